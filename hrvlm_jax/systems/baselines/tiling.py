"""Closest-aspect tiling (InternVL; NVILA's "dynamic"): the grid that fits the image best.

Source: `NVlabs/VILA: llava/mm_utils.py` (dynamic_preprocess).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw

from hrvlm_jax.core import bounds
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.baselines import layout, tiled, tiles
from hrvlm_jax.systems.contract import Count, ModelConfig, System
from hrvlm_jax.systems.packing import Views, join
from hrvlm_jax.systems.pictures import squash
from hrvlm_jax.vision.vit import SIGLIP_SO400M_384, ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TilingConfig:
  """The grid of tiles whose aspect is closest to the image's; the image is squashed onto it.

  Attributes:
    layer: hidden state that is read, -1 the last block's output.
    min_tiles, max_tiles: of the grid, the thumbnail not counted.
    thumbnail: the whole image at tile size comes last, when there is more than one tile.
    newline: a learned vector after every tile (NVILA's image encoder).
    projector, width: as in AnyRes.
  """

  vision: ViTConfig = dataclasses.replace(SIGLIP_SO400M_384, image_size=448)
  layer: int = -2
  min_tiles: int = 1
  max_tiles: int = 12
  thumbnail: bool = True
  newline: bool = True
  projector: str | None = 'mlp_downsample'
  width: int = 3584
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)

  BOUNDS: ClassVar = {
    'layer': bounds.FROM_END, **dict.fromkeys(('min_tiles', 'max_tiles', 'width'), bounds.SIZE),
    'mean': bounds.FINITE, 'std': bounds.ABOVE_ZERO}

  def __post_init__(self):
    bounds.check(self)
    problems = tiled.common_problems(self)
    if self.min_tiles > self.max_tiles:
      problems.append(f'expected min_tiles <= max_tiles, got {self.min_tiles} and '
                      f'{self.max_tiles}')
    if problems:
      raise ValueError('TilingConfig: ' + '; '.join(problems))

  @property
  def has_newline(self) -> bool:
    return self.newline

  @property
  def max_views(self) -> int:
    return self.max_tiles + int(self.thumbnail and self.max_tiles > 1)

  @property
  def max_tokens(self) -> int:
    return self.max_views * (tiled.token_side(self) ** 2 + int(self.newline))


def tiny(*, vocab_size: int = 264) -> ModelConfig:
  """A model that trains on a laptop: up to six tiles of 40 pixels, width 96."""
  vision = ViTConfig(image_size=40, patch_size=8, width=96, depth=3, heads=4, mlp_width=192,
                     pool='map')
  return ModelConfig(
    system='tiling',
    encoder=TilingConfig(vision=vision, layer=-1, max_tiles=6, width=128),
    text=language.phi(vocab_size=vocab_size, width=128, depth=2, heads=4, mlp_width=256,
                      max_positions=512))


# Closest-aspect tiling on the host.

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


# Names of the tensors in LLaVA's manner, and config.json, both directions.

table = layout.table


def from_release(values: Mapping[str, Any]) -> ModelConfig | None:
  """config.json that `to_release` wrote -> ModelConfig; None for anything else."""
  return layout.own_config(values, 'tiling')


def to_release(config: ModelConfig) -> dict[str, Any]:
  """config.json and processor."""
  encoder = config.encoder
  return layout.release(config, {
    'image_aspect_ratio': 'dynamic', 'min_tiles': encoder.min_tiles,
    'max_tiles': encoder.max_tiles})


SYSTEM = System(
  name='tiling', config=TilingConfig, encoder=tiled.TiledEncoder, tiny=tiny,
  backbones=layout.backbones, count=count, views=views, packing=packing, rules=rules,
  overlay=overlay, table=table, from_release=from_release, to_release=to_release)
