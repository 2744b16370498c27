"""MC-LLaVA on the host: overlapping crops with coordinates, and which tokens of each are kept.

Source: `visheratin/mc-llava: processing_mc_llava.py` and the slicing of
`modeling_mc_llava.py`. Everything data-dependent becomes an index array here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math

import numpy as np
from PIL import Image, ImageDraw

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.images import resize_exact, to_rgb
from hrvlm_jax.systems.contract import Count, Views
from hrvlm_jax.systems.mc_llava.config import MCLlavaConfig

Box = tuple[int, int, int, int]


def crop_boxes(width: int, height: int, config: MCLlavaConfig) -> list[Box]:
  """(x0, y0, x1, y1) in pixels of every view; the whole image first, then x outer, y inner.

  The window grows until at most `max_crops` crops remain; the last column and row are stretched to
  the edge. For elongated images the short axis drops out of the product, so there can be more than
  `max_crops`.

  Raises:
    UserError: a side below 1, or more crops than `crop_cap`.
  """
  if width < 1 or height < 1:
    raise UserError(f'image of {width}x{height} pixels: both sides must be at least 1')
  whole = [(0, 0, width, height)]
  small = config.window + config.window // 2
  if config.max_crops == 0 or (width <= small and height <= small):
    return whole
  window = config.window
  while True:
    stride = window // 2
    columns, rows = (width - window) // stride + 1, (height - window) // stride + 1
    if columns * rows <= config.max_crops:
      break
    window += config.growth
  columns, rows = max(columns, 1), max(rows, 1)
  if columns == rows == 1:
    return whole
  if config.crop_cap is not None and columns * rows > config.crop_cap:
    raise UserError(
      f'image of {width}x{height} pixels needs {columns * rows} crops, more than crop_cap='
      f'{config.crop_cap}; shorten its long side or raise crop_cap')
  intervals = lambda n, size: [
    (i * stride, size if i == n - 1 else i * stride + window) for i in range(n)]
  return whole + [(x0, y0, x1, y1) for x0, x1 in intervals(columns, width)
                  for y0, y1 in intervals(rows, height)]


def centres(boxes: Sequence[Box], width: int, height: int) -> np.ndarray:
  """float32 [m 2]: centre of each view relative to the image; doubles until the last cast."""
  whole = (0.5, 0.5)
  return np.array([whole] + [((x0 + x1) / 2 / width, (y0 + y1) / 2 / height)
                             for x0, y0, x1, y1 in boxes[1:]], np.float32).reshape(-1, 2)


def kept_tokens(views: int, config: MCLlavaConfig) -> list[int]:
  """How many of its last tokens each view contributes: floor(N / M), the rest from the last view.

  A view gives at most all of its tokens but the first, so an image with few views may give fewer
  than N; `batch` pads to N and masks, and no shape changes.

  Raises:
    UserError: with quirks='refuse', N < M.
  """
  total, size = config.num_tokens, config.view_tokens
  split = total // views
  counts = [split] * (views - 1) + [total - split * (views - 1)]
  if config.quirks == 'reference':
    # Python's x[-0:] is all of x, and a slice cannot exceed its view (the first token is gone).
    return [size if n == 0 else min(n, size) for n in counts]
  if split == 0:
    raise UserError(f'num_tokens={total} is below the number of views {views}: some views would '
                    'keep nothing; raise num_tokens or lower max_crops')
  return [min(n, size) for n in counts]


def gather_index(views: int, config: MCLlavaConfig) -> np.ndarray:
  """int32 [t 2]: (view, patch) of every kept token, in view order then raster order."""
  patches = config.vision.grid**2
  pairs = [(view, patches - kept + j)
           for view, kept in enumerate(kept_tokens(views, config)) for j in range(kept)]
  return np.array(pairs, np.int32).reshape(-1, 2)


def count(width: int, height: int, config: MCLlavaConfig) -> Count:
  """Views and visual tokens of an image of that size."""
  views_ = len(crop_boxes(width, height, config))
  return Count(views_, sum(kept_tokens(views_, config)))


def view_pixels(image: Image.Image, boxes: Sequence[Box], size: int) -> np.ndarray:
  """uint8 [m size size 3]: each box resized without keeping its aspect ratio, as the original.

  Boxes of one column share the horizontal pass, which treats every row alone: half of the work,
  the same bytes.
  """
  rgb = to_rgb(image)
  out = np.empty((len(boxes), size, size, 3), np.uint8)
  columns: dict[tuple[int, int], list[int]] = {}
  for number, (x0, _, x1, _) in enumerate(boxes):
    columns.setdefault((x0, x1), []).append(number)
  for (x0, x1), members in columns.items():
    first = min(boxes[n][1] for n in members)
    column = rgb.crop((x0, first, x1, max(boxes[n][3] for n in members)))
    column = resize_exact(column, (size, column.height))
    for n in members:
      view = column.crop((0, boxes[n][1] - first, size, boxes[n][3] - first))
      out[n] = np.asarray(resize_exact(view, (size, size)))
  return out


def views(images: Sequence[Image.Image], config: MCLlavaConfig) -> Views:
  """Arrays of one example: its images' views one after the other.

  Returns:
    pixels uint8 [m h w 3], coords float32 [m 2], gather int32 [t 2] (view of the example, patch),
    tokens int32 [images] visual tokens of each image, views int32 [images].
  """
  pixels, coords, gather, tokens, counts = [], [], [], [], []
  for image in images:
    boxes = crop_boxes(*image.size, config)
    index = gather_index(len(boxes), config)
    index[:, 0] += sum(counts)
    pixels.append(view_pixels(image, boxes, config.vision.image_size))
    coords.append(centres(boxes, *image.size))
    gather.append(index)
    tokens.append(len(index))
    counts.append(len(boxes))
  size, channels = config.vision.image_size, config.vision.channels
  join = lambda parts, shape, dtype: (
    np.concatenate(parts) if parts else np.zeros((0, *shape), dtype))
  return {
    'pixels': join(pixels, (size, size, channels), np.uint8),
    'coords': join(coords, (2,), np.float32),
    'gather': join(gather, (2,), np.int32),
    'tokens': np.array(tokens, np.int32),
    'views': np.array(counts, np.int32),
  }


def batch(examples: Sequence[Views], config: MCLlavaConfig, *, slots: int | None = None,
          tokens: int | None = None) -> Views:
  """Packs the views of several examples into `slots` shared crop slots.

  Args:
    slots: crop slots of the whole batch; default: the rows times the smallest view bucket that
      holds the largest row, so that any smaller count compiles nothing new.
    tokens: places per row; default: num_tokens times the largest number of images of a row (at
      least one), which does not depend on image sizes.

  Returns:
    pixels uint8 [slots h w 3] (zeros when empty), coords float32 [slots 2] (0.5 when empty),
    index int32 [b t] into the flattened (slots x patches) tokens, valid bool [b t].

  Raises:
    UserError: the views or tokens do not fit.
  """
  total = sum(len(e['pixels']) for e in examples)
  if slots is None:
    largest = max((len(e['pixels']) for e in examples), default=1)
    slots = len(examples) * _bucket(max(largest, 1), config.view_buckets)
  longest = max((len(e['gather']) for e in examples), default=0)
  if tokens is None:
    images = max((len(e['tokens']) for e in examples), default=1)
    tokens = max(config.num_tokens * max(images, 1), longest)
  if total > slots or longest > tokens:
    raise UserError(f'a batch of {total} views and {longest} tokens in one row does not fit '
                    f'{slots} crop slots and {tokens} places')
  size, channels = config.vision.image_size, config.vision.channels
  patches = config.vision.grid**2
  out = {
    'pixels': np.zeros((slots, size, size, channels), np.uint8),
    'coords': np.full((slots, 2), 0.5, np.float32),
    'index': np.zeros((len(examples), tokens), np.int32),
    'valid': np.zeros((len(examples), tokens), bool),
  }
  start = 0
  for row, example in enumerate(examples):
    n, t = len(example['pixels']), len(example['gather'])
    out['pixels'][start:start + n] = example['pixels']
    out['coords'][start:start + n] = example['coords']
    view, patch = example['gather'][:, 0], example['gather'][:, 1]
    out['index'][row, :t] = (start + view) * patches + patch
    out['valid'][row, :t] = True
    start += n
  return out


def shift(views_: Views, config: MCLlavaConfig, slots: int) -> Views:
  """A batch's views whose indices count `slots` more crop slots before them."""
  return views_ | {'index': views_['index'] + np.int32(slots * config.vision.grid**2)}


def overlay(image: Image.Image, config: MCLlavaConfig, info: Mapping[str, object]) -> Image.Image:
  """The image with its crop windows drawn; colours run along the columns."""
  del info
  picture = image.convert('RGB').copy()
  draw = ImageDraw.Draw(picture)
  boxes = crop_boxes(*image.size, config)[1:]
  width = max(1, math.ceil(max(image.size) / 400))
  for number, (x0, y0, x1, y1) in enumerate(boxes):
    hue = int(255 * number / max(len(boxes), 1))
    colour = Image.new('HSV', (1, 1), (hue, 220, 255)).convert('RGB').getpixel((0, 0))
    inset = number % 3 * width
    draw.rectangle((x0 + inset, y0 + inset, x1 - 1 - inset, y1 - 1 - inset), outline=colour,
                   width=width)
  return picture


def _bucket(n: int, buckets: Sequence[int]) -> int:
  for size in buckets:
    if n <= size:
      return size
  raise UserError(f'{n} views in one example exceed the largest view bucket {buckets[-1]}; lower '
                  'max_crops, set crop_cap, or add a bucket to view_buckets')
