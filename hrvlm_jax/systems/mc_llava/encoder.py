"""MC-LLaVA: settings and sizes; overlapping crops with coordinates on the host; on the device one
tower over all crops, coordinate embedding, gathered tokens.

Source: `visheratin/mc-llava: configuration_mc_llava.py, processing_mc_llava.py,
modeling_mc_llava.py`. Everything data-dependent becomes an index array on the host. Axis letters:
c crop slots, p patches of a crop, b rows, t kept tokens of a row, d width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
from PIL import Image, ImageDraw

from hrvlm_jax.core import bounds
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.images import check_size, resize_exact, to_rgb
from hrvlm_jax.core.layers import Mlp, torch_uniform
from hrvlm_jax.core.module import Module, Rngs
from hrvlm_jax.core.resample import normalise
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.contract import Count, ModelConfig, ProjectorConfig, VisualTokens
from hrvlm_jax.systems.packing import Entry, Packing, Views, join
from hrvlm_jax.vision.vit import SIGLIP_SO400M_384, ViT, ViTConfig

Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MCLlavaConfig:
  """The multi-crop encoder.

  Attributes:
    max_crops: K; 0 keeps the whole image only (the original takes a negative value for 0).
      Elongated images may exceed it (3.1 of the specification); `crop_cap` is a hard limit.
    num_tokens: N, visual tokens of one image.
    window, growth: first crop window and its step, in pixels of the image.
    crop_cap: refuse images with more crops than this; None follows the released code.
    quirks: 'refuse' rejects num_tokens below the number of views; 'reference' reproduces the
      original's slices there (whole views, far more than num_tokens).
    view_buckets: sizes the number of views of an example is padded to; behind the last they go on
      by doubling the number of crops, so that the knobs and several images need no new list.
  """

  vision: ViTConfig = SIGLIP_SO400M_384
  max_crops: int = 100
  num_tokens: int = 728
  window: int = 384
  growth: int = 10
  crop_cap: int | None = None
  quirks: str = 'refuse'
  view_buckets: tuple[int, ...] = (1, 5, 9, 17, 33, 65, 105, 209)
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)

  BOUNDS: ClassVar = {
    'max_crops': bounds.COUNT,
    **dict.fromkeys(('num_tokens', 'window', 'growth', 'crop_cap', 'view_buckets'), bounds.SIZE),
    'mean': bounds.FINITE, 'std': bounds.ABOVE_ZERO}

  def __post_init__(self):
    bounds.check(self)
    problems = []
    if self.window % 2 or self.growth % 2:
      problems.append(f'window and growth must be even, got {self.window} and {self.growth}')
    if self.quirks not in ('refuse', 'reference'):
      problems.append(f"quirks must be 'refuse' or 'reference', got {self.quirks!r}")
    if list(self.view_buckets) != sorted(set(self.view_buckets)):
      problems.append(f'view_buckets must rise, got {self.view_buckets}')
    if problems:
      raise ValueError('MCLlavaConfig: ' + '; '.join(problems))

  @property
  def view_tokens(self) -> int:
    """Tokens of a view that can be kept: all but the first."""
    return self.vision.grid**2 - 1


def crop_boxes(width: int, height: int, config: MCLlavaConfig) -> list[Box]:
  """(x0, y0, x1, y1) in pixels of every view; the whole image first, then x outer, y inner.

  The window grows until at most `max_crops` crops remain; the last column and row are stretched to
  the edge. For elongated images the short axis drops out of the product, so there can be more than
  `max_crops`.

  Raises:
    UserError: a side below 1, or more crops than `crop_cap`.
  """
  check_size(width, height)
  whole = [(0, 0, width, height)]
  small = config.window + config.window // 2
  if config.max_crops == 0 or (width <= small and height <= small):
    return whole
  window = config.window
  while True:
    stride = window // 2
    columns, rows = (width - window) // stride + 1, (height - window) // stride + 1
    if columns * rows <= config.max_crops:
      break
    window += config.growth
  columns, rows = max(columns, 1), max(rows, 1)
  if columns == rows == 1:
    return whole
  if config.crop_cap is not None and columns * rows > config.crop_cap:
    raise UserError(
      f'image of {width}x{height} pixels needs {columns * rows} crops, more than crop_cap='
      f'{config.crop_cap}; shorten its long side or raise crop_cap')
  intervals = lambda n, size: [
    (i * stride, size if i == n - 1 else i * stride + window) for i in range(n)]
  return whole + [(x0, y0, x1, y1) for x0, x1 in intervals(columns, width)
                  for y0, y1 in intervals(rows, height)]


def centres(boxes: Sequence[Box], width: int, height: int) -> np.ndarray:
  """float32 [m 2]: centre of each view relative to the image; doubles until the last cast."""
  whole = (0.5, 0.5)
  return np.array([whole] + [((x0 + x1) / 2 / width, (y0 + y1) / 2 / height)
                             for x0, y0, x1, y1 in boxes[1:]], np.float32).reshape(-1, 2)


def kept_tokens(views: int, config: MCLlavaConfig) -> list[int]:
  """How many of its last tokens each view contributes: floor(N / M), the rest from the last view.

  A view gives at most all of its tokens but the first, so an image with few views may give fewer
  than N; a batch pads to N and masks, and no shape changes.

  Raises:
    UserError: with quirks='refuse', N < M.
  """
  total, size = config.num_tokens, config.vision.grid**2 - 1
  split = total // views
  counts = [split] * (views - 1) + [total - split * (views - 1)]
  if config.quirks == 'reference':
    # Python's x[-0:] is all of x, and a slice cannot exceed its view (the first token is gone).
    return [size if n == 0 else min(n, size) for n in counts]
  if split == 0:
    raise UserError(
      f'num_tokens={total} is below the number of views {views}: some views would keep nothing; '
      f'raise num_tokens to {views} or more, or set max_crops=0 (the whole image alone; an '
      'elongated image keeps its crops for any other max_crops)')
  return [min(n, size) for n in counts]


def gather_index(views: int, config: MCLlavaConfig) -> np.ndarray:
  """int32 [t 2]: (view, patch) of every kept token, in view order then raster order."""
  patches = config.vision.grid**2
  pairs = [(view, patches - kept + j)
           for view, kept in enumerate(kept_tokens(views, config)) for j in range(kept)]
  return np.array(pairs, np.int32).reshape(-1, 2)


def count(width: int, height: int, config: MCLlavaConfig) -> Count:
  """Views and visual tokens of an image of that size."""
  views_ = len(crop_boxes(width, height, config))
  return Count(views_, sum(kept_tokens(views_, config)))


def view_pixels(image: Image.Image, boxes: Sequence[Box], size: int) -> np.ndarray:
  """uint8 [m size size 3]: each box resized without keeping its aspect ratio, as the original.

  Boxes of one column share the horizontal pass, which treats every row alone: half of the work,
  the same bytes.
  """
  rgb = to_rgb(image)
  out = np.empty((len(boxes), size, size, 3), np.uint8)
  columns: dict[tuple[int, int], list[int]] = {}
  for number, (x0, _, x1, _) in enumerate(boxes):
    columns.setdefault((x0, x1), []).append(number)
  for (x0, x1), members in columns.items():
    first = min(boxes[n][1] for n in members)
    column = rgb.crop((x0, first, x1, max(boxes[n][3] for n in members)))
    column = resize_exact(column, (size, column.height))
    for n in members:
      view = column.crop((0, boxes[n][1] - first, size, boxes[n][3] - first))
      out[n] = np.asarray(resize_exact(view, (size, size)))
  return out


def view(image: Image.Image, config: MCLlavaConfig) -> Views:
  """Arrays of one image: pixels uint8 [v h w 3], coords float32 [v 2], gather int32 [t 2] (view,
  patch)."""
  boxes = crop_boxes(*image.size, config)
  gather = gather_index(len(boxes), config)
  return {'pixels': view_pixels(image, boxes, config.vision.image_size),
          'coords': centres(boxes, *image.size), 'gather': gather, 'tokens': len(gather)}


def views(images: Sequence[Image.Image], config: MCLlavaConfig, *,
          configs: Sequence[MCLlavaConfig] | None = None) -> Views:
  """Arrays of one example: its images' views one after the other.

  Args:
    configs: of each image, where they differ in `max_crops` (training with a drawn limit).
  """
  configs = [config] * len(images) if configs is None else configs
  return join([view(image, own) for image, own in zip(images, configs, strict=True)],
              packing(config))


def packing(config: MCLlavaConfig) -> Packing:
  """Crops of all rows share their slots; a position takes one patch of one crop.

  A row gets the slots of the smallest view bucket that holds the largest row, so that any smaller
  count compiles nothing new.
  """
  size, patches = config.vision.image_size, config.vision.grid**2
  return Packing(
    slots={'pixels': Entry((size, size, config.vision.channels)),
           'coords': Entry((2,), np.float32, fill=0.5)},
    each=patches, gather=2, tokens=config.num_tokens,
    bucket=lambda views_: _bucket(views_, config.view_buckets))


def overlay(image: Image.Image, config: MCLlavaConfig, info: Mapping[str, object]) -> Image.Image:
  """The image with its crop windows drawn; colours run along the columns."""
  del info
  picture = image.convert('RGB').copy()
  draw = ImageDraw.Draw(picture)
  boxes = crop_boxes(*image.size, config)[1:]
  width = max(1, math.ceil(max(image.size) / 400))
  for number, (x0, y0, x1, y1) in enumerate(boxes):
    hue = int(255 * number / max(len(boxes), 1))
    colour = Image.new('HSV', (1, 1), (hue, 220, 255)).convert('RGB').getpixel((0, 0))
    inset = min(number % 3 * width, (min(x1 - x0, y1 - y0) - 1) // 2)  # windows of a few pixels
    draw.rectangle((x0 + inset, y0 + inset, x1 - 1 - inset, y1 - 1 - inset), outline=colour,
                   width=width)
  return picture


def _bucket(n: int, buckets: Sequence[int]) -> int:
  """The smallest bucket that holds so many views: 209 is followed by 417, 833, ..."""
  for size in buckets:
    if n <= size:
      return size
  while size < n:
    size = 2 * size - 1 if size > 1 else 2
  return size


class Encoder(Module):
  """Tower, coordinate MLP, selection of the last tokens of every view."""

  def __init__(self, config: MCLlavaConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    width = config.vision.width
    self.tower = ViT(config.vision, param_dtype=param_dtype, rngs=rngs)
    # torch's Linear default; the fan-in of the first layer is 2.
    self.coord_embed = Mlp(2, width, out=width, activation='gelu', kernel_init=torch_uniform(2),
                           bias_init=torch_uniform(2), param_dtype=param_dtype, rngs=rngs)

  def __call__(self, views: dict[str, jax.Array], *, key=None, ex: Execution = HERE
               ) -> VisualTokens:
    """Views of a batch (`packing`) -> [b t d], before the projector."""
    pixels = normalise(views['pixels'], self.config.mean, self.config.std).astype(ex.dtype)
    patches = self.tower(pixels, key=key, ex=ex)
    values = self.select(patches, views['coords'].astype(ex.dtype), views['index'])
    return VisualTokens(values, views['valid'])

  def select(self, patches: Float[Array, 'c p d'], coords: Float[Array, 'c 2'], index):
    """Kept tokens plus the embedding of their view's centre: [b t d]."""
    flat = patches.reshape(-1, patches.shape[-1])
    where = self.coord_embed(coords)
    return jnp.take(flat, index, axis=0) + jnp.take(where, index // patches.shape[1], axis=0)


def backbones(config: MCLlavaConfig) -> dict[str, ViTConfig]:
  """The tower can start from a release of its own."""
  return {'vision/tower': config.vision}


RELEASED = {
  'mc_llava_3b': ModelConfig(
    system='mc_llava',
    encoder=MCLlavaConfig(),
    text=language.phi(width=2560, depth=32, mlp_width=10240, rotary_factor=0.4,
                      residual_dropout=0.1),
    projector=ProjectorConfig(n_in=1152, n_out=2560),
    chat='mc_llava'),
}


def tiny(*, vocab_size: int = 264, max_crops: int = 9, num_tokens: int = 63) -> ModelConfig:
  """A model that trains on a laptop: 40-pixel views, width 96."""
  vision = ViTConfig(image_size=40, patch_size=5, width=96, depth=3, heads=4, mlp_width=192,
                     pool='map')
  return ModelConfig(
    system='mc_llava',
    encoder=MCLlavaConfig(vision=vision, max_crops=max_crops, num_tokens=num_tokens, window=40,
                          growth=4, view_buckets=(1, 5, 10, 17)),
    text=language.phi(vocab_size=vocab_size, width=128, depth=2, heads=4, mlp_width=256,
                      max_positions=512),
    projector=ProjectorConfig(n_in=96, n_out=128))
