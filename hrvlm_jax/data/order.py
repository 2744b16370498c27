"""The orders in which a training run visits a source: uniform, or LLaVA's grouping by length.

An order says, for every position of an endless sequence, which row of which epoch stands there. It
is a pure function of (source, seed), so a position is all that has to be saved.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, Protocol

import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.rows import BadRow, Source
from hrvlm_jax.data.sampler import modality_grouped_order, shuffled_index, word_count

OrderName = Literal['uniform', 'grouped']


class Order(Protocol):
  """Rows by position.

  Attributes:
    epoch_size: positions of one epoch.
  """

  epoch_size: int

  def place(self, position: int) -> tuple[int, int]:
    """(epoch, row index) of a position."""
    ...

  def describe(self) -> dict[str, Any]:
    """What a saved position depends on, as JSON values."""
    ...


class UniformOrder:
  """A new permutation every epoch, or the source's own order.

  Args:
    rows: length of the source.
    seed: of the permutations.
    shuffle: False keeps the source's own order.
  """

  def __init__(self, rows: int, *, seed: int, shuffle: bool = True):
    self.epoch_size, self._seed, self._shuffle = rows, seed, shuffle

  def place(self, position: int) -> tuple[int, int]:
    """See `Order`."""
    return shuffled_index(position, self.epoch_size, self._seed, shuffle=self._shuffle)

  def describe(self) -> dict[str, Any]:
    """See `Order`."""
    return {'rows': self.epoch_size, 'seed': self._seed, 'shuffle': self._shuffle}


class GroupedOrder:
  """Batches of similar length that hold only rows with, or only rows without images.

  `sampler.modality_grouped_order` anew every epoch. An epoch is filled up to whole batches with
  rows from its own beginning, as the original's loader does, so that groups and batches coincide in
  every epoch. The lengths are read once, from the whole source; for a mixture, whose rows change,
  once per epoch (and by every worker process).

  Args:
    source: all rows are read. Rows that cannot be read or have no words count as short ones with an
      image here, and are dealt with where they are trained.
    batch_size: examples of a global batch.
    batch: examples per device and micro-batch of the original's grouping.
    world: devices of the original's grouping.
    seed: of the permutations.

  Raises:
    UserError: a group is larger than a batch, or does not divide it.
  """

  def __init__(self, source: Source, *, batch_size: int, batch: int, world: int, seed: int):
    if batch < 1 or world < 1 or batch_size % (batch * world):
      raise UserError(f'grouped order: batch_size={batch_size} is no multiple of the groups of '
                      f'{batch} examples x {world} devices')
    self._rows, self._batch, self._world, self._seed = len(source), batch, world, seed
    self.epoch_size = -(-len(source) // batch_size) * batch_size
    # Rows of a mixture are drawn anew every epoch; those of any other source stay what they are.
    self._mixture = source if hasattr(source, 'fetch') else None
    self._lengths = None if self._mixture is not None else row_lengths(source)

  def place(self, position: int) -> tuple[int, int]:
    """See `Order`."""
    epoch, place = divmod(position, self.epoch_size)
    return epoch, int(self._epoch(epoch)[place])

  def describe(self) -> dict[str, Any]:
    """See `Order`."""
    return {'rows': self._rows, 'seed': self._seed, 'shuffle': True,
            'order': f'grouped {self._batch} x {self._world}'}

  def _epoch(self, epoch: int) -> np.ndarray:
    """int64 [epoch_size]: the rows of an epoch in their order."""
    return _grouped_epoch(self, epoch)

  def compute(self, epoch: int) -> np.ndarray:
    """int64 [epoch_size]: the rows of an epoch in their order, made from scratch."""
    lengths = self._lengths
    if lengths is None:
      lengths = row_lengths(self._mixture, epoch=epoch, seed=self._seed)
    rng = np.random.default_rng(np.random.SeedSequence([self._seed, 3, epoch]))
    order = np.array(modality_grouped_order(lengths.tolist(), batch=self._batch, world=self._world,
                                            permute=lambda n: rng.permutation(n).tolist()))
    return np.resize(order, self.epoch_size)  # repeats the beginning


@functools.lru_cache(maxsize=4)
def _grouped_epoch(order: GroupedOrder, epoch: int) -> np.ndarray:
  return order.compute(epoch)


def row_lengths(source: Source, *, epoch: int = 0, seed: int = 0) -> np.ndarray:
  """int64 [rows]: words of every row, negative without an image; 1 for rows without words.

  Args:
    epoch: of a mixture.
    seed: of what a mixture draws; rows with drawn turns get the length of one such draw.

  Source: luogen1996/LLaVA-HR: llava_hr/train/train.py (`modality_lengths`).
  """
  lengths = np.ones(len(source), np.int64)
  fetch = getattr(source, 'fetch', None)
  for index in range(len(source)):
    try:
      row = source[index] if fetch is None else fetch(
        index, epoch, np.random.default_rng(np.random.SeedSequence([seed, 4, epoch, index])))
    except BadRow:
      continue
    words = word_count(row.messages)
    if words:
      lengths[index] = words if row.images else -words
  return lengths


def make_order(
  name: OrderName, source: Source, *, batch_size: int, seed: int, shuffle: bool = True,
  group: tuple[int, int] | None = None,
) -> Order:
  """The order of a name.

  Args:
    group: (examples per device and micro-batch, devices) of the original's grouping; default: one
      group per global batch.

  Raises:
    UserError: an unknown name, or settings that contradict each other.
  """
  if name == 'uniform':
    if group is not None:
      raise UserError(f"group={group} has no meaning with order='uniform'; expected "
                      "order='grouped'")
    return UniformOrder(len(source), seed=seed, shuffle=shuffle)
  if name != 'grouped':
    raise UserError(f"order: found {name!r}, expected 'uniform' or 'grouped'")
  if not shuffle:
    raise UserError("order='grouped' shuffles; remove shuffle=False")
  batch, world = group or (batch_size, 1)
  return GroupedOrder(source, batch_size=batch_size, batch=batch, world=world, seed=seed)
