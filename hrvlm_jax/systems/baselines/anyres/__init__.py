"""AnyRes, the tiling of LLaVA-1.6."""

from hrvlm_jax.systems.baselines import layout
from hrvlm_jax.systems.baselines.anyres import config, encoder, views, weights
from hrvlm_jax.systems.contract import System

SYSTEM = System(
  name='anyres', config=config.AnyResConfig, encoder=encoder.Encoder, released=config.RELEASED,
  tiny=config.tiny, backbones=layout.backbones, count=views.count, views=views.views,
  packing=views.packing, grid=views.grid, rules=views.rules, overlay=views.overlay,
  table=weights.table, from_release=weights.from_release, to_release=weights.to_release)
