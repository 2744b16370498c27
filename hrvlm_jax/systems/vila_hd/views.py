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
from hrvlm_jax.core.images import resize_exact, to_rgb
from hrvlm_jax.systems import images as image_slots
from hrvlm_jax.systems.contract import Count, Views
from hrvlm_jax.systems.ps3 import views as ps3_views
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
  if width < 1 or height < 1:
    raise UserError(f'image of {width}x{height} pixels: both sides must be at least 1')
  return Count(1, config.low_tokens + config.high_tokens)


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
  ends = [np.zeros(4, np.int32) if box is None else
          box_range(resize_box(box, *image.size, side), side, side)
          for image, box in zip(images, boxes, strict=True)]
  pixels = [squash(image, side, grounded=box is not None)
            for image, box in zip(images, boxes, strict=True)]
  each = config.low_tokens + config.high_tokens
  return {
    'pixels': np.stack(pixels) if pixels else np.zeros((0, side, side, 3), np.uint8),
    'tokens': np.full(len(pixels), each, np.int32),
    'boxes': np.stack(ends) if ends else np.zeros((0, 4), np.int32),
    'first': np.array([first_scales(*image.size, config) for image in images], np.int32),
  }


def batch(examples: Sequence[Views], config: VilaHDConfig, *, slots: int | None = None,
          tokens: int | None = None) -> Views:
  """Packs a batch: pixels uint8 [slots S S 3], boxes int32 [slots 4], first int32 [slots] and
  indices, see `systems.images.pack`.
  """
  arrays = {'pixels': ((config.side, config.side, 3), np.uint8), 'boxes': ((4,), np.int32),
            'first': ((), np.int32)}
  return image_slots.pack(examples, arrays, each=config.low_tokens + config.high_tokens,
                          slots=slots, tokens=tokens)


def shift(views_: Views, config: VilaHDConfig, slots: int) -> Views:
  """A batch's views whose indices count `slots` more image slots before them."""
  return image_slots.shift(views_, slots, each=config.low_tokens + config.high_tokens)


def overlay(image: Image.Image, config: VilaHDConfig, info: Mapping[str, Any]) -> Image.Image:
  """One panel per high scale: chosen patches in full light, scores in red (see PS3)."""
  return ps3_views.overlay(image, config.tower, info)
