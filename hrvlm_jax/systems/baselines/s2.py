"""S2 (scaling on scales) in a LLaVA-style model: one tower over the image at several sizes.

Sources: `bfshi/scaling_on_scales: s2wrapper/core.py`; LLaVA's keys `s2`, `s2_scales`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from PIL import Image

from hrvlm_jax.checkpoint.formats import used
from hrvlm_jax.checkpoint.settings import Reader
from hrvlm_jax.core import bounds
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.images import check_size
from hrvlm_jax.core.module import Module, Rngs
from hrvlm_jax.core.resample import CLIP_MEAN, CLIP_STD, normalise
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.baselines import layout
from hrvlm_jax.systems.baselines.scaling import multi_scale, squares_per_side
from hrvlm_jax.systems.contract import Count, ModelConfig, ProjectorConfig, System, VisualTokens
from hrvlm_jax.systems.grid import WHOLE, Grid, TokenMap
from hrvlm_jax.systems.packing import Entry, Packing, Views, join
from hrvlm_jax.systems.pictures import (
  background,
  bytes_of,
  check_elongation,
  crop,
  crop_geometry,
  on_square,
  squash,
)
from hrvlm_jax.vision.blocks import BlockProjector, block_side, is_projector
from hrvlm_jax.vision.vit import CLIP_L_336, ViT, ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class S2Config:
  """One tower over the image at several sizes.

  Attributes:
    layer: hidden state that is read: -1 the last block's output, -2 the one before (LLaVA).
    sizes: side of every scale in pixels; squares of `vision.image_size` tile each.
    output: index of the scale whose map size the tokens have: 0 in LLaVA, -1 in the PS3 paper.
    fit: 'pad' pastes the image on a square of the mean colour first, 'squash' ignores the aspect,
      'crop' resizes the short side and crops the centre (what LLaVA's processor does by itself).
    projector: type string (`vila_hd.projector`) of a projector inside the encoder, for those that
      join neighbours ('mlp_downsample', PS3 paper); None: the model's ordinary projector follows.
    width: of the tokens that leave a projector in the encoder.
  """

  vision: ViTConfig = CLIP_L_336
  layer: int = -2
  sizes: tuple[int, ...] = (336, 672, 1008)
  output: int = 0
  fit: Literal['pad', 'squash', 'crop'] = 'pad'
  projector: str | None = None
  width: int | None = None
  mean: tuple[float, float, float] = CLIP_MEAN
  std: tuple[float, float, float] = CLIP_STD

  BOUNDS: ClassVar = {
    'layer': bounds.FROM_END, 'sizes': bounds.SIZE, 'width': bounds.SIZE, 'output': bounds.FINITE,
    'mean': bounds.FINITE, 'std': bounds.ABOVE_ZERO}

  def __post_init__(self):
    bounds.check(self)
    problems = []
    if not -self.vision.depth <= self.layer <= -1:
      problems.append(f'layer must lie in {-self.vision.depth}..-1, got {self.layer}')
    if not -len(self.sizes) <= self.output < len(self.sizes):
      problems.append(f'output {self.output} is no index of {len(self.sizes)} sizes')
    for size in self.sizes:
      try:
        squares_per_side(size, self.vision.image_size)
      except UserError as error:
        problems.append(str(error))
    if (self.projector is None) != (self.width is None):
      problems.append('projector and width go together')
    if self.projector is not None and not is_projector(self.projector):
      problems.append(f'projector {self.projector!r} is unknown')
    if problems:
      raise ValueError('S2Config: ' + '; '.join(problems))

  @property
  def side(self) -> int:
    """Pixels per side that travel to the device."""
    return max(self.sizes)

  @property
  def channels(self) -> int:
    """Width of the joined features."""
    return self.vision.width * len(self.sizes)

  @property
  def tokens(self) -> int:
    """Visual tokens of an image."""
    size = self.sizes[self.output]
    k = squares_per_side(size, self.vision.image_size)
    cells = k * (size // k // self.vision.patch_size)
    return (-(-cells // (1 if self.projector is None else block_side(self.projector)))) ** 2

  @property
  def squares(self) -> int:
    """Sub-images of an image over all scales."""
    return sum(squares_per_side(size, self.vision.image_size)**2 for size in self.sizes)


RELEASED = {
  'llava_1_5_7b_s2': ModelConfig(
    system='s2', encoder=S2Config(), text=language.llama(),
    projector=ProjectorConfig(n_in=3072, n_out=4096), chat='vicuna_v1'),
}


def tiny(*, vocab_size: int = 264) -> ModelConfig:
  """A model that trains on a laptop: two scales of 40 and 80 pixels, width 96."""
  vision = ViTConfig(image_size=40, patch_size=8, width=96, depth=3, heads=4, mlp_width=192,
                     pool='map')
  return ModelConfig(
    system='s2',
    encoder=S2Config(vision=vision, layer=-1, sizes=(40, 80), mean=(0.5,) * 3, std=(0.5,) * 3),
    text=language.phi(vocab_size=vocab_size, width=128, depth=2, heads=4, mlp_width=256,
                      max_positions=512),
    projector=ProjectorConfig(n_in=192, n_out=128))


# S2 on the host: one square image; its scales are made on the device.

def count(width: int, height: int, config: S2Config) -> Count:
  """Sub-images of all scales; tokens of the output scale.

  Raises:
    UserError: a side below 1, or too elongated for fit='pad' or 'crop' (see `pictures`).
  """
  _geometry(width, height, config)
  return Count(config.squares, config.tokens, slots=1)


def _geometry(width: int, height: int, config: S2Config) -> tuple[int, int]:
  """Size of the whole picture before it is resized ('pad') or cropped ('crop')."""
  check_size(width, height)
  size = (width, height)
  if config.fit == 'pad':
    size = (max(size),) * 2
  elif config.fit == 'crop':
    size = crop_geometry(width, height, config.side)
  check_elongation(width, height, size)
  return size


def square(image: Image.Image, config: S2Config) -> Image.Image:
  """The image as a square of the largest scale."""
  side = config.side
  _geometry(*image.size, config)
  if config.fit == 'pad':
    return on_square(image, side, config.mean)
  return crop(image, side) if config.fit == 'crop' else squash(image, (side, side))


def tokens(config: S2Config) -> int:
  """Visual tokens of every image."""
  return config.tokens


def width(config: S2Config) -> int:
  """Width of the visual tokens."""
  return config.width or config.channels


def views(images: Sequence[Image.Image], config: S2Config) -> Views:
  """Arrays of one example: pixels uint8 [m h w 3], tokens int32 [m]."""
  return join([{'pixels': bytes_of(square(image, config)), 'tokens': config.tokens}
               for image in images], packing(config))


def packing(config: S2Config) -> Packing:
  """Images of all rows share their slots (an image, not a sub-image); the index counts images."""
  return Packing(slots={'pixels': Entry((config.side, config.side, 3))})


def grid(config: S2Config) -> Grid:
  """One map: of the image, of its padded square, or of a centre crop."""
  side = math.isqrt(config.tokens)
  return Grid(maps=(TokenMap(side, side, box=None if config.fit == 'crop' else WHOLE),),
              view=config.vision.image_size, std=config.std,
              background=background(config.mean) if config.fit == 'pad' else None)


def overlay(image: Image.Image, config: S2Config, info: Mapping[str, object]) -> Image.Image:
  """The largest scale that the tower sees."""
  del info
  return square(image, config)


# S2 on the device: scales, sub-images, one tower, joined channels.

class Encoder(Module):
  """Tower over every scale; the class token is dropped."""

  def __init__(self, config: S2Config, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    self.tower = ViT(config.vision, param_dtype=param_dtype, rngs=rngs)
    self.projector = None if config.projector is None else BlockProjector(
      config.projector, config.channels, config.width, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, views: dict[str, jax.Array], *, key=None, ex: Execution = HERE
               ) -> VisualTokens:
    """Views of a batch -> [b m*tokens d]."""
    c = self.config
    pixels = normalise(views['pixels'], c.mean, c.std).astype(ex.dtype)
    stop, first = c.vision.depth + 1 + c.layer, int(c.vision.class_token)
    encode = lambda x: self.tower(x, stop=stop, key=key, ex=ex)[:, first:]
    x = multi_scale(encode, pixels, c.sizes, split=c.vision.image_size, output=c.output, ex=ex)
    x = x if self.projector is None else self.projector(x)
    rows, images = views['index'].shape
    values = jnp.take(x, views['index'], axis=0).reshape(rows, images * c.tokens, -1)
    return VisualTokens(values, jnp.repeat(views['valid'], c.tokens, axis=1))


# LLaVA's layout with S2 switched on: names of the tensors and config.json, both directions.

table = layout.table
KEYS = layout.KEYS | used('s2', 's2_scales')


def from_release(values: Mapping[str, Any]) -> ModelConfig | None:
  """config.json of a LLaVA folder with `s2` -> ModelConfig; None for other layouts.

  Raises:
    UserError: scales that are no numbers or do not fit the tower.
  """
  if layout.written_by_us(values):
    return layout.own_config(values, 's2')
  if not values.get('s2') or values.get('model_type') not in ('llava', 'llava_llama'):
    return None
  read = Reader(values)
  said, text = layout.llava(read), layout.text_config(values)
  scales = values.get('s2_scales', '336,672,1008')
  try:
    # The original sorts its scales and splits by the smallest.
    sizes = tuple(sorted(int(part) for part in str(scales).split(',')))
  except ValueError:
    read.bad('s2_scales', "sides in pixels, as in '336,672,1008'")
    sizes = (336,)
  encoder = read.build(lambda: dataclasses.replace(
    RELEASED['llava_1_5_7b_s2'].encoder, sizes=sizes, layer=said.layer,
    fit='pad' if said.aspect == 'pad' else 'crop'))
  return ModelConfig(system='s2', encoder=encoder, text=text, chat=said.chat,
                     projector=said.projector(encoder.channels, text.width))


def to_release(config: ModelConfig) -> dict[str, Any]:
  """config.json and processor of the released layout."""
  encoder = config.encoder
  # With the tower's weights in the folder LLaVA's code for S2 does not start: it takes the named
  # tower's own.
  return layout.release(config, {
    'unfreeze_mm_vision_tower': False, **layout.projector_keys(config), 's2': True,
    's2_scales': ','.join(map(str, encoder.sizes)), 'mm_hidden_size': encoder.channels,
    'image_aspect_ratio': 'pad' if encoder.fit == 'pad' else 'square'})


SYSTEM = System(
  name='s2', keys=KEYS, config=S2Config, encoder=Encoder, released=RELEASED, tiny=tiny,
  backbones=layout.backbones, count=count, views=views, packing=packing, grid=grid, tokens=tokens,
  width=width, overlay=overlay, table=table, from_release=from_release, to_release=to_release)
