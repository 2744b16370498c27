"""AnyRes on the host: thumbnail, tiles and the order of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from hrvlm_jax.systems.baselines import tiled, tiles
from hrvlm_jax.systems.baselines.anyres.config import AnyResConfig
from hrvlm_jax.systems.contract import Count
from hrvlm_jax.systems.grid import Grid, TokenMap
from hrvlm_jax.systems.packing import Views, join
from hrvlm_jax.systems.pictures import squash

packing, rules = tiled.packing, tiled.rules


def tile_grid(width: int, height: int, config: AnyResConfig) -> tuple[int, int]:
  """(columns, rows) of the tiles of an image of that size."""
  wide, high = tiles.choose_resolution(width, height, config.pinpoints)
  return wide // config.vision.image_size, high // config.vision.image_size


def gather_index(width: int, height: int, config: AnyResConfig) -> np.ndarray:
  """int32 [t]: 0 for the newline, else 1 + place in the tokens of the tiles, thumbnail first."""
  columns, rows = tile_grid(width, height, config)
  side = tiled.token_side(config)
  thumbnail = np.arange(side * side)
  if config.merge == 'flat':
    return (1 + np.arange((1 + rows * columns) * side * side)).astype(np.int32)
  cells = 1 + side * side + tiles.map_index(rows, columns, side)
  if config.merge == 'spatial_unpad':
    cells = cells[tiles.content_cells(width, height, *cells.shape)]
    newline = np.full((len(cells), 1), tiled.NEWLINE)
    cells = np.concatenate([cells, newline], axis=1)
  return np.concatenate([1 + thumbnail, cells.reshape(-1)]).astype(np.int32)


def count(width: int, height: int, config: AnyResConfig) -> Count:
  """Thumbnail and tiles, and what their merged features cost."""
  columns, rows = tile_grid(width, height, config)
  return Count(1 + rows * columns, len(gather_index(width, height, config)))


def canvas(image: Image.Image, config: AnyResConfig) -> Image.Image:
  """The image on the black canvas of its chosen resolution."""
  return tiles.padded(image, tiles.choose_resolution(*image.size, config.pinpoints))


def view_pixels(image: Image.Image, config: AnyResConfig) -> np.ndarray:
  """uint8 [1 + tiles, size, size, 3]: the squashed thumbnail, then the tiles row by row."""
  size = config.vision.image_size
  thumbnail = np.asarray(squash(image, (size, size)), np.uint8)
  return np.concatenate([thumbnail[None], tiles.cut(canvas(image, config), size)])


def views(images: Sequence[Image.Image], config: AnyResConfig) -> Views:
  """Arrays of one example, see `tiled.packing`."""
  return join([{'pixels': view_pixels(image, config), 'gather': gather_index(*image.size, config),
                'tokens': count(*image.size, config).tokens} for image in images], packing(config))


def grid(config: AnyResConfig) -> Grid:
  """The thumbnail's map; the tiles' depends on the image."""
  side = tiled.token_side(config)
  return Grid(maps=(TokenMap(side, side),), view=config.vision.image_size, std=config.std)


def overlay(image: Image.Image, config: AnyResConfig, info: Mapping[str, object]) -> Image.Image:
  """The padded canvas with the borders of its tiles."""
  del info
  picture, size = canvas(image, config), config.vision.image_size
  draw = ImageDraw.Draw(picture)
  for x in range(size, picture.width, size):
    draw.line((x, 0, x, picture.height), fill=(255, 80, 80))
  for y in range(size, picture.height, size):
    draw.line((0, y, picture.width, y), fill=(255, 80, 80))
  return picture
