"""Which examples share a step, a device's crops and a row; decided from their sizes alone.

The examples of a window of steps are dealt out to bins, one per step, micro-batch and shard, so
that every bin has the same number of them and almost the same number of crops; then those of a bin
are packed into its rows. Sizes come from image headers and token counts, so every host assigns them
alike, and makes the same choice of bucket and crop slots, without asking the others and without
decoding what it does not own.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import heapq
from typing import ClassVar

import numpy as np

from hrvlm_jax.core import bounds
from hrvlm_jax.core.errors import UserError, raise_all

# Crop slots grow by 6 % from one default size to the next: 3 % are empty on average, and a wide
# window, whose steps hardly differ, meets two or three sizes (each compiles once).
_GROWTH = 2 ** (1 / 12)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
  """How the examples of a step share rows and crop slots.

  Attributes:
    rows: rows of a global batch, shared by its `batch_size` examples: attention stays within an
      example and positions restart. None: a row per example.
    window: steps whose examples are dealt out together, for bins of equal size. 1: the examples of
      a step are those of the order, in their order (needed by the grouped order).
    slots: crop slots a micro-batch may have, ascending; the smallest that holds its crops is used.
      Each size compiles once. (): sizes 6 % apart.
  """

  rows: int | None = None
  window: int = 1
  slots: tuple[int, ...] = ()

  BOUNDS: ClassVar = {
    'rows': bounds.SIZE, 'window': bounds.SIZE, 'slots': bounds.SIZE + bounds.MAY_BE_EMPTY}

  def __post_init__(self):
    bounds.check(self)
    problems = []
    if list(self.slots) != sorted(set(self.slots)):
      problems.append(f'slots must be ascending numbers, got {self.slots}')
    if problems:
      raise ValueError('Packing: ' + '; '.join(problems))

  @property
  def active(self) -> bool:
    """Whether rows and crop slots are assigned beforehand at all."""
    return self.rows is not None or self.window > 1 or bool(self.slots)


@dataclasses.dataclass(frozen=True)
class Size:
  """What an example costs: positions of a row, crop slots, images."""

  positions: int
  views: int
  images: int = 0


@dataclasses.dataclass(frozen=True)
class PackedStep:
  """One global batch.

  Attributes:
    bins: rows of every (micro-batch, shard), micro-batches outermost; a row is a tuple of offsets
      in the window.
    length: bucket of all rows.
    slots: crop slots of every bin.
    images: most images of a row.
    lost: offsets of examples there was no room for, with a sentence each.
    members: all offsets that belong to this step, usable or not.
  """

  bins: tuple[tuple[tuple[int, ...], ...], ...]
  length: int
  slots: int
  images: int
  lost: tuple[tuple[int, str], ...]
  members: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowPacker:
  """Assigns the examples of a window to bins and rows.

  Attributes:
    batch_size: examples of a step.
    parts: micro-batches of a step.
    shards: bins of a micro-batch, which hosts own and whose crops lie together.
    packing: see `Packing`.
    lengths: buckets of a row.
    share: devices that a shard is cut over; its crop slots are a multiple of it.
  """

  batch_size: int
  packing: Packing
  lengths: tuple[int, ...]
  parts: int = 1
  shards: int = 1
  share: int = 1

  def __post_init__(self):
    bins, problems = self.parts * self.shards, []
    if self.batch_size % bins:
      problems.append(f'batch_size={self.batch_size} is no multiple of {self.parts} micro-batches '
                      f'x {self.shards} shards')
    if (rows := self.packing.rows) is not None and (rows % bins or rows > self.batch_size):
      problems.append(f'packing.rows={rows} must be a multiple of {self.parts} micro-batches x '
                      f'{self.shards} shards, and at most batch_size={self.batch_size}')
    problems += [f'packing.slots: {n} is no multiple of {self.shards} shards x {self.share} '
                 'devices of a shard' for n in self.packing.slots if n % (self.shards * self.share)]
    if not self.lengths:
      problems.append('lengths is empty, expected at least one bucket')
    raise_all('data packing', problems)

  @property
  def window_size(self) -> int:
    """Examples of a window."""
    return self.batch_size * self.packing.window

  @property
  def bin_rows(self) -> int:
    """Rows of a bin."""
    return (self.packing.rows or self.batch_size) // (self.parts * self.shards)

  def describe(self) -> str:
    """What the assignment depends on beside the sizes, for saved positions."""
    p = self.packing
    slots = ' '.join(map(str, p.slots)) or '6 % apart'
    return (f'{p.rows or "no"} packed rows, window {p.window}, {self.parts} micro-batches x '
            f'{self.shards} shards, lengths {" ".join(map(str, sorted(self.lengths)))}, '
            f'slots {slots}')

  def pack(self, sizes: Sequence[Size | None], rng: np.random.Generator) -> list[PackedStep]:
    """The steps of a window.

    Args:
      sizes: of its examples in the order of the run, `window_size` of them (fewer whole steps in
        the last window); None for one that cannot be used, which takes up one of its step's
        `batch_size` examples but no row.
      rng: decides which bin goes to which step.
    """
    if len(sizes) % self.batch_size or len(sizes) > self.window_size:
      raise ValueError(f'{len(sizes)} sizes, expected {self.window_size} or fewer whole batches of '
                       f'{self.batch_size}')
    count = self.parts * self.shards
    bins = self._deal(sizes, rng)
    return [self._step(bins[i:i + count], sizes) for i in range(0, len(bins), count)]

  def _deal(self, sizes, rng) -> list[list[int]]:
    """Offsets of every bin, ascending."""
    each = self.batch_size // (self.parts * self.shards)
    number = len(sizes) // each
    if self.packing.window == 1:
      return [list(range(i * each, (i + 1) * each)) for i in range(number)]
    cost = lambda i: (0, 0) if sizes[i] is None else (sizes[i].views, sizes[i].positions)
    heap = [(0, 0, b) for b in range(number)]  # views, positions, bin: the emptiest first
    bins: list[list[int]] = [[] for _ in range(number)]
    for index in sorted(range(len(sizes)), key=lambda i: (*cost(i), -i), reverse=True):
      views, positions, b = heapq.heappop(heap)
      bins[b].append(index)
      if len(bins[b]) < each:
        more = cost(index)
        heapq.heappush(heap, (views + more[0], positions + more[1], b))
    return [sorted(bins[b]) for b in rng.permutation(number)]

  def _step(self, bins, sizes) -> PackedStep:
    lost: list[tuple[int, str]] = []
    kept = [self._within_slots([i for i in b if sizes[i] is not None], sizes, lost) for b in bins]
    packed = [self._rows(b, sizes, lost) for b in kept]
    rows = [row for b in packed for row in b]
    total = lambda row: sum(sizes[i].positions for i in row)
    longest = max((total(row) for row in rows), default=0)
    views = max((sum(sizes[i].views for row in b for i in row) for b in packed), default=0)
    return PackedStep(
      bins=tuple(tuple(tuple(row) for row in b) for b in packed),
      length=min(n for n in self.lengths if n >= longest),
      slots=self._slots(views),
      images=max((sum(sizes[i].images for i in row) for row in rows), default=0),
      lost=tuple(lost), members=tuple(sorted(i for b in bins for i in b)))

  def _within_slots(self, members, sizes, lost) -> list[int]:
    """The members of a bin whose crops fit; the last ones that do not are lost."""
    if not self.packing.slots:
      return members
    most, used, kept = self.packing.slots[-1] // self.shards, 0, []
    for i in members:
      if used + sizes[i].views > most:
        lost.append((i, f'no room for its {sizes[i].views} crops beside {used} others in {most} '
                        'slots; add a larger number to packing.slots, or widen packing.window'))
        continue
      used += sizes[i].views
      kept.append(i)
    return kept

  def _rows(self, members, sizes, lost) -> list[list[int]]:
    """Packs a bin: the longest example first, always into the emptiest row."""
    if self.packing.rows is None:
      rows, each = [[i] for i in members], self.bin_rows
      return rows + [[] for _ in range(each - len(rows))]
    rows = [[] for _ in range(self.bin_rows)]
    heap, most = [(0, r) for r in range(self.bin_rows)], max(self.lengths)
    for i in sorted(members, key=lambda i: (-sizes[i].positions, i)):
      used, r = heap[0]
      if used + sizes[i].positions > most:
        lost.append((i, f'no room for its {sizes[i].positions} tokens in {self.bin_rows} rows of '
                        f'{most}; raise packing.rows, or add a longer bucket to data.lengths'))
        continue
      rows[r].append(i)
      heapq.heapreplace(heap, (used + sizes[i].positions, r))
    return [sorted(row) for row in rows]

  def _slots(self, views: int) -> int:
    """Crop slots of every bin of a step whose fullest bin has so many views."""
    for size in self.packing.slots:
      if views <= size // self.shards:
        return size // self.shards
    if self.packing.slots:
      raise UserError(f'{views} crops are more than the {self.packing.slots[-1] // self.shards} '
                      'slots of packing.slots')
    size = 1.0
    while round(size) < views:
      size *= _GROWTH
    return -(-round(size) // self.share) * self.share
