"""Which sizes of images are refused, and the square that several systems put an image on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.images import resize_exact, to_rgb
from hrvlm_jax.core.strips import resize_on_canvas, resize_part

Pair = tuple[int, int]
LIMIT = 357_913_940  # pixels of an intermediate form


def check_elongation(width: int, height: int, size: Pair) -> None:
  """Refuses a picture that is made square at a cost far above its worth.

  Args:
    size: of its intermediate form, though that is never made whole.

  Raises:
    UserError: that form has more than `LIMIT` pixels.
  """
  if size[0] * size[1] > LIMIT:
    raise UserError(f'image of {width}x{height} pixels is too elongated: making it square needs a '
                    f'picture of {size[0]} x {size[1]} pixels, at most {LIMIT} pixels '
                    'are allowed; crop it first')


def background(mean: Sequence[float]) -> tuple[int, ...]:
  """The colour around a padded picture: floor(255 * mean)."""
  return tuple(int(255 * value) for value in mean)


def pad_geometry(width: int, height: int) -> tuple[int, Pair]:
  """(side of the square, (x, y) where the picture is pasted, in its middle)."""
  side = max(width, height)
  return side, ((side - width) // 2, (side - height) // 2)


def on_square(image: Image.Image, side: int, mean: Sequence[float]) -> Image.Image:
  """The image, centred on a square of the mean colour, at side x side pixels."""
  rgb, (whole, place) = to_rgb(image), pad_geometry(*image.size)
  return resize_on_canvas(rgb, (whole, whole), place, background(mean), (side, side))


def crop_geometry(width: int, height: int, side: int) -> Pair:
  """Size of the whole picture whose centre is cropped: its short side is `side`, the long one is
  truncated, as torchvision's resize does."""
  short = min(width, height)
  return tuple(side if n == short else int(side * n / short) for n in (width, height))


def crop(image: Image.Image, side: int) -> Image.Image:
  """The centre of the image, at side x side pixels: what CLIP's processor makes by itself."""
  if image.width == image.height:
    return squash(image, (side, side))
  size = crop_geometry(*image.size, side)
  x, y = (size[0] - side) // 2, (size[1] - side) // 2
  return resize_part(to_rgb(image), size, (x, y, x + side, y + side))


def squash(image: Image.Image, size: Pair) -> Image.Image:
  """The whole image in RGB at that size, its aspect not kept."""
  return resize_exact(to_rgb(image), size)


def bytes_of(image: Image.Image) -> np.ndarray:
  """uint8 [1 height width 3]: a picture as the one view of an image."""
  return np.asarray(image, np.uint8)[None]
