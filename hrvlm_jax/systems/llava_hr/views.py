"""LLaVA-HR on the host: one square image of S pixels per picture.

Source: `luogen1996/LLaVA-HR: llava_hr/mm_utils.py` (process_images, expand2square) and Hugging
Face's CLIP processor. The low-resolution image is made from the same pixels inside the tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math

import numpy as np
from PIL import Image, ImageDraw

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.images import MAX_PIXELS, resize_on_canvas, resize_part, to_rgb
from hrvlm_jax.systems import images as image_slots
from hrvlm_jax.systems.contract import Count, Views
from hrvlm_jax.systems.llava_hr.config import CLIP_MEAN, LlavaHRConfig

_LIMIT = 4 * MAX_PIXELS  # of an intermediate picture, though it is never made whole


def square_geometry(width: int, height: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
  """((width, height) after resizing, (left, top) of the centre crop) of aspect mode 'square'."""
  short, long = min(width, height), max(width, height)
  longer = int(size * long / short)
  resized = (size, longer) if width <= height else (longer, size)
  return resized, ((resized[0] - size) // 2, (resized[1] - size) // 2)


def pad_geometry(width: int, height: int) -> tuple[int, tuple[int, int]]:
  """(side of the square, (x, y) where the picture is pasted) of aspect mode 'pad'."""
  side = max(width, height)
  return side, ((side - width) // 2, (side - height) // 2)


def background(mean: Sequence[float]) -> tuple[int, ...]:
  """The colour around a padded picture: floor(255 * mean)."""
  return tuple(int(255 * value) for value in mean)


def to_square(image: Image.Image, size: int, *, aspect: str = 'pad',
              mean: Sequence[float] = CLIP_MEAN) -> Image.Image:
  """The picture as RGB, size x size pixels: padded ('pad') or resized and cropped ('square').

  Raises:
    UserError: the picture is so elongated that the square, or the resized picture, would be huge.
  """
  check_elongation(*image.size, size, aspect=aspect)
  image = to_rgb(image)
  if aspect == 'pad':
    side, place = pad_geometry(*image.size)
    return resize_on_canvas(image, (side, side), place, background(mean), (size, size))
  resized, (left, top) = square_geometry(*image.size, size)
  return resize_part(image, resized, (left, top, left + size, top + size))


def check_elongation(width: int, height: int, size: int, *, aspect: str) -> None:
  """Refuses what would cost far more than the picture is worth.

  Raises:
    UserError: a side below 1; the picture on its square ('pad'), or resized before the crop
      ('square'), would have more than 4 x `core.images.MAX_PIXELS` pixels.
  """
  if width < 1 or height < 1:
    raise UserError(f'image of {width}x{height} pixels: both sides must be at least 1')
  if aspect == 'pad':
    pixels = pad_geometry(width, height)[0] ** 2
  else:
    pixels = math.prod(square_geometry(width, height, size)[0])
  if pixels > _LIMIT:
    raise UserError(f'image of {width}x{height} pixels is too elongated: making it square needs a '
                    f'picture of {pixels} pixels, at most {_LIMIT} are allowed; crop it first')


def count(width: int, height: int, config: LlavaHRConfig) -> Count:
  """Every image is one view and costs the same number of tokens.

  Raises:
    UserError: see `check_elongation`.
  """
  check_elongation(width, height, config.image_size, aspect=config.aspect)
  return Count(1, config.tokens)


def views(images: Sequence[Image.Image], config: LlavaHRConfig) -> Views:
  """Arrays of one example.

  Returns:
    pixels uint8 [m s s 3], tokens int32 [images] visual tokens of each image, views int32 [images].
  """
  size = config.image_size
  pixels = [np.asarray(_square(image, config), np.uint8) for image in images]
  return {
    'pixels': np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8),
    'tokens': np.full(len(images), config.tokens, np.int32),
    'views': np.ones(len(images), np.int32),
  }


def batch(examples: Sequence[Views], config: LlavaHRConfig, *, slots: int | None = None,
          tokens: int | None = None) -> Views:
  """Packs a batch: pixels uint8 [slots s s 3] and indices, see `systems.images.pack`.

  The original encodes a blank image for a row without images and discards it; here such a row uses
  no slot and its places are invalid.
  """
  shape = (config.image_size, config.image_size, 3)
  return image_slots.pack(examples, {'pixels': (shape, np.uint8)}, each=config.tokens, slots=slots,
                          tokens=tokens)


def shift(views_: Views, config: LlavaHRConfig, slots: int) -> Views:
  """A batch's views whose indices count `slots` more image slots before them."""
  return image_slots.shift(views_, slots, each=config.tokens)


def overlay(image: Image.Image, config: LlavaHRConfig, info: Mapping[str, object]) -> Image.Image:
  """What the encoder saw, and below it one panel per adapter: where it injected, and its gate.

  A panel is the picture, darkened where little was injected; the bar under it runs from its middle
  to the gate's value, -1 at the left edge and +1 at the right (a vector gate: its mean). Without
  adapters, the square picture alone.
  """
  picture = _square(image, config)
  if 'gates' not in info:
    return picture
  gates = [float(np.asarray(g, np.float32)[0].mean()) for g in _per_adapter(info['gates'])]
  strengths = [np.asarray(s, np.float32)[0] for s in _per_adapter(info['injected'])]
  side = max(picture.width, 192)
  panel = side // len(gates)
  bar = max(8, panel // 8)
  canvas = Image.new('RGB', (side, side + panel + bar + 14), 'white')
  canvas.paste(picture.resize((side, side)), (0, 0))
  draw = ImageDraw.Draw(canvas)
  largest = max(float(s.max()) for s in strengths) or 1.0
  for number, (gate, strength) in enumerate(zip(gates, strengths, strict=True)):
    x, y = number * panel, side
    heat = Image.fromarray(np.uint8(np.clip(strength / largest, 0, 1) * 255))
    small = np.asarray(picture.resize((panel, panel)), np.float32)
    light = 0.15 + 0.85 * np.asarray(heat.resize((panel, panel)), np.float32)[..., None] / 255
    canvas.paste(Image.fromarray(np.uint8(small * light)), (x, y))
    middle, reach = x + panel // 2, int(gate * (panel // 2 - 2))
    draw.rectangle((x + 1, y + panel, x + panel - 2, y + panel + bar), outline='black')
    draw.rectangle((min(middle, middle + reach), y + panel + 2, max(middle, middle + reach),
                    y + panel + bar - 2), fill='seagreen' if gate >= 0 else 'firebrick')
    draw.text((x + 2, y + panel + bar + 1), f'gate {number + 1}: {gate:+.3f}', fill='black')
  return canvas


def _per_adapter(values) -> list:
  """[n k ...] or a list of [n ...] -> a list of [n ...]."""
  return list(values) if isinstance(values, (list, tuple)) else list(
    np.moveaxis(np.asarray(values), 1, 0))


def _square(image: Image.Image, config: LlavaHRConfig) -> Image.Image:
  return to_square(image, config.image_size, aspect=config.aspect, mean=config.mean)
