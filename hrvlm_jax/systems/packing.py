"""From the views of examples to those of a batch: one packer, which follows a declaration.

A system says once which arrays its views are (`Packing`): one entry per view slot, per image or per
row, and which numbers in them count slots. The arrays of an example, those of a batch, the packing
and the shift of a part of a batch that lies behind another all follow from it. Axis letters: v view
slots, b rows, m images of a row, t visual positions of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import numpy as np
from PIL import Image

from hrvlm_jax.core.errors import UserError, raise_all

Views = dict[str, np.ndarray]
BLANK = Image.new('RGB', (64, 64))


@dataclasses.dataclass(frozen=True)
class ViewSpec:
  """Dtype and shape of one array; a string in the shape is an axis whose length varies."""

  dtype: Any
  shape: tuple[int | str, ...]

  def __str__(self) -> str:
    return f'{np.dtype(self.dtype).name}[{" ".join(map(str, self.shape))}]'


@dataclasses.dataclass(frozen=True)
class Entry:
  """One entry of an array.

  Attributes:
    shape: of the entry, the axis of slots, images or rows not counted.
    fill: stands in entries that nothing uses.
    counts: how far a value moves with every view slot before it: 0 for plain values, 1 for the
      number of a slot.
  """

  shape: tuple[int, ...]
  dtype: Any = np.uint8
  fill: float = 0
  counts: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
  """What the views of a system are, and how those of several examples share a batch.

  Attributes:
    slots: arrays with an entry per view; all rows of a batch share its slots.
    images: arrays with an entry per image, [b m ...] in a batch.
    rows: arrays that an example has once, [b ...] in a batch.
    each: tokens that a slot yields, by which `index` int32 [b t] counts; `valid` bool [b t] says
      which positions are real. 0: the index counts within its row. None: a batch has no index.
    fixed: learned tokens in front of those of all slots (a newline); an index below it stays.
    gather: axes of the array `gather` of an example, the tokens it takes: 1, numbered over its
      slots (and `fixed`); 2, pairs (view, token of the view); 0: it takes all, in order.
    views, tokens: most slots and positions of an image.
    bucket: views of the fullest row -> slots that every row gets; None: by `views`.
  """

  slots: Mapping[str, Entry] = dataclasses.field(default_factory=dict)
  images: Mapping[str, Entry] = dataclasses.field(default_factory=dict)
  rows: Mapping[str, Entry] = dataclasses.field(default_factory=dict)
  each: int | None = 1
  fixed: int = 0
  gather: int = 0
  views: int = 1
  tokens: int = 1
  bucket: Callable[[int], int] | None = None

  @property
  def example(self) -> dict[str, ViewSpec]:
    """The arrays of one example."""
    found = {'tokens': ViewSpec(np.int32, ('images',))}
    found |= {name: ViewSpec(a.dtype, ('views', *a.shape)) for name, a in self.slots.items()}
    found |= {name: ViewSpec(a.dtype, ('images', *a.shape)) for name, a in self.images.items()}
    found |= {name: ViewSpec(a.dtype, a.shape) for name, a in self.rows.items()}
    if self.gather:
      found['gather'] = ViewSpec(np.int32, ('positions', 2)[:self.gather])
    return found

  @property
  def batch(self) -> dict[str, ViewSpec]:
    """The arrays of a batch, which the encoder reads."""
    found = {name: ViewSpec(a.dtype, ('slots', *a.shape)) for name, a in self.slots.items()}
    found |= {name: ViewSpec(a.dtype, ('rows', 'images', *a.shape))
              for name, a in self.images.items()}
    found |= {name: ViewSpec(a.dtype, ('rows', *a.shape)) for name, a in self.rows.items()}
    if self.each is not None:
      found |= {'index': ViewSpec(np.int32, ('rows', 'positions')),
                'valid': ViewSpec(bool, ('rows', 'positions'))}
    return found

  def views_of(self, example: Views) -> int:
    """View slots of an example."""
    return len(example[next(iter(self.slots))]) if self.slots else self.views


def check(views: Mapping[str, Any], specs: Mapping[str, ViewSpec], *, what: str) -> None:
  """Holds arrays against their declaration.

  Args:
    what: the first words of the error: the system, and whose views they are.

  Raises:
    UserError: per key what was found and what is declared.
  """
  axes: dict[str, int] = {}
  problems = [f'{key}: missing, expected {spec}' for key, spec in specs.items() if key not in views]
  for key, value in views.items():
    found = ViewSpec(value.dtype, value.shape)
    if key not in specs:
      problems.append(f'{key}: found {found}, expected no array of this name')
      continue
    spec = specs[key]
    if fits := len(value.shape) == len(spec.shape):
      lengths = [axes.setdefault(axis, size) if isinstance(axis, str) else axis
                 for size, axis in zip(value.shape, spec.shape, strict=True)]
      fits = value.dtype == spec.dtype and lengths == list(value.shape)
    if not fits:
      known = ', '.join(f'{a} = {n}' for a, n in axes.items() if a in spec.shape)
      problems.append(f'{key}: found {found}, expected {spec}' + (f' ({known})' if known else ''))
  if problems:
    raise_all(what, problems)


def join(images: Sequence[Views], packing: Packing) -> Views:
  """The views of an example from those of its images, each an example of its own.

  `tokens` of an image may be a number.
  """
  out = {name: [np.zeros((0, *spec.shape[1:]), spec.dtype)]
         for name, spec in packing.example.items()}
  start = 0
  for image in images:
    image = image | {'tokens': np.reshape(image['tokens'], -1)}
    for name, value in _moved(image, packing, start).items():
      out[name].append(np.asarray(value, out[name][0].dtype))
    start += packing.views_of(image)
  return {name: np.concatenate(parts) for name, parts in out.items()}


def batch(examples: Sequence[Views], packing: Packing, *, system: str, slots: int | None = None,
          tokens: int | None = None) -> Views:
  """Packs the views of several examples; every shape follows from its arguments' counts of images.

  Args:
    system: names the system in errors.
    slots: view slots of the whole batch; default: rows x (`packing.bucket` of the fullest row, or
      the most images of a row x `packing.views`).
    tokens: visual positions of a row; default: the most images of a row x `packing.tokens`.

  Returns:
    See `Packing.batch`; entries without a view hold `fill`, positions without a token are invalid.

  Raises:
    UserError: arrays that are not as declared, more views or tokens than there is room for.
  """
  for example in examples:
    check(example, packing.example, what=f'views of system {system}')
  rows, counts = len(examples), [packing.views_of(example) for example in examples]
  images = max([1, *(len(example['tokens']) for example in examples)])
  if slots is None:
    each = images * packing.views if packing.bucket is None else packing.bucket(max([1, *counts]))
    slots = max(rows, 1) * each
  takes = [_takes(example, n, packing) for example, n in zip(examples, counts, strict=True)]
  longest = max([0, *map(len, takes)])
  positions = max(images * packing.tokens, longest) if tokens is None else tokens
  problems = []
  if sum(counts) > slots:
    problems.append(f'{sum(counts)} views do not fit {slots} view slots')
  if longest > positions:
    problems.append(f'{longest} visual tokens in one row do not fit {positions} positions')
  if problems:
    raise_all(f'a batch of {rows} rows of {system}', problems)
  axes = {'slots': slots, 'rows': rows, 'images': images, 'positions': positions}
  fills = {name: a.fill for name, a in (packing.slots | packing.images | packing.rows).items()}
  out = {name: np.full([axes.get(n, n) for n in spec.shape], fills.get(name, 0), spec.dtype)
         for name, spec in packing.batch.items()}
  start = 0
  for row, (example, n, take) in enumerate(zip(examples, counts, takes, strict=True)):
    moved = _moved(example, packing, start)
    for name in packing.slots:
      out[name][start:start + n] = moved[name]
    for name in packing.images:
      out[name][row, :len(moved[name])] = moved[name]
    for name in packing.rows:
      out[name][row] = moved[name]
    if packing.each is not None:
      out['index'][row, :len(take)] = _index(take, packing, start)
      out['valid'][row, :len(take)] = True
    start += n
  return out


def shift(views: Views, packing: Packing, slots: int) -> Views:
  """The views of a batch, whose numbers count `slots` more view slots before them."""
  moved = _moved(views, packing, slots)
  return moved if packing.each is None else moved | {
    'index': _index(views['index'], packing, slots)}


def _takes(example: Views, views: int, packing: Packing) -> np.ndarray:
  """int32 [t]: the tokens of a row, numbered over the example's own slots."""
  if packing.each is None:
    return np.zeros(0, np.int32)
  if not packing.gather:
    return np.arange(views * packing.each, dtype=np.int32)
  gather = example['gather']
  return gather if gather.ndim == 1 else gather[:, 0] * np.int32(packing.each) + gather[:, 1]


def _index(index: np.ndarray, packing: Packing, slots: int) -> np.ndarray:
  moved = index + np.int32(slots * packing.each)
  return np.where(index < packing.fixed, index, moved) if packing.fixed else moved


def _moved(views: Views, packing: Packing, slots: int) -> Views:
  """Views whose plain arrays and `gather` stand behind so many slots of the same example."""
  moved = {name: views[name] + np.asarray(slots * a.counts, a.dtype)
           for group in (packing.slots, packing.images, packing.rows) for name, a in group.items()
           if a.counts}
  if packing.gather == 1 and 'gather' in views:
    moved['gather'] = _index(views['gather'], packing, slots)
  elif packing.gather and 'gather' in views:
    moved['gather'] = views['gather'] + np.array([slots, 0], np.int32)
  return views | moved


class Packed:
  """What of a system follows from its declaration (`contract.System` adds the rest)."""

  def packing(self, config: Any) -> Packing:
    """The declaration of the views (see `systems.packing`).

    Default, for a system whose images all have the same number of views and each view the same
    number of tokens: the arrays with an entry per view or per image that a blank image has; the
    encoder finds them with `index` into the flattened (slots x tokens of a view), and `valid`.
    """
    return _blank_packing(self, config)

  def batch(self, examples: Sequence[Views], config: Any, *, slots: int | None = None,
            tokens: int | None = None) -> Views:
    """The views of a batch, see `packing.batch`."""
    return batch(examples, self.packing(config), system=self.name, slots=slots, tokens=tokens)

  def shift(self, views: Views, config: Any, slots: int) -> Views:
    """A batch's views behind `slots` others, see `packing.shift`; a subclass without: None."""
    return shift(views, self.packing(config), slots)


@functools.lru_cache(maxsize=64)
def _blank_packing(system: Packed, config: Any) -> Packing:
  """The declaration that the views of a blank image give."""
  count, found = system.count(*BLANK.size, config), system.views([BLANK], config)
  entry = lambda value: Entry(value.shape[1:], value.dtype)
  views = {name: entry(value) for name, value in found.items()
           if name != 'tokens' and len(value) == count.slots}
  images = {name: entry(value) for name, value in found.items()
            if name != 'tokens' and name not in views and len(value) == 1}
  unclear = sorted(found.keys() - {'tokens', *views, *images})
  if unclear or not views or count.tokens % count.slots:
    raise UserError(
      f'system {system.name!r}: its views do not declare themselves: a blank image has '
      f'{count.slots} view slots, {count.tokens} tokens and the arrays '
      f'{ {name: value.shape for name, value in found.items()} }; define `packing`')
  return Packing(slots=views, images=images, each=count.tokens // count.slots, views=count.slots,
                 tokens=count.tokens)
