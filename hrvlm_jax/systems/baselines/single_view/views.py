"""Plain LLaVA on the host: one view per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from hrvlm_jax.systems.baselines.single_view.config import SingleViewConfig
from hrvlm_jax.systems.contract import Count
from hrvlm_jax.systems.grid import Grid, TokenMap
from hrvlm_jax.systems.packing import Entry, Packing, Views, join
from hrvlm_jax.systems.pictures import (
  background,
  bytes_of,
  check_elongation,
  check_size,
  on_square,
  squash,
)


def count(width: int, height: int, config: SingleViewConfig) -> Count:
  """One view, always.

  Raises:
    UserError: a side below 1, or too elongated for fit='pad' (see `pictures`).
  """
  check_size(width, height)
  if config.fit == 'pad':
    check_elongation(width, height, (max(width, height),) * 2)
  return Count(1, config.tokens)


def tokens(config: SingleViewConfig) -> int:
  """Visual tokens of every image."""
  return config.tokens


def view(image: Image.Image, config: SingleViewConfig) -> Image.Image:
  """The square picture that the tower sees."""
  count(*image.size, config)
  size = config.vision.image_size
  return on_square(image, size, config.mean) if config.fit == 'pad' else squash(image, (size, size))


def views(images: Sequence[Image.Image], config: SingleViewConfig) -> Views:
  """Arrays of one example: pixels uint8 [m h w 3], tokens int32 [m]."""
  return join([{'pixels': bytes_of(view(image, config)), 'tokens': config.tokens}
               for image in images], packing(config))


def packing(config: SingleViewConfig) -> Packing:
  """Images of all rows share their slots; the index counts images."""
  return Packing(slots={'pixels': Entry((config.vision.image_size,) * 2 + (3,))})


def grid(config: SingleViewConfig) -> Grid | None:
  """One map of the image, or of its padded square; none where only the last tokens are kept."""
  if config.last_tokens is not None:
    return None
  return Grid(maps=(TokenMap(config.vision.grid, config.vision.grid),), std=config.std,
              view=config.vision.image_size,
              background=background(config.mean) if config.fit == 'pad' else None)


def overlay(image: Image.Image, config: SingleViewConfig,
            info: Mapping[str, object]) -> Image.Image:
  """What the model sees: the view, blown up to the image's size without smoothing."""
  del info
  return view(image, config).resize(image.size, Image.Resampling.NEAREST)
