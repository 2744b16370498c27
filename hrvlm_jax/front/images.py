"""An image as people have it: a path, an address, bytes, a picture, an array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import glob
import os
import pathlib
from typing import Any, Literal

import numpy as np
from PIL import Image

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.images import (
  MAX_PIXELS,
  AlphaPolicy,
  ExifPolicy,
  ImageError,
  data_url,
  on_page,
  open_image,
)
from hrvlm_jax.data.sources import IMAGE_SUFFIXES
from hrvlm_jax.serving.pictures import PictureLimits, fetch

MAX_BYTES = 32 << 20  # of a download or a data URL
LONGEST = 120.0  # seconds of a download
Urls = bool | Literal['private']
_FORMS = ('a path, bytes, a PIL image, a NumPy array [h w 3], a data URL or an address '
          '(https://...)')


def as_image(source: Any, *, exif: ExifPolicy = 'apply', alpha: AlphaPolicy = 'drop',
             urls: Urls = False, files: bool = True, max_bytes: int = MAX_BYTES,
             max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
  """A decoded picture.

  Args:
    source: a path; bytes or an open file; a PIL image; an array [h w], [h w 1], [h w 3] or
      [h w 4], uint8 or floats from 0 to 1; `data:` URL; http or https address; Hugging Face's
      {'bytes', 'path'}.
    exif, alpha: see `core.images.open_image`; `alpha` also of pictures and arrays.
    urls: addresses may be fetched. Off, so that a question from elsewhere makes this machine ask
      no other; True: those of the public internet (`serving.pictures`), so that none reads what
      only this machine can reach; 'private': all.
    files: paths may be read (off for questions that come over a network).
    max_bytes: of a download or data URL.
    max_pixels: width x height, known before the pixels are decoded.
    name: how errors call it.

  Raises:
    UserError: nothing of these, an address while they are off, too large, no usable image.
  """
  read = dict(exif=exif, alpha=alpha, max_pixels=max_pixels)
  if isinstance(source, Image.Image):
    _check_pixels(source.size, max_pixels, name or 'image')
    return on_page(source, alpha)
  if isinstance(source, Mapping):
    source = source.get('bytes') or source.get('url') or source.get('path')
  if isinstance(source, (bytes, bytearray, memoryview)):
    return open_image(source, name=name, **read)
  if hasattr(source, 'read'):
    return open_image(source.read(), name=name or getattr(source, 'name', None), **read)
  if isinstance(source, str) and source[:5].lower() == 'data:':
    return open_image(data_url(source, max_bytes=max_bytes, name=name or 'data URL'),
                      name=name or 'data URL', **read)
  if isinstance(source, str) and is_address(source):
    shown = source if len(source) <= 100 else f'{source[:97]}...'
    if not source.lower().startswith(('http://', 'https://')):
      raise UserError(f'{shown}: addresses begin with http:// or https://; expected {_FORMS}')
    if not urls:
      raise UserError(f'{shown}: addresses are not fetched unless they are allowed: '
                      'load(..., urls=True), or --urls on the command line')
    if urls not in (True, 'private'):
      raise UserError(f"urls: found {urls!r}, expected True, False or 'private'")
    limits = PictureLimits(remote=True, private=urls == 'private', bytes=max_bytes, seconds=LONGEST)
    try:
      data = fetch(source, limits, name=shown)
    except UserError as error:
      hint = "; load(..., urls='private') or --private-urls allows it" if limits.private is False \
          and ('public internet' in str(error) or 'only ports' in str(error)) else ''
      raise ImageError('missing', f'{error}{hint}') from error
    return open_image(data, name=name or shown, **read)
  if isinstance(source, (str, os.PathLike)):
    if not files:
      raise UserError('an image is given as a path, expected a data URL: files of the server are '
                      'not read')
    return open_image(source, name=name, **read)
  if hasattr(source, '__array__'):
    return on_page(
      from_array(np.asarray(source), max_pixels=max_pixels, name=name or 'array'), alpha)
  found = 'nothing' if source is None else type(source).__name__
  raise UserError(f'{name or "image"}: found {found}, expected {_FORMS}')


def is_address(text: str) -> bool:
  """Whether a text is an address (`scheme://...`) and no path."""
  scheme, mark, _ = text[:200].partition('://')
  return bool(mark) and scheme.isalpha()


def from_array(array: np.ndarray, *, max_pixels: int = MAX_PIXELS, name: str = 'array'
               ) -> Image.Image:
  """The picture of an array [h w], [h w 1], [h w 3] or [h w 4]; floats are from 0 to 1.

  Raises:
    UserError: another shape or type, values outside.
  """
  shown = f'{array.dtype.name}[{" ".join(map(str, array.shape))}]'
  if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or \
      0 in array.shape:
    hint = ('; move the channels to the end: array.transpose(1, 2, 0)'
            if array.ndim == 3 and array.shape[0] in (1, 3, 4) else '')
    raise UserError(f'{name}: found {shown}, expected [h w], [h w 1], [h w 3] or [h w 4]{hint}')
  _check_pixels(array.shape[1::-1], max_pixels, name)
  if array.dtype.kind == 'f':
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):
      raise UserError(f'{name}: found {shown} with values from {low:g} to {high:g}; floats must be '
                      'from 0 to 1, or give uint8')
    array = (array * 255 + 0.5).astype(np.uint8)
  elif array.dtype == bool:
    array = array.astype(np.uint8) * 255
  elif array.dtype != np.uint8:
    raise UserError(f'{name}: found {shown}, expected uint8, or floats from 0 to 1')
  return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))


def spread(words: Sequence[str]) -> list[str] | None:
  """The images that folders and patterns stand for; None where all are single images.

  Raises:
    UserError: a folder or pattern without an image.
  """
  if not any(_is_several(word) for word in words):
    return None
  found: list[str] = []
  for word in words:
    if not _is_several(word):
      found.append(word)
      continue
    path = pathlib.Path(word)
    names = sorted(str(p) for p in path.rglob('*')) if path.is_dir() else sorted(
      glob.glob(word, recursive=True))
    names = [name for name in names
             if name.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(name)]
    if not names:
      raise UserError(f'{word}: has no images ({", ".join(IMAGE_SUFFIXES)})')
    found += names
  return found


def _is_several(word: str) -> bool:
  if os.path.isdir(word):
    return True
  return any(mark in word for mark in '*?[') and not os.path.exists(word) and not is_address(word)


def _check_pixels(size: tuple[int, int], most: int, name: str) -> None:
  if size[0] * size[1] > most:
    raise ImageError('too large', f'{name}: has {size[0]} x {size[1]} pixels, more than {most:,}')
