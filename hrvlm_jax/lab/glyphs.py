"""Pre-training a small ViT on crops of the built-in task: what is written on which colour.

A ViT learns, on crops drawn afresh at every step, to say from the LAST K tokens of a view what is
written on the sign of each colour; those K tokens are all that MC-LLaVA keeps of a view. A second
loss on every patch teaches reading in a fraction of the steps.

For `relate` and `page` the views are those of `needle.views`, some of the whole picture. The last
tokens of a page tell its words apart by where in the view they stand. Every patch also learns which
thing it shows, the last tokens and all together which things there are, and which cue.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import optax

from hrvlm_jax.core.layers import LayerNorm, Linear
from hrvlm_jax.core.module import Module, Rngs
from hrvlm_jax.core.resample import normalise
from hrvlm_jax.lab.needle import CUT, NOTHING, glyph_crops, task_views, views
from hrvlm_jax.lab.pretrain import NOTHING_WEIGHT, Pretraining, weighted_entropy
from hrvlm_jax.vision.vit import ViT, ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlyphConfig(Pretraining):
  """The head for a ViT on crops.

  Attributes:
    window: side of the crops in canvas pixels.
    last_tokens: K, the tokens the readout sees.
    patch_weight: weight of the loss on every patch.
    whole: share of views of the whole picture, of composed tasks.
    thing_weight: of the losses on things and cues, of composed tasks.
    colour_weight: weight of a second loss on every patch, the colour of the sign it shows; systems
      that hand all patches to the language model need both in one token. 0: there is none.
    mean, std: of the pixels, as the system normalises them.
  """

  vision: ViTConfig
  window: int
  last_tokens: int
  batch_size: int = 64
  patch_weight: float = 4.0
  colour_weight: float = 0.0
  whole: float = 0.125
  thing_weight: float = 1.0
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)
  below: ClassVar[str] = 'tower/'

  @property
  def classes(self) -> int:
    """Letters, and 'nothing' as the last class."""
    return len(self.needle.alphabet) + 1

  @property
  def composed(self) -> bool:
    """Whether the task shows things and a cue too."""
    return views.composed(self.needle)

  def reader(self, rngs: Rngs) -> Module:
    """The tower with its readouts."""
    return GlyphReader(self, rngs=rngs)

  def draw(self, step: int):
    """(pixels, letter of every slot, letter and colour of every patch[, its thing, the cue]).

    Slots are the colours, those of a page `views.slots`.
    """
    sizes = {'window': self.window, 'size': self.vision.image_size}
    grid, rng = self.vision.grid, self.rng(step)
    crops = task_views(self.needle, rng, self.batch_size, whole=self.whole, **sizes) if (
      self.composed) else glyph_crops(self.needle, rng, self.batch_size, **sizes)
    drawn = (crops.pixels, crops.letters[:, :, 0], crops.patch_letters(grid),
             crops.patch_colours(grid))
    return (*drawn, crops.patch_things(grid), crops.cues) if self.composed else drawn

  def loss(self, reader, batch, key):
    """(loss, accuracy over visible signs)."""
    del key
    pixels, letters, patches, shown, *scene = batch
    (colour_logits, patch_logits, shown_logits), scene_logits = reader(pixels)
    target = lambda labels: jnp.where(labels < 0, self.classes - 1, labels)
    colour_weight = jnp.where(letters == CUT, 0.0, jnp.where(letters == NOTHING, 0.2, 1.0))
    patch_weight = jnp.where(patches == CUT, 0.0,
                             jnp.where(patches == NOTHING, NOTHING_WEIGHT, 1.0))
    visible = letters >= 0
    right = (colour_logits.argmax(-1) == letters) & visible
    loss = weighted_entropy(colour_logits, target(letters), colour_weight)
    loss += self.patch_weight * weighted_entropy(patch_logits, target(patches), patch_weight)
    if shown_logits is not None:
      loss += self.colour_weight * weighted_entropy(shown_logits, jnp.clip(shown, 0), shown >= 0)
    if self.composed:
      loss += self.thing_weight * scene_loss(*scene, *scene_logits)
    return loss, right.sum() / jnp.maximum(visible.sum(), 1)


def scene_loss(things, cues, patch_logits, view_logits):
  """What patches show of things; what the last tokens, and all, say of things and of the cue.

  things: int32 [n patches] of `GlyphCrops`; cues: int32 [n]; patch_logits: [n patches things + 1];
  view_logits: [n 2 things + states].
  """
  count = patch_logits.shape[-1] - 1
  weight = jnp.where(things == CUT, 0.0, jnp.where(things == NOTHING, NOTHING_WEIGHT, 1.0))
  loss = weighted_entropy(patch_logits, jnp.where(things < 0, count, things), weight)
  there = (things[:, :, None] == jnp.arange(count)).any(1)  # n things
  fair = ~(things == CUT).any(1)
  binary = optax.sigmoid_binary_cross_entropy(view_logits[..., :count], there[:, None])
  loss += (binary.sum(-1) * fair[:, None]).sum() / jnp.maximum(2 * fair.sum(), 1)
  lights = jnp.broadcast_to(cues[:, None], view_logits.shape[:2])
  return loss + weighted_entropy(view_logits[..., count:], jnp.clip(lights, 0), lights >= 0)


class GlyphReader(Module):
  """Tower plus its readouts: per slot from the last K tokens, per patch; of things and cue."""

  def __init__(self, config: GlyphConfig, *, rngs: Rngs):
    self.config = config
    width = config.vision.width
    self.tower = ViT(config.vision, rngs=rngs)
    self.norm = LayerNorm(width, eps=1e-6, rngs=rngs)
    self.slots = views.slots(config.needle) if config.composed else len(config.needle.colours)
    self.read = Linear(width, self.slots * config.classes, rngs=rngs)
    self.patch_norm = LayerNorm(width, eps=1e-6, rngs=rngs)
    self.patch_read = Linear(width, config.classes, rngs=rngs)
    self.patch_colour = Linear(
      width, len(config.needle.colours), rngs=rngs) if config.colour_weight else None
    if config.composed:
      self.patch_thing = Linear(width, len(views.THINGS) + 1, rngs=rngs)
      self.scene = Linear(width, len(views.THINGS) + len(views.states(config.needle)), rngs=rngs)

  def __call__(self, pixels):
    """uint8 [n h w 3] -> (logits of letters by slot, by patch, of colours by patch), more logits.

    [n slots classes], [n patches classes], [n patches colours] or None without `colour_weight`;
    more: of things by patch [n patches things + 1], of things and cues from the last tokens and
    from all [n 2 things + states]; () of plain tasks.
    """
    c = self.config
    x = self.tower(normalise(pixels, c.mean, c.std))
    x = x[:, -c.vision.grid**2:]  # without the class token
    # A mean, as attention takes one: what a decoder can read off these tokens in one layer.
    last = self.norm(x[:, -c.last_tokens:].mean(axis=1))
    colours = self.read(last)
    shape = (len(x), self.slots, c.classes)
    patches = self.patch_norm(x)
    shown = None if self.patch_colour is None else self.patch_colour(patches)
    scene = (self.patch_thing(patches), self.scene(jnp.stack([last, patches.mean(1)], 1))) if (
      c.composed) else ()
    return (colours.reshape(shape), self.patch_read(patches), shown), scene
