"""LLaVA-HR: a ViT on a small image, a ConvNeXt on a large one, MR-Adapters between them."""

from hrvlm_jax.systems.contract import System
from hrvlm_jax.systems.llava_hr import config, encoder, views, weights

SYSTEM = System(
  name='llava_hr', config=config.LlavaHRConfig, count=views.count, views=views.views,
  batch=views.batch, shift=views.shift, encoder=encoder.Encoder, table=weights.table,
  from_release=weights.from_release, to_release=weights.to_release, overlay=views.overlay,
  overlay_needs_info=True, released=config.RELEASED, tiny=config.tiny,
  backbones=lambda encoder: {path: tower for path, tower in (
    ('vision/fast', encoder.fast), ('vision/slow', encoder.slow)) if tower is not None})
