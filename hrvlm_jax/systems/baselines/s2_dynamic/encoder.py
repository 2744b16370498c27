"""Dynamic S2 on the device.

The grid of an image is data, its few possible values are not: one branch per candidate grid, chosen
by `lax.switch` for one image after the other, each padded to the most tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.module import Module, Rngs
from hrvlm_jax.core.pixels import normalise
from hrvlm_jax.systems.baselines.s2.scaling import dynamic_map, project_blocks
from hrvlm_jax.systems.baselines.s2_dynamic.config import DynamicS2Config
from hrvlm_jax.systems.contract import VisualTokens
from hrvlm_jax.vision.blocks import BlockProjector
from hrvlm_jax.vision.vit import ViT


class Encoder(Module):
  """Tower over all tiles, merged maps, a projector per block."""

  def __init__(self, config: DynamicS2Config, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    self.tower = ViT(config.vision, param_dtype=param_dtype, rngs=rngs)
    self.projector = BlockProjector(config.projector, config.vision.width * len(config.scales),
                                    config.width, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, views: dict[str, jax.Array], *, key=None, ex: Execution = HERE
               ) -> VisualTokens:
    """Views of a batch -> [b t d]."""
    c = self.config
    pixels = normalise(views['pixels'], c.mean, c.std).astype(ex.dtype)
    x = self.tower(pixels, stop=c.vision.depth + 1 + c.layer, key=key, ex=ex)
    x = x[:, int(c.vision.class_token):]
    branches = [self._branch((rows, columns)) for columns, rows in c.candidates]
    rows, images = views['grid'].shape

    def one(inputs):
      tiles, grid = inputs
      return jax.lax.switch(grid, branches, jnp.take(x, tiles, axis=0))

    flat = (views['tiles'].reshape(rows * images, -1), views['grid'].reshape(-1))
    tokens = jax.lax.map(one, flat).reshape(rows, images * c.max_tokens, -1)
    values = jnp.take_along_axis(tokens, views['index'][..., None], axis=1)
    return VisualTokens(values, views['valid'])

  def _branch(self, last):
    c = self.config
    grids = [*c.squares, last]
    count = sum(r * k for r, k in grids)

    def run(tiles):
      merged = dynamic_map(tiles[:count], grids, output=c.output)
      tokens = project_blocks(merged, grids[c.output], self.projector)
      return jnp.pad(tokens, ((0, c.max_tokens - len(tokens)), (0, 0)))

    return run
