"""VILA-HD: PS3 inside a language model that says where to look."""

from hrvlm_jax.systems.contract import System
from hrvlm_jax.systems.vila_hd import config, encoder, views, weights

SYSTEM = System(
  name='vila_hd', config=config.VilaHDConfig, count=views.count, views=views.views,
  batch=views.batch, shift=views.shift, encoder=encoder.Encoder, table=weights.table,
  from_release=weights.from_release, to_release=weights.to_release, overlay=views.overlay,
  released=config.RELEASED, tiny=config.tiny, overlay_needs_info=True, folders=weights.FOLDERS,
  backbones=lambda encoder: {'vision/ps3': encoder.tower})
