"""Reading of planned batches: every host measures the window, decodes what it owns, and pads to the
shapes of the plan.

Global batch k is the same array for array whatever the number of hosts: a host makes the rows and
crop slots of its lanes, and the lanes' parts stand one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import threading
from typing import Any

import numpy as np
from PIL import Image

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.packing import Planner, Size, StepPlan
from hrvlm_jax.data.rows import BadRow, Row
from hrvlm_jax.language.prompt import empty_text, pad_batch

Views = dict[str, np.ndarray]
Fault = tuple[str, str]

_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Measured:
  """The sizes of a window's examples, its plan and the faults found on the way."""

  sizes: tuple[Size | None, ...]
  faults: Mapping[int, Fault]
  steps: tuple[StepPlan, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PlannedRows:
  """What makes planned batches, beside the source; picklable.

  Attributes:
    planner: see `plan.Planner`.
    example: `transforms.ToExample`, or anything with its `measure`, `open` and `join`.
    views: the system's, for rows without an image.
    batch: the system's function that packs views into crop slots.
    encoder: the system's config.
    shift: (views of a batch, encoder config, slots) -> views whose indices count so many more slots
      before them; needed with several lanes.
    side: padding side of the text.
  """

  planner: Planner
  example: Any
  views: Callable[[Sequence[Image.Image], Any], Views]
  batch: Callable[..., Views]
  encoder: Any
  shift: Callable[[Views, Any, int], Views] | None = None
  side: str = 'right'

  def __post_init__(self):
    if self.planner.lanes > 1 and self.shift is None:
      raise UserError(f'data.lanes={self.planner.lanes}: crops of this system cannot lie in lanes; '
                      'expected 1')

  @property
  def packed(self) -> bool:
    """Whether examples share rows."""
    return self.planner.packing.rows is not None

  def measure(self, window: int, rows: Callable[[int], tuple[Row, np.random.Generator] | None],
              seed: int, steps: int) -> Measured:
    """Sizes and plan of a window.

    Args:
      steps: of the run; the last window may be short.
      rows: position -> (row, random generator of its position), None behind the last epoch; raises
        `UserError` for a row that cannot be read.
      seed: of the run.
    """
    size, width = self.planner.window_size, self.planner.packing.window
    sizes: list[Size | None] = []
    faults: dict[int, Fault] = {}
    for offset in range(min(width, steps - window * width) * self.planner.batch_size):
      try:
        found = rows(window * size + offset)
        sizes.append(None if found is None else self.example.measure(*found))
      except UserError as error:
        sizes.append(None)
        faults[offset] = fault_of(error)
    rng = np.random.default_rng(np.random.SeedSequence([seed, 5, window]))
    return Measured(tuple(sizes), faults, tuple(self.planner.plan(sizes, rng)))

  def step(self, plan: StepPlan, start: int, lanes: Sequence[int],
           rows: Callable[[int], tuple[Row, np.random.Generator] | None]
           ) -> tuple[dict[str, Any], list[Fault]]:
    """This host's arrays of a step, and the faults that only decoding shows.

    Args:
      start: position of the window's first example.
      lanes: those this host owns.
    """
    faults: list[Fault] = []
    parts = []
    for part in range(self.planner.parts):
      bins = [plan.bins[part * self.planner.lanes + lane] for lane in lanes]
      made = [[self._row([start + i for i in row], rows, plan, faults) for row in b] for b in bins]
      texts = [text for b in made for text, _ in b]
      arrays = pad_batch(texts, plan.length, self.side)
      parts.append(arrays | {'views': self._views(
        [[views for _, views in b] for b in made], plan, lanes)})
    return (parts[0] if len(parts) == 1 else _stack(parts)), faults

  def _row(self, positions, rows, plan, faults):
    """(text arrays, views) of one row; what cannot be decoded leaves a hole."""
    opened = []
    for position in positions:
      try:
        opened.append(self.example.open(*rows(position)))
      except UserError as error:
        faults.append(fault_of(error))
    try:
      text, views = self._join(opened)
    except UserError:  # one of them is to blame: each alone
      good = []
      for item in opened:
        try:
          self._join([item])
          good.append(item)
        except UserError as error:
          faults.append(fault_of(error))
      text, views = self._join(good)
    if len(text['tokens']) > plan.length:
      raise ValueError(f'a row of {len(text["tokens"])} tokens was planned for {plan.length}; '
                       '`measure` and `join` disagree')
    return text, views

  def _join(self, opened):
    if not opened:
      return empty_text(packed=self.packed), self._blank()
    return self.example.join(opened, packed=self.packed)

  def _blank(self) -> Views:
    """Views of a row without an image."""
    return _blank(self)

  def _views(self, bins, plan, lanes) -> Views:
    """The crops of this host's lanes, in the shapes of the plan."""
    shapes = _shapes(self, plan.images)
    # Systems that always read an image need slots for rows without one too.
    blank = self._blank().get('pixels', np.zeros((0, 1, 1, 3)))
    slots = max(plan.slots, self.planner.bin_rows * int(np.prod(blank.shape[:-3])))
    out = []
    for lane, examples in zip(lanes, bins, strict=True):
      views = self.batch(examples, self.encoder, slots=slots)
      for key, value in views.items():
        more = [max(n - m, 0) for n, m in zip(shapes[key], value.shape[1:], strict=True)]
        if any(more):
          views[key] = np.pad(value, [(0, 0)] + [(0, n) for n in more])
        if self.packed and key in ('index', 'valid'):  # a row has no more tokens than places
          views[key] = views[key][:, :plan.length]
      out.append(views if lane == 0 else self.shift(views, self.encoder, lane * slots))
    return {key: np.concatenate([views[key] for views in out]) for key in out[0]}


def _shapes(rows: PlannedRows, images: int) -> dict[str, tuple[int, ...]]:
  """Shapes, but for the first axis, of a batch whose fullest row has so many images.

  The number is rounded up to a power of two: a few shapes for any number of images.
  """
  return _probe(rows, 1 << max(images - 1, 0).bit_length())


@functools.lru_cache(maxsize=8)
def _blank(rows: PlannedRows) -> Views:
  try:
    return rows.views([], rows.encoder)
  except UserError:  # systems that always read exactly one image
    return rows.views([Image.new('RGB', (32, 32))], rows.encoder)


@functools.lru_cache(maxsize=64)
def _probe(rows: PlannedRows, images: int) -> dict[str, tuple[int, ...]]:
  made = rows.views([Image.new('RGB', (32, 32))] * images, rows.encoder)
  return {key: value.shape[1:] for key, value in rows.batch([made], rows.encoder).items()}


def fault_of(error: UserError) -> Fault:
  """(kind, sentence) of a row that cannot be used."""
  return (error.kind if isinstance(error, BadRow) else 'example'), str(error)


def _stack(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  return {key: _stack([part[key] for part in parts]) if isinstance(parts[0][key], dict) else
          np.stack([part[key] for part in parts]) for key in parts[0]}


@functools.lru_cache(maxsize=8)
def _window(reader, window: int) -> Measured:
  return reader.planned.measure(window, reader.row, reader.seed, len(reader))


def window_of(reader, window: int) -> Measured:
  """The plan of a window, made once per process though several threads ask."""
  with _lock:
    return _window(reader, window)
