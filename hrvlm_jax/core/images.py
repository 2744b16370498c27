"""Host side image handling: decoding with limits, conversion to RGB, exact resizing, crops.

NumPy and Pillow only; nothing here touches a device. Two jobs:

* Untrusted files. `open_image` turns every way in which a file fails to be an image into one
  `UserError` sentence, and refuses an image above a pixel limit before decoding it.
* Equal bytes. The released models were trained on images resized by Pillow <= 10.3, whose
  two 8-bit passes run horizontally first. Newer versions (12.2 for extreme shapes, 13 for ordinary
  portraits; python-pillow/Pillow pull requests 9524 and 9549) may swap them, which moves bytes
  by up to 20 grey levels. `resize_exact` writes the order out and gives the same bytes with every
  version.

Axis letters: h height, w width. Sizes and boxes as in Pillow: (width, height), (x0, y0, x1, y1).
"""

import base64
import binascii
import io
import os
from pathlib import Path
import threading
from typing import BinaryIO, Literal
import urllib.parse

from jaxtyping import UInt8
import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from hrvlm_jax.core.errors import UserError

BICUBIC = Image.Resampling.BICUBIC
BILINEAR = Image.Resampling.BILINEAR
NEAREST = Image.Resampling.NEAREST

# About 13,377 x 13,377, the limit above which Pillow refuses an image as a decompression bomb: half
# a gigabyte of RGB. `max_pixels` raises it where larger pictures are meant.
MAX_PIXELS = 178_956_970

# Containers with a decoder that is pure pixels. EPS and friends would start other programs.
FORMATS = ('JPEG', 'MPO', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM', 'ICO', 'AVIF', 'JPEG2000')

class ImageError(UserError):
  """A file that is no usable image.

  Attributes:
    kind: 'missing' (no such file, a folder, unreadable), 'empty', 'not an image', 'damaged'
      (truncated, broken header or data), 'no pixels', 'too large'. Counted by data pipelines.
  """

  def __init__(self, kind: str, message: str):
    super().__init__(message)
    self.kind = kind

  def __reduce__(self):
    return ImageError, (self.kind, str(self))


ImageFile = str | os.PathLike | bytes | bytearray | memoryview
ExifPolicy = Literal['apply', 'ignore']
AlphaPolicy = Literal['drop', 'white']

# Pillow gives the memory of every picture back to the system and gets it anew, page by page: 14 %
# of the time from a 12-megapixel JPEG to Pheye's views. It keeps up to 64 MB (4 blocks) per process
# instead; the variable PILLOW_BLOCKS_MAX has its say.
if 'PILLOW_BLOCKS_MAX' not in os.environ:
  Image.core.set_blocks_max(max(4, Image.core.get_blocks_max()))

_ORIENTATION = 0x0112
_PNG = b'\x89PNG\r\n\x1a\n'
_open_lock = threading.Lock()


def open_image(
  source: ImageFile,
  *,
  exif: ExifPolicy = 'apply',
  alpha: AlphaPolicy = 'drop',
  max_pixels: int = MAX_PIXELS,
  name: str | None = None,
  inexact: int | None = None,
) -> Image.Image:
  """Decodes an image file completely, in its own mode (RGB, RGBA, palette, CMYK, 16-bit...).

  Of an animated image (GIF, WebP, APNG, multi-page TIFF) the first frame is returned. Comments and
  profiles of a PNG do not matter, however large.

  Args:
    source: path, or the bytes of the file.
    exif: 'apply' turns the image upright as its EXIF orientation says, which is what a person
      expects; 'ignore' keeps the stored orientation, as the original evaluation codes do. An
      unreadable EXIF block counts as absent.
    alpha: 'white' puts a picture with transparency on a white page, as a browser shows it (black
      text on a transparent page is else a black rectangle); 'drop' leaves it to `to_rgb`, which
      forgets it as the originals do.
    max_pixels: refuse more than this many pixels (width x height), before decoding.
    name: how errors call the image; default: the path, or 'image' for bytes.
    inexact: decode JPEG files at 1/2, 1/4 or 1/8 of their size, as small as both sides stay at
      least so many pixels: several times faster, other pixels than the originals saw. None: exact.

  Raises:
    ImageError: missing file, directory, unreadable, empty, not an image of a supported kind,
      truncated or damaged, zero size, too many pixels. A `UserError`: one sentence that names the
      file.
    ValueError: unknown `exif` or `alpha` policy.
  """
  if exif not in ('apply', 'ignore'):
    raise ValueError(f"exif: expected 'apply' or 'ignore', got {exif!r}")
  if alpha not in ('drop', 'white'):
    raise ValueError(f"alpha: expected 'drop' or 'white', got {alpha!r}")
  if isinstance(source, (bytes, bytearray, memoryview)):
    name, data = name or 'image', bytes(source)
  else:
    name = name or os.fspath(source)
    data = read_file(source, name=name)
  if not data:
    raise ImageError('empty', f'{name}: the image file is empty (0 bytes)')

  try:
    image = _decoded(data, max_pixels, name, inexact)
  except ImageError as error:
    bare = _without_texts(data) if error.kind == 'damaged' else data
    if bare == data:
      raise
    image = _decoded(bare, max_pixels, name, inexact)
  if getattr(image, 'is_animated', False):
    image = image.copy()  # the first frame alone, without the open file
  if exif == 'apply':
    image = _upright(image)
  return on_page(image, alpha)


def on_page(image: Image.Image, alpha: AlphaPolicy) -> Image.Image:
  """A picture with transparency on a white page, under 'white'; else as it is."""
  white = alpha == 'white' and image.has_transparency_data
  return to_rgb(image, alpha='white') if white else image


def _decoded(data: bytes, max_pixels: int, name: str, inexact: int | None) -> Image.Image:
  image = _open_header(io.BytesIO(data), data[:512], name)
  _check_size(image.size, max_pixels, name)
  try:
    _shrink(image, inexact)
    image.load()
  except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
    raise ImageError(
      'damaged', f'{name}: the image data is truncated or damaged ({_reason(error)})') from error
  return image


def _without_texts(data: bytes) -> bytes:
  """A PNG without comments and colour profile, which Pillow refuses above a megabyte; no pixel
  depends on them. Other files, and what is no whole chunk, as they are."""
  if not data.startswith(_PNG):
    return data
  kept, place = [_PNG], len(_PNG)
  while place + 12 <= len(data):
    end = place + 12 + int.from_bytes(data[place:place + 4], 'big')
    if data[place + 4:place + 8] not in (b'tEXt', b'zTXt', b'iTXt', b'iCCP'):
      kept.append(data[place:end])
    place = end
  return b''.join([*kept, data[place:]])


def image_size(
  source: ImageFile, *, max_pixels: int = MAX_PIXELS, name: str | None = None,
  exif: ExifPolicy = 'ignore', inexact: int | None = None,
) -> tuple[int, int]:
  """(width, height) from the header alone: damaged pixels go unnoticed.

  Args:
    exif: 'ignore': as stored; 'apply': of the upright image, as `open_image` returns it.
    inexact: as `open_image`.

  Raises:
    ImageError: as `open_image`, for everything the header shows.
  """
  if isinstance(source, (bytes, bytearray, memoryview)):
    name, file = name or 'image', io.BytesIO(bytes(source))
  else:
    name = name or os.fspath(source)
    file = open(_regular_file(source, name), 'rb')  # noqa: SIM115 - closed below
  with file:
    head = file.read(512)
    if not head:
      raise ImageError('empty', f'{name}: the image file is empty (0 bytes)')
    file.seek(0)
    try:
      image = _open_header(file, head, name)
    except ImageError as error:
      if error.kind != 'damaged' or not head.startswith(_PNG):
        raise
      file.seek(0)
      file = io.BytesIO(_without_texts(file.read()))
      image = _open_header(file, head, name)
    _check_size(image.size, max_pixels, name)
    _shrink(image, inexact)
    size = image.size
    if exif == 'apply' and _is_turned(image, file):
      size = size[::-1]
  return size


def _shrink(image: Image.Image, side: int | None) -> None:
  """Lets the JPEG decoder leave out what a picture of `side` pixels does not need."""
  if side is not None and image.format in ('JPEG', 'MPO'):
    image.draft('RGB', (side, side))


def _is_turned(image: Image.Image, file: BinaryIO) -> bool:
  """Whether the EXIF orientation of an image that is not decoded yet swaps its sides."""
  if image.format == 'TIFF':  # Pillow turns these itself, size included
    return False
  try:
    if image.format == 'PNG' and 'exif' not in image.info:
      # It may come after the pixels; Pillow would decode all of them to find out that it does not.
      file.seek(0)
      data = file.read()
      if not any(mark in data for mark in (b'eXIf', b'exif', b'xmp', b'Orientation')):
        return False
      image = Image.open(io.BytesIO(data))
    return image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
  except Exception:  # noqa: BLE001 - any fault of an EXIF block, as in `_upright`
    return False


def read_file(path: str | os.PathLike, *, name: str | None = None) -> bytes:
  """The bytes of a regular file.

  Raises:
    ImageError: missing, a directory or another thing that is not a file, not readable.
  """
  name = name or os.fspath(path)
  try:
    return _regular_file(path, name).read_bytes()
  except OSError as error:
    raise ImageError('missing', f'{name}: cannot be read ({_reason(error)})') from error


def _regular_file(path: str | os.PathLike, name: str) -> Path:
  path = Path(path)
  try:
    if path.is_dir():
      raise ImageError('missing', f'{name}: is a folder, expected an image file')
    if not path.exists():
      raise ImageError('missing', f'{name}: no such file')
    if not path.is_file():
      raise ImageError('missing', f'{name}: is not a regular file')
    return path
  except (OSError, ValueError) as error:
    if isinstance(error, UserError):
      raise
    raise ImageError('missing', f'{name}: cannot be read ({_reason(error)})') from error


def _check_size(size: tuple[int, int], max_pixels: int, name: str) -> None:
  width, height = size
  if width < 1 or height < 1:
    raise ImageError('no pixels', f'{name}: the image has no pixels ({width} x {height})')
  if width * height > max_pixels:
    raise ImageError(
      'too large', f'{name}: the image has {width} x {height} = {width * height} pixels, the limit '
      f'is {max_pixels}; make it smaller or raise the limit (--max-pixels N; data.max_pixels in a '
      f'run; decoded it takes {width * height * 3 / 1e9:.1f} GB)')


def data_url(text: str, *, max_bytes: int, name: str = 'data URL') -> bytes:
  """The bytes of `data:image/png;base64,...`, also with percent signs or white space in it.

  Raises:
    UserError: no base64, or too large.
  """
  head, comma, body = text.partition(',')
  if not comma or not head.lower().endswith(';base64'):
    raise ImageError('not an image',
                     f'{name}: begins with {head[:40]!r}, expected data:image/...;base64,...')
  if len(body) * 3 // 4 > max_bytes + 3:
    raise ImageError('too large', f'{name}: holds more than {max_bytes:,} bytes')
  try:
    return base64.b64decode(
      b''.join(urllib.parse.unquote_to_bytes(body).split()), validate=True)
  except (binascii.Error, ValueError) as error:
    raise ImageError('damaged', f'{name}: is not base64 ({error})') from error


def check_size(width: int, height: int) -> None:
  """Refuses an image without pixels.

  Raises:
    UserError: a side below 1.
  """
  if width < 1 or height < 1:
    raise UserError(f'image of {width}x{height} pixels: both sides must be at least 1')


def to_rgb(image: Image.Image, *, alpha: Literal['drop', 'white'] = 'drop') -> Image.Image:
  """The image in mode RGB, 8 bits per channel, as a person would expect it to look.

  16-bit images are scaled (65535 becomes 255), where Pillow would clip; whole-number 32-bit images
  by the smallest of the ranges 8-bit, 16-bit, own maximum that holds them; float images likewise
  with the range 0..1 first. CMYK, LAB, YCbCr, palette, grey and 1-bit images are converted.

  Args:
    image: any mode. An RGB image is returned as it is.
    alpha: 'drop' forgets transparency, as `convert('RGB')` in all original codes does; 'white' puts
      the image on a white page.

  Raises:
    UserError: a mode that has no meaning as a picture.
  """
  if alpha not in ('drop', 'white'):
    raise ValueError(f"alpha: expected 'drop' or 'white', got {alpha!r}")
  if image.mode == 'RGB':
    return image
  if image.mode.startswith('I') or image.mode == 'F':
    return _grey8(image).convert('RGB')
  if image.mode == 'LAB':
    lab, srgb = ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB')
    return ImageCms.profileToProfile(image, lab, srgb, outputMode='RGB')
  if alpha == 'white' and image.has_transparency_data:
    rgba = image.convert('RGBA')
    page = Image.new('RGBA', rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(page, rgba).convert('RGB')
  try:
    if image.mode == 'P' and image.has_transparency_data:
      image = image.convert('RGBA')  # same colours; the direct way makes Pillow warn
    return image.convert('RGB')
  except ValueError as error:
    raise UserError(f'image of mode {image.mode}: cannot be converted to RGB') from error


def to_array(image: Image.Image) -> UInt8[np.ndarray, 'h w 3']:
  """Pixels of an image as a contiguous uint8 array, converted by `to_rgb` where needed."""
  return np.array(to_rgb(image), dtype=np.uint8, order='C')


def resize_exact(
  image: Image.Image,
  size: tuple[int, int],
  resample: Image.Resampling = BICUBIC,
) -> Image.Image:
  """Pillow's 8-bit resize with the horizontal pass first, in every Pillow version.

  Equal to `image.resize(size, resample)` of Pillow <= 10.3, byte for byte: each pass is
  antialiased when it shrinks and rounded to 8 bits; an axis of unchanged size is skipped. RGBA and
  LA are resampled with premultiplied alpha, palette and 1-bit images by nearest neighbour, as
  Pillow does. To crop and resize, crop first: a `box` given to Pillow would read pixels outside.

  Args:
    image: any 8-bit mode (convert 16-bit images with `to_rgb` before).
    size: (width, height) in pixels, each at least 1.
    resample: a filter of `PIL.Image.Resampling`.

  Source: NVlabs/PS3, miguelscarv/pheye, luogen1996/LLaVA-HR and visheratin/mc-llava all call
  `PIL.Image.resize` of Pillow 9 or 10.
  """
  width, height = size
  if width < 1 or height < 1:
    raise ValueError(f'size: expected at least 1 x 1, got {width} x {height}')
  if image.size == (width, height):
    return image.copy()
  if image.mode in ('P', '1') or resample == NEAREST:
    return image.resize((width, height), NEAREST)
  premultiplied = {'RGBA': 'RGBa', 'LA': 'La'}.get(image.mode)
  work = image.convert(premultiplied) if premultiplied else image
  if width != image.width:
    work = work.resize((width, image.height), resample)
  if height != image.height:
    work = work.resize((width, height), resample)
  return work.convert(image.mode) if premultiplied else work


def crop(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
  """The pixels x0 <= x < x1, y0 <= y < y1 of an image; the box must lie inside and not be empty.

  Raises:
    ValueError: an empty box, or one that leaves the image (Pillow would invent black pixels).
  """
  x0, y0, x1, y1 = box
  if not (0 <= x0 < x1 <= image.width and 0 <= y0 < y1 <= image.height):
    whole = f'{image.width} x {image.height}'
    raise ValueError(f'box {tuple(box)}: expected a box with pixels inside the image of {whole}')
  if (x0, y0, x1, y1) == (0, 0, image.width, image.height):
    return image
  return image.crop((x0, y0, x1, y1))


def _open_header(file: BinaryIO, head: bytes, name: str) -> Image.Image:
  """Reads the header only. Pillow's own pixel limit is lifted meanwhile: the caller has one."""
  try:
    with _open_lock:
      # A number and not None: other threads crop meanwhile, and Pillow compares with it there.
      limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 1 << 62
      try:
        return Image.open(file, formats=_formats())
      finally:
        Image.MAX_IMAGE_PIXELS = limit
  except UnidentifiedImageError as error:
    raise ImageError('not an image', f'{name}: is not an image{_looks_like(head)}') from error
  except Exception as error:
    raise ImageError(
      'damaged', f'{name}: the image header is damaged ({_reason(error)})') from error


def _formats() -> list[str]:
  Image.init()  # AVIF and WebP are missing from some builds
  return [name for name in FORMATS if name in Image.OPEN]


def _looks_like(head: bytes) -> str:
  head = head.lstrip().lower()
  if head.startswith((b'<!doctype html', b'<html')):
    return ' but a web page (HTML)'
  if head.startswith((b'<svg', b'<?xml')):
    return ' of pixels but XML or SVG text'
  if head.startswith(b'%pdf'):
    return ' but a PDF document'
  if head[4:12] in (b'ftypheic', b'ftypheix', b'ftyphevc', b'ftypmif1', b'ftypmsf1'):
    return ' that can be read but HEIC or HEIF; save it as JPEG or PNG'
  if head.startswith((b'\xff\xd8', b'\x89png')):
    return ' that can be read: its header is damaged'
  return f' of a supported kind ({", ".join(_formats())})'


def _upright(image: Image.Image) -> Image.Image:
  try:
    orientation = image.getexif().get(_ORIENTATION, 1)
    return image if orientation == 1 else ImageOps.exif_transpose(image)
  except Exception:  # noqa: BLE001 - any fault of an EXIF block; the picture itself is fine
    return image


def _grey8(image: Image.Image) -> Image.Image:
  """A 16-bit, 32-bit or float image as 8-bit grey."""
  values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
  low, high = float(values.min()), float(values.max())
  if image.mode.startswith('I;16'):
    low, high = 0.0, 65535.0
  else:
    known = (1.0, 255.0, 65535.0) if image.mode == 'F' else (255.0, 65535.0)
    fits = [limit for limit in known if low >= 0 and high <= limit]
    low, high = (0.0, fits[0]) if fits else (low, max(high, low + 1.0))
  return Image.fromarray(np.rint((values - low) * (255.0 / (high - low))).astype(np.uint8))


def _reason(error: BaseException) -> str:
  text = str(error).splitlines()[0] if str(error) else ''
  return text or type(error).__name__
