"""From selected patches to high-resolution tokens: complete blocks, gathered, padded, masked.

The original scatters the patches on empty canvases, projects the canvases and keeps the blocks
whose patches were all selected. Only those are projected here; the result is the same. How many
there are depends on the image: they take the first of a fixed number of slots per scale. Source:
`NVlabs/VILA: llava/model/llava_arch.py` (`encode_images_ps3`). Axis letters: b images, n tokens
of the tower, c its width, k slots, r patches of a block, d language width.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hrvlm_jax.core import resample
from hrvlm_jax.core.attention import first_true
from hrvlm_jax.systems.ps3.losses import cell_entropy
from hrvlm_jax.vision.blocks import BlockProjector


def complete_blocks(selected: Float[Array, 'b g g'], side: int) -> Bool[Array, 'b t t']:
  """Which blocks have every patch of their averaging window selected (window mean exactly 1)."""
  blocks = -(-selected.shape[1] // side)
  return resample.adaptive_max(1 - selected, blocks, blocks) == 0


def _block_index(index: Int[Array, 'b g g'], side: int) -> Int[Array, 'b t r']:
  """Token indices of the patches of every block; -1 outside of the grid."""
  batch, grid, _ = index.shape
  blocks = -(-grid // side)
  room = blocks * side - grid
  index = jnp.pad(index, ((0, 0), (0, room), (0, room)), constant_values=-1)
  index = index.reshape(batch, blocks, side, blocks, side).transpose(0, 1, 3, 2, 4)
  return index.reshape(batch, blocks * blocks, side * side)


def low_tokens(projector: BlockProjector, features: Float[Array, 'b n c']) -> Float[Array, 'b k d']:
  """Projected low-resolution tokens with their embeddings."""
  x = projector(features)
  size = int(x.shape[1]**0.5)
  every = jnp.arange(x.shape[1])[None]
  return (x + projector.positions(0, size, every)).astype(x.dtype)


def high_tokens(
  projector: BlockProjector, features: Float[Array, 'b n c'], low: Float[Array, 'b _ d'],
  maps: Sequence[Float[Array, 'b _ _']], slots: Sequence[int], *, thumbnail: int,
) -> tuple[Float[Array, 'b k d'], Bool[Array, 'b k']]:
  """Tokens of the complete blocks, by scale and raster order, in sum(slots) places.

  Args:
    features: of the tower: `thumbnail` low-resolution tokens, then the selected patches.
    low: low-resolution tokens of `low_tokens`; the first stands in where no block is complete.
    maps: 0/1 selection per high scale.
    slots: places per scale (`vision.blocks.block_slots`).

  Returns:
    (tokens, which places hold one). Places are filled scale by scale, with gaps between scales.
  """
  batch, side = features.shape[0], projector.side
  chosen = jnp.concatenate([m.reshape(batch, -1) for m in maps], axis=1) > 0
  index = jnp.where(chosen, thumbnail + jnp.cumsum(chosen, axis=1) - 1, -1)
  tokens, valid, start = [], [], 0
  for scale, (m, room) in enumerate(zip(maps, slots, strict=True), 1):
    grid = m.shape[1]
    own = index[:, start:start + grid * grid].reshape(m.shape)
    start += grid * grid
    if not room:
      continue
    keep = complete_blocks(m, side).reshape(batch, -1)
    blocks, real = first_true(keep, room)
    patches = jnp.take_along_axis(_block_index(own, side), blocks[..., None], axis=1)
    flat = jnp.clip(patches.reshape(batch, -1, 1), 0, features.shape[1] - 1)
    taken = jnp.take_along_axis(features, flat, axis=1).reshape(*patches.shape, -1)
    taken = jnp.where(patches[..., None] >= 0, taken, 0).reshape(batch, room, -1)
    x = projector.project(taken)
    tokens.append((x + projector.positions(scale, -(-grid // side), blocks)).astype(x.dtype))
    valid.append(real)
  if not tokens:
    return low[:, :1], jnp.ones((batch, 1), bool)
  tokens, valid = jnp.concatenate(tokens, axis=1), jnp.concatenate(valid, axis=1)
  none = ~valid.any(axis=1)
  tokens = tokens.at[:, 0].set(jnp.where(none[:, None], low[:, 0], tokens[:, 0]))
  return tokens, valid.at[:, 0].set(valid[:, 0] | none)


def target_maps(boxes: Int[Array, 'b 4'], side: int) -> Float[Array, 'b side side']:
  """Ground-truth maps of boxes (first row, last row + 1, first column, last column + 1)."""
  place = jnp.arange(side)
  rows = (place >= boxes[:, :1]) & (place < boxes[:, 1:2])
  cols = (place >= boxes[:, 2:3]) & (place < boxes[:, 3:])
  return (rows[:, :, None] & cols[:, None, :]).astype(jnp.float32)


def selection_loss(
  probs: Sequence[Float[Array, 'b _ _']], target: Float[Array, 'b H W']
) -> tuple[jax.Array, jax.Array]:
  """(binary cross entropy + dice of the selection, number of images that have a map).

  Per scale the mean cross entropy over all cells of those images, plus the mean over them of
  1 - (2 p.g + e) / (p.1 + g.1 + e), p and g divided by 100 first; then the mean over scales. A
  cell is positive where the map touches it. Images whose map is empty do not count.
  """
  counted = target.any(axis=(1, 2))
  number = counted.sum()
  share = counted / jnp.maximum(number, 1)
  total = jnp.zeros((), jnp.float32)
  for p in probs:
    p = p.astype(jnp.float32)
    g = (resample.area(target, *p.shape[1:]) > 0).astype(jnp.float32)
    entropy = cell_entropy(p, g)
    sums = lambda x: x.sum(axis=(1, 2)) / 100
    dice = 1 - (2 * sums(p * g) + 1e-6) / (sums(p) + sums(g) + 1e-6)
    total = total + (share * (entropy + dice)).sum()
  return total / len(probs), number
