"""The three published training stages of Pheye as data, for `configs/`.

Source: Pheye (arXiv 2501.02584), section 3.1 and appendix A; the same for all four variants.
Published: data, learning rates, cosine schedule, effective batch 128, what trains, the loss (sum
over output tokens of the effective batch over their number), frozen weights in bfloat16. `open`:
the optimizer of the main runs (AdamW with torch's defaults here, as in the preliminary
experiments), warm-up and clipping (none), epochs (one, which the data counts imply), the longest
text, and LoRA dropout (0.05, as in the preliminary experiments).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.pheye.config import RELEASED

STAGES = (1, 2, 3)
EXAMPLES = {1: 1_246_000, 2: 964_000, 3: 676_000}
LEARNING_RATE = {1: 2e-4, 2: 1e-4, 3: 5e-5}
BATCH = 128
ACCUMULATE = 8

_READ = r'fusion/.*|vision/(norm1|norm2|sub_image)/.*'
_LORA = r'vision/tower/.*lora_[ab]_(first|second)'


def model(name: str, *, train_first_adapter: bool = True) -> ModelConfig:
  """A released model; without the first adapter it trains as the original's code does."""
  whole = RELEASED[name]
  encoder = dataclasses.replace(whole.encoder, train_first_adapter=train_first_adapter)
  return dataclasses.replace(whole, encoder=encoder)


def trains_first(adapters: str) -> bool:
  """Whether the first LoRA set trains: 'paper' says so, the original's 'code' does not.

  Raises:
    ValueError: another word.
  """
  if adapters not in ('paper', 'code'):
    raise ValueError(f"adapters must be 'paper' or 'code', got {adapters!r}")
  return adapters == 'paper'


def groups(*, train_first_adapter: bool = True) -> tuple[dict[str, Any], ...]:
  """Cross-attention blocks, both LoRA sets, norms and sub-image positions train.

  Args:
    train_first_adapter: False: the set of the global view is frozen, as its gradient is cut.
  """
  first = () if train_first_adapter else (dict(pattern='.*_first', frozen=True),)
  return (*first, dict(pattern=_READ), dict(pattern=_LORA), dict(pattern='.*', frozen=True))


def run(name: str, stage: int, *, train_first_adapter: bool = True) -> dict[str, Any]:
  """The `data` and `training` sections of a run config.

  Raises:
    ValueError: unknown stage.
  """
  if stage not in STAGES:
    raise ValueError(f'stage must be one of {STAGES}, got {stage!r}')
  fresh = (_READ, _LORA, 'vision/norm3/.*')
  start = f'weights/{name}_start' if stage == 1 else f'runs/{name}_stage{stage - 1}'
  return {
    'data': dict(train=f'data/pheye_stage{stage}.json', tokenizer='weights/phi-1_5-slimorca',
                 lengths=(128, 192, 256, 384, 512), exif='ignore'),
    'training': dict(
      steps=EXAMPLES[stage] // BATCH, batch_size=BATCH, accumulate=ACCUMULATE,
      groups=groups(train_first_adapter=train_first_adapter), dtype='bfloat16',
      frozen_dtype='bfloat16', remat='layers', attention='auto', loss_average='tokens',
      init_from=start, init_allow=fresh if stage == 1 else (),
      optimizer=dict(learning_rate=LEARNING_RATE[stage], schedule='cosine', warmup=0.0,
                     weight_decay=0.01, clip_norm=None))}
