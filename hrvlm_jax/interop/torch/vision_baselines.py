"""Encoders of the baselines: one view, tiles, S2 and dynamic S2."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import BlockProjector
from .towers import Tower


class SingleViewVision(nn.Module):
  """Patch tokens of one hidden state."""

  def __init__(self, c, config):
    super().__init__()
    self.c, self.tower = c, Tower(c.vision, config.vision_config)

  def patches(self, pixels):
    """[v 3 h w] -> [v p d] of the hidden state that is read, without the class token."""
    vit = self.c.vision
    return self.tower(pixels, stop=vit.depth + 1 + self.c.layer)[:, int(vit.class_token):]

  def forward(self, pixel_values):
    """[v 3 h w] -> [v p d]."""
    return self.patches(pixel_values)


class TiledVision(SingleViewVision):
  """AnyRes and closest-aspect tiling: a projector per tile; row 0 is the learned newline."""

  def __init__(self, c, config):
    super().__init__(c, config)
    self.projector = None if c.projector is None else BlockProjector(
      c.projector, c.vision.width, c.width)
    has = c.newline if hasattr(c, 'newline') else c.merge == 'spatial_unpad'
    self.newline = nn.Parameter(torch.zeros(c.width)) if has else None

  def forward(self, pixel_values):
    """[v 3 h w] -> [1 + v p, d]."""
    x = self.patches(pixel_values)
    x = (x if self.projector is None else self.projector(x)).flatten(0, 1)
    first = x.new_zeros(1, x.shape[-1]) if self.newline is None else self.newline.to(x.dtype)[None]
    return torch.cat([first, x])


def squares(x, k):
  """[n c h h] -> [n k*k c h/k h/k], row by row."""
  x = x.unflatten(3, (k, -1)).unflatten(2, (k, -1))
  return x.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def joined(x, rows, columns):
  """[n rows*columns p*p c] -> maps [n c rows*p columns*p]."""
  side = math.isqrt(x.shape[2])
  x = x.unflatten(2, (side, side)).unflatten(1, (rows, columns))
  return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class S2Vision(SingleViewVision):
  """One tower over the picture at several sizes; channels of all scales joined."""

  def __init__(self, c, config):
    super().__init__(c, config)
    self.projector = None if c.projector is None else BlockProjector(
      c.projector, c.vision.width * len(c.sizes), c.width)

  def forward(self, pixel_values):
    """[n 3 S S] -> [n t d]."""
    maps = []
    for size in self.c.sizes:
      x, k = pixel_values, math.ceil(size / self.c.vision.image_size)
      if size != x.shape[-1]:
        x = F.interpolate(x.float(), size=(size, size), mode='bicubic').to(x.dtype)
      parts = squares(x, k)
      found = self.patches(parts.flatten(0, 1)).unflatten(0, parts.shape[:2])
      maps.append(joined(found, k, k))
    size = maps[self.c.output].shape[2:]
    x = torch.cat([F.adaptive_avg_pool2d(one, size) for one in maps], dim=1)
    x = x.flatten(2).transpose(1, 2)
    return x if self.projector is None else self.projector(x)


class DynamicS2Vision(SingleViewVision):
  """Tiles of all scales, the last scale's grid by the picture's aspect; a projector per block."""

  def __init__(self, c, config):
    super().__init__(c, config)
    self.projector = BlockProjector(c.projector, c.vision.width * len(c.scales), c.width)

  def forward(self, pixel_values, grids):
    """Tiles [v 3 h w] and (rows, columns) of the last scale of every picture -> [n d]."""
    first = self.c.scales[0]
    fixed = [(scale // first,) * 2 for scale in self.c.scales[:-1]]
    x, start, out = self.patches(pixel_values), 0, []
    for last in grids.tolist():
      maps, all_grids = [], [*fixed, tuple(last)]
      count = sum(rows * columns for rows, columns in all_grids)
      alone = count == 1
      for rows, columns in all_grids:
        maps.append(joined(x[None, start:start + rows * columns], rows, columns))
        start += 0 if alone else rows * columns
      start += int(alone)
      rows, columns = all_grids[self.c.output]
      size = maps[self.c.output].shape[2:]
      x_ = torch.cat([F.adaptive_avg_pool2d(one, size) for one in maps], dim=1)[0]
      blocks = x_.unflatten(2, (columns, -1)).unflatten(1, (rows, -1))  # c r h k w
      blocks = blocks.permute(1, 3, 2, 4, 0).flatten(2, 3).flatten(0, 1)
      tokens = self.projector(blocks)[None]
      out.append(joined(tokens, rows, columns)[0].flatten(1).T)
    return torch.cat(out)
