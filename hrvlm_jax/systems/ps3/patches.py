"""Tokens of chosen patches: pixels, positions and residuals are gathered, then embedded at once.

Neither the patch grid nor the position table of a high scale is ever built as a whole: the cost of
a look follows its number of tokens, not the size of the image. Source: `NVlabs/PS3:
ps3/modeling_ps3.py`. Axis letters: b images, t tokens of a look, k tokens of one scale, d width.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from hrvlm_jax.core import resample
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import wide
from hrvlm_jax.systems.ps3.plan import Plan, Size
from hrvlm_jax.vision.vit import ViT


def scaled(images: Float[Array, 'b H W c'], plan: Plan, *, ex: Execution = HERE
           ) -> list[Float[Array, 'b h w c'] | None]:
  """The images at every high scale that some look uses (None elsewhere); equal sizes are shared."""
  return [resample.bicubic(images, *size, ex=ex) if used else None
          for size, used in zip(plan.sizes[1:], plan.deepest, strict=True)]


def gather_patches(
  images: Float[Array, 'b H W c'], rows: Int[Array, 'b k'], cols: Int[Array, 'b k'], patch: int
) -> Float[Array, 'b k ppc']:
  """Pixels of the patches at (row, column) of the grid, flattened as (row, column, channel)."""
  # Columns and channels as one axis: a last axis of three is stored as 128 on a TPU, and a 4K image
  # would take 7 GB.
  wide_patch = patch * images.shape[-1]
  flat = images.reshape(*images.shape[:2], -1)

  def one(image, row, col):
    block = jax.lax.dynamic_slice(image, (row * patch, col * wide_patch), (patch, wide_patch))
    return block.reshape(-1)

  return jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)))(flat, rows, cols)


def positions_at(
  tower: ViT, grid: Size, rows: Int[Array, 'b k'], cols: Int[Array, 'b k'], *,
  ex: Execution = HERE,
) -> Float[Array, 'b k d']:
  """Rows of `tower.positions(grid)` at given cells, without making that table.

  Resampling is separable: the weights of a cell over the stored table are the outer product of
  two short vectors.
  """
  side, width = tower.config.table_grid, tower.pos_embed.shape[-1]
  table = ex.constrain('small', wide(tower.pos_embed[...]))
  target = max(grid)
  if tower.config.position == 'crop' or target == side:
    return jnp.take(table, rows * side + cols, axis=0)
  weights = jnp.asarray(resample.bicubic_antialias_matrix(side, target), table.dtype)
  down, across = jnp.take(weights, rows, axis=0), jnp.take(weights, cols, axis=0)
  both = (down[..., :, None] * across[..., None, :]).reshape(*rows.shape, side * side)
  both = ex.constrain('hidden', both)
  return ex.constrain('hidden', jnp.matmul(both, table.reshape(side * side, width),
                                           precision='highest'))


def embed_cells(
  tower: ViT,
  residuals: Sequence[Float[Array, 'n d']] | None,
  images: Sequence[Float[Array, 'b h w c'] | None],
  cells: Int[Array, 'b t'],
  counts: Sequence[Sequence[int]],
  plan: Plan,
  *,
  ex: Execution = HERE,
) -> Float[Array, 'b t d']:
  """Tokens of one look: patch embedding + position + residual, in the order of `cells`.

  Args:
    residuals: per high scale [g*g d], g the side of its square grid; smaller grids use its
      top-left part. None without residuals.
    images: per high scale, the resized images (None where no look takes anything).
    cells: rising flat indices over all high scales.
    counts: [instance][high scale] tokens of this look; one instance stands for all.
  """
  patch = tower.config.patch_size
  parts, starts, first = [], np.zeros(len(counts), np.int64), 0
  rows_of, columns = np.array(counts), []
  for i, grid in enumerate(plan.grids[1:]):
    # Instances with other counts are padded to the largest; the padding is dropped below.
    most = int(rows_of[:, i].max())
    if most:
      place = np.minimum(starts[:, None] + np.arange(most), cells.shape[1] - 1)
      index = jnp.take_along_axis(cells, jnp.broadcast_to(place, (cells.shape[0], most)), axis=1)
      index = jnp.clip(index - first, 0, plan.cells[i] - 1)
      row, col = index // grid[1], index % grid[1]
      pixels = gather_patches(images[i], row, col, patch).astype(ex.dtype)
      where = positions_at(tower, grid, row, col, ex=ex)
      if residuals is not None:
        side = round(residuals[i].shape[0] ** 0.5)
        where = where + jnp.take(wide(residuals[i]), row * side + col, axis=0)
      parts.append(tower.patch_embed.project(pixels, ex=ex) + where.astype(ex.dtype))
    columns.append(most)
    starts += rows_of[:, i]
    first += plan.cells[i]
  tokens = jnp.concatenate(parts, axis=1)
  if len(counts) == 1:
    return tokens
  keep = np.stack([
    np.concatenate([sum(columns[:i]) + np.arange(n) for i, n in enumerate(row)])
    for row in rows_of]).astype(np.int32)
  return jnp.take_along_axis(tokens, keep[..., None], axis=1)
