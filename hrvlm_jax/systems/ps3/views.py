"""PS3 on the host: squash to the largest scale, count tokens, draw what was selected.

All data-dependent work of PS3 is on the device; a view is the squashed image. Source: `NVlabs/PS3:
ps3/image_processing_ps3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.images import resize_exact, to_rgb
from hrvlm_jax.systems import images as image_slots
from hrvlm_jax.systems.contract import Count, Views
from hrvlm_jax.systems.ps3.config import PS3Config
from hrvlm_jax.systems.ps3.plan import make_plan


def squash(image: Image.Image, side: int) -> np.ndarray:
  """uint8 [side side 3]: resized in its own mode, then RGB (transparency is dropped afterwards)."""
  return np.asarray(to_rgb(resize_exact(image, (side, side))), np.uint8)


def tokens(config: PS3Config) -> int:
  """Visual tokens of one image, as `config.look` asks."""
  side, look = config.scales[-1], config.look
  return make_plan(side, side, config, num_looks=look.looks, num_tokens=look.tokens,
                   first_scales=look.first_scales).tokens


def count(width: int, height: int, config: PS3Config) -> Count:
  """One view and the same number of tokens for every image: they are squashed.

  Raises:
    UserError: a side below 1.
  """
  if width < 1 or height < 1:
    raise UserError(f'image of {width}x{height} pixels: both sides must be at least 1')
  return Count(1, tokens(config))


def views(images: Sequence[Image.Image], config: PS3Config) -> Views:
  """pixels uint8 [v side side 3] and tokens int32 [v] of one example."""
  side = config.scales[-1]
  pixels = [squash(image, side) for image in images]
  return {
    'pixels': np.stack(pixels) if pixels else np.zeros((0, side, side, 3), np.uint8),
    'tokens': np.full(len(pixels), tokens(config), np.int32),
  }


def batch(examples: Sequence[Views], config: PS3Config, *, slots: int | None = None,
          tokens: int | None = None) -> Views:
  """Packs a batch: pixels uint8 [slots side side 3] and indices, see `systems.images.pack`.

  The tokens of an image are those its example counts.
  """
  shape = (config.scales[-1], config.scales[-1], 3)
  each = int(next((e['tokens'][0] for e in examples if len(e['tokens'])), 0))
  return image_slots.pack(examples, {'pixels': (shape, np.uint8)}, each=each, slots=slots,
                          tokens=tokens)


def shift(views_: Views, config: PS3Config, slots: int) -> Views:
  """A batch's views whose indices count `slots` more image slots before them."""
  return image_slots.shift(views_, slots, each=tokens(config))


def overlay(image: Image.Image, config: PS3Config, info: Mapping[str, object], *,
            side: int = 512) -> Image.Image:
  """One panel per high scale: chosen patches in full light, the rest dimmed, scores in red.

  Args:
    info: `maps` and `probs` of the encoder (the first row of a batch is drawn); without them the
      image alone.
    side: longest side of a panel in pixels.
  """
  del config
  rgb = to_rgb(image)
  scale = side / max(rgb.size)
  size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
  base = np.asarray(rgb.resize(size), np.float32)
  panels = []
  for chosen, score in zip(info.get('maps', ()), info.get('probs', ()), strict=True):
    light = _stretch(np.asarray(chosen, np.float32)[0], size)
    heat = _stretch(np.asarray(score, np.float32)[0], size)
    low, high = float(heat.min()), float(heat.max())
    heat = (heat - low) / max(high - low, 1e-6)
    dimmed = base * (0.35 + 0.65 * light)[..., None]
    dimmed[..., 0] = np.maximum(dimmed[..., 0], 160 * heat * (1 - light))
    panels.append(dimmed)
  panels = panels or [base]
  return Image.fromarray(np.concatenate(panels, axis=1).round().clip(0, 255).astype(np.uint8))


def _stretch(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """A map of cells as pixels [h w], each cell a rectangle."""
  rows = np.arange(size[1]) * cells.shape[0] // size[1]
  cols = np.arange(size[0]) * cells.shape[1] // size[0]
  return cells[rows][:, cols]
