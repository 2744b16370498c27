"""Pheye: a global view and tiles, two LoRA sets on one frozen ViT, read by cross-attention."""

from hrvlm_jax.systems.contract import System
from hrvlm_jax.systems.pheye import config, encoder, views, weights

SYSTEM = System(
  name='pheye', config=config.PheyeConfig, count=views.count, views=views.views,
  batch=views.batch, shift=views.shift, encoder=encoder.Encoder, table=weights.table,
  from_release=weights.from_release, to_release=weights.to_release, overlay=views.overlay,
  overlay_needs_info=True, released=config.RELEASED, tiny=config.tiny,
  backbones=lambda encoder: {'vision/tower': encoder.vision}, pickled='checkpoint.pt')
