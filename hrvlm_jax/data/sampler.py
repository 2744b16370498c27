"""Orders of examples: uniform shuffling on lanes, and LLaVA's grouping by length and modality.

Lanes make the order independent of the number of hosts. Global batch k holds the positions
k * B .. (k + 1) * B - 1 of one endless order; it is cut into a fixed number of lanes of equal size,
and hosts own whole, neighbouring lanes. So the same seed makes the same global batches for every
host count that divides the number of lanes, and a batch number says exactly what is left.

Source of the grouping: luogen1996/LLaVA-HR: llava_hr/train/llava_trainer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses

import grain
import numpy as np

from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.language.chat import Message

Permute = Callable[[int], Sequence[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lanes:
  """Which positions of the global order a batch of a host holds.

  Attributes:
    lanes: fixed for a run, a multiple of every host count it should support.
    batch_size: examples of a global batch, a multiple of `lanes`.
    host: this host.
    hosts: how many there are.
  """

  lanes: int
  batch_size: int
  host: int = 0
  hosts: int = 1

  def __post_init__(self):
    problems = []
    if self.lanes < 1 or self.batch_size % max(self.lanes, 1):
      problems.append(f'batch_size={self.batch_size} is no multiple of lanes={self.lanes}')
    if self.hosts < 1 or self.lanes % max(self.hosts, 1):
      problems.append(f'lanes={self.lanes} is no multiple of the {self.hosts} hosts')
    if not 0 <= self.host < max(self.hosts, 1):
      problems.append(f'host={self.host} of {self.hosts} does not exist')
    raise_all('data lanes', problems)

  @property
  def local_batch_size(self) -> int:
    """Examples of a batch on this host."""
    return self.batch_size // self.hosts

  def positions(self, step: int) -> range:
    """Positions in the global order of this host's part of batch `step`.

    The parts of all hosts, one after the other, are the global batch; the batches 0..n-1 together
    hold exactly the positions 0..n * batch_size - 1.
    """
    start = step * self.batch_size + self.host * self.local_batch_size
    return range(start, start + self.local_batch_size)


def shuffled_index(position: int, size: int, seed: int, *, shuffle: bool = True) -> tuple[int, int]:
  """(epoch, index) of a position in an endless order over `size` examples.

  Every epoch is a permutation of its own, computed for one position without storing it.
  """
  epoch, place = divmod(position, size)
  if not shuffle or size == 1:
    return epoch, place
  mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint32)[0])
  index = grain.experimental.index_shuffle(place, max_index=size - 1, seed=mixed, rounds=4)
  return epoch, int(index)


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
