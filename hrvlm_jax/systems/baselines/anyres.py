"""AnyRes, the tiling of LLaVA-1.6: candidate resolutions, tiles, how their features are merged.

Source: `haotian-liu/LLaVA: llava/mm_utils.py, llava/model/llava_arch.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image, ImageDraw

from hrvlm_jax.checkpoint.formats import used
from hrvlm_jax.checkpoint.settings import Reader
from hrvlm_jax.core import bounds
from hrvlm_jax.core.resample import CLIP_MEAN, CLIP_STD
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.baselines import layout, tiled, tiles
from hrvlm_jax.systems.contract import Count, ModelConfig, System
from hrvlm_jax.systems.grid import Grid, TokenMap
from hrvlm_jax.systems.packing import Views, join
from hrvlm_jax.systems.pictures import squash
from hrvlm_jax.vision.vit import CLIP_L_336, ViTConfig

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyResConfig:
  """A thumbnail and the tiles of the best candidate resolution.

  The projector is part of the encoder, because the learned newline has the language model's width.

  Attributes:
    layer: hidden state that is read: -1 the last block's output, -2 the one before (LLaVA).
    pinpoints: candidate resolutions (width, height), multiples of the tower's image size.
    merge: 'flat' tile after tile, 'spatial' one map of all tiles, 'spatial_unpad' that map without
      padding and with a learned newline after every row.
    projector: type string (`vila_hd.projector`); 'mlp_downsample' joins 2x2 patches, as in the
      comparison of the PS3 paper. None leaves the tower's width (for cross-attention).
    width: of the tokens that leave the encoder.
  """

  vision: ViTConfig = CLIP_L_336
  layer: int = -2
  pinpoints: tuple[tuple[int, int], ...] = PINPOINTS
  merge: Literal['flat', 'spatial', 'spatial_unpad'] = 'spatial_unpad'
  projector: str | None = 'mlp2x_gelu'
  width: int = 4096
  mean: tuple[float, float, float] = CLIP_MEAN
  std: tuple[float, float, float] = CLIP_STD

  BOUNDS: ClassVar = {
    'layer': bounds.FROM_END, 'pinpoints': bounds.SIZE, 'width': bounds.SIZE,
    'mean': bounds.FINITE, 'std': bounds.ABOVE_ZERO}

  def __post_init__(self):
    bounds.check(self)
    problems = tiled.common_problems(self)
    size = self.vision.image_size
    for width, height in self.pinpoints:
      if width % size or height % size:
        problems.append(f'pinpoint {width}x{height}: both sides must be multiples of '
                        f'vision.image_size {size}')
    if problems:
      raise ValueError('AnyResConfig: ' + '; '.join(problems))

  @property
  def has_newline(self) -> bool:
    return self.merge == 'spatial_unpad'

  @property
  def max_views(self) -> int:
    size = self.vision.image_size
    return 1 + max(w * h for w, h in self.pinpoints) // size**2

  @property
  def max_tokens(self) -> int:
    size, side = self.vision.image_size, tiled.token_side(self)
    maps = [(h // size * side, w // size * side) for w, h in self.pinpoints]
    return side**2 + max(rows * (columns + int(self.has_newline)) for rows, columns in maps)


RELEASED = {
  'llava_1_6_vicuna_7b': ModelConfig(
    system='anyres', encoder=AnyResConfig(), text=language.llama(), chat='vicuna_v1'),
}


def tiny(*, vocab_size: int = 264) -> ModelConfig:
  """A model that trains on a laptop: tiles of 40 pixels, width 96."""
  vision = ViTConfig(image_size=40, patch_size=8, width=96, depth=3, heads=4, mlp_width=192,
                     pool='map')
  return ModelConfig(
    system='anyres',
    encoder=AnyResConfig(
      vision=vision, layer=-1, pinpoints=((40, 80), (80, 40), (80, 80), (120, 40), (40, 120)),
      width=128, mean=(0.5,) * 3, std=(0.5,) * 3),
    text=language.phi(vocab_size=vocab_size, width=128, depth=2, heads=4, mlp_width=256,
                      max_positions=512))


# AnyRes on the host: thumbnail, tiles and the order of their tokens.

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


# LLaVA-1.6's layout: names of the tensors and config.json, both directions.

table = layout.table


def from_release(values: Mapping[str, Any]) -> ModelConfig | None:
  """config.json of a LLaVA-1.6 folder -> ModelConfig; None for other layouts.

  Raises:
    UserError: settings this system does not have.
  """
  if layout.written_by_us(values):
    return layout.own_config(values, 'anyres')
  if (values.get('image_aspect_ratio') != 'anyres' or values.get('s2')
      or values.get('model_type') not in ('llava', 'llava_llama')):
    return None
  read = Reader(values, where='config.json of AnyRes')
  said = layout.llava(read)
  merge = read.word('mm_patch_merge_type', 'flat', ('flat', 'spatial', 'spatial_unpad'))
  pinpoints = values.get('image_grid_pinpoints')
  try:
    pairs = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
    pairs = tuple((int(w), int(h)) for w, h in pairs)
  except (TypeError, ValueError, SyntaxError, MemoryError, RecursionError, OverflowError):
    read.bad('image_grid_pinpoints', 'pairs (width, height)')
    pairs = ()
  text = layout.text_config(values)
  encoder = read.build(lambda: dataclasses.replace(
    RELEASED['llava_1_6_vicuna_7b'].encoder, layer=said.layer, pinpoints=pairs, merge=merge,
    projector=said.kind, width=text.width))
  return ModelConfig(system='anyres', encoder=encoder, text=text, chat=said.chat)


KEYS = layout.KEYS | used('image_grid_pinpoints', 'mm_patch_merge_type')


def to_release(config: ModelConfig) -> dict[str, Any]:
  """config.json and processor of the released layout."""
  encoder = config.encoder
  return layout.release(config, {
    'image_aspect_ratio': 'anyres', 'mm_patch_merge_type': encoder.merge,
    'image_grid_pinpoints': [list(pair) for pair in encoder.pinpoints]})


SYSTEM = System(
  name='anyres', keys=KEYS, config=AnyResConfig, encoder=tiled.TiledEncoder, released=RELEASED,
  tiny=tiny, backbones=layout.backbones, count=count, views=views, packing=packing, grid=grid,
  rules=rules, overlay=overlay, table=table, from_release=from_release, to_release=to_release)
