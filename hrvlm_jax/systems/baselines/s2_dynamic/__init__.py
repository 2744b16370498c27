"""Dynamic S2 (NVILA)."""

from hrvlm_jax.systems.baselines import layout
from hrvlm_jax.systems.baselines.s2_dynamic import config, encoder, views, weights
from hrvlm_jax.systems.contract import System

SYSTEM = System(
  name='s2_dynamic', config=config.DynamicS2Config, encoder=encoder.Encoder,
  released=config.RELEASED, tiny=config.tiny, backbones=layout.backbones,
  count=views.count, views=views.views, packing=views.packing, overlay=views.overlay,
  table=weights.table, from_release=weights.from_release, to_release=weights.to_release)
