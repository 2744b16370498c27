"""Plain LLaVA on the host: one view per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from hrvlm_jax.core.images import resize_exact, resize_on_canvas, to_rgb
from hrvlm_jax.systems import images as image_slots
from hrvlm_jax.systems.baselines import tiles
from hrvlm_jax.systems.baselines.single_view.config import SingleViewConfig
from hrvlm_jax.systems.contract import Count, Views


def count(width: int, height: int, config: SingleViewConfig) -> Count:
  """One view, always.

  Raises:
    UserError: a side below 1, or too elongated for fit='pad' (see `tiles`).
  """
  tiles.check_size(width, height)
  if config.fit == 'pad':
    tiles.check_elongation(width, height, (max(width, height),) * 2)
  return Count(1, config.tokens)


def view_pixels(image: Image.Image, config: SingleViewConfig) -> np.ndarray:
  """uint8 [size size 3]."""
  rgb, size = to_rgb(image), config.vision.image_size
  count(*rgb.size, config)
  if config.fit == 'pad' and rgb.width != rgb.height:
    side = max(rgb.size)
    place = ((side - rgb.width) // 2, (side - rgb.height) // 2)
    return np.asarray(resize_on_canvas(
      rgb, (side, side), place, tuple(int(255 * m) for m in config.mean), (size, size)), np.uint8)
  return np.asarray(resize_exact(rgb, (size, size)), np.uint8)


def views(images: Sequence[Image.Image], config: SingleViewConfig) -> Views:
  """Arrays of one example: pixels uint8 [m h w 3], tokens int32 [m]."""
  size = config.vision.image_size
  pixels = [view_pixels(image, config) for image in images]
  return {
    'pixels': np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8),
    'tokens': np.full(len(images), config.tokens, np.int32),
  }


def batch(examples: Sequence[Views], config: SingleViewConfig, *,
          slots: int | None = None) -> Views:
  """Packs a batch: pixels [slots h w 3], index int32 [b m] (view slot of each image of a row),
  valid bool [b m]; see `systems.images.pack`.
  """
  shape = (config.vision.image_size, config.vision.image_size, 3)
  return image_slots.pack(examples, {'pixels': (shape, np.uint8)}, slots=slots)


def shift(views_: Views, config: SingleViewConfig, slots: int) -> Views:
  """A batch's views whose indices count `slots` more view slots before them."""
  del config
  return image_slots.shift(views_, slots)


def overlay(image: Image.Image, config: SingleViewConfig,
            info: Mapping[str, object]) -> Image.Image:
  """What the model sees: the view, blown up to the image's size without smoothing."""
  del info
  view = Image.fromarray(view_pixels(image, config))
  return view.resize(image.size, Image.Resampling.NEAREST)
