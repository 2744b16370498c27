"""MC-LLaVA's views: the whole image, then overlapping crops, columns outermost."""

import numpy as np

from .pixels import resize, to_rgb


def boxes(width, height, encoder):
  """(x0, y0, x1, y1) of every view.

  The window grows from `window` by `growth` until at most `max_crops` crops remain, half
  overlapping; the last column and row reach the edge. An axis shorter than the window counts
  as one (which makes the product 0 in the comparison: elongated images get more crops).
  """
  whole = [(0, 0, width, height)]
  window, most = encoder.window, encoder.max_crops
  if most == 0 or max(width, height) <= window + window // 2:
    return whole
  fits = lambda size: (size - window) // (window // 2) + 1
  while fits(width) * fits(height) > most:
    window += encoder.growth
  columns, rows = max(fits(width), 1), max(fits(height), 1)
  if columns * rows == 1:
    return whole
  if encoder.crop_cap is not None and columns * rows > encoder.crop_cap:
    raise ValueError(f'image of {width}x{height} pixels needs {columns * rows} crops, more than '
                     f'crop_cap={encoder.crop_cap}; shorten its long side or raise crop_cap')
  cut = lambda n, size: [(i * (window // 2), size if i == n - 1 else i * (window // 2) + window)
                         for i in range(n)]
  return whole + [(x0, y0, x1, y1) for x0, x1 in cut(columns, width)
                  for y0, y1 in cut(rows, height)]


def kept(views, encoder):
  """How many of its last tokens each view gives: an equal share, the rest from the last view."""
  most = (encoder.vision.image_size // encoder.vision.patch_size) ** 2 - 1
  share = encoder.num_tokens // views
  counts = [share] * (views - 1) + [encoder.num_tokens - share * (views - 1)]
  if encoder.quirks == 'reference':  # x[-0:] is all of x
    counts = [n or most for n in counts]
  elif share == 0:
    raise ValueError(f'num_tokens={encoder.num_tokens} is below the number of views {views}: some '
                     'views would keep nothing; raise num_tokens or lower max_crops')
  return [min(n, most) for n in counts]


def view(image, encoder):
  """pixels uint8 [v h w 3], coords float32 [v 2], index int64 [t] into the views' tokens."""
  width, height = image.size
  rgb, side = to_rgb(image), encoder.vision.image_size
  found = boxes(width, height, encoder)
  pixels = np.stack([np.asarray(resize(rgb.crop(box), (side, side))) for box in found])
  centres = [(0.5, 0.5)] + [((x0 + x1) / 2 / width, (y0 + y1) / 2 / height)
                            for x0, y0, x1, y1 in found[1:]]
  each = (side // encoder.vision.patch_size) ** 2
  index = [np.arange(each - n, each) + number * each
           for number, n in enumerate(kept(len(found), encoder))]
  return {'pixels': pixels, 'coords': np.array(centres, np.float32),
          'index': np.concatenate(index), 'size': each * len(found)}
