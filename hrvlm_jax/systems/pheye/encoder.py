"""Pheye on the device: one tower over all sub-images, each with its own LoRA set.

Source: `miguelscarv/pheye: pheye_builder/encoder.py`, which runs the tower twice. Axis letters:
b images, s sub-images (the global one first), t tokens of a sub-image, d width, m = s * t.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import Embedding, LayerNorm
from hrvlm_jax.core.module import Module, Rngs
from hrvlm_jax.core.resample import normalise
from hrvlm_jax.systems.contract import VisualTokens
from hrvlm_jax.systems.pheye.config import PheyeConfig
from hrvlm_jax.vision.vit import ViT


class Encoder(Module):
  """Tower, one norm per level, positions of sub-images.

  `norm3` and the rows of `sub_image` beyond 1 + level^2 are never read; the released checkpoints
  hold them, so they are kept for export.
  """

  def __init__(self, config: PheyeConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    width = config.vision.width
    norm = lambda: LayerNorm(width, eps=config.norm_eps, param_dtype=param_dtype, rngs=rngs)
    self.tower = ViT(config.tower, param_dtype=param_dtype, rngs=rngs)
    self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()
    self.sub_image = Embedding(config.sub_image_rows, width, std=0.02, param_dtype=param_dtype,
                               rngs=rngs)

  def __call__(self, views: dict[str, jax.Array], *, key=None, ex: Execution = HERE
               ) -> VisualTokens:
    """Views of a batch (`views.batch`) -> [b m d], global tokens first."""
    pixels = normalise(views['pixels'], self.config.mean, self.config.std).astype(ex.dtype)
    states = self.states(pixels, key=key, ex=ex)
    values = self.join(states)
    return VisualTokens(values, jnp.ones(values.shape[:2], bool))

  def states(self, pixels: Float[Array, 'b s h w c'], *, key=None,
             ex: Execution = HERE) -> Float[Array, 'b s t d']:
    """Output of the last block (class token kept, no final norm) of every sub-image."""
    keys = (None, None) if key is None else jax.random.split(key)
    adapter = self.config.adapters
    x = self.tower.embed(pixels, adapter=adapter, key=keys[0], ex=ex)
    return self.tower.run(x, adapter=adapter, key=keys[1], ex=ex).x

  def join(self, states: Float[Array, 'b s t d']) -> Float[Array, 'b m d']:
    """Norm of each level, position of each sub-image, one row of tokens per image."""
    x = jnp.concatenate([self.norm1(states[:, :1]), self.norm2(states[:, 1:])], axis=1)
    where = self.sub_image(jnp.arange(x.shape[1]), dtype=x.dtype)
    x = x + where[None, :, None]
    return x.reshape(x.shape[0], -1, x.shape[-1])
