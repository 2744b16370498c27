"""One batch of a run taken apart, for `hrvlm data show`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data import show
from hrvlm_jax.data.transforms import ToExample
from hrvlm_jax.systems import registry
from hrvlm_jax.training.batches import make_batches
from hrvlm_jax.training.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Look:
  """What `hrvlm data show` shows of a batch.

  Attributes:
    batch: its arrays.
    rows: the first rows, arrays [t].
    shares: what is not used of its places and crop slots.
    panels: a picture per image of these rows: as the system cuts it, and its crops.
    faults: (kind, message) of rows that could not be used.
  """

  batch: dict[str, Any]
  rows: list[dict[str, np.ndarray]]
  shares: dict[str, float]
  panels: list[Image.Image]
  faults: tuple[tuple[str, str], ...]
  tokenizer: Any


def look(config: RunConfig, step: int, *, rows: int = 4, draw: bool = False) -> Look:
  """One batch of a run, as `make_batches` makes it, to be looked at.

  Args:
    rows: how many rows are taken apart.
    draw: make pictures; for the images of the first `rows` examples.

  Raises:
    UserError: see `make_batches`; no such batch, or none of its rows can be used.
  """
  batches = make_batches(config)
  reader = batches.reader
  if step >= len(reader):
    raise UserError(f'batch {step}: the data set has {len(reader)} batches')
  made = reader[step]
  if made.fatal is not None:
    raise UserError(made.fatal)
  texts = {key: value.reshape(-1, *value.shape[value.ndim - 1:])
           for key, value in made.arrays.items() if key in _TEXT}
  shown = [{key: value[row] for key, value in texts.items()}
           for row in range(min(rows, len(texts['tokens'])))]
  shares = {'places not used': 1 - float(texts['valid'].mean())}
  example, used, panels = reader.transform, 0, []
  for place, position in enumerate(reader.positions(step)):
    try:
      row, rng = reader.row(position)
      used += example.measure(row, rng).views
      if draw and place < rows:
        panels += _panels(config, *reader.row(position), example, place)
    except UserError:  # it is among the faults
      continue
  slots = made.arrays['views'].get('pixels')
  if slots is not None and slots.shape[-4:-3] and used:
    total = int(np.prod(slots.shape[:-3]))
    shares['crop slots not used'] = 1 - used / total
  return Look(made.arrays, shown, shares, panels, made.faults, example.text.tokenizer)


_TEXT = ('tokens', 'visual_index', 'valid', 'labels', 'segments')


def _panels(config: RunConfig, row, rng, example: ToExample, place: int) -> list[Image.Image]:
  system, encoder = registry.get(config.model.system), config.model.encoder
  opened = example.open(row, rng)
  out = []
  for number, (image, box) in enumerate(zip(opened.images, opened.boxes, strict=True)):
    box = row.extra.get('box') if box is None and len(opened.images) == 1 else box
    options = {'boxes': [opened.boxes[number]]} if example.boxes else {}
    crops = system.views([image], encoder, **options)['pixels']
    drawn = system.overlay(show.with_box(image, box), encoder, {})
    cost = system.count(*image.size, encoder)
    out.append(show.panel(drawn, crops, f'example {place}, image {number}: {image.width} x '
                          f'{image.height}, {cost.views} views, {cost.tokens} visual tokens'))
  return out
