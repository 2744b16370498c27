"""MC-LLaVA: overlapping crops with coordinates, K tokens of each."""

from hrvlm_jax.systems.contract import System
from hrvlm_jax.systems.mc_llava import encoder, weights

SYSTEM = System(
  name='mc_llava', keys=weights.KEYS, config=encoder.MCLlavaConfig, encoder=encoder.Encoder,
  released=encoder.RELEASED,
  tiny=encoder.tiny, backbones=encoder.backbones, count=encoder.count, views=encoder.views,
  packing=encoder.packing, per_image=('max_crops',), overlay=encoder.overlay, table=weights.table,
  from_release=weights.from_release, to_release=weights.to_release,
  frozen='vision/tower/(post_norm|pool)/.*')
