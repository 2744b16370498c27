"""VILA-HD: PS3 inside a language model that says where to look."""

from hrvlm_jax.systems.contract import System
from hrvlm_jax.systems.vila_hd import config, encoder, views, weights

SYSTEM = System(
  name='vila_hd', keys=weights.KEYS, config=config.VilaHDConfig, encoder=encoder.Encoder,
  released=config.RELEASED,
  tiny=config.tiny, backbones=views.backbones, count=views.count, views=views.views, boxes=True,
  packing=views.packing, grid=views.grid, rules=views.rules, overlay=views.overlay,
  overlay_needs_info=True, tokens=views.tokens, places=views.places, table=weights.table,
  from_release=weights.from_release, to_release=weights.to_release, folders=weights.FOLDERS,
  frozen=r'vision/ps3/(pool_head/.*|tower/(post_norm|pool)/.*|selection/prior_prompt)')
