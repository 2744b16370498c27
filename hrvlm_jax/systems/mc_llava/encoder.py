"""MC-LLaVA on the device: one tower over all crops, coordinate embedding, gathered tokens.

Source: `visheratin/mc-llava: modeling_mc_llava.py`. Axis letters: c crop slots, p patches of a
crop, b rows, t kept tokens of a row, d width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import Mlp, torch_uniform
from hrvlm_jax.core.module import Module, Rngs
from hrvlm_jax.core.pixels import normalise
from hrvlm_jax.systems.contract import VisualTokens
from hrvlm_jax.systems.mc_llava.config import MCLlavaConfig
from hrvlm_jax.vision.vit import ViT


class Encoder(Module):
  """Tower, coordinate MLP, selection of the last tokens of every view."""

  def __init__(self, config: MCLlavaConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    width = config.vision.width
    self.tower = ViT(config.vision, param_dtype=param_dtype, rngs=rngs)
    # torch's Linear default; the fan-in of the first layer is 2.
    self.coord_embed = Mlp(2, width, out=width, activation='gelu', kernel_init=torch_uniform(2),
                           bias_init=torch_uniform(2), param_dtype=param_dtype, rngs=rngs)

  def __call__(self, views: dict[str, jax.Array], *, key=None, ex: Execution = HERE
               ) -> VisualTokens:
    """Views of a batch (`views.batch`) -> [b t d], before the projector."""
    pixels = normalise(views['pixels'], self.config.mean, self.config.std).astype(ex.dtype)
    patches = self.tower(pixels, key=key, ex=ex)
    values = self.select(patches, views['coords'].astype(ex.dtype), views['index'])
    return VisualTokens(values, views['valid'])

  def select(self, patches: Float[Array, 'c p d'], coords: Float[Array, 'c 2'], index):
    """Kept tokens plus the embedding of their view's centre: [b t d]."""
    flat = patches.reshape(-1, patches.shape[-1])
    where = self.coord_embed(coords)
    return jnp.take(flat, index, axis=0) + jnp.take(where, index // patches.shape[1], axis=0)
