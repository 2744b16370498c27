"""S2 on the device: scales, sub-images, one tower, joined channels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.module import Module, Rngs
from hrvlm_jax.core.pixels import normalise
from hrvlm_jax.systems.baselines.s2.config import S2Config
from hrvlm_jax.systems.baselines.s2.scaling import multi_scale
from hrvlm_jax.systems.contract import VisualTokens
from hrvlm_jax.vision.blocks import BlockProjector
from hrvlm_jax.vision.vit import ViT


class Encoder(Module):
  """Tower over every scale; the class token is dropped."""

  def __init__(self, config: S2Config, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    self.tower = ViT(config.vision, param_dtype=param_dtype, rngs=rngs)
    self.projector = None if config.projector is None else BlockProjector(
      config.projector, config.channels, config.width, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, views: dict[str, jax.Array], *, key=None, ex: Execution = HERE
               ) -> VisualTokens:
    """Views of a batch -> [b m*tokens d]."""
    c = self.config
    pixels = normalise(views['pixels'], c.mean, c.std).astype(ex.dtype)
    stop, first = c.vision.depth + 1 + c.layer, int(c.vision.class_token)
    encode = lambda x: self.tower(x, stop=stop, key=key, ex=ex)[:, first:]
    x = multi_scale(encode, pixels, c.sizes, split=c.vision.image_size, output=c.output, ex=ex)
    x = x if self.projector is None else self.projector(x)
    rows, images = views['index'].shape
    values = jnp.take(x, views['index'], axis=0).reshape(rows, images * c.tokens, -1)
    return VisualTokens(values, jnp.repeat(views['valid'], c.tokens, axis=1))
