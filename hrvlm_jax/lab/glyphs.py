"""Pre-training a small ViT on crops of the built-in task: what is written on which colour.

A ViT learns, on crops drawn afresh at every step, to say from the LAST K tokens of a view what is
written on the sign of each colour; those K tokens are all that MC-LLaVA keeps of a view. A second
loss on every patch teaches reading in a fraction of the steps.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from hrvlm_jax.core.layers import LayerNorm, Linear
from hrvlm_jax.core.module import Module, Rngs
from hrvlm_jax.core.resample import normalise
from hrvlm_jax.lab.needle import CUT, NOTHING, glyph_crops
from hrvlm_jax.lab.pretrain import NOTHING_WEIGHT, Pretraining, weighted_entropy
from hrvlm_jax.vision.vit import ViT, ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlyphConfig(Pretraining):
  """The head for a ViT on crops.

  Attributes:
    window: side of the crops in canvas pixels.
    last_tokens: K, the tokens the readout sees.
    patch_weight: weight of the loss on every patch.
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
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)
  below: ClassVar[str] = 'tower/'

  @property
  def classes(self) -> int:
    """Letters, and 'nothing' as the last class."""
    return len(self.needle.alphabet) + 1

  def reader(self, rngs: Rngs) -> Module:
    """The tower with its readouts."""
    return GlyphReader(self, rngs=rngs)

  def draw(self, step: int):
    """(pixels, letter of every colour, letter and colour of every patch)."""
    crops = glyph_crops(self.needle, self.rng(step), self.batch_size, window=self.window,
                        size=self.vision.image_size)
    grid = self.vision.grid
    return (crops.pixels, crops.letters[:, :, 0], crops.patch_letters(grid),
            crops.patch_colours(grid))

  def loss(self, reader, batch, key):
    """(loss, accuracy over visible signs)."""
    del key
    pixels, letters, patches, shown = batch
    colour_logits, patch_logits, shown_logits = reader(pixels)
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
    return loss, right.sum() / jnp.maximum(visible.sum(), 1)


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
