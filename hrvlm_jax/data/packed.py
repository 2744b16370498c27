"""Batches whose examples share rows and crop slots: every host measures a window of steps, opens
what it makes itself, and pads to the shapes that the sizes of all give.

Global batch k is the same array for array whatever the number of hosts: a host makes the rows and
crop slots of its shards, and the shards stand one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import threading
from typing import Any

import grain
import numpy as np
from PIL import Image

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.faults import Batch, Fault
from hrvlm_jax.data.packing import PackedStep, RowPacker, Size
from hrvlm_jax.language.prompt import empty_text, pad_batch

Views = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RowMaker:
  """What makes packed rows of opened examples; picklable.

  Attributes:
    packer: see `packing.RowPacker`.
    example: `transforms.ToExample`, or anything with its `measure`, `open` and `join`.
    views: the system's, for rows without an image.
    batch: the system's function that packs views into crop slots.
    encoder: the system's config.
    shift: (views of a batch, encoder config, slots) -> views whose indices count so many more slots
      before them; needed with several shards.
    side: padding side of the text.
  """

  packer: RowPacker
  example: Any
  views: Callable[[Sequence[Image.Image], Any], Views]
  batch: Callable[..., Views]
  encoder: Any
  shift: Callable[[Views, Any, int], Views] | None = None
  side: str = 'right'

  def __post_init__(self):
    if self.packer.shards > 1 and self.shift is None:
      raise UserError(f'data.shards={self.packer.shards}: crops of this system cannot lie in '
                      'shards; expected 1')

  @property
  def packed(self) -> bool:
    """Whether examples share rows."""
    return self.packer.packing.rows is not None

  def row(self, opened: Mapping[int, Any], step: PackedStep, faults: list[Fault]
          ) -> tuple[dict[str, np.ndarray], Views]:
    """(text arrays, views) of one row; what does not fit leaves a hole and is added to `faults`.

    Args:
      opened: the row's examples by position, of `example.open`.
    """
    try:
      text, views = self._join(list(opened.values()))
    except UserError:  # one of them is to blame: each alone
      good = []
      for position, item in opened.items():
        try:
          self._join([item])
          good.append(item)
        except UserError as error:
          faults.append(Fault.of(error, position))
      text, views = self._join(good)
    if len(text['tokens']) > step.length:
      raise ValueError(f'a row of {len(text["tokens"])} tokens was measured for {step.length}; '
                       '`measure` and `join` disagree')
    return text, views

  def _join(self, opened):
    if not opened:
      return empty_text(packed=self.packed), _blank(self)
    return self.example.join(opened, packed=self.packed)

  def arrays(self, bins: Sequence[Sequence[tuple[dict[str, np.ndarray], Views]]],
             step: PackedStep, shards: Sequence[int]) -> dict[str, Any]:
    """One micro-batch of this host, in the shapes of the step.

    Args:
      bins: rows (`row`) of every shard.
      shards: their numbers.
    """
    shapes = _probe(self, 1 << max(step.images - 1, 0).bit_length())  # few shapes for any number
    # Systems that always read an image need slots for rows without one too.
    blank = _blank(self).get('pixels', np.zeros((0, 1, 1, 3)))
    slots = max(step.slots, self.packer.bin_rows * int(np.prod(blank.shape[:-3])))
    out = []
    for shard, rows in zip(shards, bins, strict=True):
      views = self.batch([views for _, views in rows], self.encoder, slots=slots)
      for key, value in views.items():
        more = [max(n - m, 0) for n, m in zip(shapes[key], value.shape[1:], strict=True)]
        if any(more):
          views[key] = np.pad(value, [(0, 0)] + [(0, n) for n in more])
        if self.packed and key in ('index', 'valid'):  # a row has no more tokens than positions
          views[key] = views[key][:, :step.length]
      out.append(views if shard == 0 else self.shift(views, self.encoder, shard * slots))
    text = pad_batch([text for rows in bins for text, _ in rows], step.length, self.side)
    return text | {'views': {key: np.concatenate([views[key] for views in out]) for key in out[0]}}


@functools.lru_cache(maxsize=8)
def _blank(rows: RowMaker) -> Views:
  """Views of a row without an image."""
  try:
    return rows.views([], rows.encoder)
  except UserError:  # systems that always read exactly one image
    return rows.views([Image.new('RGB', (32, 32))], rows.encoder)


@functools.lru_cache(maxsize=64)
def _probe(rows: RowMaker, images: int) -> dict[str, tuple[int, ...]]:
  """Shapes, but for the first axis, of a batch whose fullest row has so many images."""
  made = rows.views([Image.new('RGB', (32, 32))] * images, rows.encoder)
  return {key: value.shape[1:] for key, value in rows.batch([made], rows.encoder).items()}


@dataclasses.dataclass(frozen=True)
class Window:
  """The sizes of a window's examples in the order of the run, and its packed steps."""

  sizes: tuple[Size | Fault, ...]
  steps: tuple[PackedStep, ...]


@dataclasses.dataclass(frozen=True)
class Pack(grain.transforms.RandomMap):
  """Sizes of a window -> `Window`."""

  packer: RowPacker

  def random_map(self, element: Sequence[Size | Fault], rng: np.random.Generator) -> Window:
    """See the class."""
    usable = [None if isinstance(size, Fault) else size for size in element]
    return Window(tuple(element), tuple(self.packer.pack(usable, rng)))


_lock = threading.Lock()


@functools.lru_cache(maxsize=8)
def _made(windows: grain.MapDataset, number: int) -> Window:
  return windows[number]


def window_of(windows: grain.MapDataset, number: int) -> Window:
  """A window, made once per process though several threads ask for it."""
  with _lock:
    return _made(windows, number)


class PackedBatches(grain.MapDataset):
  """Batch k of this host, its rows assigned beforehand from the sizes of its window.

  Grain's packing iterators (`FirstFitPackIterDataset`) carry open bins from one batch to the next:
  what batch k holds depends on all before it and on who read them. Here it follows from k, so that
  resuming is a number and stays exact with another number of hosts and workers.

  Args:
    sizes: `Size` or `Fault` by position.
    opened: opened example or `Fault` by position.
    maker: what makes rows of them.
    own: shards this host makes, ascending.
    seed: decides which bin goes to which step.
    fatal: whether a row that cannot be used ends the run.
  """

  def __init__(self, sizes: grain.MapDataset, opened: grain.MapDataset, maker: RowMaker, *,
               own: Sequence[int], seed: int, fatal: bool):
    packer = maker.packer
    whole = sizes[:len(sizes) // packer.batch_size * packer.batch_size]
    windows = whole.batch(packer.window_size, batch_fn=list).random_map(Pack(packer), seed=seed)
    super().__init__([windows, opened])
    self._length = len(whole) // packer.batch_size
    self._maker, self._own, self._fatal = maker, tuple(own), fatal

  def __len__(self):
    return self._length

  def positions(self, index: int) -> list[int]:
    """Positions in the order of the run of a batch's examples, over all hosts."""
    start, _, step = self._step(index)
    return [start + i for i in step.members]

  def _step(self, index: int) -> tuple[int, Window, PackedStep]:
    """(position of the window's first example, the window, its step)."""
    packer = self._maker.packer
    number, step = divmod(index, packer.packing.window)
    window = window_of(self._parents[0], number)
    return number * packer.window_size, window, window.steps[step]

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    packer = self._maker.packer
    start, window, step = self._step(index)
    bad = {i: window.sizes[i] for i in step.members if isinstance(window.sizes[i], Fault)}
    if not any(row for b in step.bins for row in b):
      last = [fault.message for fault in bad.values()] + [message for _, message in step.lost]
      return Batch(None, (), fatal=f'batch {index}: none of its rows can be used (last fault: '
                   f'{last[-1] if last else "none"}); check the data set')
    if bad and self._fatal:  # every host finds the same ones in the window
      return Batch.ended(next(iter(bad.values())))
    # Each fault is counted by the host that owns its place in the order.
    each = packer.batch_size // packer.shards
    mine = {i for shard in self._own for i in step.members[shard * each:(shard + 1) * each]}
    faults = [fault for i, fault in bad.items() if i in mine]
    faults += [Fault('no room', message, start + i) for i, message in step.lost if i in mine]
    parts = []
    for part in range(packer.parts):
      bins = [step.bins[part * packer.shards + shard] for shard in self._own]
      rows = [[self._row([start + i for i in row], step, faults) for row in b] for b in bins]
      parts.append(self._maker.arrays(rows, step, self._own))
    if faults and self._fatal:
      return Batch.ended(faults[0])
    return Batch(parts[0] if len(parts) == 1 else _stack(parts), tuple(faults))

  def _row(self, positions, step, faults):
    opened = {position: self._parents[1][position] for position in positions}
    faults += [item for item in opened.values() if isinstance(item, Fault)]
    good = {key: item for key, item in opened.items() if not isinstance(item, Fault)}
    return self._maker.row(good, step, faults)


def _stack(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  return {key: _stack([part[key] for part in parts]) if isinstance(parts[0][key], dict) else
          np.stack([part[key] for part in parts]) for key in parts[0]}
