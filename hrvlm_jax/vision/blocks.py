"""VILA's projectors: blocks of neighbouring patches become one token of language width.

Shared by VILA-HD, S2 and the tiled baselines. Source: `NVlabs/VILA:
llava/model/multimodal_projector/base_projector.py`. Axis letters: b images,
n patches of a square grid, t blocks, c visual width, d language width.
"""

from __future__ import annotations

import functools
import re

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from hrvlm_jax.core import resample
from hrvlm_jax.core.layers import LayerNorm, Linear, activation, normal, torch_uniform, wide
from hrvlm_jax.core.module import Module, Param, Rngs

# Side of a block and the widths between the layers: 'c' visual, 'd' language; every layer of the
# first group has a LayerNorm (eps 1e-5) in front, those of the second have none.
PROJECTORS = {
  'linear': (1, (), ('d',)),
  'mlp_downsample': (2, ('d',), ('d',)),
  'mlp_downsample_2x2_fix': (2, ('d',), ('d',)),
  'mlp_downsample_3x3_fix': (3, (3, 'd'), ('d',)),
  'mlp_downsample_3x3_s2': (3, (3, 1, 1 / 3, 'd'), ('d',)),
  'mlp_downsample_3x3_s2_new': (3, (4, 2, 1, 1 / 3, 'd'), ('d',)),
}
_MLP = re.compile(r'mlp(\d+)x_gelu')


def is_projector(kind: str) -> bool:
  """Whether a type string is known."""
  match = _MLP.fullmatch(kind)
  return kind in PROJECTORS or (match is not None and int(match[1]) > 0)


def _described(kind: str):
  if match := _MLP.fullmatch(kind):
    return 1, (), ('d',) * int(match[1])
  return PROJECTORS[kind]


def block_side(kind: str) -> int:
  """Side of the blocks of a type: 1, 2 or 3."""
  return _described(kind)[0]


def stages(kind: str, n_in: int, n_out: int) -> list[tuple[bool, int, int]]:
  """(norm in front, width in, width out) of every linear layer."""
  side, normed, plain = _described(kind)
  width, out = side * side * n_in, []
  for number, size in enumerate((*normed, *plain)):
    # c // 3, not round(c / 3), as the original.
    after = n_out if size == 'd' else (n_in // 3 if size < 1 else n_in * size)
    out.append((number < len(normed), width, after))
    width = after
  return out


def stack_blocks(x: Float[Array, 'b n c'], side: int) -> Float[Array, 'b t e']:
  """Blocks of side x side patches as vectors, row by row, blocks row by row.

  An incomplete last row or column of blocks is filled with zeros.
  """
  if side == 1:
    return x
  batch, n, width = x.shape
  grid = int(n**0.5)
  blocks = -(-grid // side)
  x = x.reshape(batch, grid, grid, width)
  room = blocks * side - grid
  x = jnp.pad(x, ((0, 0), (0, room), (0, room), (0, 0)))
  x = x.reshape(batch, blocks, side, blocks, side, width).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, blocks * blocks, side * side * width)


@functools.lru_cache(maxsize=256)
def block_slots(grid: int, selected: int, side: int) -> int:
  """The most blocks that can be complete when `selected` cells of a grid x grid map are.

  Block (i, j) is complete when all cells of its averaging window are selected. Cells from the
  window's beginning up to the next window's belong to it alone, so filling windows from the
  cheapest on is an upper bound: exactly selected // side^2 where `side` divides `grid`.
  """
  blocks = -(-grid // side)
  starts = [(i * grid) // blocks for i in range(blocks + 1)]
  widths = np.diff(starts)
  costs = np.sort(np.outer(widths, widths).ravel())
  return int(np.searchsorted(np.cumsum(costs), selected, side='right'))


class BlockProjector(Module):
  """norm, linear, gelu, ... and the extra position and scale embeddings.

  Args:
    grid: side of the low-resolution grid, of the position table too; None without embeddings.
    scales: number of scales, the low resolution included.
  """

  def __init__(self, kind: str, n_in: int, n_out: int, *, grid: int | None = None, scales: int = 1,
               param_dtype=jnp.float32, rngs: Rngs):
    self.side, self.grid = block_side(kind), grid
    plan = stages(kind, n_in, n_out)
    for number, (normed, width, out) in enumerate(plan, 1):
      if normed:
        setattr(self, f'norm{number}',
                LayerNorm(width, eps=1e-5, param_dtype=param_dtype, rngs=rngs))
      init = torch_uniform(width)
      setattr(self, f'fc{number}', Linear(width, out, kernel_init=init, bias_init=init,
                                          param_dtype=param_dtype, rngs=rngs))
    self.normed = tuple(normed for normed, _, _ in plan)
    draw = lambda *shape: Param(normal(0.02)(rngs.params(), shape, param_dtype))
    self.pos_embed = None if grid is None else draw(grid * grid, n_out)
    self.scale_embedding = None if grid is None else draw(scales, n_out)

  def project(self, blocks: Float[Array, '... e']) -> Float[Array, '... d']:
    """Stacked blocks -> tokens."""
    x = blocks
    for number, normed in enumerate(self.normed, 1):
      x = activation('gelu')(x) if number > 1 else x
      x = getattr(self, f'norm{number}')(x) if normed else x
      x = getattr(self, f'fc{number}')(x)
    return x

  def __call__(self, x: Float[Array, 'b n c']) -> Float[Array, 'b t d']:
    """A whole square grid."""
    return self.project(stack_blocks(x, self.side))

  def position_table(self, size: int) -> Float[Array, 't d']:
    """The position table averaged (torch's `area`) to size x size, row by row, float32."""
    table = wide(self.pos_embed[...]).reshape(self.grid, self.grid, -1)
    matrix = resample.area_matrix(self.grid, size)
    return resample.resize(table, matrix, matrix).reshape(size * size, -1)

  def positions(
    self, scale: int, size: int, blocks: Int[Array, 'b k']
  ) -> Float[Array, 'b k d'] | float:
    """What is added to the tokens of given blocks of a size x size grid; 0.0 without embeddings."""
    if self.pos_embed is None:
      return 0.0
    if size % self.grid == 0:  # every window is one cell: no table of the fine grid is made
      times = size // self.grid
      cell = blocks // size // times * self.grid + blocks % size // times
      where = jnp.take(wide(self.pos_embed[...]), cell, axis=0)
    else:
      where = jnp.take(self.position_table(size), blocks, axis=0)
    return where + wide(self.scale_embedding[...])[scale]
