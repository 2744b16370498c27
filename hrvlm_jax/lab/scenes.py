"""Pre-training on whole scenes of the built-in task, for encoders that see an image in one piece.

A ViT that reads crops (`lab.glyphs`) is not yet what PS3 or LLaVA-HR need. PS3's tower has to
read small patches among other selected patches, with the thumbnail's keys and values in front, at
positions of a larger grid (the original's PS3 pre-training teaches that); LLaVA-HR's ConvNeXt comes
from a pre-training of its own. Here both learn to say, from every token of a scene, which letter on
which colour it shows. Cells of the PS3 tower are drawn at random: nothing is learned here about
where to look.

Axis letters: n scenes, t tokens, d width, g side of a token grid.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.core import resample
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.layers import LayerNorm, Linear
from hrvlm_jax.core.module import List, Module, Rngs
from hrvlm_jax.core.resample import normalise
from hrvlm_jax.lab.needle import glyph_crops
from hrvlm_jax.lab.pretrain import NOTHING_WEIGHT, Pretraining, weighted_entropy
from hrvlm_jax.systems.llava_hr.config import LlavaHRConfig
from hrvlm_jax.systems.ps3.encoder import Encoder as PS3
from hrvlm_jax.systems.vila_hd.config import VilaHDConfig
from hrvlm_jax.vision.convnext import ConvNeXt


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneConfig(Pretraining):
  """The head for a part of an encoder on whole scenes.

  Attributes:
    encoder: of a system that has something to learn from scenes (`part`).
    window: for a ConvNeXt, which reads crops as it reads whole images: side in canvas pixels of
      crops to learn from, which show more letters per pixel than scenes do. None: whole scenes.
  """

  encoder: Any
  window: int | None = None

  def __post_init__(self):
    part(self.encoder)
    if self.window is None:
      return
    if self.vila:
      raise UserError('SceneConfig: window is for a ConvNeXt; VILA-HD learns from whole scenes')
    if self.size % self.encoder.slow.stride:
      raise UserError(f'SceneConfig: a window of {self.window} canvas pixels is {self.size} pixels '
                      f'for the encoder, expected a multiple of {self.encoder.slow.stride}')

  @property
  def vila(self) -> bool:
    """Whether the encoder is VILA-HD's."""
    return isinstance(self.encoder, VilaHDConfig)

  @property
  def canvas(self) -> int:
    """Side in canvas pixels of what a picture shows."""
    return self.window or min(self.needle.width, self.needle.height)

  @property
  def size(self) -> int:
    """Side in pixels of the square a scene, or a crop of it, is squashed to."""
    whole = self.encoder.side if self.vila else self.encoder.image_size
    return whole * self.canvas // min(self.needle.width, self.needle.height)

  @property
  def grids(self) -> list[int]:
    """Sides of the token grids that are read."""
    if self.vila:
      return [rows for rows, _ in self.encoder.plan().grids[1:]]
    slow, stages = self.encoder.slow, len(self.encoder.slow.depths)
    return [slow.grid(self.size, stage) for stage in range(stages)][-2:]

  def reader(self, rngs: Rngs) -> Module:
    """The part of the encoder with its readouts."""
    return SceneReader(self, rngs=rngs)

  def draw(self, step: int):
    """(pixels; by side of a grid, (letter, colour) of every cell in raster order [n g*g])."""
    scenes = glyph_crops(self.needle, self.rng(step), self.batch_size, window=self.canvas,
                         size=self.size, whole=float(self.window is None))
    return scenes.pixels, {g: (scenes.patch_letters(g), scenes.patch_colours(g))
                           for g in self.grids}

  def loss(self, reader, batch, key):
    """(loss, accuracy over tokens on a letter of the last grid)."""
    pixels, labels = batch
    nothing, total, accuracy = len(self.needle.alphabet), 0.0, 0.0
    for letters, colours, cells, grid in reader(pixels, key):
      letter, colour = (jnp.take_along_axis(label, cells, axis=1) for label in labels[grid])
      weight = jnp.where(letter >= 0, 1.0, NOTHING_WEIGHT) * (letter >= -1)
      total += weighted_entropy(letters, jnp.where(letter < 0, nothing, letter), weight, 4)
      shown = (letter >= 0).astype(jnp.float32)
      total += weighted_entropy(colours, jnp.clip(colour, 0), shown)
      accuracy = ((letters.argmax(-1) == letter) * shown).sum() / jnp.maximum(shown.sum(), 1)
    return total, accuracy

  def ready(self, flat):
    """See `quick_start`."""
    return quick_start(flat)

  def kept(self, flat):
    """`part` of the encoder, by paths below it."""
    return {path: leaf for path, leaf in flat.items()
            if path.startswith(tuple(f'{prefix}/' for prefix in part(self.encoder)))}

  def judged(self):
    """What learned from crops is judged on whole scenes."""
    if self.window is None:
      return None
    whole = dataclasses.replace(self, window=None, batch_size=min(self.batch_size, 16))
    return whole, range(self.steps, self.steps + 8)


def part(encoder: Any) -> tuple[str, ...]:
  """Which parameters of an encoder learn from scenes: paths below the encoder.

  Raises:
    UserError: an encoder that reads views of one size, for which `lab.glyphs` is enough.
  """
  if isinstance(encoder, VilaHDConfig):
    return ('ps3/tower', 'ps3/residual')
  if isinstance(encoder, LlavaHRConfig) and encoder.slow is not None:
    return ('slow',)
  raise UserError(f'{type(encoder).__name__}: nothing of this encoder learns from whole scenes; '
                  'VILA-HD (its tower) and LLaVA-HR (its ConvNeXt) do')


class SceneReader(Module):
  """The part of the encoder that learns, and readouts of letter and colour per token grid."""

  def __init__(self, config: SceneConfig, *, rngs: Rngs):
    self.config, encoder = config, config.encoder
    if config.vila:
      self.ps3 = PS3(encoder.tower, rngs=rngs)
      widths = [encoder.tower.vision.width] * encoder.tower.high_scales
    else:
      self.slow = ConvNeXt(encoder.slow, rngs=rngs)
      widths = list(encoder.slow.widths[-2:])
    self.norms = List([LayerNorm(width, eps=1e-6, rngs=rngs) for width in widths])
    classes = len(config.needle.alphabet) + 1, len(config.needle.colours)
    self.letters = List([Linear(width, classes[0], rngs=rngs) for width in widths])
    self.colours = List([Linear(width, classes[1], rngs=rngs) for width in widths])

  def __call__(self, pixels, key):
    """uint8 [n s s 3] -> [(letter logits [n t c], colour logits [n t c], cells [n t], g)]."""
    encoder = self.config.encoder
    source = encoder.tower if self.config.vila else encoder
    images = normalise(pixels, source.mean, source.std)
    seen = self._looks(images, key) if self.config.vila else self._stages(images)
    out = []
    for number, (tokens, cells, grid) in enumerate(seen):
      x = self.norms[number](tokens)
      out.append((self.letters[number](x), self.colours[number](x), cells, grid))
    return out

  def _looks(self, images, key):
    encoder, tower = self.config.encoder, self.config.encoder.tower
    plan = encoder.plan()
    low = self.ps3.encode_low(images, select=False)
    first = jax.random.uniform(key, (images.shape[0], tower.grid, tower.grid))
    probs = tuple(resample.nearest(first, *grid) for grid in plan.grids[1:])
    out = self.ps3.encode_high(low, images, probs, plan)
    tokens, seen, start, used = out.last[:, tower.grid**2:], [], 0, 0
    for (rows, cols), count in zip(plan.grids[1:], np.sum(plan.counts[0], axis=0), strict=True):
      # Cells rise, and every scale has a fixed number of them.
      cells = out.cells[:, used:used + count] - start
      seen.append((tokens[:, used:used + count], cells, rows))
      start, used = start + rows * cols, used + int(count)
    return seen

  def _stages(self, images):
    x, seen = self.slow.stem(images), []
    for number, stage in enumerate(self.slow.stages):
      x = stage(x)
      if number >= len(self.slow.stages) - 2:
        n, rows, cols, width = x.shape
        cells = jnp.broadcast_to(jnp.arange(rows * cols), (n, rows * cols))
        seen.append((x.reshape(n, rows * cols, width), cells, rows))
    return seen


def quick_start(flat: dict[str, Any]) -> dict[str, Any]:
  """A drawn ConvNeXt made ready for hundreds of steps; other leaves as they are.

  Its published start (kernels of 0.02, layer scales of 1e-6) is for deep trunks and long runs: the
  blocks of a small one would add nothing until a short run is over. Here kernels keep the size of
  what they read, and blocks count from the first step. Depthwise kernels start with their middle
  3 x 3: on crops of a few cells the rest would stay as drawn, and speak up in a whole image.
  """
  def ready(path: str, leaf: Any) -> Any:
    if not path.startswith('slow/'):
      return leaf
    if path.endswith('/layer_scale'):
      return jnp.ones_like(leaf)
    if path.endswith('/conv_dw/kernel'):  # layers r s 1 channels
      near = jnp.abs(jnp.arange(leaf.shape[-4]) - leaf.shape[-4] // 2) <= 1
      return jnp.where((near[:, None] & near)[..., None, None], leaf / (leaf.std() * 3), 0)
    if path.endswith('/kernel'):
      # Stacked blocks have an axis in front: [layers] in out; r s in out.
      fan_in = math.prod(leaf.shape[-2:-1] if '/mlp/' in path else leaf.shape[-4:-1])
      return leaf / (leaf.std() * math.sqrt(fan_in))
    return leaf

  return {path: ready(path, leaf) for path, leaf in flat.items()}
