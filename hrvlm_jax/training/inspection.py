"""One batch of a run taken apart, for `hrvlm data show`."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data import show
from hrvlm_jax.data.faults import Fault
from hrvlm_jax.data.rows import BadRow, box_of
from hrvlm_jax.data.transforms import Opened, ToExample
from hrvlm_jax.systems import registry
from hrvlm_jax.training.batches import make_batches
from hrvlm_jax.training.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Inspection:
  """What `hrvlm data show` shows of a batch.

  Attributes:
    batch: its arrays.
    rows: the first rows, arrays [t].
    shares: what is not used of its positions and crop slots.
    panels: a picture per image of these rows: as the system cuts it, and its crops.
    faults: of rows that could not be used.
  """

  batch: dict[str, Any]
  rows: list[dict[str, np.ndarray]]
  shares: dict[str, float]
  panels: list[Image.Image]
  faults: tuple[Fault, ...]
  tokenizer: Any


def inspect_batch(config: RunConfig, step: int, *, rows: int = 4,
                  draw: bool = False) -> Inspection:
  """One batch of a run, as `make_batches` makes it, to be inspected.

  Args:
    rows: how many rows are taken apart.
    draw: make pictures; for the images of the first `rows` examples.

  Raises:
    UserError: see `make_batches`; no such batch, or none of its rows can be used.
  """
  batches = make_batches(config)
  if step >= len(batches):
    raise UserError(f'batch {step}: the data set has {len(batches)} batches')
  made = batches.dataset[step]
  if made.fatal is not None:
    raise UserError(made.fatal)
  texts = {key: value.reshape(-1, *value.shape[value.ndim - 1:])
           for key, value in made.arrays.items() if key in _TEXT}
  shown = [{key: value[row] for key, value in texts.items()}
           for row in range(min(rows, len(texts['tokens'])))]
  shares = {'positions not used': 1 - float(texts['valid'].mean())}
  example, used, panels = batches.transform, 0, []
  sizes, opened = batches.mapped(example.measure), batches.mapped(example.open)
  for place, position in enumerate(batches.positions(step)):
    size = sizes[position]
    if isinstance(size, Fault):  # it is among the faults
      continue
    used += size.views
    if draw and place < rows and not isinstance(item := opened[position], Fault):
      panels += _panels(config, item, example, place)
  slots = made.arrays['views'].get('pixels')
  if slots is not None and slots.shape[-4:-3] and used:
    total = int(np.prod(slots.shape[:-3]))
    shares['crop slots not used'] = 1 - used / total
  return Inspection(made.arrays, shown, shares, panels, made.faults, example.text.tokenizer)


_TEXT = ('tokens', 'visual_index', 'valid', 'labels', 'segments')


def _panels(config: RunConfig, opened: Opened, example: ToExample, place: int) -> list[Image.Image]:
  system = registry.get(config.model.system)
  out = []
  for number, (image, box) in enumerate(zip(opened.images, opened.boxes, strict=True)):
    if box is None and len(opened.images) == 1:
      with contextlib.suppress(BadRow):  # nothing reads it here
        box = box_of(opened.row)
    options = {'boxes': [opened.boxes[number]]} if example.boxes else {}
    encoder = config.model.encoder if opened.configs is None else opened.configs[number]
    crops = system.views([image], encoder, **options)['pixels']
    drawn = system.overlay(show.with_box(image, box), encoder, {})
    cost = system.count(*image.size, encoder)
    out.append(show.panel(drawn, crops, f'example {place}, image {number}: {image.width} x '
                          f'{image.height}, {cost.views} views, {cost.tokens} visual tokens'))
  return out
