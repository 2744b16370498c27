"""PS3: a 4K image is encoded only where a prompt or saliency points."""

from hrvlm_jax.systems.contract import System
from hrvlm_jax.systems.ps3 import config, encoder, model, text, views, weights

SYSTEM = System(
  name='ps3', keys=weights.KEYS, config=config.PS3Config, encoder=encoder.Encoder, alone=model.PS3,
  released=config.RELEASED, tiny=config.tiny, backbones=views.backbones, count=views.count,
  views=views.views, packing=views.packing, grid=views.grid, rules=views.rules,
  overlay=views.overlay, overlay_needs_info=True, tokens=views.tokens, places=views.places,
  table=weights.table, prompt_ids=text.prompt_ids, from_release=weights.from_release,
  to_release=weights.to_release)
