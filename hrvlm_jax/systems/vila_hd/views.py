"""VILA-HD on the host: squash, grounding boxes, counts, packing.

Source: `NVlabs/VILA: llava/mm_utils.py`, `llava/data/dataset.py`. Everything that depends on pixels
happens on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.images import check_size, resize_exact, to_rgb
from hrvlm_jax.parallel.rules import Rule
from hrvlm_jax.systems.contract import Count
from hrvlm_jax.systems.grid import Grid, TokenMap
from hrvlm_jax.systems.packing import Entry, Packing, Views, join
from hrvlm_jax.systems.ps3 import views as ps3_views
from hrvlm_jax.systems.ps3.config import PS3Config
from hrvlm_jax.systems.ps3.data import box_range
from hrvlm_jax.systems.vila_hd.config import VilaHDConfig

Box = Sequence[float]


def squash(image: Image.Image, side: int, *, grounded: bool = False) -> np.ndarray:
  """uint8 [side side 3]: RGB first, then resized without keeping the aspect ratio.

  Args:
    grounded: images with a box are resized bilinearly, as the original's torchvision call.
  """
  how = Image.Resampling.BILINEAR if grounded else Image.Resampling.BICUBIC
  return np.asarray(resize_exact(to_rgb(image), (side, side), how), np.uint8)


def resize_box(box: Box, width: int, height: int, side: int) -> np.ndarray:
  """[4] a box (x0, y0, x1, y1) in pixels of the squashed image.

  A box of whole numbers is truncated to whole numbers, others are float32, as torchvision's.

  Raises:
    UserError: not four numbers.
  """
  array = np.asarray(box)
  if array.shape != (4,) or array.dtype.kind not in 'iuf':
    raise UserError(f'box {box!r}: expected four numbers x0, y0, x1, y1 in pixels of the image')
  factor = (side / width, side / height) * 2
  if array.dtype.kind in 'iu':
    return np.array([int(v * f) for v, f in zip(array.tolist(), factor, strict=True)], np.int64)
  return array.astype(np.float32) * np.array(factor, np.float32)


def first_scales(width: int, height: int, config: VilaHDConfig) -> int:
  """How many high scales an image of that size uses (`dynamic_aspect`)."""
  scales = config.tower.scales
  if config.dynamic_aspect != 'on':
    return config.tower.high_scales
  threshold = (scales[-2] + scales[-1]) / 2
  whole = max(width, height) > threshold or scales[-1] <= 2000
  return config.tower.high_scales - (not whole)


def count(width: int, height: int, config: VilaHDConfig) -> Count:
  """One view and the same number of places for every image.

  Low-resolution tokens, then places for as many complete blocks as there can be; those that stay
  empty are masked on the device and shift nothing.

  Raises:
    UserError: a side below 1.
  """
  check_size(width, height)
  return Count(1, config.image_tokens)


def views(images: Sequence[Image.Image], config: VilaHDConfig, *,
          boxes: Sequence[Box | None] | None = None) -> Views:
  """Arrays of one example.

  Args:
    boxes: per image the region its question is about, (x0, y0, x1, y1) in pixels of the image.

  Returns:
    pixels uint8 [v S S 3], tokens int32 [v], boxes int32 [v 4] (`box_range`; zeros: none), first
    int32 [v] high scales of each image.

  Raises:
    UserError: a malformed box, or not one entry per image.
  """
  side = config.side
  boxes = [None] * len(images) if boxes is None else list(boxes)
  if len(boxes) != len(images):
    raise UserError(f'{len(boxes)} boxes for {len(images)} images; give one (or None) per image')
  made = []
  for image, box in zip(images, boxes, strict=True):
    ends = np.zeros(4, np.int32) if box is None else box_range(
      resize_box(box, *image.size, side), side, side)
    made.append({'pixels': squash(image, side, grounded=box is not None)[None],
                 'boxes': ends[None], 'first': np.array([first_scales(*image.size, config)]),
                 'tokens': config.image_tokens})
  return join(made, packing(config))


def tokens(config: VilaHDConfig) -> int:
  """Visual tokens of every image."""
  return config.image_tokens


def places(config: VilaHDConfig) -> int:
  """Patches that run through the tower: the thumbnail's and those of the looks."""
  return config.plan(config.scale_choices[-1]).tokens


def packing(config: VilaHDConfig) -> Packing:
  """Images of all rows share their slots."""
  return Packing(
    slots={'pixels': Entry((config.side, config.side, 3)), 'boxes': Entry((4,), np.int32),
           'first': Entry((), np.int32)}, each=config.image_tokens, tokens=config.image_tokens)


def grid(config: VilaHDConfig) -> Grid:
  """The low-resolution tokens' map; those behind it stand where the model looked."""
  side = -(-config.tower.grid // config.ratio)
  return Grid(maps=(TokenMap(side, side),), view=config.tower.scales[0], std=config.tower.std)


def rules(config: VilaHDConfig) -> tuple[Rule, ...]:
  """Sharding rows: PS3's."""
  return ps3_views.rules(config.tower)


def backbones(config: VilaHDConfig) -> dict[str, PS3Config]:
  """PS3 can start from a release of its own."""
  return {'vision/ps3': config.tower}


def overlay(image: Image.Image, config: VilaHDConfig, info: Mapping[str, Any]) -> Image.Image:
  """One panel per high scale: chosen patches in full light, scores in red (see PS3)."""
  return ps3_views.overlay(image, config.tower, info)
