"""S2 on the host: one square image; its scales are made on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from hrvlm_jax.core.images import resize_on_canvas, resize_part
from hrvlm_jax.systems import images as image_slots
from hrvlm_jax.systems.baselines import tiles
from hrvlm_jax.systems.baselines.s2.config import S2Config
from hrvlm_jax.systems.contract import Count, Views


def count(width: int, height: int, config: S2Config) -> Count:
  """Sub-images of all scales; tokens of the output scale.

  Raises:
    UserError: a side below 1, or too elongated for fit='pad' or 'crop' (see `tiles`).
  """
  _geometry(width, height, config)
  return Count(config.squares, config.tokens, slots=1)


def _geometry(width: int, height: int, config: S2Config) -> tuple[int, int]:
  """Size of the whole picture before it is resized ('pad') or cropped ('crop')."""
  tiles.check_size(width, height)
  size, short = (width, height), min(width, height)
  if config.fit == 'pad':
    size = (max(size),) * 2
  elif config.fit == 'crop':
    # The short side gets `side`, the long one is truncated, as torchvision's resize does.
    size = tuple(config.side if n == short else int(config.side * n / short) for n in size)
  tiles.check_elongation(width, height, size)
  return size


def square(image: Image.Image, config: S2Config) -> Image.Image:
  """The image as a square of the largest scale."""
  picture, side = tiles.rgb(image), config.side
  size = _geometry(*picture.size, config)
  if picture.width == picture.height or config.fit not in ('pad', 'crop'):
    return tiles.squashed(picture, (side, side))
  if config.fit == 'pad':
    place = ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2)
    colour = tuple(int(255 * m) for m in config.mean)
    return resize_on_canvas(picture, size, place, colour, (side, side))
  x, y = (size[0] - side) // 2, (size[1] - side) // 2
  return resize_part(picture, size, (x, y, x + side, y + side))


def views(images: Sequence[Image.Image], config: S2Config) -> Views:
  """Arrays of one example: pixels uint8 [m h w 3], tokens int32 [m]."""
  pixels = [np.asarray(square(image, config), np.uint8) for image in images]
  return {
    'pixels': np.stack(pixels) if pixels else np.zeros((0, config.side, config.side, 3), np.uint8),
    'tokens': np.full(len(images), config.tokens, np.int32),
  }


def batch(examples: Sequence[Views], config: S2Config, *, slots: int | None = None) -> Views:
  """Packs a batch: pixels [slots h w 3], index int32 [b m] (slot of each image of a row), valid
  bool [b m]; see `systems.images.pack`. A slot is an image, not a sub-image.
  """
  shape = (config.side, config.side, 3)
  return image_slots.pack(examples, {'pixels': (shape, np.uint8)}, slots=slots)


def shift(views_: Views, config: S2Config, slots: int) -> Views:
  """A batch's views whose indices count `slots` more view slots before them."""
  del config
  return image_slots.shift(views_, slots)


def overlay(image: Image.Image, config: S2Config, info: Mapping[str, object]) -> Image.Image:
  """The largest scale that the tower sees."""
  del info
  return square(image, config)
