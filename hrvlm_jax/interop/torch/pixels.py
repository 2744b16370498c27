"""Pictures on the host: to RGB, resized by Pillow with the horizontal pass first, normalised."""

import numpy as np
from PIL import Image, ImageCms

BICUBIC = Image.Resampling.BICUBIC


def to_rgb(image):
  """The picture in mode RGB, 8 bits per channel; transparency is dropped.

  16-bit grey is scaled by 65535, whole 32-bit numbers by the smallest of 255, 65535 and their own
  range that holds them, floats likewise with 1 first.
  """
  if image.mode == 'RGB':
    return image
  if image.mode.startswith('I') or image.mode == 'F':
    return _grey(image).convert('RGB')
  if image.mode == 'LAB':
    return ImageCms.profileToProfile(image, ImageCms.createProfile('LAB'),
                                     ImageCms.createProfile('sRGB'), outputMode='RGB')
  if image.mode == 'P' and image.has_transparency_data:
    image = image.convert('RGBA')
  return image.convert('RGB')


def _grey(image):
  values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
  low, high = float(values.min()), float(values.max())
  if image.mode.startswith('I;16'):
    low, high = 0.0, 65535.0
  else:
    limits = (1.0, 255.0, 65535.0) if image.mode == 'F' else (255.0, 65535.0)
    fits = [limit for limit in limits if low >= 0 and high <= limit]
    low, high = (0.0, fits[0]) if fits else (low, max(high, low + 1.0))
  return Image.fromarray(np.rint((values - low) * (255.0 / (high - low))).astype(np.uint8))


def resize(image, size, resample=BICUBIC):
  """RGB resized to (width, height) in two 8-bit passes, rows first, whatever Pillow prefers."""
  if image.width != size[0]:
    image = image.resize((size[0], image.height), resample)
  if image.height != size[1]:
    image = image.resize(size, resample)
  return image


def resize_any(image, size):
  """`resize` in the picture's own mode: palettes by nearest neighbour, alpha premultiplied."""
  if image.size == size:
    return image
  if image.mode in ('P', '1'):
    return image.resize(size, Image.Resampling.NEAREST)
  inside = {'RGBA': 'RGBa', 'LA': 'La'}.get(image.mode)
  out = resize(image.convert(inside) if inside else image, size)
  return out.convert(image.mode) if inside else out


def normalise(pixels, mean, std):
  """uint8 [n h w 3] -> float32 [n 3 h w]: (x / 255 - mean) / std."""
  x = pixels.astype(np.float32) / np.float32(255)
  x = (x - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
  return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def check(width, height, most=4 * 89_478_485):
  """Refuses a picture without pixels, or of too many once it is made square."""
  if min(width, height) < 1 or width * height > most:
    raise ValueError(f'a picture of {width} x {height} pixels (or its square form) cannot be read; '
                     'both sides must be at least 1, and it must not be too elongated: crop it')


def on_square(image, side, mean):
  """The picture in the middle of a square of the mean colour, at side x side pixels."""
  whole = max(image.size)
  check(whole, whole)
  page = Image.new('RGB', (whole, whole), tuple(int(255 * value) for value in mean))
  page.paste(to_rgb(image), ((whole - image.width) // 2, (whole - image.height) // 2))
  return resize(page, (side, side))


def centre(image, side):
  """The short side at `side` pixels, the long one truncated, and the middle cut out."""
  short = min(image.size)
  size = tuple(side if n == short else int(side * n / short) for n in image.size)
  check(*size)
  left, top = (size[0] - side) // 2, (size[1] - side) // 2
  return resize(to_rgb(image), size).crop((left, top, left + side, top + side))


def squash(image, size):
  """The whole picture in RGB at that size, its aspect not kept."""
  check(*image.size)
  return resize(to_rgb(image), size)


def one(image):
  """uint8 [1 h w 3]: a picture as the one view."""
  return np.asarray(image, np.uint8)[None]
