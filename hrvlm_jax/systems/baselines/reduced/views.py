"""Reduced systems on the host: every image is a row of the inner system's batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from hrvlm_jax.parallel.rules import WHOLE_VECTORS, Rule
from hrvlm_jax.systems.baselines.reduced.config import ReducedConfig
from hrvlm_jax.systems.contract import Count
from hrvlm_jax.systems.grid import Grid
from hrvlm_jax.systems.packing import Views

IMAGE_INDEX, IMAGE_VALID = 'image_index', 'image_valid'


def count(width: int, height: int, config: ReducedConfig) -> Count:
  """The inner system's views, the step's tokens."""
  inner = config.system.count(width, height, config.encoder)
  return Count(inner.views, config.tokens, slots=inner.slots)


def views(images: Sequence[Image.Image], config: ReducedConfig) -> Views:
  """Arrays of one example: those of image i under `i/`, tokens int32 [m]."""
  system = config.system
  out: Views = {'tokens': np.full(len(images), config.tokens, np.int32)}
  for number, image in enumerate(images):
    found = system.views([image], config.encoder)
    out |= {f'{number}/{name}': value for name, value in found.items()}
  return out


def batch(examples: Sequence[Views], config: ReducedConfig, *, slots: int | None = None) -> Views:
  """The inner system's batch of all images, and which of its rows belong to which row.

  Returns:
    the inner arrays; image_index int32 [b m], image_valid bool [b m].
  """
  system, inner = config.system, []
  most = max((len(e['tokens']) for e in examples), default=1) or 1
  index = np.zeros((len(examples), most), np.int32)
  valid = np.zeros((len(examples), most), bool)
  for row, example in enumerate(examples):
    for number in range(len(example['tokens'])):
      prefix = f'{number}/'
      index[row, number], valid[row, number] = len(inner), True
      inner.append({name.removeprefix(prefix): value for name, value in example.items()
                    if name.startswith(prefix)})
  rows = len(examples) * most
  if len(inner) < rows:  # rows without an image, so that the shape does not depend on them
    inner += [system.views([], config.encoder)] * (rows - len(inner))
  packed = system.batch(inner, config.encoder, slots=slots)
  return {**packed, IMAGE_INDEX: index, IMAGE_VALID: valid}


def tokens(config: ReducedConfig) -> int:
  """Visual tokens of every image."""
  return config.tokens


def grid(config: ReducedConfig) -> Grid | None:
  """The inner system's maps, pooled; other steps leave none."""
  return config.grid


def rules(config: ReducedConfig) -> tuple[Rule, ...]:
  """The inner system's sharding rows, and those of the resamplers."""
  return (Rule(r'vision/resampler/(query|latents|time)', (), why=WHOLE_VECTORS),
          Rule(r'vision/resampler/proj', ('fsdp', None)),
          *config.system.rules(config.encoder))


def overlay(image: Image.Image, config: ReducedConfig, info: Mapping[str, object]) -> Image.Image:
  """What the inner system draws."""
  return config.system.overlay(image, config.encoder, info)
