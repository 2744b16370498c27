"""Which tiles an image is cut into: AnyRes's candidate resolutions and the closest-aspect grid.

Sizes are (width, height), grids (columns, rows), boxes (x0, y0, x1, y1) everywhere; feature maps
are (rows, columns). Sources: `haotian-liu/LLaVA: llava/mm_utils.py, llava/model/llava_arch.py`;
`NVlabs/VILA: llava/mm_utils.py`. Where the originals truncate with int() or round up, so does this:
a float just under an integer decides the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
import math

import numpy as np
from PIL import Image

from hrvlm_jax.core.images import check_size
from hrvlm_jax.systems.pictures import Pair, squash


def choose_resolution(width: int, height: int, candidates: Sequence[Pair]) -> Pair:
  """The candidate that keeps most pixels; of equals the one that wastes least, then the first."""
  check_size(width, height)
  best, best_score = None, None
  for wide, high in candidates:
    scale = min(wide / width, high / height)
    kept = min(int(width * scale) * int(height * scale), width * height)
    score = (kept, kept - wide * high)
    if best_score is None or score > best_score:
      best, best_score = (wide, high), score
  return best


def content_box(width: int, height: int, canvas: Pair) -> tuple[int, int, int, int]:
  """Where the image lies on the canvas once resized to fit: the aspect kept, centred."""
  wide, high = canvas
  across, down = wide / width, high / height
  if across < down:
    size = (wide, min(math.ceil(height * across), high))
  else:
    size = (min(math.ceil(width * down), wide), high)
  x, y = (wide - size[0]) // 2, (high - size[1]) // 2
  return x, y, x + size[0], y + size[1]


def content_cells(width: int, height: int, rows: int, columns: int) -> tuple[slice, slice]:
  """Rows and columns of a (rows, columns) feature map that show the image, not its padding.

  The other side of the padding is cut by the same number, so one more row or column may remain.
  """
  if width / height > columns / rows:
    factor = columns / width
    margin = (rows - int(height * factor)) // 2
    return slice(margin, rows - margin), slice(0, columns)
  factor = rows / height
  margin = (columns - int(width * factor)) // 2
  return slice(0, rows), slice(margin, columns - margin)


def grid_candidates(min_tiles: int, max_tiles: int) -> list[Pair]:
  """(columns, rows) of every grid of min..max tiles, few tiles first.

  Among grids of equal area the order is that of a Python set of pairs, as in the original; it
  matters only when two of them are equally close to the image's aspect.
  """
  pairs = {(columns, rows) for n in range(min_tiles, max_tiles + 1)
           for columns in range(1, n + 1) for rows in range(1, n + 1)
           if min_tiles <= columns * rows <= max_tiles}
  return sorted(pairs, key=lambda pair: pair[0] * pair[1])


def closest_grid(width: int, height: int, tile: int, candidates: Sequence[Pair]) -> Pair:
  """(columns, rows) whose aspect is closest to the image's.

  On an exact tie a later grid wins if the image has more than half of that grid's pixels.
  """
  check_size(width, height)
  aspect, best, smallest = width / height, candidates[0], math.inf
  for columns, rows in candidates:
    gap = abs(aspect - columns / rows)
    tied = gap == smallest and width * height > 0.5 * tile * tile * columns * rows
    if gap < smallest or tied:
      best, smallest = (columns, rows), gap
  return best


def scale_grids(width: int, height: int, scales: Sequence[int], tile: int, max_tiles: int
                ) -> list[Pair]:
  """(rows, columns) of the tiles of every scale of dynamic S2.

  Square grids for all scales but the last, which gets the closest-aspect grid of at least the
  tiles that its own square would have. Only here are grids (rows, columns).
  """
  least = (scales[-1] // scales[0]) ** 2
  columns, rows = closest_grid(width, height, tile, grid_candidates(least, max_tiles))
  return [(scale // scales[0],) * 2 for scale in scales[:-1]] + [(rows, columns)]


def padded(image: Image.Image, canvas: Pair) -> Image.Image:
  """The image resized to fit and pasted on a black canvas (see `content_box`)."""
  box = content_box(*image.size, canvas)
  out = Image.new('RGB', canvas)
  out.paste(squash(image, (box[2] - box[0], box[3] - box[1])), box[:2])
  return out


def cut(image: Image.Image, tile: int) -> np.ndarray:
  """uint8 [n tile tile 3]: the squares of an image, row by row; its sides are multiples of tile."""
  x = np.asarray(image, np.uint8)
  rows, columns = x.shape[0] // tile, x.shape[1] // tile
  x = x.reshape(rows, tile, columns, tile, 3).transpose(0, 2, 1, 3, 4)
  return np.ascontiguousarray(x.reshape(rows * columns, tile, tile, 3))


def map_index(rows: int, columns: int, side: int) -> np.ndarray:
  """int [rows*side columns*side]: where cell (y, x) of the map of rows x columns tiles stands in
  the tiles' tokens, each tile's side x side tokens row by row."""
  y, x = np.mgrid[:rows * side, :columns * side]
  return ((y // side) * columns + x // side) * side * side + (y % side) * side + x % side
