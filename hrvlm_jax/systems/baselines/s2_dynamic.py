"""Dynamic S2 (NVILA): square grids for small scales, the closest-aspect for the last.

Source: `NVlabs/VILA: llava/mm_utils.py, llava/model/llava_arch.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from hrvlm_jax.core import bounds
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.module import Module, Rngs
from hrvlm_jax.core.resample import normalise
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.baselines import layout, tiles
from hrvlm_jax.systems.baselines.scaling import dynamic_map, project_blocks
from hrvlm_jax.systems.baselines.tiles import grid_candidates
from hrvlm_jax.systems.contract import Count, ModelConfig, System, VisualTokens
from hrvlm_jax.systems.packing import Entry, Packing, Views, join
from hrvlm_jax.systems.pictures import Pair, squash
from hrvlm_jax.vision.blocks import BlockProjector, block_side, is_projector
from hrvlm_jax.vision.vit import SIGLIP_SO400M_384, ViT, ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicS2Config:
  """Tiles of several scales, merged, joined on channels, projected block by block.

  Attributes:
    layer: hidden state that is read, -1 the last block's output.
    scales: pixels per side, ascending multiples of the first, which is `vision.image_size`.
    max_tiles: of the last scale; it has at least (last / first)^2.
    output: index of the scale whose map size the tokens have; -1 the last (NVILA).
    projector, width: `vila_hd.projector`, applied to every block of tile size.
  """

  vision: ViTConfig = dataclasses.replace(SIGLIP_SO400M_384, image_size=448)
  layer: int = -2
  scales: tuple[int, ...] = (448, 896, 1344)
  max_tiles: int = 12
  output: int = -1
  projector: str = 'mlp_downsample'
  width: int = 3584
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)

  BOUNDS: ClassVar = {
    'layer': bounds.FROM_END, **dict.fromkeys(('scales', 'max_tiles', 'width'), bounds.SIZE),
    'output': bounds.FINITE, 'mean': bounds.FINITE, 'std': bounds.ABOVE_ZERO}

  def __post_init__(self):
    bounds.check(self)
    problems, size = [], self.vision.image_size
    if not -self.vision.depth <= self.layer <= -1:
      problems.append(f'layer must lie in {-self.vision.depth}..-1, got {self.layer}')
    if not self.scales or self.scales[0] != size or list(self.scales) != sorted(self.scales) or any(
        scale % size for scale in self.scales):
      problems.append(f'scales must be ascending multiples of vision.image_size {size}, the first '
                      f'equal to it, got {self.scales}')
    else:
      if not -len(self.scales) <= self.output < len(self.scales):
        problems.append(f'output {self.output} is no index of {len(self.scales)} scales')
      if self.max_tiles < self.min_tiles:
        problems.append(f'max_tiles must be at least (last/first scale)^2 = {self.min_tiles}, got '
                        f'{self.max_tiles}')
    if not is_projector(self.projector):
      problems.append(f'projector {self.projector!r} is unknown')
    if problems:
      raise ValueError('DynamicS2Config: ' + '; '.join(problems))

  @property
  def min_tiles(self) -> int:
    return (self.scales[-1] // self.scales[0]) ** 2

  @property
  def candidates(self) -> list[Pair]:
    """(columns, rows) that the last scale can have."""
    return grid_candidates(self.min_tiles, self.max_tiles)

  @property
  def squares(self) -> list[Pair]:
    """Grids of all scales but the last."""
    return [(scale // self.scales[0],) * 2 for scale in self.scales[:-1]]

  @property
  def block_tokens(self) -> int:
    """Tokens of a projected block."""
    return (-(-self.vision.grid // block_side(self.projector))) ** 2

  @property
  def max_views(self) -> int:
    return sum(r * c for r, c in self.squares) + self.max_tiles

  @property
  def max_tokens(self) -> int:
    last = self.output in (-1, len(self.scales) - 1)
    blocks = self.max_tiles if last else self.squares[self.output][0] ** 2
    return blocks * self.block_tokens


def tiny(*, vocab_size: int = 264) -> ModelConfig:
  """A model that trains on a laptop: scales of 40 and 80 pixels, width 96."""
  vision = ViTConfig(image_size=40, patch_size=8, width=96, depth=3, heads=4, mlp_width=192,
                     pool='map')
  return ModelConfig(
    system='s2_dynamic',
    encoder=DynamicS2Config(vision=vision, layer=-1, scales=(40, 80), max_tiles=6, width=128),
    text=language.phi(vocab_size=vocab_size, width=128, depth=2, heads=4, mlp_width=256,
                      max_positions=512))


# Dynamic S2 on the host: tiles of every scale, resized by Pillow.

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


# Dynamic S2 on the device.

class Encoder(Module):
  """Tower over all tiles, merged maps, a projector per block."""

  def __init__(self, config: DynamicS2Config, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    self.tower = ViT(config.vision, param_dtype=param_dtype, rngs=rngs)
    self.projector = BlockProjector(config.projector, config.vision.width * len(config.scales),
                                    config.width, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, views: dict[str, jax.Array], *, key=None, ex: Execution = HERE
               ) -> VisualTokens:
    """Views of a batch -> [b t d]."""
    c = self.config
    pixels = normalise(views['pixels'], c.mean, c.std).astype(ex.dtype)
    x = self.tower(pixels, stop=c.vision.depth + 1 + c.layer, key=key, ex=ex)
    x = x[:, int(c.vision.class_token):]
    branches = [self._branch((rows, columns)) for columns, rows in c.candidates]
    rows, images = views['grid'].shape

    def one(inputs):
      tiles, grid = inputs
      return jax.lax.switch(grid, branches, jnp.take(x, tiles, axis=0))

    flat = (views['tiles'].reshape(rows * images, -1), views['grid'].reshape(-1))
    tokens = jax.lax.map(one, flat).reshape(rows, images * c.max_tokens, -1)
    values = jnp.take_along_axis(tokens, views['index'][..., None], axis=1)
    return VisualTokens(values, views['valid'])

  def _branch(self, last):
    c = self.config
    grids = [*c.squares, last]
    count = sum(r * k for r, k in grids)

    def run(tiles):
      merged = dynamic_map(tiles[:count], grids, output=c.output)
      tokens = project_blocks(merged, grids[c.output], self.projector)
      return jnp.pad(tokens, ((0, c.max_tokens - len(tokens)), (0, 0)))

    return run


# Names of the tensors in LLaVA's manner, and config.json, both directions.

table = layout.table


def from_release(values: Mapping[str, Any]) -> ModelConfig | None:
  """config.json that `to_release` wrote -> ModelConfig; None for anything else."""
  return layout.own_config(values, 's2_dynamic')


def to_release(config: ModelConfig) -> dict[str, Any]:
  """config.json and processor."""
  encoder = config.encoder
  return layout.release(config, {
    'dynamic_s2': True, 's2_scales': ','.join(map(str, encoder.scales)),
    's2_max_split_size': encoder.scales[0], 's2_resize_output_to_scale_idx': encoder.output,
    'image_aspect_ratio': 'dynamic_s2', 'max_tiles': encoder.max_tiles})


SYSTEM = System(
  name='s2_dynamic', config=DynamicS2Config, encoder=Encoder, tiny=tiny, backbones=layout.backbones,
  count=count, views=views, packing=packing, overlay=overlay, table=table,
  from_release=from_release, to_release=to_release)
