"""Dynamic S2 on the host: tiles of every scale, resized by Pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from hrvlm_jax.systems.baselines import tiles
from hrvlm_jax.systems.baselines.s2_dynamic.config import DynamicS2Config
from hrvlm_jax.systems.contract import Count
from hrvlm_jax.systems.packing import Entry, Packing, Views, join
from hrvlm_jax.systems.pictures import squash


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
    tiles.cut(squash(image, (columns * size, rows * size)), size)
    for rows, columns in grids(*image.size, config)])


def views(images: Sequence[Image.Image], config: DynamicS2Config) -> Views:
  """Arrays of one example: pixels uint8 [n h w 3]; per image its `grid` (which of
  `config.candidates`) and `tiles`, its slots (repeating the last); `gather` of its tokens."""
  made = []
  for number, image in enumerate(images):
    pixels, (rows, columns) = view_pixels(image, config), grids(*image.size, config)[-1]
    tokens = count(*image.size, config).tokens
    made.append({
      'pixels': pixels, 'grid': np.array([config.candidates.index((columns, rows))], np.int32),
      'tiles': np.minimum(np.arange(config.max_views), len(pixels) - 1)[None].astype(np.int32),
      'gather': number * config.max_tokens + np.arange(tokens), 'tokens': tokens})
  return join(made, packing(config))


def packing(config: DynamicS2Config) -> Packing:
  """Tiles of all rows share their slots, an image names its own; the index takes, of the padded
  tokens of a row's images, those that there are."""
  size = config.vision.image_size
  return Packing(
    slots={'pixels': Entry((size, size, 3))},
    images={'grid': Entry((), np.int32), 'tiles': Entry((config.max_views,), np.int32, counts=1)},
    each=0, gather=1, views=config.max_views, tokens=config.max_tokens)


def overlay(image: Image.Image, config: DynamicS2Config, info: Mapping[str, object]
            ) -> Image.Image:
  """The largest scale as it is cut."""
  del info
  rows, columns = grids(*image.size, config)[-1]
  size = config.vision.image_size
  return squash(image, (columns * size, rows * size))
