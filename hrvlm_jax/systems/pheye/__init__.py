"""Pheye: a global view and tiles, two LoRA sets on one frozen ViT, read by cross-attention."""

from hrvlm_jax.systems.contract import System
from hrvlm_jax.systems.pheye import config, encoder, views, weights

SYSTEM = System(
  name='pheye', keys=weights.KEYS, config=config.PheyeConfig, encoder=encoder.Encoder,
  released=config.RELEASED,
  tiny=config.tiny, backbones=config.backbones, count=views.count, views=views.views,
  packing=views.packing, grid=views.grid, overlay=views.overlay, overlay_needs_info=True,
  tokens=views.tokens, table=weights.table, from_release=weights.from_release,
  to_release=weights.to_release, pickled='checkpoint.pt',
  # All but what reads the image, and the two sets on the tower.
  frozen=r'(?!(fusion/.*|vision/(norm1|norm2|sub_image)/.*|vision/tower/.*lora_[ab]_(first|second))$)'
         '.*')
