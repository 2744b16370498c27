"""What AnyRes and closest-aspect tiling share: tiles through one tower, gathered tokens.

Every tile is encoded and projected on its own; which tokens stand where, and where the learned
newline stands between them, is an index array made on the host. Axis letters: v tile slots of a
batch, p tokens of a tile, b rows, t visual places of a row, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import normal
from hrvlm_jax.core.module import Module, Param, Rngs
from hrvlm_jax.core.pixels import normalise
from hrvlm_jax.systems.contract import Views, VisualTokens
from hrvlm_jax.vision.blocks import BlockProjector, block_side, is_projector
from hrvlm_jax.vision.vit import ViT, ViTConfig

NEWLINE = 0  # in an index: the newline; token i of the flattened tiles is i + 1


class TiledConfig(Protocol):
  """What the shared parts read of a configuration.

  projector: a type of `vila_hd.projector` ('mlp2x_gelu', 'mlp_downsample', ...), or None for tokens
  in the tower's width. width: of the projected tokens, the language model's. has_newline: there is
  a learned newline. max_views, max_tokens: the most an image can cost.
  """

  vision: ViTConfig
  layer: int
  projector: str | None
  width: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  @property
  def has_newline(self) -> bool: ...
  @property
  def max_views(self) -> int: ...
  @property
  def max_tokens(self) -> int: ...


def common_problems(config: TiledConfig) -> list[str]:
  """What is wrong with the shared settings."""
  problems = []
  if not -config.vision.depth <= config.layer <= -1:
    problems.append(f'layer must lie in {-config.vision.depth}..-1, got {config.layer}')
  if config.projector is None:
    if config.width != config.vision.width:
      problems.append(f"without a projector, width must be the tower's {config.vision.width}, got "
                      f'{config.width}')
  elif not is_projector(config.projector):
    problems.append(f'projector {config.projector!r} is unknown')
  return problems


def token_side(config: TiledConfig) -> int:
  """Tokens per side of a projected tile."""
  side = 1 if config.projector is None else block_side(config.projector)
  return -(-config.vision.grid // side)


def batch(examples: Sequence[Views], config: TiledConfig, *, slots: int | None = None) -> Views:
  """Packs a batch.

  Args:
    examples: pixels uint8 [n h w 3], gather int32 [t] (`NEWLINE`, or 1 + place in the example's
      flattened tokens), tokens int32 [images].
    slots: tile slots of the whole batch; default: rows x most images of a row x `max_views`, which
      does not depend on image sizes.

  Returns:
    pixels uint8 [slots h w 3], index int32 [b t], valid bool [b t].

  Raises:
    UserError: more tiles than slots.
  """
  images = max((len(e['tokens']) for e in examples), default=1) or 1
  total = sum(len(e['pixels']) for e in examples)
  slots = max(len(examples), 1) * images * config.max_views if slots is None else slots
  if total > slots:
    raise UserError(f'a batch of {total} tiles does not fit {slots} slots')
  size, each = config.vision.image_size, token_side(config) ** 2
  shape = (len(examples), images * config.max_tokens)
  out = {'pixels': np.zeros((slots, size, size, 3), np.uint8),
         'index': np.zeros(shape, np.int32), 'valid': np.zeros(shape, bool)}
  start = 0
  for row, example in enumerate(examples):
    n, gather = len(example['pixels']), example['gather']
    out['pixels'][start:start + n] = example['pixels']
    out['index'][row, :len(gather)] = np.where(gather == NEWLINE, NEWLINE, gather + start * each)
    out['valid'][row, :len(gather)] = True
    start += n
  return out


def shift(views_: Views, config: TiledConfig, slots: int) -> Views:
  """A batch's views whose indices count `slots` more tile slots before them."""
  index, each = views_['index'], token_side(config) ** 2
  return views_ | {'index': np.where(index == NEWLINE, NEWLINE, index + np.int32(slots * each))}


def collect(pixels: Sequence[np.ndarray], gathers: Sequence[np.ndarray], config: TiledConfig
            ) -> Views:
  """The arrays of one example from those of its images."""
  size, each = config.vision.image_size, token_side(config) ** 2
  shifted, start = [np.zeros(0, np.int32)], 0
  for tiles, gather in zip(pixels, gathers, strict=True):
    shifted.append(np.where(gather == NEWLINE, NEWLINE, gather + start * each).astype(np.int32))
    start += len(tiles)
  return {'pixels': np.concatenate([np.zeros((0, size, size, 3), np.uint8), *pixels]),
          'gather': np.concatenate(shifted),
          'tokens': np.array([len(gather) for gather in gathers], np.int32)}


class TiledEncoder(Module):
  """Tower, projector per tile, newline, gathering."""

  def __init__(self, config: TiledConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    self.tower = ViT(config.vision, param_dtype=param_dtype, rngs=rngs)
    self.projector = None if config.projector is None else BlockProjector(
      config.projector, config.vision.width, config.width, param_dtype=param_dtype, rngs=rngs)
    self.newline = Param(normal(config.width**-0.5)(
      rngs.params(), (config.width,), param_dtype)) if config.has_newline else None

  def __call__(self, views: dict[str, jax.Array], *, key=None, ex: Execution = HERE
               ) -> VisualTokens:
    """Views of a batch (`batch`) -> [b t d]."""
    c = self.config
    pixels = normalise(views['pixels'], c.mean, c.std).astype(ex.dtype)
    x = self.tower(pixels, stop=c.vision.depth + 1 + c.layer, key=key, ex=ex)
    return VisualTokens(self.arrange(x[:, int(c.vision.class_token):], views['index']),
                        views['valid'])

  def arrange(self, features: Float[Array, 'v n c'], index: Int[Array, 'b t']
              ) -> Float[Array, 'b t d']:
    """Patches of every tile -> projected tokens in their places."""
    x = features if self.projector is None else self.projector(features)
    flat = x.reshape(-1, x.shape[-1])
    newline = jnp.zeros((1, x.shape[-1]), x.dtype) if self.newline is None else (
      self.newline[...].astype(x.dtype)[None])
    return jnp.take(jnp.concatenate([newline, flat]), index, axis=0)
