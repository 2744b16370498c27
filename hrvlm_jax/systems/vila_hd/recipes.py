"""Training stages of VILA-HD as data, for `configs/`.

VILA-HD's own training script and data were not released. The stages are those of the public NVILA
scripts it builds on (`NVlabs/VILA: scripts/NVILA/*.sh`): AdamW with betas 0.9 and 0.999, cosine,
3 % warm-up, no weight decay, bfloat16, one epoch, 8192 ids. `open`: everything that is VILA-HD's
own: the number of steps, the weight of the selection loss (1.0 here; its flag's default is 0),
whether ground-truth boxes steer the selection (they do here), which stages train the selection.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hrvlm_jax.systems.contract import ModelConfig, TwoPassFusion
from hrvlm_jax.systems.vila_hd.config import RELEASED

# Stage -> what trains, learning rate, batch, clipping of the NVILA script.
STAGES = {
  'align': dict(trains=('projector',), learning_rate=1e-3, batch_size=512, clip_norm=1.0),
  'tower': dict(trains=('projector', 'tower'), learning_rate=2e-5, batch_size=1024, clip_norm=5.0),
  'pretrain': dict(trains=('projector', 'language'), learning_rate=2e-5, batch_size=1024,
                   clip_norm=1.0),
  'sft': dict(trains=('projector', 'tower', 'language', 'selection'), learning_rate=1.5e-5,
              batch_size=1024, clip_norm=5.0),
}
STEPS = {'align': 1000, 'tower': 2000, 'pretrain': 10_000, 'sft': 10_000}  # open
ORDER = tuple(STAGES)
MICRO_BATCH = 64

_PARTS = {
  'projector': 'vision/projector/.*',
  'tower': r'vision/ps3/(tower|residual|adapter)/.*',
  'language': 'language/.*',
  'selection': r'vision/(prompt_head|ps3/selection)/.*',
}
# Never read here: PS3's own pooling and final norm, the prompt of saliency-guided selection.
UNREAD = r'vision/ps3/(pool_head/.*|tower/(post_norm|pool)/.*|selection/prior_prompt)'

# Where all patches are taken nothing learns to select.
UNREAD_WITHOUT_SELECTION = rf'{UNREAD}|{_PARTS["selection"]}'


def model(name: str, stage: str) -> ModelConfig:
  """A released model as the stage trains it."""
  whole = RELEASED[name]
  if 'selection' not in STAGES[stage]['trains']:
    return whole
  encoder = dataclasses.replace(whole.encoder, select_target=True)
  return dataclasses.replace(whole, encoder=encoder, fusion=TwoPassFusion(selection_weight=1.0))


def run(name: str, stage: str, *, weights: str) -> dict[str, Any]:
  """The `data` and `training` sections of a run config.

  Args:
    name: of the config's runs: a stage starts from `runs/<name>_<stage before>`.
    weights: what the first stage starts from.

  Raises:
    ValueError: unknown stage.
  """
  if stage not in STAGES:
    raise ValueError(f'stage must be one of {ORDER}, got {stage!r}')
  numbers = STAGES[stage]
  before = ORDER.index(stage) - 1
  fresh = ('vision/(projector|prompt_head)/.*', UNREAD) if before < 0 else ()
  return {
    'data': dict(train=f'data/vila_hd_{stage}.json', tokenizer='weights/qwen2-vl-7b-instruct',
                 max_length=8192, too_long='cut_row', boxes='selection' in numbers['trains'],
                 lengths=(2048, 3072, 4096, 6144, 8192), exif='apply'),
    'training': dict(
      steps=STEPS[stage], batch_size=numbers['batch_size'],
      accumulate=numbers['batch_size'] // MICRO_BATCH, objective='two_pass',
      groups=(dict(pattern=UNREAD, frozen=True),
              *(dict(pattern=_PARTS[part], decay=False) for part in numbers['trains']),
              dict(pattern='.*', frozen=True)),
      dtype='bfloat16', frozen_dtype='bfloat16', remat='layers', attention='auto',
      loss_average='micro_batch', init_from=weights if before < 0 else
      f'runs/{name}_{ORDER[before]}', init_allow=fresh,
      optimizer=dict(learning_rate=numbers['learning_rate'], schedule='cosine', warmup=0.03,
                     weight_decay=0.0, clip_norm=numbers['clip_norm']))}
