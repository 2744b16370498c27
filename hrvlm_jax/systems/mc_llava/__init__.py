"""MC-LLaVA: overlapping crops with coordinates, K tokens of each."""

from hrvlm_jax.systems.contract import System
from hrvlm_jax.systems.mc_llava import config, encoder, views, weights

SYSTEM = System(
  name='mc_llava', config=config.MCLlavaConfig, count=views.count, views=views.views,
  batch=views.batch, shift=views.shift, encoder=encoder.Encoder, table=weights.table,
  from_release=weights.from_release, to_release=weights.to_release, overlay=views.overlay,
  released=config.RELEASED, tiny=config.tiny,
  backbones=lambda encoder: {'vision/tower': encoder.vision})
