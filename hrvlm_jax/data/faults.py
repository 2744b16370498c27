"""Rows that cannot be used: each keeps its place in the order, is counted by its kind, and is not
trained.

So the number of a batch says which rows came before it, and no host has to tell another what it
skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, Literal

import grain
import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.rows import BadRow, Row
from hrvlm_jax.data.unchanged import DataChanged
from hrvlm_jax.language.chat import IGNORE

Example = dict[str, Any]
BadRowPolicy = Literal['skip', 'fatal']

_DONOR_TRIES = 1000


@dataclasses.dataclass(frozen=True)
class Fault:
  """What stands in the place of a row that cannot be used: kind of fault, sentence, position."""

  kind: str
  message: str
  position: int

  @classmethod
  def of(cls, error: UserError, position: int) -> Fault:
    """The fault an error tells of."""
    return cls(error.kind if isinstance(error, BadRow) else 'example', str(error), position)


@dataclasses.dataclass(frozen=True)
class Batch:
  """What a reader hands over: arrays and the faults met, or the sentence that ends the run."""

  arrays: dict[str, Any] | None
  faults: tuple[Fault, ...]
  fatal: str | None = None

  @classmethod
  def ended(cls, fault: Fault) -> Batch:
    """A batch that ends the run with this fault."""
    return cls(None, (fault,), fatal=fault.message)


@dataclasses.dataclass(frozen=True)
class Named(grain.transforms.RandomMap):
  """A transform (row, random generator) -> anything, whose errors name the row."""

  transform: Callable[[Row, np.random.Generator], Any]

  def random_map(self, element: Row, rng: np.random.Generator) -> Any:
    """See the class.

    Raises:
      BadRow: the row cannot be used.
    """
    try:
      return self.transform(element, rng)
    except BadRow:
      raise
    except UserError as error:
      raise BadRow('example', element.where, str(error)) from error


class KeepPlace(grain.MapDataset):
  """The elements of the parent, and a `Fault` in the place of each that cannot be used.

  Grain's `filter` leaves such elements out, after which an index says no longer which rows came
  before; and `batch` and `ElasticIterator` refuse it.
  """

  def __len__(self):
    return len(self._parent)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    try:
      return self._parent[index]
    except DataChanged:
      raise
    except UserError as error:
      return Fault.of(error, index)


def untrained(example: Mapping[str, Any]) -> Example:
  """The example with all labels -100.

  Raises:
    ValueError: it has no labels, so something else must say that it does not count.
  """
  if 'labels' not in example:
    raise ValueError("an example without 'labels' cannot stand in for a bad row; use "
                     "bad_rows='fatal' or give the pipeline another `blank`")
  return dict(example) | {'labels': np.full_like(example['labels'], IGNORE)}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ToBatch:
  """Examples and faults of a batch -> `Batch`, for Grain's `batch`.

  The place of a fault is filled with a copy of a usable example in which nothing is trained: one of
  the batch, else the first behind it.

  Attributes:
    examples: where that one is looked for.
    collate: examples -> arrays of a batch.
    blank: makes the copy that does not count.
    batch_size: of a global batch, for what errors say.
    fatal: whether a fault ends the run.
    epoch: examples of an epoch; all of them stand within two epochs from anywhere.
  """

  examples: grain.MapDataset
  collate: Callable[[Sequence[Example]], dict[str, Any]]
  blank: Callable[[Example], Example]
  batch_size: int
  fatal: bool
  epoch: int = _DONOR_TRIES

  def __call__(self, elements: Sequence[Example | Fault]) -> Batch:
    faults = tuple(element for element in elements if isinstance(element, Fault))
    if faults and self.fatal:
      return Batch.ended(faults[0])
    donor = next((element for element in elements if not isinstance(element, Fault)), None)
    if donor is None:
      donor = self._behind(faults[-1].position)
    if donor is None:
      return Batch(None, faults, fatal=(
        f'batch {faults[-1].position // self.batch_size}: none of its rows can be used, nor any of '
        f'the next {self._tries} (last fault: {faults[-1].message}); check the data set'))
    return Batch(self.collate([self.blank(donor) if isinstance(element, Fault) else element
                               for element in elements]), faults)

  @property
  def _tries(self) -> int:
    return min(_DONOR_TRIES, max(2 * self.epoch, 100))  # a mixture takes other rows every epoch

  def _behind(self, position: int) -> Example | None:
    """The first usable example behind a batch that has none."""
    end = min(position + 1 + self._tries, len(self.examples))
    found = (self.examples[i] for i in range(position + 1, end))
    return next((element for element in found if not isinstance(element, Fault)), None)
