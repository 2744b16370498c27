"""S2: one tower over the image at several sizes."""

from hrvlm_jax.systems.baselines import layout
from hrvlm_jax.systems.baselines.s2 import config, encoder, views, weights
from hrvlm_jax.systems.contract import System

SYSTEM = System(
  name='s2', config=config.S2Config, encoder=encoder.Encoder, released=config.RELEASED,
  tiny=config.tiny, backbones=layout.backbones, count=views.count, views=views.views,
  packing=views.packing, grid=views.grid, tokens=views.tokens,
  width=views.width, overlay=views.overlay,
  table=weights.table, from_release=weights.from_release, to_release=weights.to_release)
