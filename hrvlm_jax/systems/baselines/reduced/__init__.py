"""Any system, followed by a step that makes its tokens fewer."""

from hrvlm_jax.systems.baselines.reduced import config, encoder, views, weights
from hrvlm_jax.systems.contract import System

SYSTEM = System(
  name='reduced', config=config.ReducedConfig, encoder=encoder.Encoder, released=config.RELEASED,
  tiny=config.tiny, backbones=weights.backbones, count=views.count, views=views.views,
  batch=views.batch, shift=None, grid=views.grid, rules=views.rules, tokens=views.tokens,
  overlay=views.overlay, table=weights.table, from_release=weights.from_release,
  to_release=weights.to_release)
