"""Closest-aspect tiling: the grid that fits the image best."""

from hrvlm_jax.systems.baselines import layout
from hrvlm_jax.systems.baselines.tiling import config, encoder, views, weights
from hrvlm_jax.systems.contract import System

SYSTEM = System(
  name='tiling', config=config.TilingConfig, encoder=encoder.Encoder, released=config.RELEASED,
  tiny=config.tiny, backbones=layout.backbones, count=views.count, views=views.views,
  packing=views.packing, rules=views.rules, overlay=views.overlay,
  table=weights.table, from_release=weights.from_release, to_release=weights.to_release)
