"""AnyRes, the tiling of LLaVA-1.6."""

from hrvlm_jax.systems.baselines.anyres import config, encoder, views, weights
from hrvlm_jax.systems.contract import System

SYSTEM = System(
  name='anyres', config=config.AnyResConfig, count=views.count, views=views.views,
  batch=views.batch, shift=views.shift, encoder=encoder.Encoder, table=weights.table,
  from_release=weights.from_release, to_release=weights.to_release, overlay=views.overlay,
  released=config.RELEASED, tiny=config.tiny,
  backbones=lambda encoder: {'vision/tower': encoder.vision})
