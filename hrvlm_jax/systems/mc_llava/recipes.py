"""Training of MC-LLaVA-3B as data, for `configs/`.

Source: `visheratin/mc-llava: train.py` and its data module. What the repository fixes: AdamW (8 bit
there, float32 moments here) with the library's defaults, linear warm-up then cosine per step,
bfloat16, one mean over all targets of the batch, 1000 ids of text, at most one level of crops in
training, LoRA of rank 64. Learning rates, batch size, epochs, warm-up and clipping are arguments of
its command line and were not published: the values here are LLaVA-1.5's, marked `open`. The
repository starts from the released checkpoint and has no projector stage; the stage is here so that
the model can be made from its parts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hrvlm_jax.core.layers import LoRA
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.mc_llava.config import RELEASED

STAGES = ('projector', 'full', 'lora')
# The encoder's final norm and pooling head are never read (13 tensors of the checkpoint).
UNREAD = 'vision/tower/(post_norm|pool)/.*'
# Of all linear layers of the decoder but the head. The original's suffix match also wraps the
# vision tower, whose own weights train beside the adapters; that pair is left out here.
ADAPTER = LoRA(rank=64, alpha=16.0, dropout=0.05)

_OPEN = {  # open: not published
  'projector': dict(learning_rate=1e-3, batch_size=256, accumulate=8, warmup=0.03, steps=2181),
  'full': dict(learning_rate=2e-5, batch_size=128, accumulate=8, warmup=0.03, steps=5198),
  'lora': dict(learning_rate=2e-4, batch_size=128, accumulate=8, warmup=0.03, steps=5198),
}
_FROZEN = {
  'projector': ('vision/tower/.*', 'language/.*'),
  'full': (),
  'lora': (r'language/(?!.*lora_[ab]).*',),
}
_START = {'projector': 'weights/mc_llava_3b_start', 'full': 'runs/mc_llava_3b_projector',
          'lora': 'weights/mc_llava_3b'}
_FRESH = {'projector': ('projector/.*', 'vision/coord_embed/.*', UNREAD), 'full': (),
          'lora': (r'language/.*lora_[ab].*',)}


def model(stage: str) -> ModelConfig:
  """The released model as it trains: at most one level of crops, adapters in the LoRA stage."""
  whole = RELEASED['mc_llava_3b']
  encoder = dataclasses.replace(whole.encoder, max_crops=1)
  text = whole.text
  if stage == 'lora':
    text = dataclasses.replace(text, lora=(ADAPTER,))
  return dataclasses.replace(whole, encoder=encoder, text=text)


def run(stage: str) -> dict[str, Any]:
  """The `data` and `training` sections of a run config.

  Raises:
    ValueError: unknown stage.
  """
  if stage not in STAGES:
    raise ValueError(f'stage must be one of {STAGES}, got {stage!r}')
  numbers = _OPEN[stage]
  frozen = (UNREAD, *_FROZEN[stage])
  return {
    'data': dict(train=f'data/mc_llava_{"align" if stage == "projector" else "mixture"}.json',
                 tokenizer='weights/mc_llava_3b/tokenizer', max_length=1000,
                 lengths=(896, 1024, 1280, 1536, 1728), exif='ignore'),
    'training': dict(
      steps=numbers['steps'], batch_size=numbers['batch_size'], accumulate=numbers['accumulate'],
      groups=(*(dict(pattern=pattern, frozen=True) for pattern in frozen), dict(pattern='.*')),
      dtype='bfloat16', frozen_dtype='bfloat16', remat='layers', attention='auto',
      loss_average='tokens', init_from=_START[stage], init_allow=_FRESH[stage],
      # Weight decay 0.01 on everything: the default of the original's optimizer, one group.
      optimizer=dict(learning_rate=numbers['learning_rate'], schedule='cosine',
                     warmup=numbers['warmup'], weight_decay=0.01, clip_norm=1.0))}
