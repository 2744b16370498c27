"""From a source to batches: one chain of Grain datasets below an iterator with a state.

    MapDataset.source(source)       rows; a mixture is a dataset already (`mixture.mix`)
      order.Shuffle                 or `GroupedShuffle`: the order of each epoch
      .repeat(epochs)
      .random_map(transform)        examples, each with random draws of its own
      faults.KeepPlace              a row that cannot be used leaves a `Fault` in its place
      OwnShards                     what this host makes of every batch
      .batch(batch_fn=ToBatch)      batch k of this host
    ElasticIterator                 threads, worker processes, and a state: k

With packing two such chains, one that measures rows and one that opens them, meet in
`packed.PackedBatches`. Either way batch k is a pure function of (source, options, k) and nothing is
carried over from one batch to the next. Resuming is therefore a number, whatever the workers had
read ahead, and stays exact when the numbers of hosts and workers change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
import dataclasses
import gc
import math
from typing import Any
import weakref

from absl import flags
import grain
import numpy as np

from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.data.faults import BadRowPolicy, Batch, Example, KeepPlace, Named, ToBatch, untrained
from hrvlm_jax.data.order import GroupedShuffle, OrderName, dataset, derived_seed, in_order
from hrvlm_jax.data.packed import PackedBatches, RowMaker
from hrvlm_jax.data.rows import Row, Source
from hrvlm_jax.data.workers import OfWorker, Watched, stop_thread

Transform = Callable[[Row, np.random.Generator], Example]

_ENDLESS = 2**62  # rows; Grain counts batches in floating point, and sys.maxsize rounds up
_ORDER = {'order': 'uniform', 'packing': 'none'}  # what an order's description says by default


def neighbours(shards: int, *, host: int, hosts: int) -> tuple[int, ...]:
  """The shards of a host where hosts own equally many, side by side.

  Raises:
    UserError: they cannot be dealt out evenly.
  """
  problems = []
  if hosts < 1 or shards % max(hosts, 1):
    problems.append(f'shards={shards} is no multiple of the {hosts} hosts')
  if not 0 <= host < max(hosts, 1):
    problems.append(f'host={host} of {hosts} does not exist')
  raise_all('data.shards', problems)
  each = shards // hosts
  return tuple(range(host * each, (host + 1) * each))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How a source is read.

  Attributes:
    batch_size: examples of a global batch, over all hosts.
    seed: of the order and of all random choices.
    shuffle: a new permutation every epoch; otherwise the source's own order.
    order: 'uniform', or 'grouped' by length and modality (see `order.GroupedShuffle`).
    group: (examples per device and micro-batch, devices) of the grouping.
    epochs: None: endless.
    shards: parts of a batch that hosts make whole; a batch size they do not divide uses the
      greatest common divisor. With packing the packer's count.
    own: number of shards -> those this host makes, ascending; None: all (see `neighbours`).
    workers: processes; 0 uses threads of this process only.
    bad_rows: 'skip' counts and fills the place with an untrained copy; 'fatal' stops.
  """

  batch_size: int
  seed: int = 0
  shuffle: bool = True
  order: OrderName = 'uniform'
  group: tuple[int, int] | None = None
  epochs: int | None = None
  shards: int = 8
  own: Callable[[int], Sequence[int]] | None = None
  workers: int = 0
  bad_rows: BadRowPolicy = 'skip'

  def __post_init__(self):
    if self.bad_rows not in ('skip', 'fatal'):
      raise ValueError(f"bad_rows: expected 'skip' or 'fatal', got {self.bad_rows!r}")
    if self.batch_size < 1:
      raise UserError(f'batch_size: expected at least 1, got {self.batch_size}')


class OwnShards(grain.MapDataset):
  """The rows of every global batch that this host makes, shard after shard; the last, incomplete
  batch is left out.

  `ElasticIterator` gives host h of n every n-th element: the same batch would lie in another order
  for another number of hosts. Here the parts of all hosts, one after the other, are the batch.
  """

  def __init__(self, parent: grain.MapDataset, *, batch_size: int, shards: int,
               own: Sequence[int]):
    super().__init__(parent)
    each = batch_size // shards
    self._size = batch_size
    self._offsets = [shard * each + i for shard in own for i in range(each)]

  def __len__(self):
    return len(self._parent) // self._size * len(self._offsets)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    batch, place = divmod(index, len(self._offsets))
    return self._parent[batch * self._size + self._offsets[place]]


class Batches:
  """Iterator over the batches of this host, as NumPy arrays, with a state.

  Attributes:
    counts: faults by kind in the batches handed out so far, on this host.
    on_fault: called with (kind, message) for every fault, if set.
    dataset: `faults.Batch` by number (to look at one again).
    rows: rows by position in the order of the run.
    transform: what makes an example of a row.
    own, shards: the shards this host makes, and how many there are.
  """

  def __init__(self, dataset: grain.MapDataset, rows: grain.MapDataset, transform: Transform,
               options: Options, *, own: Sequence[int], shards: int, order: dict[str, Any]):
    self.dataset, self.rows, self.transform = dataset, rows, transform
    self.own, self.shards = tuple(own), shards
    self.counts: Counter[str] = Counter()
    self.on_fault: Callable[[str, str], None] | None = None
    self._options, self._order = options, order
    # An element is this host's batch already: to choose its bucket and crop slots takes all of it.
    self._batches = grain.experimental.ElasticIterator(
      OfWorker(dataset), 1, grain.sharding.ShardOptions(shard_index=0, shard_count=1),
      read_options=grain.ReadOptions(num_threads=2, prefetch_buffer_size=2),
      multiprocessing_options=processes(options.workers))
    self._take = Watched(lambda batches=self._batches: next(batches)) if options.workers else None
    weakref.finalize(self, _end, self._batches, self._take)  # also when the program ends

  def __len__(self) -> int:
    """Batches of all epochs (a very large number when endless)."""
    return len(self.dataset)

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, Any]:
    """The next batch.

    Raises:
      StopIteration: after the last epoch.
      UserError: a row that cannot be used, under the policy 'fatal'; or nothing can be used.
    """
    batch = self.take()
    for fault in batch.faults:
      self.counts[fault.kind] += 1
      if self.on_fault is not None:
        self.on_fault(fault.kind, fault.message)
    if batch.fatal is not None:
      raise UserError(batch.fatal)
    return batch.arrays

  @property
  def batch_size(self) -> int:
    """Examples of a global batch."""
    return self._options.batch_size

  @property
  def epoch(self) -> int:
    """Examples of an epoch."""
    return self._order['rows']

  def take(self) -> Batch:
    """The next batch with its faults, neither counted nor raised.

    Raises:
      StopIteration: after the last epoch.
      UserError: a data worker died.
    """
    found = self._take() if self._take is not None else next(self._batches)
    return found[0]  # Grain makes a batch of one batch

  def positions(self, number: int) -> Sequence[int]:
    """Positions in the order of the run of a batch's examples, over all hosts."""
    if isinstance(self.dataset, PackedBatches):
      return self.dataset.positions(number)
    size = self._options.batch_size
    return range(number * size, (number + 1) * size)

  def mapped(self, transform: Callable[[Row, np.random.Generator], Any]) -> grain.MapDataset:
    """What a transform makes of the row at each position (or a `Fault`); it draws as in the run."""
    return _mapped(self.rows, transform, self._options.seed)

  def get_state(self) -> dict[str, Any]:
    """JSON values from which `set_state` goes on with the next batch, bit for bit."""
    step = self._batches.get_state()['global_next_index']
    return {'version': 1, 'step': step, 'counts': dict(self.counts), 'order': self._order}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on where `get_state` was called, with any number of hosts and workers.

    Raises:
      UserError: the state belongs to another order (each difference is named).
    """
    stored = {key: value.replace(' lanes', ' shards') if isinstance(value, str) else value
              for key, value in state.get('order', {}).items()}  # as it was called until 0.2
    raise_all('the saved position belongs to another order of the data (set these back, or start '
              'from its weights: training.init_from=WORKDIR with another --workdir)', [
      f'{key} was {stored.get(key, _ORDER.get(key))}, is {value}'
      for key, value in self._order.items() if stored.get(key, _ORDER.get(key)) != value])
    _end(self._batches, self._take, int(state['step']))
    self.counts = Counter(state.get('counts', {}))

  def close(self) -> None:
    """Ends worker processes; the next batch starts them again."""
    _end(self._batches, self._take)


def processes(workers: int) -> grain.MultiprocessingOptions | None:
  """What Grain is told for so many worker processes; None: this process reads."""
  if not workers:
    return None
  if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl flags
    flags.FLAGS.mark_as_parsed()
  return grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)


def _end(batches: grain.experimental.ElasticIterator, take: Watched | None,
         step: int | None = None) -> None:
  """Ends Grain's workers, unless they are gone already: it would wait for them."""
  if take is not None:
    stop_thread(take)
  if take is None or not take.broken:
    _close(batches, step)


def _close(batches: grain.experimental.ElasticIterator, step: int | None = None) -> None:
  """Ends Grain's workers now: at interpreter exit its own clean-up comes too late."""
  state = batches.get_state()
  batches.set_state(state if step is None else state | {'global_next_index': step})
  gc.collect()  # the parts of what ran refer to each other


def _mapped(rows: grain.MapDataset, transform, seed: int) -> grain.MapDataset:
  return KeepPlace(rows.random_map(Named(transform), seed=derived_seed(seed, 1)))


def build(source: Source, transform: Transform, options: Options, *,
          collate: Callable[[Sequence[Example]], dict[str, Any]],
          blank: Callable[[Example], Example] = untrained, packed: RowMaker | None = None
          ) -> Batches:
  """The batches of a source.

  Args:
    transform: (row, random generator of its position) -> example; picklable with workers.
    collate: examples -> arrays of a batch.
    blank: makes the copy of an example that does not count.
    packed: makes batches whose examples share rows and crop slots; `transform`, `collate` and
      `blank` are then not used.

  Raises:
    UserError: no rows, or sizes that do not divide.
  """
  if not len(source):
    raise UserError('the data set has no rows')
  size, seed = options.batch_size, options.seed
  # A batch that one host makes is one shard: its micro-batches may have fewer rows than `shards`.
  shards = 1 if options.own is None else math.gcd(options.shards, size)
  if packed is not None:
    shards = packed.packer.shards
  if packed is not None and packed.packer.batch_size != size:
    raise ValueError(f'the packer is for batches of {packed.packer.batch_size}, not {size}')
  own = tuple(range(shards) if options.own is None else options.own(shards))
  ordered = in_order(dataset(source), options.order, batch_size=size, seed=seed,
                     shuffle=options.shuffle, group=options.group)
  rows = ordered.repeat(options.epochs or _ENDLESS // len(ordered))
  fatal = options.bad_rows == 'fatal'
  if packed is None:
    examples = _mapped(rows, transform, seed)
    mine = OwnShards(examples, batch_size=size, shards=shards, own=own)
    batches = mine.batch(len(own) * size // shards, batch_fn=ToBatch(
      examples=examples, collate=collate, blank=blank, batch_size=size, fatal=fatal,
      epoch=len(ordered)))
  else:
    batches = PackedBatches(
      _mapped(rows, packed.example.measure, seed), _mapped(rows, packed.example.open, seed),
      packed, own=own, seed=derived_seed(seed, 5), fatal=fatal)
  if not len(batches):
    raise UserError(f'{options.epochs} epochs of {len(source)} rows are less than one batch of '
                    f'{size}')
  grouped = isinstance(ordered, GroupedShuffle)
  order = _ORDER | {'rows': len(source), 'seed': seed, 'shuffle': options.shuffle,
                    'batch_size': size}
  if grouped:
    order['order'] = 'grouped {} x {}'.format(*ordered.group)
  if packed is not None:
    order['packing'] = packed.packer.describe()
  return Batches(batches, rows, transform, options, own=own, shards=shards, order=order)
