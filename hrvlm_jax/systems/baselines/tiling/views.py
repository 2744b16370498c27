"""Closest-aspect tiling on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from hrvlm_jax.systems.baselines import tiled, tiles
from hrvlm_jax.systems.baselines.tiling.config import TilingConfig
from hrvlm_jax.systems.contract import Count
from hrvlm_jax.systems.packing import Views, join
from hrvlm_jax.systems.pictures import squash

packing, rules = tiled.packing, tiled.rules


def tile_grid(width: int, height: int, config: TilingConfig) -> tuple[int, int]:
  """(columns, rows) of the tiles of an image of that size."""
  return tiles.closest_grid(width, height, config.vision.image_size,
                            tiles.grid_candidates(config.min_tiles, config.max_tiles))


def view_count(width: int, height: int, config: TilingConfig) -> int:
  """Tiles, and the thumbnail when there is more than one."""
  columns, rows = tile_grid(width, height, config)
  return columns * rows + int(config.thumbnail and columns * rows > 1)


def gather_index(views_: int, config: TilingConfig) -> np.ndarray:
  """int32 [t]: the tokens tile after tile, each followed by the newline where there is one."""
  each = tiled.token_side(config) ** 2
  index = 1 + np.arange(views_ * each).reshape(views_, each)
  if config.newline:
    index = np.concatenate([index, np.full((views_, 1), tiled.NEWLINE)], axis=1)
  return index.reshape(-1).astype(np.int32)


def count(width: int, height: int, config: TilingConfig) -> Count:
  """Tiles and thumbnail; every one costs the same."""
  views_ = view_count(width, height, config)
  return Count(views_, len(gather_index(views_, config)))


def view_pixels(image: Image.Image, config: TilingConfig) -> np.ndarray:
  """uint8 [views size size 3]: tiles row by row, the thumbnail last."""
  size = config.vision.image_size
  columns, rows = tile_grid(*image.size, config)
  pixels = tiles.cut(squash(image, (columns * size, rows * size)), size)
  if not (config.thumbnail and len(pixels) > 1):
    return pixels
  thumbnail = np.asarray(squash(image, (size, size)), np.uint8)
  return np.concatenate([pixels, thumbnail[None]])


def views(images: Sequence[Image.Image], config: TilingConfig) -> Views:
  """Arrays of one example, see `tiled.packing`."""
  made = []
  for image in images:
    pixels = view_pixels(image, config)
    gather = gather_index(len(pixels), config)
    made.append({'pixels': pixels, 'gather': gather, 'tokens': len(gather)})
  return join(made, packing(config))


def overlay(image: Image.Image, config: TilingConfig, info: Mapping[str, object]) -> Image.Image:
  """The image with the borders of its tiles."""
  del info
  picture = image.convert('RGB').copy()
  columns, rows = tile_grid(*image.size, config)
  draw = ImageDraw.Draw(picture)
  for i in range(1, columns):
    x = i * picture.width // columns
    draw.line((x, 0, x, picture.height), fill=(255, 80, 80))
  for j in range(1, rows):
    y = j * picture.height // rows
    draw.line((0, y, picture.width, y), fill=(255, 80, 80))
  return picture
