"""PS3: a 4K image is encoded only where a prompt or saliency points."""

from hrvlm_jax.systems.contract import System
from hrvlm_jax.systems.ps3 import config, encoder, model, views, weights

SYSTEM = System(
  name='ps3', config=config.PS3Config, count=views.count, views=views.views, batch=views.batch,
  shift=views.shift, encoder=encoder.Encoder, table=weights.table,
  from_release=weights.from_release, to_release=weights.to_release, overlay=views.overlay,
  overlay_needs_info=True, released=config.RELEASED, tiny=config.tiny, alone=model.PS3,
  backbones=lambda encoder: {'vision': encoder, 'vision/tower': encoder.vision})
