"""A whole data set checked before money is spent: every bad row, with its place and kind of fault.

Rows are checked in parallel. An image that many rows share is opened once per process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
import dataclasses
import functools
import os
from typing import Literal

import grain
from tqdm import tqdm

from hrvlm_jax.core import images
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.faults import Fault
from hrvlm_jax.data.pipeline import Batches, processes
from hrvlm_jax.data.rows import BadRow, ImageRef, Row, Source, each_image, inside
from hrvlm_jax.language.chat import IMAGE, Template, check_messages, render
from hrvlm_jax.language.conversation import prepare

ImageCheck = Literal['none', 'header', 'decode']

_CHUNK = 2000
# Below this a pool of processes costs more time than it saves.
_WORTH_A_POOL = 20_000


@dataclasses.dataclass(frozen=True)
class CheckReport:
  """What a check found; `faults` are in the order of the rows."""

  rows: int
  faults: tuple[Fault, ...]
  what: str = 'rows'

  @property
  def counts(self) -> dict[str, int]:
    """Faults by kind, the most frequent first."""
    return dict(Counter(fault.kind for fault in self.faults).most_common())

  def summary(self) -> str:
    """One line: how many rows, how many bad ones of which kind."""
    if not self.faults:
      return f'{self.rows} {self.what}, none is bad'
    kinds = ', '.join(f'{count} {kind}' for kind, count in self.counts.items())
    return f'{self.rows} {self.what}, {len(self.faults)} bad: {kinds}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowCheck:
  """What is checked of a row.

  Attributes:
    image: nothing, the header (kind, size), or everything by decoding it.
    max_pixels: limit of width x height.
    template: the chat template the rows are meant for; None: only that turns alternate.
    answers: every conversation must end with an answer (training data).
  """

  image: ImageCheck = 'decode'
  max_pixels: int = images.MAX_PIXELS
  template: Template | None = None
  answers: bool = True

  def __call__(self, row: Row) -> None:
    """Raises:
      BadRow: what is wrong with the row.
    """
    each_image(row, lambda ref: _check_image(ref, self.image, self.max_pixels))
    if not row.messages and not self.answers:
      return
    try:
      messages = list(row.messages)
      if self.template is not None:
        messages = prepare(messages, self.template, len(row.images))
      elif messages and messages[0].role == 'assistant':
        messages = messages[1:]
      check_messages(messages, generation=not self.answers and len(messages) % 2 == 1)
      shown = sum(message.text.count(IMAGE) for message in messages)
      wants_images = self.template is None or bool(self.template.image)
      if self.template is not None:
        render(self.template, messages, generation=not self.answers and len(messages) % 2 == 1)
      told = self.template is not None or bool(row.images)  # without either, it may be plain text
      if told and wants_images and shown not in ({0, len(row.images)} if row.images else {0}):
        raise UserError(f'has {shown} image placeholders for {len(row.images)} images')
      if not wants_images and len(row.images) != 1:
        raise UserError(f'the template {self.template.name} is of a model that reads exactly one '
                        f'image per prompt, found {len(row.images)}')
    except UserError as error:
      raise BadRow('conversation', row.where, str(error)) from error


def check_source(
  source: Source,
  check: Callable[[Row], None] | None = None,
  *,
  workers: int | None = None,
  progress: bool = True,
) -> CheckReport:
  """Reads every row of a data set and reports all that cannot be used.

  Args:
    check: raises `BadRow` for a row; default: `RowCheck()`.
    workers: processes; None: one per core for large sets; 0: this process.
    progress: show a bar on standard error.
  """
  check = check or RowCheck()
  size = len(source)
  if workers is None:
    workers = (os.cpu_count() or 1) if size >= _WORTH_A_POOL or _decodes(check) else 0
  chunks = grain.MapDataset.range(0, size, _CHUNK).map(_Chunk(source, check))
  # Reading ahead in threads would only get in the way of processes.
  chunks = chunks.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  if workers > 1 and size > _CHUNK:
    chunks = chunks.mp_prefetch(processes(min(workers, -(-size // _CHUNK))))
  faults: list[Fault] = []
  with tqdm(total=size, desc='rows', unit='row', disable=not progress) as bar:
    for rows, found in chunks if size else ():
      faults.extend(found)
      bar.update(rows)
      bar.set_postfix(bad=len(faults))
  return CheckReport(size, tuple(faults))


def check_batches(batches: Batches, *, progress: bool = True) -> CheckReport:
  """Makes the first epoch's batches of a run, as training makes them, and reports every example
  that training would leave out.

  Args:
    batches: with `bad_rows='skip'`, made by one host; its workers serve the check too.
    progress: show a bar on standard error.

  Raises:
    UserError: a batch that cannot be made at all.
  """
  size = batches.epoch
  faults: dict[int, Fault] = {}
  with tqdm(total=size, desc='examples', unit='example', disable=not progress) as bar:
    for number in range(min(-(-size // batches.batch_size), len(batches))):
      made = batches.take()
      faults |= {fault.position: fault for fault in made.faults if fault.position < size}
      bar.update(min(batches.batch_size, size - number * batches.batch_size))
      bar.set_postfix(bad=len(faults))
  batches.close()
  return CheckReport(size, tuple(faults[position] for position in sorted(faults)), 'examples')


@dataclasses.dataclass(frozen=True)
class _Chunk(grain.transforms.Map):
  """First row of a chunk -> number of its rows, and the faults among them.

  A chunk and not a row is the element: what Grain does for each costs as much as reading a row.
  """

  source: Source
  check: Callable[[Row], None]

  def map(self, element: int) -> tuple[int, list[Fault]]:
    rows, faults = range(element, min(element + _CHUNK, len(self.source))), []
    for index in rows:
      try:
        self.check(self.source[index])
      except UserError as error:
        faults.append(Fault.of(error, index))
    return len(rows), faults


def _decodes(check: Callable[[Row], None]) -> bool:
  return isinstance(check, RowCheck) and check.image == 'decode'


def _check_image(ref: ImageRef, how: ImageCheck, max_pixels: int) -> None:
  if how == 'none':
    return
  if ref.data is not None:
    _look(ref.data, ref.name, how, max_pixels)
  elif failed := _look_once(ref.folder, ref.path, ref.name, how, max_pixels):
    kind, message = failed
    raise images.ImageError(kind, message) if kind != 'path' else UserError(message)


@functools.lru_cache(maxsize=1 << 16)
def _look_once(folder, path, name, how, max_pixels) -> tuple[str, str] | None:
  """(kind, message) of what is wrong with an image file, remembered."""
  try:
    _look(inside(folder, path), name, how, max_pixels)
  except images.ImageError as error:
    return error.kind, str(error)
  except UserError as error:
    return 'path', str(error)
  return None


def _look(source, name, how, max_pixels) -> None:
  if how == 'header':
    images.image_size(source, max_pixels=max_pixels, name=name)
  else:
    images.open_image(source, exif='ignore', max_pixels=max_pixels, name=name)
