"""MC-LLaVA: overlapping crops with coordinates, K tokens of each."""

from hrvlm_jax.systems.contract import System
from hrvlm_jax.systems.mc_llava import config, encoder, views, weights

SYSTEM = System(
  name='mc_llava', config=config.MCLlavaConfig, encoder=encoder.Encoder, released=config.RELEASED,
  tiny=config.tiny, backbones=config.backbones, count=views.count, views=views.views,
  packing=views.packing, overlay=views.overlay, table=weights.table,
  from_release=weights.from_release, to_release=weights.to_release)
