"""ViCrop: the model's own attention says where to look again; the answer reads image and crop.

Training-free, over any system that puts visual tokens of a grid into its prompt: two forward passes
for the map (or one or two with a gradient), then the answer from [image, crop]. Sources:
`saccharomycetes/mllms_know` and its predecessor `vicrop`. Axis letters: b rows, h heads, t prompt
positions, d width; maps are (rows, columns), boxes (x0, y0, x1, y1), sizes (width, height).
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from hrvlm_jax.core.attention import attention, last_true
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.core.module import layer_at
from hrvlm_jax.vlm.answer import Answerer, Items
from hrvlm_jax.vlm.fastv import last_attention

RATIOS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
METHODS = ('rel_att', 'grad_att', 'pure_grad')
GENERAL = 'Write a general description of the image.'
Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViCrop:
  """Settings.

  Attributes:
    method: 'rel_att' attention of the question over that of a general prompt; 'grad_att' attention
      weighted by the positive gradient of the model's own top next token; 'pure_grad' how strongly
      that token depends on each pixel, over the same for a general prompt, where the picture has
      fine structure (no attention is read; the encoder must see the whole image as one view).
    layer: decoder layer, from 0 (LLaVA-1.5: 14); not read by 'pure_grad'.
    base: side of the smallest crop in pixels; None: the encoder's input size.
    suffix: instruction after the question and after the general prompt; None: as they are. The
      original: 'Answer the question using a single word or phrase.'
    split: images with a longer side are cut into tiles of about this many pixels, one map each;
      None never splits (the `_high` variants: 1024).
  """

  method: Literal['rel_att', 'grad_att', 'pure_grad'] = 'rel_att'
  layer: int = 14
  base: int | None = None
  suffix: str | None = None
  split: int | None = None

  def __post_init__(self):
    if self.method not in METHODS:
      raise ValueError(f'ViCrop: method must be one of {METHODS}, got {self.method!r}')
    if self.layer < 0 or (self.base is not None and self.base < 1):
      raise ValueError('ViCrop: layer must be at least 0 and base at least 1, got '
                       f'{self.layer} and {self.base}')


def crop_box(weights: np.ndarray, width: int, height: int, base: int) -> Box:
  """The crop around the sharpest peak of a map.

  Windows of base*t pixels for t in 1..2; of each the one with the largest sum (the first, scanning
  columns, then rows); of these the one that stands out most from its up to four neighbours. The
  whole image when it is not larger than the smallest window.

  Args:
    weights: [rows columns] of the whole image.
    base: side of the smallest window in pixels.
  """
  rows, columns = weights.shape
  cell_x, cell_y = width / columns, height / rows
  table = np.pad(np.cumsum(np.cumsum(weights.astype(np.float64), 0), 1), ((1, 0), (1, 0)))
  best: tuple[float, float, int, int, int, int] | None = None
  for ratio in RATIOS:
    nx = max(1, min(int(base * ratio / cell_x), columns))
    ny = max(1, min(int(base * ratio / cell_y), rows))
    if (nx, ny) == (columns, rows):
      if ratio == 1:
        return 0, 0, width, height
      continue
    sums = table[ny:, nx:] - table[:-ny, nx:] - table[ny:, :-nx] + table[:-ny, :-nx]
    x, y = np.unravel_index(np.argmax(sums.T), sums.T.shape)
    near = [sums[y + dy, x + dx] for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1))
            if 0 <= y + dy < sums.shape[0] and 0 <= x + dx < sums.shape[1]]
    sharpness = (sums[y, x] - float(np.mean(near))) / (nx * ny)
    if best is None or sharpness > best[0]:
      best = (sharpness, ratio, int(x), int(y), nx, ny)
  if best is None:
    return 0, 0, width, height
  _, ratio, x, y, nx, ny = best
  half = int(base * ratio) // 2
  centre_x = _inside(int(x * cell_x + cell_x * nx / 2), half, width)
  centre_y = _inside(int(y * cell_y + cell_y * ny / 2), half, height)
  return (max(centre_x - half, 0), max(centre_y - half, 0), min(centre_x + half, width),
          min(centre_y + half, height))


def _inside(centre: int, half: int, size: int) -> int:
  """The lower bound first; where the image is smaller than the window the box is clipped after."""
  return min(max(centre, half), size - half)


def fine_structure(pixels: np.ndarray) -> np.ndarray:
  """bool [h w]: pixels whose high-pass energy is above the median of the picture.

  The energy is the length, over channels, of the picture minus its 3x3 Gaussian blur (weights
  1 2 1), smoothed by a 7x7 median filter.
  """
  x = np.asarray(pixels, np.float64)
  padded = np.pad(x, ((1, 1), (1, 1), (0, 0)), mode='reflect')
  rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
  blurred = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
  energy = np.pad(np.linalg.norm(x - blurred, axis=-1), 3, mode='symmetric')
  windows = np.lib.stride_tricks.sliding_window_view(energy, (7, 7))
  smooth = np.stack([np.median(row, axis=(-2, -1)) for row in windows])  # a row at a time: memory
  return smooth > np.median(smooth)


def block_means(weights: np.ndarray, rows: int, columns: int) -> np.ndarray:
  """[h w] -> [rows columns]: means of equal blocks (h and w must be multiples of those)."""
  h, w = weights.shape
  return weights.reshape(rows, h // rows, columns, w // columns).mean(axis=(1, 3))


def tile_boxes(width: int, height: int, split: int | None) -> tuple[int, int, list[Box]]:
  """(columns, rows, boxes row by row) of the tiles of a large image."""
  if split is None or max(width, height) <= split:
    return 1, 1, [(0, 0, width, height)]
  rows = math.ceil(height / split)
  columns = max(1, int(rows * width / height))
  wide, high = math.ceil(width / columns), math.ceil(height / rows)
  boxes = [(x * wide, y * high, min((x + 1) * wide, width), min((y + 1) * high, height))
           for y in range(rows) for x in range(columns)]
  return columns, rows, boxes


class ViCropAnswerer(Answerer):
  """Answers from each image and a crop of it that the model's own attention chose.

  Args:
    answerer: a model whose visual tokens stand in the prompt and form a grid.

  Raises:
    UserError: a model that this cannot work with, and why.
  """

  def __init__(self, answerer: Answerer, config: ViCrop = ViCrop()):
    vars(self).update(vars(answerer))
    self.answerer, self.vicrop = answerer, config
    self.methods = {**answerer.methods, 'vicrop': dataclasses.asdict(config)}
    model = answerer.config
    if not model.fusion.one_pass:
      raise UserError('ViCrop reads the attention of the prompt on its visual tokens; fusion '
                      f'{model.fusion.kind!r} has none')
    if config.method != 'pure_grad' and config.layer >= model.text.depth:
      raise UserError(f'ViCrop: layer {config.layer} does not exist, the decoder has '
                      f'{model.text.depth}')
    self.grid = answerer.system.whole_grid(model.encoder, what='ViCrop')
    self.map = self.grid.whole
    self._map = jax.jit({'rel_att': self._attention, 'grad_att': self._weighted,
                         'pure_grad': self._pixel_gradient}[config.method], static_argnames='ex')

  def _mapped(self, batch) -> np.ndarray:
    """The method's map of a batch in float64, made in float32 whatever answers are computed in."""
    ex = self.generator.ex.replace(dtype='float32')
    return np.asarray(self._map(self.generator.params, batch, ex=ex), np.float64)

  def batch(self, items: Items) -> dict[str, Any]:
    """See `Answerer.batch`."""
    return self.answerer.batch(items)

  def shown(self, items: Items) -> list[tuple[tuple[Image.Image, ...], str]]:
    """[image, crop] and the question for each (image, question).

    Raises:
      UserError: a question without an image, or with several.
    """
    shown = []
    for images, question in items:
      if len(images) != 1:
        raise UserError(f'ViCrop crops the one image of a question, got {len(images)}')
      if not isinstance(question, str):
        raise UserError('ViCrop takes one question, no conversation and no system text; ask '
                        'without it')
      crop, _ = self.crop(images[0], question)
      shown.append(((images[0], crop), self._prompt(question)))
    return shown

  def _attention(self, params, batch, *, ex: Execution):
    """[b t] attention of the last place, mean over heads."""
    module = self.generator.fn.bind(params)
    x, valid = self._input(module, batch, ex)
    return last_attention(module.language, x, valid, self.vicrop.layer, ex=ex).mean(axis=1)

  def _input(self, module, batch, ex: Execution):
    embeds, valid, _ = module.prompt(batch, ex=ex)
    context = module.language.context(valid, ex=ex)
    return module.language.layers(embeds, context, stop=self.vicrop.layer)[0], valid

  def _weighted(self, params, batch, *, ex: Execution):
    """[b t] mean over heads of attention times the positive part of its gradient."""
    module = self.generator.fn.bind(params)
    x, valid = self._input(module, batch, ex)
    probs = last_attention(module.language, x, valid, self.vicrop.layer, ex=ex)

    def score(probs):
      scores = jax.nn.log_softmax(self._logits_from(module.language, x, valid, probs, ex))
      return scores.max(axis=-1).sum()

    return (probs * jax.nn.relu(jax.grad(score)(probs))).mean(axis=1)

  def _pixel_gradient(self, params, batch, *, ex: Execution):
    """[slots h w] length, over channels, of the gradient of the top next token's log-probability.

    Taken at the normalised pixels, as the original does.
    """
    module = self.generator.fn.bind(params)
    length = batch['tokens'].shape[1]

    def score(pixels):
      seen = {**batch, 'views': {**batch['views'], 'pixels': pixels}}
      embeds, valid, extras = module.prompt(seen, ex=ex)
      logits, _, _ = module.prefill(embeds, valid, slots=length, ex=ex, **extras)
      return jax.nn.log_softmax(logits).max(axis=-1).sum()

    gradient = jax.grad(score)(jnp.asarray(batch['views']['pixels'], jnp.float32))
    scale = 255 * jnp.asarray(self.grid.std, jnp.float32)
    return jnp.linalg.norm(gradient * scale, axis=-1)

  def _logits_from(self, decoder, x, valid, probs, ex: Execution):
    """Logits after the last place when its attention in the chosen layer is `probs`."""
    context, index = decoder.context(valid, ex=ex), self.vicrop.layer
    block = layer_at(decoder.blocks, index)
    normed = block.norm1(x)
    q, k, v = block.attn.project(normed, context.rope, ex=ex)
    y = attention(q, k, v, **context.reads, ex=ex)
    values = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    row = jnp.einsum('bht,bthp->bhp', probs, values)
    last = last_true(valid)
    rows = jnp.arange(x.shape[0])
    y = block.attn.out(y.at[rows, last].set(row.astype(y.dtype)).reshape(*x.shape[:2], -1),
                       ex=ex)
    if block.norm2 is None:
      x = x + y + block.mlp(normed, ex=ex)
    else:
      x = x + y
      x = x + block.mlp(block.norm2(x), ex=ex)
    x, _ = decoder.layers(x, context, start=index + 1)
    return decoder.logits(decoder.norm(x[rows, last]))

  def _gradients(self, images: Sequence[Image.Image], question: str):
    """(float64 [images h w] lengths of the gradient, the pixels it was taken at)."""
    batch = self.batch([([image], question) for image in images])
    pixels = np.asarray(batch['views']['pixels'])
    rows, columns = self.map.rows, self.map.columns
    if len(pixels) != len(images) or pixels.shape[1] % rows or pixels.shape[2] % columns:
      raise UserError(
        f"ViCrop: method 'pure_grad' needs one view of the whole image per image, whose sides are "
        f'multiples of the token map {rows} x {columns}; {self.config.system} makes '
        f'{len(pixels)} views of {pixels.shape[2]}x{pixels.shape[1]} pixels for {len(images)} '
        "image(s); use 'rel_att' or 'grad_att'")
    return self._mapped(batch), pixels

  def _pure_gradient(self, tiles: Sequence[Image.Image], question: str) -> np.ndarray:
    """float64 [tiles rows columns]."""
    asked, pixels = self._gradients(tiles, self._prompt(question))
    general, _ = self._gradients(tiles, self._prompt(GENERAL))
    ratio = asked / np.maximum(general, np.finfo(np.float32).tiny)
    return np.stack([block_means(r * fine_structure(p), self.map.rows, self.map.columns)
                     for r, p in zip(ratio, pixels, strict=True)])

  def _maps(self, images: Sequence[Image.Image], question: str) -> np.ndarray:
    """float64 [images rows columns]."""
    batch = self.batch([([image], question) for image in images])
    weights = self._mapped(batch)
    found = []
    for row, index in zip(weights, np.asarray(batch['visual_index']), strict=True):
      visual = np.zeros(int(index.max()) + 1)
      visual[index[index >= 0]] = row[index >= 0]
      found.append(visual[self.map.tokens].reshape(self.map.rows, self.map.columns))
    return np.stack(found)

  def importance(self, image: Image.Image, question: str) -> np.ndarray:
    """The map of an image, float64 [rows columns]; larger where the question points."""
    columns, rows, boxes = tile_boxes(*image.size, self.vicrop.split)
    tiles = [image if len(boxes) == 1 else image.crop(box) for box in boxes]
    if self.vicrop.method == 'pure_grad':
      maps = self._pure_gradient(tiles, question)
    else:
      maps = self._maps(tiles, self._prompt(question))
    if self.vicrop.method == 'rel_att':
      general = self._maps(tiles, self._prompt(GENERAL))
      maps = maps / np.maximum(general, np.finfo(np.float32).tiny)
    tiled = maps.reshape(rows, columns, self.map.rows, self.map.columns).transpose(0, 2, 1, 3)
    return tiled.reshape(rows * self.map.rows, columns * self.map.columns)

  def _prompt(self, question: str) -> str:
    return question if self.vicrop.suffix is None else f'{question} {self.vicrop.suffix}'

  def crop(self, image: Image.Image, question: str) -> tuple[Image.Image, Box]:
    """The part to look at again, and its box on the picture that was looked at."""
    picture = self.grid.picture(image)
    base = self.vicrop.base or self.grid.view
    box = crop_box(self.importance(picture, question), *picture.size, base)
    return picture.crop(box), box
