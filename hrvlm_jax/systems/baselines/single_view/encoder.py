"""Plain LLaVA on the device: patch tokens of one hidden state. Axis letters as in `vision.vit`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.module import Module, Rngs
from hrvlm_jax.core.pixels import normalise
from hrvlm_jax.systems.baselines.single_view.config import SingleViewConfig
from hrvlm_jax.systems.contract import VisualTokens
from hrvlm_jax.vision.vit import ViT


class Encoder(Module):
  """Tower; the class token is dropped, `last_tokens` applied."""

  def __init__(self, config: SingleViewConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    self.tower = ViT(config.vision, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, views: dict[str, jax.Array], *, key=None, ex: Execution = HERE
               ) -> VisualTokens:
    """Views of a batch -> [b m*tokens d]."""
    c = self.config
    pixels = normalise(views['pixels'], c.mean, c.std).astype(ex.dtype)
    stop = c.vision.depth + 1 + c.layer
    x = self.tower(pixels, stop=stop, key=key, ex=ex)
    x = x[:, int(c.vision.class_token):][:, -c.tokens:]
    rows, images = views['index'].shape
    values = jnp.take(x, views['index'], axis=0).reshape(rows, images * c.tokens, -1)
    return VisualTokens(values, jnp.repeat(views['valid'], c.tokens, axis=1))
