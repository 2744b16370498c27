"""Pre-training on whole scenes of the built-in task, for encoders that see an image in one piece.

A ViT that reads crops (`training.glyphs`) is not yet what PS3 or LLaVA-HR need. PS3's tower has to
read small patches among other selected patches, with the thumbnail's keys and values in front, at
positions of a larger grid (the original's PS3 pre-training teaches that); LLaVA-HR's ConvNeXt comes
from a pre-training of its own. Here both learn to say, from every token of a scene, which letter on
which colour it shows. Cells of the PS3 tower are drawn at random: nothing is learned here about
where to look.

Axis letters: n scenes, t tokens, d width, g side of a token grid.
"""

from __future__ import annotations

from collections.abc import Callable
import concurrent.futures
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hrvlm_jax.core import paths, resample
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.layers import LayerNorm, Linear
from hrvlm_jax.core.module import Functional, List, Module, Rngs
from hrvlm_jax.core.pixels import normalise
from hrvlm_jax.lab.needle import NeedleConfig, glyph_crops
from hrvlm_jax.systems.llava_hr.config import LlavaHRConfig
from hrvlm_jax.systems.ps3.encoder import Encoder as PS3
from hrvlm_jax.systems.vila_hd.config import VilaHDConfig
from hrvlm_jax.training.optimizer import muon
from hrvlm_jax.training.schedules import learning_rate
from hrvlm_jax.vision.convnext import ConvNeXt

_NOTHING_WEIGHT = 0.05  # as in `training.glyphs`


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneConfig:
  """The pre-training run.

  Attributes:
    encoder: of a system that has something to learn from scenes (`part`).
    window: for a ConvNeXt, which reads crops as it reads whole images: side in canvas pixels of
      crops to learn from, which show more letters per pixel than scenes do. None: whole scenes.
  """

  needle: NeedleConfig
  encoder: Any
  steps: int
  batch_size: int = 32
  learning_rate: float = 2e-3
  warmup: int = 50
  weight_decay: float = 0.01
  window: int | None = None
  seed: int = 0

  def __post_init__(self):
    part(self.encoder)
    if self.window is None:
      return
    if isinstance(self.encoder, VilaHDConfig):
      raise UserError('SceneConfig: window is for a ConvNeXt; VILA-HD learns from whole scenes')
    if self.size % self.encoder.slow.stride:
      raise UserError(f'SceneConfig: a window of {self.window} canvas pixels is {self.size} pixels '
                      f'for the encoder, expected a multiple of {self.encoder.slow.stride}')

  @property
  def canvas(self) -> int:
    """Side in canvas pixels of what a picture shows."""
    return self.window or min(self.needle.width, self.needle.height)

  @property
  def size(self) -> int:
    """Side in pixels of the square a scene, or a crop of it, is squashed to."""
    vila = isinstance(self.encoder, VilaHDConfig)
    whole = self.encoder.side if vila else self.encoder.image_size
    return whole * self.canvas // min(self.needle.width, self.needle.height)


def part(encoder: Any) -> tuple[str, ...]:
  """Which parameters of an encoder learn from scenes: paths below the encoder.

  Raises:
    UserError: an encoder that reads views of one size, for which `training.glyphs` is enough.
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
    if isinstance(encoder, VilaHDConfig):
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
    vila = isinstance(encoder, VilaHDConfig)
    source = encoder.tower if vila else encoder
    images = normalise(pixels, source.mean, source.std)
    seen = self._looks(images, key) if vila else self._stages(images)
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


def scene_loss(fn: Functional, config: SceneConfig, params, pixels, key, labels):
  """(loss, accuracy over tokens on a letter of the last grid).

  Args:
    labels: by side of a grid, (letter, colour) of every cell in raster order [n g*g].
  """
  nothing, total, accuracy = len(config.needle.alphabet), 0.0, 0.0
  for letters, colours, cells, grid in fn.apply(params, pixels, key):
    letter, colour = (jnp.take_along_axis(label, cells, axis=1) for label in labels[grid])
    weight = jnp.where(letter >= 0, 1.0, _NOTHING_WEIGHT) * (letter >= -1)
    entropy = optax.softmax_cross_entropy_with_integer_labels
    lost = entropy(letters, jnp.where(letter < 0, nothing, letter))
    total += 4 * (lost * weight).sum() / jnp.maximum(weight.sum(), 1)
    shown = (letter >= 0).astype(jnp.float32)
    count = jnp.maximum(shown.sum(), 1)
    total += (entropy(colours, jnp.clip(colour, 0)) * shown).sum() / count
    accuracy = ((letters.argmax(-1) == letter) * shown).sum() / count
  return total, accuracy


def _grids(config: SceneConfig) -> list[int]:
  if isinstance(config.encoder, VilaHDConfig):
    return [rows for rows, _ in config.encoder.plan().grids[1:]]
  slow, stages = config.encoder.slow, len(config.encoder.slow.depths)
  return [slow.grid(config.size, stage) for stage in range(stages)][-2:]


def _draw(config: SceneConfig, step: int):
  """The scenes of a step, a function of (seed, step)."""
  rng = np.random.default_rng(np.random.SeedSequence([config.seed, step]))
  scenes = glyph_crops(config.needle, rng, config.batch_size, window=config.canvas,
                       size=config.size, whole=float(config.window is None))
  labels = {g: (scenes.patch_letters(g), scenes.patch_colours(g)) for g in _grids(config)}
  return scenes.pixels, labels


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


def pretrain(
  config: SceneConfig, start: dict[str, Any] | None = None, *,
  report: Callable[[int, float, float], None] | None = None,
) -> tuple[dict[str, Any], float]:
  """Trains `part(config.encoder)`; returns (flat parameters below the encoder, accuracy).

  The accuracy is over tokens on a letter: of the last 20 fresh batches, and for crops of fresh
  whole scenes after training.

  Args:
    start: flat parameters below the encoder to begin with (the shared tower's).
    report: called with (step, loss, accuracy) every step.
  """
  fn = Functional(lambda rngs: SceneReader(config, rngs=rngs))
  flat = quick_start(paths.flatten(jax.jit(fn.init)(jax.random.key(config.seed))))
  flat |= {path: jnp.asarray(leaf) for path, leaf in (start or {}).items() if path in flat}
  rate = learning_rate('cosine', peak=config.learning_rate, total_steps=config.steps,
                       warmup_steps=min(config.warmup, config.steps))
  tx = optax.chain(optax.clip_by_global_norm(1.0), muon(rate, config.weight_decay, b2=0.98))

  @jax.jit
  def update(flat, opt, step, pixels, labels):
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    loss_of = lambda f: scene_loss(fn, config, paths.unflatten(f), pixels, key, labels)
    (loss, accuracy), grads = jax.value_and_grad(loss_of, has_aux=True)(flat)
    updates, opt = tx.update(grads, opt, flat)
    return optax.apply_updates(flat, updates), opt, loss, accuracy

  opt, history = tx.init(flat), []
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    ahead = pool.submit(_draw, config, 0)
    for step in range(config.steps):
      batch = ahead.result()
      ahead = pool.submit(_draw, config, step + 1)
      flat, opt, loss, accuracy = update(flat, opt, step, *batch)
      history.append(float(accuracy))
      if report is not None:
        report(step + 1, float(loss), history[-1])
  kept = {path: leaf for path, leaf in flat.items()
          if any(path.startswith(prefix + '/') for prefix in part(config.encoder))}
  if config.window is not None:
    history = _whole_scenes(fn, config, flat)
  return kept, float(np.mean(history[-20:]))


def _whole_scenes(fn: Functional, config: SceneConfig, flat: dict[str, Any]) -> list[float]:
  """Accuracy of fresh batches of whole scenes, for what learned from crops."""
  config = dataclasses.replace(config, window=None, batch_size=min(config.batch_size, 16))
  read = jax.jit(lambda flat, key, *batch: scene_loss(
    fn, config, paths.unflatten(flat), batch[0], key, batch[1])[1])
  key = jax.random.key(config.seed)
  return [float(read(flat, key, *_draw(config, config.steps + number))) for number in range(8)]
