"""LLaVA-HR: a ViT on a small image, a ConvNeXt on a large one, MR-Adapters between them."""

from hrvlm_jax.systems.contract import System
from hrvlm_jax.systems.llava_hr import config, encoder, views, weights

SYSTEM = System(
  name='llava_hr', keys=weights.KEYS, config=config.LlavaHRConfig, encoder=encoder.Encoder,
  released=config.RELEASED,
  tiny=config.tiny, backbones=config.backbones, count=views.count, views=views.views,
  packing=views.packing, grid=views.grid, rules=views.rules, overlay=views.overlay,
  overlay_needs_info=True, tokens=views.tokens, table=weights.table,
  from_release=weights.from_release, to_release=weights.to_release,
  frozen='vision/(slow/head|fast/post_norm)/.*')
