"""PS3 on the host: squash to the largest scale, count tokens, draw what was selected.

All data-dependent work of PS3 is on the device; a view is the squashed image. Source: `NVlabs/PS3:
ps3/image_processing_ps3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from hrvlm_jax.core.images import check_size, resize_exact, to_rgb
from hrvlm_jax.parallel.rules import WHOLE_VECTORS, Rule
from hrvlm_jax.systems.contract import Count
from hrvlm_jax.systems.grid import Grid, TokenMap
from hrvlm_jax.systems.packing import Entry, Packing, Views, join
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


def places(config: PS3Config) -> int:
  """Patches that run through the tower: the thumbnail's and those of the looks."""
  return tokens(config)


def count(width: int, height: int, config: PS3Config) -> Count:
  """One view and the same number of tokens for every image: they are squashed.

  Raises:
    UserError: a side below 1.
  """
  check_size(width, height)
  return Count(1, tokens(config))


def views(images: Sequence[Image.Image], config: PS3Config) -> Views:
  """Arrays of one example: pixels uint8 [m side side 3], tokens int32 [m]."""
  each = tokens(config)
  return join([{'pixels': squash(image, config.scales[-1])[None], 'tokens': each}
               for image in images], packing(config))


def packing(config: PS3Config) -> Packing:
  """Images of all rows share their slots."""
  side, each = config.scales[-1], tokens(config)
  return Packing(slots={'pixels': Entry((side, side, 3))}, each=each, tokens=each)


def grid(config: PS3Config) -> Grid:
  """The thumbnail's map; the selected tokens stand where the prompt or saliency sent them."""
  return Grid(maps=(TokenMap(config.grid, config.grid),), view=config.scales[0], std=config.std)


def rules(config: PS3Config) -> tuple[Rule, ...]:
  """Sharding rows of the position residuals and the selection's prompt."""
  del config
  return (Rule(r'.*/residual/\d+', ('fsdp',)), Rule(r'.*/prior_prompt', (), why=WHOLE_VECTORS))


def backbones(config: PS3Config) -> dict[str, Any]:
  """The whole encoder, or its trunk, can start from a release of its own."""
  return {'vision': config, 'vision/tower': config.vision}


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
