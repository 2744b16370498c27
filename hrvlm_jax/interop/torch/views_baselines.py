"""Views of LLaVA-HR, Pheye and the baselines: one square, tiles, tiles of several scales."""

import math

import numpy as np
from PIL import Image

from .blocks import described
from .configuration_hrvlm import low_resolution
from .pixels import centre, check, on_square, one, resize_any, squash, to_rgb
from .ps3_plan import HighDef, Plan
from .sizes_llava_next import told_size


def _whole(pixels, tokens, taken=None):
  """All tokens of one view, or its last ones."""
  return {'pixels': pixels, 'index': np.arange(tokens)[-(taken or tokens):], 'size': tokens}


def llava_hr(image, c):
  """One square of S pixels; every picture has the same number of tokens."""
  side = c.image_size
  fitted = on_square(image, side, c.mean) if c.aspect == 'pad' else centre(image, side)
  return _whole(one(fitted), llava_hr_tokens(c))


def llava_hr_tokens(c):
  """Visual tokens of a picture."""
  if c.reduce == 'queries':
    return c.queries
  if c.slow is not None and c.fast is None:
    grid = c.image_size // 4
    for _ in c.slow.depths[1:]:
      grid //= 2
    return grid**2
  size = c.image_size if c.slow is None else c.fast_size or low_resolution(c.image_size)
  grid = size // c.fast.patch_size
  return (grid // (c.reduce_factor if c.reduce == 'average' else 1)) ** 2


def single_view(image, c):
  """One square view, all of its patches or the last ones."""
  side = c.vision.image_size
  fitted = _fitted(image, side, c)
  return _whole(one(fitted), (side // c.vision.patch_size) ** 2, c.last_tokens)


def _fitted(image, side, c):
  """One square: padded, its centre, or squashed."""
  if c.fit == 'pad':
    return on_square(image, side, c.mean)
  return centre(image, side) if c.fit == 'crop' else squash(image, (side, side))


def s2(image, c):
  """One square of the largest scale."""
  side, split = max(c.sizes), c.vision.image_size
  fitted = _fitted(image, side, c)
  size = c.sizes[c.output]
  k = math.ceil(size / split)
  cells = k * (size // k // c.vision.patch_size)
  blocks = -(-cells // (1 if c.projector is None else described(c.projector)[0]))
  return _whole(one(fitted), blocks**2)


def _side(c):
  """Tokens per side of a projected tile."""
  grid = c.vision.image_size // c.vision.patch_size
  return -(-grid // (1 if c.projector is None else described(c.projector)[0]))


def _cut(image, tile):
  """uint8 [n tile tile 3] of a picture whose sides are multiples of it, row by row."""
  x = np.asarray(image, np.uint8)
  x = x.reshape(x.shape[0] // tile, tile, x.shape[1] // tile, tile, 3).swapaxes(1, 2)
  return np.ascontiguousarray(x.reshape(-1, tile, tile, 3))


def _best(width, height, candidates):
  """The candidate that keeps most pixels, of equals the one that wastes least, then the first."""
  best, score = None, None
  for wide, high in candidates:
    scale = min(wide / width, high / height)
    kept = min(int(width * scale) * int(height * scale), width * height)
    if score is None or (kept, kept - wide * high) > score:
      best, score = (wide, high), (kept, kept - wide * high)
  return best


def _content(width, height, rows, columns):
  """Rows and columns of a map of the padded canvas that show the picture."""
  if width / height > columns / rows:
    margin = (rows - int(height * (columns / width))) // 2
    return slice(margin, rows - margin), slice(0, columns)
  margin = (columns - int(width * (rows / height))) // 2
  return slice(0, rows), slice(margin, columns - margin)


def anyres(image, c):
  """A thumbnail, then the tiles of the best resolution on a black canvas; index 0 is the newline.
  """
  (width, height), tile, side = image.size, c.vision.image_size, _side(c)
  check(width, height)
  wide, high = _best(width, height, c.pinpoints)
  across, down = wide / width, high / height
  fitted = (wide, min(math.ceil(height * across), high)) if across < down else (
    min(math.ceil(width * down), wide), high)
  canvas = Image.new('RGB', (wide, high))
  canvas.paste(squash(image, fitted), ((wide - fitted[0]) // 2, (high - fitted[1]) // 2))
  pixels = np.concatenate([one(squash(image, (tile, tile))), _cut(canvas, tile)])
  columns, rows, each = wide // tile, high // tile, side * side
  if c.merge == 'flat':
    index = 1 + np.arange((1 + rows * columns) * each)
  else:
    y, x = np.mgrid[:rows * side, :columns * side]
    cells = (y // side * columns + x // side) * each + y % side * side + x % side
    cells += 1 + each  # behind the newline and the thumbnail
    if c.merge == 'spatial_unpad':
      cells = cells[_content(width, height, *cells.shape)]
      cells = np.concatenate([cells, np.zeros((len(cells), 1), cells.dtype)], axis=1)
    index = np.concatenate([1 + np.arange(each), cells.reshape(-1)])
  return {'pixels': pixels, 'index': index, 'size': len(pixels) * each, 'fixed': 1}


def llava_next_size(image, c):
  """(height, width) that the LlavaNext of transformers is told of a picture."""
  (width, height), tile, side = image.size, c.vision.image_size, _side(c)
  canvas = _best(width, height, c.pinpoints)
  rows, columns = (n // tile * side for n in reversed(canvas))
  cells = _content(width, height, rows, columns)
  return told_size(width, height, canvas, cells, c.pinpoints, tile, side)


def _closest(width, height, tile, least, most):
  """(columns, rows) of least..most tiles whose aspect is closest to the picture's; on a tie a
  later one wins if the picture has more than half of its pixels. The order is that of a set of
  pairs sorted by area, as in the original."""
  pairs = {(i, j) for n in range(least, most + 1) for i in range(1, n + 1)
           for j in range(1, n + 1) if least <= i * j <= most}
  best, smallest = None, math.inf
  for columns, rows in sorted(pairs, key=lambda pair: pair[0] * pair[1]):
    gap = abs(width / height - columns / rows)
    if gap < smallest or (gap == smallest
                          and width * height > 0.5 * tile * tile * columns * rows):
      best, smallest = (columns, rows), gap
  return best


def tiling(image, c):
  """The tiles of the closest grid, then the thumbnail; each followed by the newline (index 0)."""
  check(*image.size)
  tile, each = c.vision.image_size, _side(c) ** 2
  columns, rows = _closest(*image.size, tile, c.min_tiles, c.max_tiles)
  pixels = _cut(squash(image, (columns * tile, rows * tile)), tile)
  if c.thumbnail and len(pixels) > 1:
    pixels = np.concatenate([pixels, one(squash(image, (tile, tile)))])
  index = 1 + np.arange(len(pixels) * each).reshape(-1, each)
  if c.newline:
    index = np.concatenate([index, np.zeros((len(pixels), 1), index.dtype)], axis=1)
  return {'pixels': pixels, 'index': index.reshape(-1), 'size': len(pixels) * each, 'fixed': 1}


def s2_dynamic(image, c):
  """The tiles of every scale, each squashed onto its grid; `grids` [1 2] of the last scale."""
  check(*image.size)
  tile, first = c.vision.image_size, c.scales[0]
  columns, rows = _closest(*image.size, tile, (c.scales[-1] // first) ** 2, c.max_tiles)
  grids = [(scale // first,) * 2 for scale in c.scales[:-1]] + [(rows, columns)]
  pixels = np.concatenate([_cut(squash(image, (k * tile, r * tile)), tile) for r, k in grids])
  tokens = grids[c.output][0] * grids[c.output][1] * _side(c) ** 2
  return _whole(pixels, tokens) | {'grids': np.array([[rows, columns]])}


def pheye(image, c):
  """The whole picture, then the tiles of an enlarged copy, down the first column first."""
  side = c.vision.image_size
  large = np.asarray(squash(image, (c.level * side,) * 2), np.uint8)
  tiles = [large[y * side:(y + 1) * side, x * side:(x + 1) * side]
           for x in range(c.level) for y in range(c.level)]
  pixels = np.stack([np.asarray(squash(image, (side, side)), np.uint8), *tiles])
  each = (side // c.vision.patch_size) ** 2 + int(c.vision.class_token)
  return _whole(pixels, len(pixels) * each)


def ps3(image, c):
  """One square of the largest scale, resized in the picture's own mode."""
  check(*image.size)
  side, look = c.scales[-1], c.look
  plan = Plan(c, look.looks if look.tokens is None else None, look.tokens, look.first_scales)
  pixels = one(to_rgb(resize_any(image, (side, side))))
  return _whole(pixels, plan.grids[0][0] * plan.grids[0][1] + plan.tokens)


def vila_hd(image, c):
  """One square of the largest scale; places for low-resolution tokens and for as many blocks as
  there can be."""
  counts, side = HighDef(c, described(c.projector)[0]), c.tower.scales[-1]
  found = _whole(one(squash(image, (side, side))), counts.low + counts.high)
  return found if len(counts.choices) == 1 else found | {
    'first_scales': np.array([counts.first(*image.size)])}


def reduced_tokens(step, sizes):
  """Tokens of a picture behind a step.

  Args:
    sizes: (rows, columns) of the maps that the tokens before it are.
  """
  if step.kind == 'pool':
    return sum(-(-rows // step.factor) * -(-columns // step.factor) for rows, columns in sizes)
  if step.kind in ('perceiver', 'single_layer'):
    return step.queries
  return step.keep if step.kind == 'tome' else step.dominant + step.contextual
