"""What lies behind the signs: procedural pictures in muted colours, or the user's photographs.

The procedural ones use integer arithmetic only, so that every machine makes the same bytes.
"""

import functools
from pathlib import Path

from jaxtyping import UInt8
import numpy as np
from PIL import Image

from hrvlm_jax.core import images
from hrvlm_jax.core.errors import UserError

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff')


def procedural(
  rng: np.random.Generator, width: int, height: int, *, kinds: tuple[str, ...], grain: int,
) -> UInt8[np.ndarray, 'h w 3']:
  """One picture of a kind drawn from `kinds` (config.BACKGROUNDS), with pixel noise +-grain."""
  kind = kinds[int(rng.integers(len(kinds)))]
  picture = _KINDS[kind](rng, width, height)
  if grain:
    noise = rng.integers(0, 2 * grain + 1, (height, width), dtype=np.uint8)
    # Kinds stay within 40..215, so that no sum leaves the range of a byte.
    picture = picture + noise[:, :, None] - np.uint8(grain)
  return picture


def photograph(
  rng: np.random.Generator, width: int, height: int, *, folder: str,
) -> UInt8[np.ndarray, 'h w 3']:
  """A random part, of the canvas' aspect ratio, of a random photograph of a folder.

  The part is at least half as long as the largest one that fits, and resized to the canvas. Equal
  on every machine as far as the image decoder is: use PNG where that matters.

  Raises:
    UserError: no such folder, no image in it, an unreadable image.
  """
  found = files(folder)
  photo = _decode(str(found[int(rng.integers(len(found)))]))
  share = 0.5 + 0.5 * rng.random()
  # Largest w x h of the canvas' ratio inside the photograph, in whole pixels.
  largest = min(photo.width * height, photo.height * width)
  part_w = max(1, min(photo.width, int(largest * share) // height))
  part_h = max(1, min(photo.height, int(largest * share) // width))
  x = int(rng.integers(photo.width - part_w + 1))
  y = int(rng.integers(photo.height - part_h + 1))
  part = images.crop(photo, (x, y, x + part_w, y + part_h))
  return np.array(images.resize_exact(part, (width, height)))


@functools.lru_cache(maxsize=8)
def files(folder: str) -> tuple[Path, ...]:
  """Image files of a folder, sorted by name so that a seed means the same everywhere.

  Raises:
    UserError: no such folder, no image in it.
  """
  if not Path(folder).is_dir():
    raise UserError(f'photographs: {folder} is not a folder, expected a folder of images')
  found = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
  if not found:
    raise UserError(f'photographs: no image in {folder}, expected files {", ".join(SUFFIXES)}')
  return tuple(found)


@functools.lru_cache(maxsize=16)
def _decode(path: str) -> Image.Image:
  return images.to_rgb(images.open_image(path))


def _muted(rng, n, low=55, high=195, spread=25):
  """n colours [n, 3] of little saturation: a grey level and a small deviation per channel."""
  grey = rng.integers(low, high, (n, 1))
  return np.clip(grey + rng.integers(-spread, spread + 1, (n, 3)), 45, 205).astype(np.int32)


def _axis(n, cells):
  """For n pixels over `cells` cells: left knot, and its weight and the right one's (sum 128)."""
  position = (np.arange(n, dtype=np.int64) * 2 + 1) * cells * 64 // n  # cells in 1/128
  right = (position % 128).astype(np.uint16)
  return position // 128, 128 - right, right


def _interpolated(knots, width, height):
  """Bilinear picture [h, w, 3] through knots [rows + 1, columns + 1, 3] of 0..255."""
  y, y_left, y_right = _axis(height, knots.shape[0] - 1)
  x, x_left, x_right = _axis(width, knots.shape[1] - 1)
  knots = knots.astype(np.uint16)
  rows = (knots[:, x] * x_left[:, None] + knots[:, x + 1] * x_right[:, None]) >> 7
  top, bottom = rows[y], rows[y + 1]
  top *= y_left[:, None, None]
  bottom *= y_right[:, None, None]
  top += bottom
  top >>= 7
  return top.astype(np.uint8)


def _clouds(rng, width, height):
  short = min(width, height)
  base = _muted(rng, 1, 80, 170)
  coarse, fine = int(rng.integers(2, 5)), int(rng.integers(8, 17))

  def octave(cells, amplitude):
    shape = (max(1, height * cells // short) + 1, max(1, width * cells // short) + 1)
    grey = rng.integers(-amplitude, amplitude + 1, (*shape, 1))
    return grey + rng.integers(-8, 9, (*shape, 3))

  low = _interpolated(np.clip(base + octave(coarse, 40), 45, 210), width, height)
  high = _interpolated(128 + octave(fine, 14), width, height)
  # Averaging a signed octave around 128 keeps the sum inside a byte: (2 low + high) / 3.
  mixed = (low.astype(np.uint16) * 2 + high) * np.uint16(85) >> 8
  return mixed.astype(np.uint8)


def _gradient(rng, width, height):
  return _interpolated(_muted(rng, 4).reshape(2, 2, 3), width, height)


def _blocks(rng, width, height):
  """Rectangles one over the other: walls, doors, windows."""
  picture = np.empty((height, width, 3), np.uint8)
  n = int(rng.integers(10, 25))
  colours = _muted(rng, n + 1)
  picture[:] = colours[0]
  corners = rng.random((n, 4))
  for (x, y, w, h), colour in zip(corners, colours[1:]):
    block_w, block_h = (int(s * (0.05 + 0.35 * t)) + 1 for s, t in ((width, w), (height, h)))
    left, top = int(x * width) - block_w // 2, int(y * height) - block_h // 2
    picture[max(top, 0):top + block_h, max(left, 0):left + block_w] = colour
  return picture


def _tiles(rng, width, height):
  """A wall of bricks with joints, every brick slightly different."""
  short = min(width, height)
  brick_h = max(4, short // int(rng.integers(6, 15)))
  brick_w = brick_h * int(rng.integers(1, 4))
  joint = max(1, brick_h // 10)
  base, dark = _muted(rng, 2, 80, 170)
  rows, columns = height // brick_h + 1, width // brick_w + 2
  shades = np.clip(base + rng.integers(-14, 15, (rows, columns, 1)), 45, 210).astype(np.uint8)
  y, x = np.arange(height), np.arange(width)
  row = y // brick_h
  shifted = x[None] + (row % 2)[:, None] * (brick_w // 2)
  picture = shades[row[:, None], shifted // brick_w]
  picture[y % brick_h < joint] = dark
  picture[shifted % brick_w < joint] = dark
  return picture


def _stripes(rng, width, height):
  """Slanted stripes of a few colours, as on awnings."""
  short = min(width, height)
  period = max(6, short // int(rng.integers(4, 13)))
  colours = _muted(rng, int(rng.integers(2, 5))).astype(np.uint8)
  slant_x, slant_y = ((1, 0), (0, 1), (1, 1), (1, -1), (2, 1))[int(rng.integers(5))]
  level = np.arange(width)[None] * slant_x + np.arange(height)[:, None] * slant_y
  return colours[(level // period) % len(colours)]


_KINDS = {'clouds': _clouds, 'gradient': _gradient, 'blocks': _blocks, 'tiles': _tiles,
          'stripes': _stripes}
