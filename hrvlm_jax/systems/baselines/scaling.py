"""S2: one encoder over an image at several sizes, features joined on channels.

Sources: `bfshi/scaling_on_scales: s2wrapper/core.py, utils.py`; the dynamic form
`NVlabs/VILA: llava/model/llava_arch.py`. Axis letters: b images, k squares per side, n tokens, h w
rows and columns, c channels, t tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hrvlm_jax.core import resample
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import wide

Encode = Callable[[jax.Array], jax.Array]


def squares_per_side(size: int, split: int) -> int:
  """How many squares per side an image of `size` is split into.

  Raises:
    UserError: they would not be equal.
  """
  k = math.ceil(size / split)
  if size % k:
    raise UserError(f'S2: scale {size} is not divisible into {k} squares per side (squares of at '
                    f'most {split} pixels); choose a multiple of {k}')
  return k


def split_squares(x: Float[Array, 'b h w c'], k: int) -> Float[Array, 'kkb s s c']:
  """Sub-images in the order (row, column, image)."""
  b, h, w, c = x.shape
  x = x.reshape(b, k, h // k, k, w // k, c).transpose(1, 3, 0, 2, 4, 5)
  return x.reshape(k * k * b, h // k, w // k, c)


def merge_squares(x: Float[Array, 'kkb h w c'], k: int) -> Float[Array, 'b H W c']:
  """The inverse of `split_squares`."""
  h, w, c = x.shape[1:]
  x = x.reshape(k, k, -1, h, w, c).transpose(2, 0, 3, 1, 4, 5)
  return x.reshape(-1, k * h, k * w, c)


def area(x: Float[Array, 'b h w c'], height: int, width: int) -> Float[Array, 'b H W c']:
  """Adaptive average pooling in float32."""
  return resample.resize(x, resample.area_matrix(x.shape[1], height),
                         resample.area_matrix(x.shape[2], width))


def square_map(x: Float[Array, 'b n c']) -> Float[Array, 'b h w c']:
  """Tokens of a square grid as a map.

  Raises:
    UserError: their number is no square (a prefix token was not declared, for example).
  """
  side = math.isqrt(x.shape[1])
  if side * side != x.shape[1]:
    raise UserError(f'S2: {x.shape[1]} tokens do not form a square map; is a class token among '
                    'them?')
  return x.reshape(x.shape[0], side, side, x.shape[2])


def multi_scale(
  encode: Encode, x: Float[Array, 'b h h c'], sizes: Sequence[int], *, split: int | None = None,
  output: int = 0, prefix: int = 0, tokens: bool = True,
  trace: dict[str, jax.Array] | None = None, ex: Execution = HERE,
) -> jax.Array:
  """Features of all scales at the resolution of one of them.

  Args:
    encode: sub-images [n s s c] -> tokens [n p d], or maps [n h w d] with `tokens=False`.
    x: square images.
    sizes: side of every scale in pixels.
    split: side of the largest sub-image; default: the side of x.
    output: index of the scale whose map size the result has; -1 the last.
    prefix: leading tokens that are no patches (a class token); they are averaged over the
      sub-images and put in front.
    trace: filled with intermediates by name, for comparison with recorded values.

  Returns:
    [b n d*scales], or maps [b h w d*scales] with `tokens=False`.

  Raises:
    UserError: a scale that does not split into equal squares.
  """
  split = x.shape[1] if split is None else split
  keep = lambda name, value: None if trace is None else trace.__setitem__(name, value)
  maps, means = [], []
  for number, size in enumerate(sizes):
    k = squares_per_side(size, split)
    resized = wide(x) if size == x.shape[1] else resample.bicubic(wide(x), size, size, ex=ex)
    parts = split_squares(resized.astype(x.dtype), k)
    found = encode(parts)
    for name, value in (('resized', resized), ('split_input', parts), ('encoder_out', found)):
      keep(f'scale{number}.{name}', value)
    if tokens and prefix:
      first = found[:, :prefix].reshape(k * k, -1, prefix, found.shape[-1])
      means.append(first.mean(axis=0))
    merged = merge_squares(square_map(found[:, prefix:]) if tokens else found, k)
    keep(f'scale{number}.merged', merged)
    maps.append(merged)
  height, width = maps[output].shape[1:3]
  pooled = [area(m, height, width) for m in maps]
  for number, value in enumerate(pooled):
    keep(f'scale{number}.pooled', value)
  joined = jnp.concatenate(pooled, axis=-1)
  if not tokens:
    return joined
  out = joined.reshape(joined.shape[0], -1, joined.shape[-1])
  if not means:
    return out
  mean = jnp.concatenate(means, axis=-1)
  keep('prefix_mean', mean)
  return jnp.concatenate([mean, out], axis=1)


def split_blocks(x: Float[Array, 'h w c'], rows: int, columns: int) -> Float[Array, 't n n c']:
  """A map as rows x columns blocks, row by row."""
  h, w, c = x.shape
  x = x.reshape(rows, h // rows, columns, w // columns, c).transpose(0, 2, 1, 3, 4)
  return x.reshape(rows * columns, h // rows, w // columns, c)


def merge_blocks(x: Float[Array, 't n m c'], rows: int, columns: int) -> Float[Array, 'h w c']:
  """The inverse of `split_blocks`."""
  n, m, c = x.shape[1:]
  x = x.reshape(rows, columns, n, m, c).transpose(0, 2, 1, 3, 4)
  return x.reshape(rows * n, columns * m, c)


def output_grid(grids: Sequence[tuple[int, int]], output: int) -> tuple[int, int]:
  """(rows, columns) of blocks after the merge: the grid of the output scale."""
  return grids[output]


def dynamic_map(
  tiles: Float[Array, 't n c'], grids: Sequence[tuple[int, int]], *, output: int = -1,
) -> Float[Array, 'h w d']:
  """Tiles of all scales of one image -> one map with all scales' channels.

  Args:
    tiles: scales ascending, each row by row; or a single tile, which stands for all scales.
    grids: (rows, columns) of tiles per scale.
  """
  n = math.isqrt(tiles.shape[1])
  if tiles.shape[0] == 1:
    return jnp.tile(square_map(tiles)[0], (1, 1, len(grids)))
  maps, start = [], 0
  for rows, columns in grids:
    part = tiles[start:start + rows * columns]
    maps.append(merge_blocks(part.reshape(-1, n, n, part.shape[-1]), rows, columns))
    start += rows * columns
  height, width = maps[output].shape[:2]
  return jnp.concatenate([area(m[None], height, width)[0] for m in maps], axis=-1)


def project_blocks(
  x: Float[Array, 'h w c'], grid: tuple[int, int], project: Callable[[jax.Array], jax.Array],
) -> Float[Array, 'n d']:
  """Projects a map block by block (padding of odd sides happens per block) and reads it row by row.

  Args:
    project: [t p c] -> [t q d], square grids both.
  """
  blocks = split_blocks(x, *grid)
  flat = blocks.reshape(blocks.shape[0], -1, blocks.shape[-1])
  merged = merge_blocks(square_map(project(flat)), *grid)
  return merged.reshape(-1, merged.shape[-1])
