"""The orders in which a training run visits its rows: uniform, or LLaVA's grouping by length.

An order is a Grain dataset over the rows: index e * n + i is position i of epoch e, and which row
stands there is a pure function of (rows, seed), so a position is all that has to be saved.

Source of the grouping: luogen1996/LLaVA-HR: llava_hr/train/llava_trainer.py.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
import functools
from typing import Literal

import grain
import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.rows import BadRow, Source
from hrvlm_jax.language.chat import Message

OrderName = Literal['uniform', 'grouped']
Permute = Callable[[int], Sequence[int]]


def derived_seed(seed: int, *path: int) -> int:
  """A seed of 32 bits, as Grain wants them; those of different paths have nothing in common."""
  return int(np.random.SeedSequence([seed, *path]).generate_state(1, np.uint32)[0])


def dataset(source: Source) -> grain.MapDataset:
  """The rows of a source as a Grain dataset; a mixture is one already."""
  return source if isinstance(source, grain.MapDataset) else grain.MapDataset.source(source)


class Reordered(grain.MapDataset):
  """Rows of the parent in another order; epoch e reads epoch e of the parent."""

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    epoch, position = divmod(index, len(self))
    return self._parent[epoch * len(self._parent) + self.row(epoch, position)]

  @abc.abstractmethod
  def row(self, epoch: int, position: int) -> int:
    """Which row of the parent stands at a position of an epoch."""


class Shuffle(Reordered):
  """A new permutation every epoch: Grain's `shuffle`, but for the seed of an epoch.

  Grain adds the number of the epoch to the seed, so that a run with the next seed begins with the
  second epoch of this one: runs that differ in their seed would not be independent. It would also
  change what stands at the positions that runs have saved so far.
  """

  def __init__(self, parent: grain.MapDataset, *, seed: int):
    super().__init__(parent)
    self._seed = seed

  def __len__(self):
    return len(self._parent)

  def row(self, epoch, position):
    """See `Reordered`."""
    if len(self) == 1:
      return 0
    return int(grain.experimental.index_shuffle(
      position, max_index=len(self) - 1, seed=derived_seed(self._seed, epoch), rounds=4))


class GroupedShuffle(Reordered):
  """Batches of similar length that hold only rows with, or only rows without images.

  `modality_grouped_order` anew every epoch. An epoch is filled up to whole batches with rows from
  its own beginning, as the original's loader does, so that groups and batches coincide in every
  epoch. The lengths are read once, from the whole source; for a mixture, whose rows change, once
  per epoch (and by every worker process). Grain has no order that depends on the rows.

  Args:
    parent: all rows are read. Rows that cannot be read or have no words count as short ones with an
      image here, and are dealt with where they are trained.
    batch_size: examples of a global batch.
    group: (examples per device and micro-batch, devices) of the original's grouping; default: one
      group per global batch.
    seed: of the permutations.

  Raises:
    UserError: a group is larger than a batch, or does not divide it.
  """

  def __init__(self, parent: grain.MapDataset, *, batch_size: int,
               group: tuple[int, int] | None = None, seed: int):
    super().__init__(parent)
    self.group = batch, world = group or (batch_size, 1)
    if batch < 1 or world < 1 or batch_size % (batch * world):
      raise UserError(f'grouped order: batch_size={batch_size} is no multiple of the groups of '
                      f'{batch} examples x {world} devices')
    self._seed = seed
    self._size = -(-len(parent) // batch_size) * batch_size
    # Rows of a mixture are drawn anew every epoch; those of a source itself stay what they are.
    self._lengths = None if parent.parents else row_lengths(parent)

  def __len__(self):
    return self._size

  def row(self, epoch, position):
    """See `Reordered`."""
    return int(_grouped_epoch(self, epoch)[position])

  def epoch(self, epoch: int) -> np.ndarray:
    """int64 [positions]: the rows of an epoch in their order, made from scratch."""
    lengths = row_lengths(self._parent, epoch) if self._lengths is None else self._lengths
    rng = np.random.default_rng(np.random.SeedSequence([self._seed, 3, epoch]))
    order = np.array(modality_grouped_order(
      lengths.tolist(), batch=self.group[0], world=self.group[1],
      permute=lambda n: rng.permutation(n).tolist()))
    return np.resize(order, self._size)  # repeats the beginning


@functools.lru_cache(maxsize=4)
def _grouped_epoch(order: GroupedShuffle, epoch: int) -> np.ndarray:
  return order.epoch(epoch)


def row_lengths(rows: grain.MapDataset, epoch: int = 0) -> np.ndarray:
  """int64 [rows]: words of every row of an epoch, negative without an image; 1 without words.

  Source: luogen1996/LLaVA-HR: llava_hr/train/train.py (`modality_lengths`).
  """
  lengths = np.ones(len(rows), np.int64)
  for index in range(len(rows)):
    try:
      row = rows[epoch * len(rows) + index]
    except BadRow:
      continue
    if words := word_count(row.messages):
      lengths[index] = words if row.images else -words
  return lengths


def in_order(
  rows: grain.MapDataset, name: OrderName, *, batch_size: int, seed: int, shuffle: bool = True,
  group: tuple[int, int] | None = None,
) -> grain.MapDataset:
  """The rows in the order of a name; without `shuffle` in their own.

  Raises:
    UserError: an unknown name, or settings that contradict each other.
  """
  if name == 'uniform':
    if group is not None:
      raise UserError(f"group={group} has no meaning with order='uniform'; expected "
                      "order='grouped'")
    return Shuffle(rows, seed=seed) if shuffle else rows
  if name != 'grouped':
    raise UserError(f"order: found {name!r}, expected 'uniform' or 'grouped'")
  if not shuffle:
    raise UserError("order='grouped' shuffles; remove shuffle=False")
  return GroupedShuffle(rows, batch_size=batch_size, group=group, seed=seed)


def word_count(messages: Sequence[Message]) -> int:
  """White-space separated words of all messages: the length LLaVA groups by."""
  return sum(len(message.text.split()) for message in messages)


def even_chunks(
  indices: Sequence[int], lengths: Sequence[int], chunks: int
) -> list[list[int]]:
  """Deals indices to chunks of equal count and similar total length.

  Each next index goes to the chunk that is shortest so far (the first one of equals); a chunk that
  has its count is closed. If the count does not divide, every chunks-th index goes to one chunk.
  """
  if len(indices) % chunks:
    return [list(indices[i::chunks]) for i in range(chunks)]
  size = len(indices) // chunks
  dealt: list[list[int]] = [[] for _ in range(chunks)]
  totals = [0.0] * chunks
  for index in indices:
    chunk = totals.index(min(totals))
    dealt[chunk].append(index)
    totals[chunk] += lengths[index]
    if len(dealt[chunk]) == size:
      totals[chunk] = float('inf')
  return dealt


def length_grouped_order(
  lengths: Sequence[int], *, batch: int, world: int, permute: Permute
) -> list[int]:
  """A random order in which the batches of one step hold examples of similar length.

  Args:
    lengths: of every example, positive.
    batch: examples per device and micro-batch.
    world: number of devices.
    permute: n -> a permutation of range(n).
  """
  order = list(permute(len(lengths)))
  out: list[int] = []
  for group in _cut(order, batch * world):
    group = sorted(group, key=lambda index: lengths[index], reverse=True)
    for chunk in even_chunks(group, lengths, world):
      out += chunk
  return out


def modality_grouped_order(
  lengths: Sequence[int], *, batch: int, world: int, permute: Permute
) -> list[int]:
  """LLaVA's order: every global batch has only examples with, or only ones without images.

  Both kinds are ordered by `length_grouped_order` and cut into global batches. The last one of each
  kind, which may be short, is set aside; the others are shuffled. Of those set aside a full
  batch comes first in the epoch, what is left last. With one kind alone the order is that of
  `length_grouped_order`, where the original stops with an assertion.

  Args:
    lengths: positive with, negative without an image.
    batch: examples per device and micro-batch.
    world: number of devices.
    permute: n -> a permutation of range(n); called for examples with images, for those
      without, and for the batches, in this order.

  Raises:
    UserError: examples of length zero, all of them named.
  """
  if zero := [index for index, length in enumerate(lengths) if length == 0]:
    raise UserError(f'examples {zero[:20]} have no words; expected none of length zero')
  kinds = []
  for sign in (1, -1):
    members = [index for index, length in enumerate(lengths) if length * sign > 0]
    if members:
      own = [abs(lengths[index]) for index in members]
      order = length_grouped_order(own, batch=batch, world=world, permute=permute)
      kinds.append([members[index] for index in order])
  if len(kinds) < 2:
    return kinds[0] if kinds else []
  size = batch * world
  cut = [_cut(kind, size) for kind in kinds]
  aside = cut[0][-1] + cut[1][-1]
  whole = cut[0][:-1] + cut[1][:-1]
  batches = [whole[index] for index in permute(len(whole))]
  if len(aside) >= size:
    batches.insert(0, aside[:size])
    aside = aside[size:]
  return [index for group in [*batches, aside] for index in group]


def _cut(items: Sequence[int], size: int) -> list[list[int]]:
  return [list(items[i:i + size]) for i in range(0, len(items), size)]
