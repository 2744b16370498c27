"""VILA's projectors: blocks of neighbouring patches become one token."""

import re

import torch
from torch import nn
from torch.nn import functional as F

# Side of a block; widths between layers with a norm in front, and of those without ('d': out).
KINDS = {
  'linear': (1, (), ('d',)),
  'mlp_downsample': (2, ('d',), ('d',)),
  'mlp_downsample_2x2_fix': (2, ('d',), ('d',)),
  'mlp_downsample_3x3_fix': (3, (3, 'd'), ('d',)),
  'mlp_downsample_3x3_s2': (3, (3, 1, 1 / 3, 'd'), ('d',)),
  'mlp_downsample_3x3_s2_new': (3, (4, 2, 1, 1 / 3, 'd'), ('d',)),
}


def described(kind):
  """(side of a block, widths with a norm in front, widths without)."""
  if match := re.fullmatch(r'mlp(\d+)x_gelu', kind):
    return 1, (), ('d',) * int(match[1])
  return KINDS[kind]


def stacked(x, side):
  """[n t c] of a square grid -> [n blocks side*side*c]; incomplete blocks end in zeros."""
  if side == 1:
    return x
  grid = round(x.shape[1] ** 0.5)
  room = -grid % side
  x = F.pad(x.unflatten(1, (grid, grid)), (0, 0, 0, room, 0, room))
  blocks = (grid + room) // side
  x = x.unflatten(2, (blocks, side)).unflatten(1, (blocks, side))
  return x.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


class BlockProjector(nn.Module):
  """norm, linear, gelu, ... over stacked blocks.

  Args:
    grid, scales: of the extra position and scale embeddings; None without.
  """

  def __init__(self, kind, n_in, n_out, *, grid=None, scales=1):
    super().__init__()
    self.side, normed, plain = described(kind)
    self.grid, self.layers, width = grid, [], self.side**2 * n_in
    for number, size in enumerate((*normed, *plain), 1):
      out = n_out if size == 'd' else n_in // 3 if size < 1 else n_in * size
      if number <= len(normed):
        setattr(self, f'norm{number}', nn.LayerNorm(width, eps=1e-5))
      setattr(self, f'fc{number}', nn.Linear(width, out))
      self.layers.append(number <= len(normed))
      width = out
    self.pos_embed = self.scale_embedding = None
    if grid is not None:
      self.pos_embed = nn.Parameter(torch.zeros(grid * grid, n_out))
      self.scale_embedding = nn.Parameter(torch.zeros(scales, n_out))

  def project(self, x):
    """Stacked blocks [... e] -> [... d]."""
    for number, normed in enumerate(self.layers, 1):
      x = F.gelu(x) if number > 1 else x
      x = getattr(self, f'norm{number}')(x) if normed else x
      x = getattr(self, f'fc{number}')(x)
    return x

  def forward(self, x):
    """[n t c] of a square grid -> [n blocks d]."""
    return self.project(stacked(x, self.side))

  def positions(self, scale, size):
    """What is added to the tokens of a size x size grid of blocks, [t d] float32; 0.0 without."""
    if self.pos_embed is None:
      return 0.0
    maps = self.pos_embed.float().T.reshape(1, -1, self.grid, self.grid)
    maps = F.adaptive_avg_pool2d(maps, size)[0].flatten(1).T
    return maps + self.scale_embedding[scale].float()
