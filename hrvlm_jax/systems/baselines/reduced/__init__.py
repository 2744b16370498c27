"""Any system, followed by a step that makes its tokens fewer."""

from hrvlm_jax.systems.baselines.reduced import config, encoder, views, weights
from hrvlm_jax.systems.contract import System

SYSTEM = System(
  name='reduced', config=config.ReducedConfig, count=views.count, views=views.views,
  batch=views.batch, encoder=encoder.Encoder, table=weights.table,
  from_release=weights.from_release, to_release=weights.to_release, overlay=views.overlay,
  released=config.RELEASED, tiny=config.tiny, backbones=weights.backbones)
