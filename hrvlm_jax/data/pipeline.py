"""From a source to batches: order, worker processes, faults, exact resume.

The unit of reading is a batch. Batch k is a pure function of (source, seed, k): its positions are
fixed by `order` and `sampler.Lanes`, every position has its own random generator, and nothing is
carried over from one batch to the next. Resuming is therefore a number, whatever the workers had
read ahead, and stays exact when the numbers of hosts and workers change.

A row that cannot be used keeps its place: the place is filled with a copy of a usable example of
the batch in which nothing is trained, and the fault is counted by kind. So one host never has to
tell another that it skipped something.

Reading, decoding and batching run in Grain (threads, or worker processes with `workers`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
import dataclasses
import gc
import math
from typing import Any, Literal
import weakref

from absl import flags
import grain
import numpy as np

from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.data.order import Order, OrderName, make_order
from hrvlm_jax.data.planned import PlannedRows, fault_of, window_of
from hrvlm_jax.data.rows import BadRow, Row, Source
from hrvlm_jax.data.sampler import Lanes
from hrvlm_jax.language.prompt import IGNORE

Example = dict[str, Any]
Transform = Callable[[Row, np.random.Generator], Example]
Collate = Callable[[Sequence[Example]], dict[str, Any]]
BadRowPolicy = Literal['skip', 'fatal']

_ENDLESS = 2**62
_ORDER = {'order': 'uniform', 'packing': 'none'}  # what an order's description says by default
_DONOR_TRIES = 1000


def untrained(example: Example) -> Example:
  """The example with all labels -100.

  Raises:
    ValueError: it has no labels, so something else must say that it does not count.
  """
  if 'labels' not in example:
    raise ValueError("an example without 'labels' cannot stand in for a bad row; use "
                     "bad_rows='fatal' or give the pipeline another `blank`")
  return example | {'labels': np.full_like(example['labels'], IGNORE)}


@dataclasses.dataclass(frozen=True)
class Batch:
  """What a worker hands over: arrays, faults (kind, message), or the fault that ends the run."""

  arrays: dict[str, Any] | None
  faults: tuple[tuple[str, str], ...]
  fatal: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BatchReader:
  """Batch k of this host, for any k; what Grain's threads and processes call.

  Attributes: see `build`.
  """

  source: Source
  transform: Transform
  collate: Collate
  lanes: Lanes
  seed: int
  order: Order
  epochs: int | None
  bad_rows: BadRowPolicy
  blank: Callable[[Example], Example]
  remainder: Literal['drop', 'blank']
  planned: PlannedRows | None = None
  own: tuple[int, ...] | None = None

  @property
  def part(self) -> tuple[tuple[int, ...], int]:
    """(the lanes a batch of this host holds, number of lanes of the global batch).

    A host that makes the whole batch has the one lane of one.
    """
    count = self.lanes.lanes
    each = count // self.lanes.hosts
    start = self.lanes.host * each
    own = tuple(range(start, start + each)) if self.own is None else self.own
    return (own, count) if len(own) < count else ((0,), 1)

  @property
  def total(self) -> int | None:
    """Positions of all epochs; None: endless."""
    return None if self.epochs is None else self.epochs * self.order.epoch_size

  def __len__(self) -> int:
    if self.total is None:
      return _ENDLESS
    size = self.lanes.batch_size
    return self.total // size if self.remainder == 'drop' else math.ceil(self.total / size)

  def __getitem__(self, step: int) -> Batch:
    if self.planned is not None:
      return self._planned_batch(step)
    examples: list[Example | None] = []
    faults: list[tuple[str, str]] = []
    for position in self.lanes.positions(step):
      if self.total is not None and position >= self.total:
        examples.append(None)
        continue
      try:
        examples.append(self.example(position))
      except UserError as error:
        fault = fault_of(error)
        if self.bad_rows == 'fatal':
          return Batch(None, (fault,), fatal=str(error))
        examples.append(None)
        faults.append(fault)
    donor = next((example for example in examples if example is not None), None)
    if donor is None:
      donor = self._donor(step)
      if donor is None:
        return Batch(None, tuple(faults), fatal=(
          f'batch {step}: none of its rows can be used, nor any of the next {_DONOR_TRIES} '
          f'(last fault: {faults[-1][1] if faults else "none"}); check the data set'))
    filled = [example if example is not None else self.blank(donor) for example in examples]
    return Batch(self.collate(filled), tuple(faults))

  def example(self, position: int) -> Example:
    """The example at a position of the global order.

    Raises:
      UserError: the row cannot be used.
    """
    row, rng = self.row(position)
    try:
      return self.transform(row, rng)
    except BadRow:
      raise
    except UserError as error:
      raise BadRow('example', row.where, str(error)) from error

  def positions(self, step: int) -> list[int]:
    """Positions in the global order of a batch's examples, over all hosts."""
    if self.planned is None:
      return list(range(step * self.lanes.batch_size, (step + 1) * self.lanes.batch_size))
    planner = self.planned.planner
    window, number = divmod(step, planner.packing.window)
    return [window * planner.window_size + i
            for i in window_of(self, window).steps[number].members]

  def row(self, position: int) -> tuple[Row, np.random.Generator] | None:
    """The row at a position of the global order, and its own random generator.

    None behind the last epoch.

    Raises:
      UserError: the row cannot be read.
    """
    if self.total is not None and position >= self.total:
      return None
    epoch, index = self.order.place(position)
    rng = np.random.default_rng(np.random.SeedSequence([self.seed, 1, position]))
    fetch = getattr(self.source, 'fetch', None)
    return (self.source[index] if fetch is None else fetch(index, epoch, rng)), rng

  def _planned_batch(self, step: int) -> Batch:
    """A batch of `planned`; faults are counted by the host that owns their place in the order."""
    planner = self.planned.planner
    window, number = divmod(step, planner.packing.window)
    measured = window_of(self, window)
    plan, start = measured.steps[number], window * planner.window_size
    if not any(row for b in plan.bins for row in b):
      reasons = [message for _, message in measured.faults.values()]
      return Batch(None, (), fatal=(
        f'batch {step}: none of its rows can be used (last fault: '
        f'{reasons[-1] if reasons else "none"}); check the data set'))
    if self.bad_rows == 'fatal':  # every host finds the same ones in the window
      for i in plan.members:
        if i in measured.faults:
          return Batch(None, (measured.faults[i],), fatal=measured.faults[i][1])
    own, count = self.part
    each = self.lanes.batch_size // count
    members = [i for lane in own for i in plan.members[lane * each:(lane + 1) * each]]
    faults = [measured.faults[i] for i in members if i in measured.faults]
    faults += [('no room', message) for i, message in plan.lost if i in members]
    lanes = own if count == planner.lanes else range(planner.lanes)
    arrays, found = self.planned.step(plan, start, lanes, self.row)
    faults += found
    if faults and self.bad_rows == 'fatal':
      return Batch(None, tuple(faults[:1]), fatal=faults[0][1])
    return Batch(arrays, tuple(faults))

  def _donor(self, step: int) -> Example | None:
    """The first usable example after a batch that has none."""
    last = self.lanes.positions(step)[-1]
    for position in range(last + 1, last + 1 + _DONOR_TRIES):
      try:
        return self.example(position)
      except UserError:
        continue
    return None


class Batches:
  """Iterator over batches with a state.

  Attributes:
    counts: faults by kind in the batches handed out so far, on this host.
    reader: reads any batch by its number (to look at one again).
  """

  def __init__(self, reader: BatchReader, *, workers: int, threads: int, prefetch: int,
               on_fault: Callable[[str, str], None] | None):
    self.reader = reader
    self.counts: Counter[str] = Counter()
    self._workers, self._threads, self._prefetch = workers, threads, prefetch
    self._on_fault = on_fault
    self._step = 0
    self._running: list[Any] = []  # Grain's iterator, once started
    weakref.finalize(self, _close, self._running)  # also when the program ends

  def __len__(self) -> int:
    """Batches of all epochs (a very large number when endless)."""
    return len(self.reader)

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, Any]:
    """The next batch.

    Raises:
      StopIteration: after the last epoch.
      UserError: a row that cannot be used, under the policy 'fatal'; or nothing can be used.
    """
    if not self._running:
      self._running.append(self._start())
    batch = next(self._running[0])
    self._step += 1
    for kind, message in batch.faults:
      self.counts[kind] += 1
      if self._on_fault is not None:
        self._on_fault(kind, message)
    if batch.fatal is not None:
      raise UserError(batch.fatal)
    return batch.arrays

  def _start(self):
    dataset = grain.MapDataset.source(self.reader)[self._step:]
    options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._prefetch)
    dataset = dataset.to_iter_dataset(options)
    if self._workers:
      if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl flags
        flags.FLAGS.mark_as_parsed()
      dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(
        num_workers=self._workers, per_worker_buffer_size=max(1, self._prefetch)))
    return iter(dataset)

  def get_state(self) -> dict[str, Any]:
    """JSON values from which `set_state` goes on with the next batch, bit for bit."""
    return {'version': 1, 'step': self._step, 'counts': dict(self.counts),
            'order': self._order()}

  def _order(self) -> dict[str, Any]:
    planned = self.reader.planned
    packing = {} if planned is None else {'packing': planned.planner.describe()}
    return {**_ORDER, **self.reader.order.describe(), **packing,
            'batch_size': self.reader.lanes.batch_size}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on where `get_state` was called, with any number of hosts and workers.

    Raises:
      UserError: the state belongs to another order (each difference is named).
    """
    stored, own = state.get('order', {}), self._order()
    raise_all('the saved position belongs to another order of the data', [
      f'{key} was {stored.get(key, _ORDER.get(key))}, is {value}' for key, value in own.items()
      if stored.get(key, _ORDER.get(key)) != value])
    self.close()
    self._step = int(state['step'])
    self.counts = Counter(state.get('counts', {}))

  def close(self) -> None:
    """Ends worker processes; the next batch starts them again."""
    _close(self._running)


def _close(running: list[Any]) -> None:
  """Ends Grain's iterator now: at interpreter exit its own clean-up comes too late."""
  for iterator in running:
    iterator.close()
  if running:
    running.clear()
    gc.collect()  # its parts refer to each other


def build(
  source: Source,
  transform: Transform,
  *,
  batch_size: int,
  collate: Collate,
  seed: int = 0,
  shuffle: bool = True,
  order: OrderName = 'uniform',
  group: tuple[int, int] | None = None,
  epochs: int | None = None,
  lanes: int = 8,
  host: int = 0,
  hosts: int = 1,
  workers: int = 0,
  threads: int = 2,
  prefetch: int = 2,
  bad_rows: BadRowPolicy = 'skip',
  blank: Callable[[Example], Example] = untrained,
  remainder: Literal['drop', 'blank'] = 'drop',
  on_fault: Callable[[str, str], None] | None = None,
  planned: PlannedRows | None = None,
  own: Sequence[int] | None = None,
) -> Batches:
  """Batches of this host, as NumPy arrays.

  Args:
    source: rows by index; a `fetch(index, epoch, rng)` method is preferred (mixtures).
    transform: (row, random generator of its position) -> example; picklable with workers.
    batch_size: examples of a global batch, over all hosts.
    collate: examples -> arrays of a batch.
    seed: of the order and of all random choices.
    shuffle: a new permutation every epoch; otherwise the source's own order.
    order: 'uniform', or 'grouped' by length and modality (see `order.GroupedOrder`).
    group: (examples per device and micro-batch, devices) of the grouping.
    epochs: None: endless.
    lanes: granularity of host ownership; a batch size it does not divide uses their greatest
      common divisor.
    host: this host's index among `hosts`.
    workers: processes; 0 uses threads of this process only.
    threads: batches being made at the same time, per process.
    prefetch: finished batches kept, per process.
    bad_rows: 'skip' counts and fills the place with an untrained copy; 'fatal' stops.
    blank: makes the copy that does not count.
    remainder: what is left at the very end is dropped, or filled up with untrained copies.
    on_fault: called with (kind, message) for every bad row.
    planned: makes batches whose examples share rows and crop slots by a plan; `transform`,
      `collate`, `blank` and `lanes` are then not used.
    own: with `planned`, the lanes to make, ascending, instead of those of `host`: hosts whose
      devices hold no neighbouring rows.

  Raises:
    UserError: no rows, or sizes that do not divide.
  """
  if not len(source):
    raise UserError('the data set has no rows')
  if bad_rows not in ('skip', 'fatal'):
    raise ValueError(f"bad_rows: expected 'skip' or 'fatal', got {bad_rows!r}")
  if batch_size < 1:
    raise UserError(f'batch_size: expected at least 1, got {batch_size}')
  lanes = math.gcd(lanes, batch_size) if planned is None else planned.planner.lanes
  if planned is not None and planned.planner.batch_size != batch_size:
    raise ValueError(f'the plan is for batches of {planned.planner.batch_size}, not {batch_size}')
  split = Lanes(lanes=lanes, batch_size=batch_size, host=host, hosts=hosts)
  ordered = make_order(order, source, batch_size=batch_size, seed=seed, shuffle=shuffle,
                       group=group)
  reader = BatchReader(
    source=source, transform=transform, collate=collate, lanes=split, seed=seed, order=ordered,
    epochs=epochs, bad_rows=bad_rows, blank=blank, remainder=remainder, planned=planned,
    own=None if own is None else tuple(own))
  if not len(reader):
    raise UserError(f'{epochs} epochs of {len(source)} rows are less than one batch of '
                    f'{batch_size}')
  return Batches(reader, workers=workers, threads=threads, prefetch=prefetch, on_fault=on_fault)
