"""Plain LLaVA: one resized view."""

from hrvlm_jax.systems.baselines import layout
from hrvlm_jax.systems.baselines.single_view import config, encoder, views, weights
from hrvlm_jax.systems.contract import System

SYSTEM = System(
  name='single_view', config=config.SingleViewConfig, encoder=encoder.Encoder,
  released=config.RELEASED, tiny=config.tiny, backbones=layout.backbones,
  count=views.count, views=views.views, packing=views.packing, grid=views.grid,
  tokens=views.tokens, overlay=views.overlay,
  table=weights.table, from_release=weights.from_release, to_release=weights.to_release)
