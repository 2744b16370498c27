"""Pre-training a small vision encoder on the letters of the built-in task.

Real systems start from an encoder pre-trained elsewhere (SigLIP, CLIP). This is the
miniature of that stage: a ViT learns, on crops drawn afresh at every step, to say from the LAST K
tokens of a view what is written on the sign of each colour; those K tokens are all that MC-LLaVA
keeps of a view. A second loss on every patch teaches reading in a fraction of the steps.
"""

from __future__ import annotations

from collections.abc import Callable
import concurrent.futures
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hrvlm_jax.core import paths
from hrvlm_jax.core.layers import LayerNorm, Linear
from hrvlm_jax.core.module import Functional, Module, Rngs
from hrvlm_jax.core.pixels import normalise
from hrvlm_jax.lab.needle import CUT, NOTHING, NeedleConfig, glyph_crops
from hrvlm_jax.training.optimizer import muon
from hrvlm_jax.training.schedules import learning_rate
from hrvlm_jax.vision.vit import ViT, ViTConfig

_NOTHING_WEIGHT = 0.05  # most patches show no letter; they would drown the others


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlyphConfig:
  """The pre-training run.

  Attributes:
    window: side of the crops in canvas pixels.
    last_tokens: K, the tokens the readout sees.
    patch_weight: weight of the loss on every patch.
    colour_weight: weight of a second loss on every patch, the colour of the sign it shows; systems
      that hand all patches to the language model need both in one token. 0: there is none.
    mean, std: of the pixels, as the system normalises them.
  """

  needle: NeedleConfig
  vision: ViTConfig
  window: int
  last_tokens: int
  steps: int
  batch_size: int = 64
  learning_rate: float = 2e-3
  warmup: int = 50
  weight_decay: float = 0.01
  patch_weight: float = 4.0
  colour_weight: float = 0.0
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)
  seed: int = 0

  @property
  def classes(self) -> int:
    """Letters, and 'nothing' as the last class."""
    return len(self.needle.alphabet) + 1


class GlyphReader(Module):
  """Tower plus two readouts: per colour from the last K tokens, per patch."""

  def __init__(self, config: GlyphConfig, *, rngs: Rngs):
    self.config = config
    width = config.vision.width
    self.tower = ViT(config.vision, rngs=rngs)
    self.norm = LayerNorm(width, eps=1e-6, rngs=rngs)
    self.read = Linear(width, len(config.needle.colours) * config.classes, rngs=rngs)
    self.patch_norm = LayerNorm(width, eps=1e-6, rngs=rngs)
    self.patch_read = Linear(width, config.classes, rngs=rngs)
    self.patch_colour = Linear(
      width, len(config.needle.colours), rngs=rngs) if config.colour_weight else None

  def __call__(self, pixels):
    """uint8 [n h w 3] -> logits [n colours classes], [n patches classes], [n patches colours].

    The last are None without `colour_weight`.
    """
    c = self.config
    x = self.tower(normalise(pixels, c.mean, c.std))
    x = x[:, -c.vision.grid**2:]  # without the class token
    # A mean, as attention takes one: what a decoder can read off these tokens in one layer.
    colours = self.read(self.norm(x[:, -c.last_tokens:].mean(axis=1)))
    shape = (len(x), len(c.needle.colours), c.classes)
    patches = self.patch_norm(x)
    shown = None if self.patch_colour is None else self.patch_colour(patches)
    return colours.reshape(shape), self.patch_read(patches), shown


def glyph_loss(fn: Functional, config: GlyphConfig, params, pixels, letters, patches, shown):
  """(loss, accuracy over visible signs); `patches`: letter and `shown`: colour of every patch."""
  colour_logits, patch_logits, shown_logits = fn.apply(params, pixels)
  nothing = config.classes - 1

  def cross_entropy(logits, labels, weight):
    targets = jnp.where(labels < 0, nothing, labels)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (loss * weight).sum() / jnp.maximum(weight.sum(), 1)

  colour_weight = jnp.where(letters == CUT, 0.0, jnp.where(letters == NOTHING, 0.2, 1.0))
  patch_weight = jnp.where(patches == CUT, 0.0,
                           jnp.where(patches == NOTHING, _NOTHING_WEIGHT, 1.0))
  visible = letters >= 0
  right = (colour_logits.argmax(-1) == letters) & visible
  loss = cross_entropy(colour_logits, letters, colour_weight)
  loss += config.patch_weight * cross_entropy(patch_logits, patches, patch_weight)
  if shown_logits is not None:
    targets = jnp.clip(shown, 0)
    lost = optax.softmax_cross_entropy_with_integer_labels(shown_logits, targets)
    loss += config.colour_weight * (lost * (shown >= 0)).sum() / jnp.maximum((shown >= 0).sum(), 1)
  return loss, right.sum() / jnp.maximum(visible.sum(), 1)


def _draw(config: GlyphConfig, step: int):
  """The crops of a step, a function of (seed, step)."""
  rng = np.random.default_rng(np.random.SeedSequence([config.seed, step]))
  crops = glyph_crops(config.needle, rng, config.batch_size, window=config.window,
                      size=config.vision.image_size)
  grid = config.vision.grid
  return crops.pixels, crops.letters[:, :, 0], crops.patch_letters(grid), crops.patch_colours(grid)


def pretrain(
  config: GlyphConfig, *, report: Callable[[int, float, float], None] | None = None
) -> tuple[dict, float]:
  """Trains the tower; returns (its parameters, accuracy on the last 20 fresh batches).

  Crops of the next step are drawn in a thread while the device works.

  Args:
    report: called with (step, loss, accuracy) every step.
  """
  fn = Functional(lambda rngs: GlyphReader(config, rngs=rngs))
  params = jax.jit(fn.init)(jax.random.key(config.seed))
  rate = learning_rate('cosine', peak=config.learning_rate, total_steps=config.steps,
                       warmup_steps=min(config.warmup, config.steps))
  tx = optax.chain(optax.clip_by_global_norm(1.0), muon(rate, config.weight_decay, b2=0.98))

  @jax.jit
  def update(params, opt, *batch):
    grad = jax.value_and_grad(lambda p: glyph_loss(fn, config, p, *batch), has_aux=True)
    (loss, accuracy), grads = grad(params)
    flat = paths.flatten(params)
    updates, opt = tx.update(paths.flatten(grads), opt, flat)
    return paths.unflatten(optax.apply_updates(flat, updates)), opt, loss, accuracy

  opt = tx.init(paths.flatten(params))
  history = []
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    ahead = pool.submit(_draw, config, 0)
    for step in range(config.steps):
      batch = ahead.result()
      ahead = pool.submit(_draw, config, step + 1)
      params, opt, loss, accuracy = update(params, opt, *batch)
      history.append(float(accuracy))
      if report is not None:
        report(step + 1, float(loss), history[-1])
  return params['tower'], float(np.mean(history[-20:]))
