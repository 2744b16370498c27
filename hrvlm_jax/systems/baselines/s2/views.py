"""S2 on the host: one square image; its scales are made on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math

from PIL import Image

from hrvlm_jax.core.images import resize_part, to_rgb
from hrvlm_jax.systems.baselines.s2.config import S2Config
from hrvlm_jax.systems.contract import Count
from hrvlm_jax.systems.grid import WHOLE, Grid, TokenMap
from hrvlm_jax.systems.packing import Entry, Packing, Views, join
from hrvlm_jax.systems.pictures import (
  background,
  bytes_of,
  check_elongation,
  check_size,
  on_square,
  squash,
)


def count(width: int, height: int, config: S2Config) -> Count:
  """Sub-images of all scales; tokens of the output scale.

  Raises:
    UserError: a side below 1, or too elongated for fit='pad' or 'crop' (see `pictures`).
  """
  _geometry(width, height, config)
  return Count(config.squares, config.tokens, slots=1)


def _geometry(width: int, height: int, config: S2Config) -> tuple[int, int]:
  """Size of the whole picture before it is resized ('pad') or cropped ('crop')."""
  check_size(width, height)
  size, short = (width, height), min(width, height)
  if config.fit == 'pad':
    size = (max(size),) * 2
  elif config.fit == 'crop':
    # The short side gets `side`, the long one is truncated, as torchvision's resize does.
    size = tuple(config.side if n == short else int(config.side * n / short) for n in size)
  check_elongation(width, height, size)
  return size


def square(image: Image.Image, config: S2Config) -> Image.Image:
  """The image as a square of the largest scale."""
  side = config.side
  size = _geometry(*image.size, config)
  if config.fit == 'pad':
    return on_square(image, side, config.mean)
  if config.fit == 'squash' or image.width == image.height:
    return squash(image, (side, side))
  x, y = (size[0] - side) // 2, (size[1] - side) // 2
  return resize_part(to_rgb(image), size, (x, y, x + side, y + side))


def tokens(config: S2Config) -> int:
  """Visual tokens of every image."""
  return config.tokens


def width(config: S2Config) -> int:
  """Width of the visual tokens."""
  return config.width or config.channels


def views(images: Sequence[Image.Image], config: S2Config) -> Views:
  """Arrays of one example: pixels uint8 [m h w 3], tokens int32 [m]."""
  return join([{'pixels': bytes_of(square(image, config)), 'tokens': config.tokens}
               for image in images], packing(config))


def packing(config: S2Config) -> Packing:
  """Images of all rows share their slots (an image, not a sub-image); the index counts images."""
  return Packing(slots={'pixels': Entry((config.side, config.side, 3))})


def grid(config: S2Config) -> Grid:
  """One map: of the image, of its padded square, or of a centre crop."""
  side = math.isqrt(config.tokens)
  return Grid(maps=(TokenMap(side, side, box=None if config.fit == 'crop' else WHOLE),),
              view=config.vision.image_size, std=config.std,
              background=background(config.mean) if config.fit == 'pad' else None)


def overlay(image: Image.Image, config: S2Config, info: Mapping[str, object]) -> Image.Image:
  """The largest scale that the tower sees."""
  del info
  return square(image, config)
