"""Dynamic S2 on the host: tiles of every scale, resized by Pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.systems.baselines import tiles
from hrvlm_jax.systems.baselines.s2_dynamic.config import DynamicS2Config
from hrvlm_jax.systems.contract import Count, Views


def grids(width: int, height: int, config: DynamicS2Config) -> list[tuple[int, int]]:
  """(rows, columns) of the tiles of every scale."""
  return tiles.scale_grids(width, height, config.scales, config.vision.image_size,
                           config.max_tiles)


def count(width: int, height: int, config: DynamicS2Config) -> Count:
  """Tiles of all scales; tokens of the blocks of the output scale."""
  found = grids(width, height, config)
  rows, columns = found[config.output]
  return Count(sum(r * c for r, c in found), rows * columns * config.block_tokens)


def view_pixels(image: Image.Image, config: DynamicS2Config) -> np.ndarray:
  """uint8 [tiles size size 3]: scales ascending, each squashed onto its grid, row by row."""
  size = config.vision.image_size
  return np.concatenate([
    tiles.cut(tiles.squashed(image, (columns * size, rows * size)), size)
    for rows, columns in grids(*image.size, config)])


def views(images: Sequence[Image.Image], config: DynamicS2Config) -> Views:
  """Arrays of one example.

  Returns:
    pixels uint8 [n h w 3], grid int32 [m] (which of `config.candidates` each image has), views and
    tokens int32 [m].
  """
  size = config.vision.image_size
  pixels = [view_pixels(image, config) for image in images]
  last = [grids(*image.size, config)[-1] for image in images]
  return {
    'pixels': np.concatenate([np.zeros((0, size, size, 3), np.uint8), *pixels]),
    'grid': np.array([config.candidates.index((c, r)) for r, c in last], np.int32),
    'views': np.array([len(p) for p in pixels], np.int32),
    'tokens': np.array([count(*image.size, config).tokens for image in images], np.int32),
  }


def batch(examples: Sequence[Views], config: DynamicS2Config, *, slots: int | None = None) -> Views:
  """Packs a batch.

  Args:
    slots: tile slots of the whole batch; default: rows x most images of a row x `max_views`.

  Returns:
    pixels [slots h w 3]; grid int32 [b m]; tiles int32 [b m max_views] slots of an image's tiles
    (repeating its last one); index int32 [b t] into the padded tokens of a row's images, valid
    bool [b t].

  Raises:
    UserError: more tiles than slots.
  """
  images = max((len(e['tokens']) for e in examples), default=1) or 1
  total = sum(len(e['pixels']) for e in examples)
  slots = max(len(examples), 1) * images * config.max_views if slots is None else slots
  if total > slots:
    raise UserError(f'a batch of {total} tiles does not fit {slots} slots')
  size, rows = config.vision.image_size, len(examples)
  out = {
    'pixels': np.zeros((slots, size, size, 3), np.uint8),
    'grid': np.zeros((rows, images), np.int32),
    'tiles': np.zeros((rows, images, config.max_views), np.int32),
    'index': np.zeros((rows, images * config.max_tokens), np.int32),
    'valid': np.zeros((rows, images * config.max_tokens), bool)}
  start = 0
  for row, example in enumerate(examples):
    n = len(example['pixels'])
    out['pixels'][start:start + n] = example['pixels']
    out['grid'][row, :len(example['grid'])] = example['grid']
    place = 0
    for image, (views_, tokens) in enumerate(zip(example['views'], example['tokens'],
                                                 strict=True)):
      out['tiles'][row, image] = start + np.minimum(np.arange(config.max_views), views_ - 1)
      out['index'][row, place:place + tokens] = image * config.max_tokens + np.arange(tokens)
      out['valid'][row, place:place + tokens] = True
      start, place = start + views_, place + tokens
  return out


def shift(views_: Views, config: DynamicS2Config, slots: int) -> Views:
  """A batch's views whose indices count `slots` more tile slots before them."""
  del config
  return views_ | {'tiles': views_['tiles'] + np.int32(slots)}


def overlay(image: Image.Image, config: DynamicS2Config, info: Mapping[str, object]
            ) -> Image.Image:
  """The largest scale as it is cut."""
  del info
  rows, columns = grids(*image.size, config)[-1]
  size = config.vision.image_size
  return tiles.squashed(image, (columns * size, rows * size))
