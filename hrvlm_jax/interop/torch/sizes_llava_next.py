"""Sizes of pictures for the LlavaNext of transformers.

Its model works out by itself, from the size of a picture, which resolution the tiles come from and
which rows or columns of the map show padding. It rounds where the original truncates, so it is told
a size from which it takes what the original does.
"""


def taken(height, width, pinpoints, tile, side):
  """(first cell, rows, columns) of the part of the map that transformers takes, and the map's own
  (rows, columns).

  Args:
    pinpoints: (width, height) each.
    side: tokens per side of a tile.
  """
  import torch
  from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
  )

  grid = get_anyres_image_grid_shape(
    (height, width), [[high, wide] for wide, high in pinpoints], tile)
  rows, columns = (n * side for n in grid)
  cells = unpad_image(torch.arange(rows * columns).reshape(1, rows, columns), (height, width))[0]
  first = int(cells[0, 0]) if cells.numel() else None
  return (first, *cells.shape), (rows, columns)


def told_size(width, height, canvas, cells, pinpoints, tile, side):
  """(height, width) from which transformers takes these cells; the picture's own if it does.

  Args:
    canvas: (width, height) of the resolution that the tiles come from.
    cells: slices of rows and columns of its map.

  Raises:
    ValueError: there is none.
  """
  rows, columns = (n // tile * side for n in reversed(canvas))
  inside = [range(n)[part] for n, part in zip((rows, columns), cells)]
  first = inside[0][0] * columns + inside[1][0] if all(map(len, inside)) else None
  wanted = (first, *map(len, inside)), (rows, columns)
  for size in candidates(width, height, canvas, wanted):
    if taken(*size, pinpoints, tile, side) == wanted:
      return size
  raise ValueError(f'a picture of {width} x {height} pixels: LlavaNext of transformers takes other '
                   'tokens of it than the original, whatever size it is told; resize it by a pixel')


def candidates(width, height, canvas, wanted):
  """The picture's own size, then sizes that touch the canvas and whose map has as many rows and
  columns of the picture, those of nearly its aspect first."""
  yield height, width
  (wide, high), ((_, *kept), whole) = canvas, wanted
  for across in (True, False):  # the picture is as wide as the canvas, as high
    n, cells, side, other = (kept[0], whole[0], high, wide) if across else (
      kept[1], whole[1], wide, high)
    exact = (height * other / width) if across else (width * other / height)
    low, top = max((n - 1) * side // cells, 1), min(-(-(n + 1) * side // cells), side)
    for length in sorted(range(low, top + 1), key=lambda one: abs(one - exact)):
      yield (length, wide) if across else (high, length)
