"""MC-LLaVA: overlapping crops with coordinates, K tokens of each."""

from hrvlm_jax.systems.contract import System
from hrvlm_jax.systems.mc_llava import config, encoder, weights

SYSTEM = System(
  name='mc_llava', config=config.MCLlavaConfig, encoder=encoder.Encoder, released=config.RELEASED,
  tiny=config.tiny, backbones=config.backbones, count=encoder.count, views=encoder.views,
  packing=encoder.packing, overlay=encoder.overlay, table=weights.table,
  from_release=weights.from_release, to_release=weights.to_release)
