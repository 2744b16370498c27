"""The two-way name table between our parameter tree and a PyTorch state dict.

One row per parameter KIND. Every operation knows its inverse, so the same table imports and
exports; both directions are complete or refused with all problems in one message. NumPy only, one
tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
import dataclasses
import fnmatch
import hashlib
from typing import Any

import numpy as np

from hrvlm_jax.checkpoint.hf import is_finite
from hrvlm_jax.core import errors, paths

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Op:
  """An invertible rearrangement of one tensor.

  Attributes:
    load: PyTorch array -> our array (or a tuple of arrays, for a row with several of our paths).
    save: the inverse.
    shape: our shape (or tuple of shapes) -> the PyTorch shape.
  """

  name: str
  load: Callable[[np.ndarray], Any]
  save: Callable[[Any], np.ndarray]
  shape: Callable[[Any], Shape]


identity = Op('identity', lambda x: x, lambda x: x, lambda s: s)
transpose = Op('transpose', lambda x: x.T, lambda x: x.T, lambda s: s[::-1])
# (out, in, rows, cols) <-> (rows, cols, in, out)
conv_kernel = Op(
  'conv_kernel', lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1),
  lambda s: (s[3], s[2], s[0], s[1]))
# A 1x1 convolution used as a linear layer: (out, in, 1, 1) <-> (in, out)
conv1x1 = Op(
  'conv1x1', lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None],
  lambda s: (s[1], s[0], 1, 1))


def reshape(ours: Shape, theirs: Shape) -> Op:
  """The same elements under two shapes (for example a scalar kept as [1])."""
  return Op('reshape', lambda x: x.reshape(ours), lambda x: x.reshape(theirs), lambda s: theirs)


def filled(known: int, rows: int, inner: Op = identity) -> Op:
  """A PyTorch tensor of `known` rows <-> `inner` of the same with rows of zeros up to `rows`."""
  if known == rows:
    return inner
  grow = lambda x: np.concatenate([x, np.zeros((rows - known, *x.shape[1:]), x.dtype)])
  return Op(f'filled({known}, {rows}, {inner.name})', lambda x: inner.load(grow(x)),
            lambda x: inner.save(x)[:known], lambda s: (known, *inner.shape(s)[1:]))


def split_rows(parts: int, inner: Op = identity) -> Op:
  """One fused PyTorch tensor [parts * m, ...] <-> `parts` of ours, each through `inner`."""

  def load(x):
    return tuple(inner.load(part) for part in np.split(x, parts, axis=0))

  def save(arrays):
    return np.concatenate([inner.save(part) for part in arrays], axis=0)

  def shape(shapes):
    each = [inner.shape(s) for s in shapes]
    return (sum(s[0] for s in each), *each[0][1:])

  return Op(f'split_rows({parts}, {inner.name})', load, save, shape)


@dataclasses.dataclass(frozen=True)
class Row:
  """One parameter kind.

  Attributes:
    ours: path in the parameter tree, or a tuple of paths that share one fused PyTorch tensor. With
      `{i}` in `theirs` the leaf carries a leading layer axis.
    theirs: name in the state dict, `{i}` running over layers; or a tuple of ALIASES, names that
      hold equal tensors (import checks equality of those present, export writes all).
    op: per-layer rearrangement.
    indices: the values of `{i}`; default 0..depth-1.
    optional: the tensor may be absent from a file; the leaf is then left out. All layers of
      a row are there or none.
  """

  ours: str | tuple[str, ...]
  theirs: str | tuple[str, ...]
  op: Op = identity
  indices: tuple[int, ...] | None = None
  optional: bool = False

  @property
  def our_paths(self) -> tuple[str, ...]:
    """`ours` as a tuple."""
    return (self.ours,) if isinstance(self.ours, str) else self.ours

  @property
  def names(self) -> tuple[str, ...]:
    """`theirs` as a tuple: the aliases."""
    return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

  @property
  def layered(self) -> bool:
    """Whether our leaf carries a layer axis."""
    return '{i}' in self.names[0]


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows plus the names that are knowingly left out.

  Attributes:
    ignored: {pattern (fnmatch) over PyTorch names: reason}: present in files, not parameters.
    unused: {pattern over our paths: reason}: parameters kept for a round trip only.
    tied: {PyTorch name: name of the tensor it shares}: may be in a file, must then be equal, and
      is never written (a tied output layer).
    by_path: parameters without a row are stored whole under their own path.
  """

  rows: tuple[Row, ...]
  ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
  unused: Mapping[str, str] = dataclasses.field(default_factory=dict)
  tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
  by_path: bool = False

  def is_ignored(self, name: str) -> bool:
    """Whether a tensor of a file is knowingly no parameter of its own."""
    return name in self.tied or any(
      fnmatch.fnmatchcase(name, pattern) for pattern in self.ignored)

  def fingerprint(self) -> str:
    """The table's version: a hash of everything that decides where a tensor goes."""
    lines = sorted(repr((row.our_paths, row.names, row.op.name, row.indices, row.optional))
                   for row in self.rows)
    lines += sorted(map(repr, (*self.ignored, *self.tied.items())))
    lines += ['by_path'] * self.by_path
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16]


def prefixed(table: Table, *, ours: str = '', theirs: str = '') -> Table:
  """The same table with prefixes on both sides, for a part inside a larger model."""
  add = lambda prefix, value: (
    prefix + value if isinstance(value, str) else tuple(prefix + v for v in value))
  return Table(
    tuple(dataclasses.replace(row, ours=add(ours, row.ours), theirs=add(theirs, row.theirs))
          for row in table.rows),
    {theirs + pattern: reason for pattern, reason in table.ignored.items()},
    {ours + pattern: reason for pattern, reason in table.unused.items()},
    {theirs + name: theirs + other for name, other in table.tied.items()}, table.by_path)


def joined(*tables: Table) -> Table:
  """One table of several parts."""
  ignored: dict[str, str] = {}
  unused: dict[str, str] = {}
  tied: dict[str, str] = {}
  for table in tables:
    ignored |= table.ignored
    unused |= table.unused
    tied |= table.tied
  return Table(tuple(row for table in tables for row in table.rows), ignored, unused, tied,
               any(table.by_path for table in tables))


@dataclasses.dataclass(frozen=True)
class Entry:
  """One PyTorch tensor and where it lives in ours; `layer` is None without a layer axis."""

  row: Row
  names: tuple[str, ...]
  layer: int | None
  shape: Shape


def entries(table: Table, abstract: Mapping[str, Any]) -> Iterator[Entry]:
  """Expands the rows over layers against the abstract parameter tree.

  Raises:
    UserError: rows whose paths the model lacks, parameters no row covers (all listed).
  """
  flat = paths.flatten(abstract)
  problems, covered, found = [], set(), []
  named = {path for row in table.rows for path in row.our_paths}
  rest = [Row(path, path) for path in flat if path not in named] if table.by_path else []
  for row in (*table.rows, *rest):
    missing = [path for path in row.our_paths if path not in flat]
    problems += [f'{path}: named by the table, not in the model' for path in missing]
    problems += [f'{p}: covered by two rows' for p in row.our_paths if p in covered]
    covered.update(row.our_paths)
    if missing:
      continue
    shapes = tuple(tuple(flat[path].shape) for path in row.our_paths)
    pick = lambda s: s[0] if isinstance(row.ours, str) else s  # noqa: B023
    if not row.layered:
      found.append(Entry(row, row.names, None, tuple(row.op.shape(pick(shapes)))))
      continue
    indices = row.indices if row.indices is not None else range(shapes[0][0])
    if len(indices) != shapes[0][0]:
      problems.append(f'{row.ours}: {shapes[0][0]} layers in the model, {len(indices)} in the '
                      'table')
      continue
    shape = tuple(row.op.shape(pick(tuple(s[1:] for s in shapes))))
    for layer, index in enumerate(indices):
      names = tuple(name.replace('{i}', str(index)) for name in row.names)
      found.append(Entry(row, names, layer, shape))
  problems += [f'{path}: in the model, no row of the table' for path in flat if path not in covered]
  errors.raise_all('weight table and model do not match', problems)
  yield from found


def check_names(
  table: Table, abstract: Mapping[str, Any], shapes: Mapping[str, Shape], *,
  what: str = 'checkpoint',
) -> list[Entry]:
  """Holds a list of PyTorch names and shapes against the table; returns the entries present.

  Raises:
    UserError: missing, unexpected or misshapen tensors, all in one message.
  """
  present, problems = find_problems(table, abstract, shapes)
  errors.raise_all(f'tensors of the {what}', problems)
  return present


def find_problems(
  table: Table, abstract: Mapping[str, Any], shapes: Mapping[str, Shape], *,
  unreadable: Collection[str] = (),
) -> tuple[list[Entry], list[str]]:
  """The entries whose tensors are present with the right shape, and a sentence per other one.

  Args:
    unreadable: names that are known to be in a damaged file: neither missing nor checked.
  """
  missing, problems, used, present = [], [], set(), []
  rows: dict[int, list[tuple[Entry, bool]]] = {}
  for entry in entries(table, abstract):
    names = [name for name in entry.names if name in shapes]
    used.update(names)
    lost = any(name in unreadable for name in entry.names)
    rows.setdefault(id(entry.row), []).append((entry, bool(names) or lost))
    if not names:
      if not entry.row.optional and not lost:
        missing.append(f'missing tensor {entry.names[0]} (for {_where(entry)})')
      continue
    bad = [f'{name}: shape {tuple(shapes[name])} in the file, {entry.shape} expected'
           for name in names if tuple(shapes[name]) != entry.shape]
    problems += bad
    if not bad:
      present.append(dataclasses.replace(entry, names=tuple(names)))
  for group in rows.values():
    found = [there for _, there in group]
    if group[0][0].row.optional and any(found) and not all(found):
      missing += [f'missing tensor {entry.names[0]} (for {_where(entry)}; other layers have it)'
                  for entry, there in group if not there]
  for name, other in table.tied.items():
    if name in shapes and other in shapes and tuple(shapes[name]) != tuple(shapes[other]):
      problems.append(f'{name}: shape {tuple(shapes[name])}, but it is tied to {other} of shape '
                      f'{tuple(shapes[other])}')
  unexpected = [
    f'unexpected tensor {name} {tuple(shapes[name])}'
    for name in shapes if name not in used and not table.is_ignored(name)]
  return present, errors.rarest_first(missing, problems, unexpected)


def common_dtype(dtypes: Collection[np.dtype]) -> np.dtype:
  """The narrowest dtype that holds values of all of them exactly."""
  widest, *others = {np.dtype(dtype) for dtype in dtypes}
  for dtype in others:
    try:
      widest = np.promote_types(widest, dtype)
    except TypeError:  # bfloat16 and float16: neither holds the other
      widest = np.dtype(np.float32)
  return widest


def leaf_dtypes(
  present: list[Entry], dtypes: Mapping[str, np.dtype]
) -> dict[str, np.dtype]:
  """Dtype of every leaf: that of its tensors, or one that holds all of them exactly."""
  found: dict[str, set[np.dtype]] = {}
  for entry in present:
    for path in entry.row.our_paths:
      found.setdefault(path, set()).add(np.dtype(dtypes[entry.names[0]]))
  return {path: common_dtype(kinds) for path, kinds in found.items()}


def widened(present: list[Entry], dtypes: Mapping[str, np.dtype]) -> dict[str, np.dtype]:
  """{PyTorch name: its dtype} where the leaf that holds it got a wider one."""
  leaves = leaf_dtypes(present, dtypes)
  return {name: np.dtype(dtypes[name]) for entry in present for name in entry.names
          if np.dtype(dtypes[name]) != leaves[entry.row.our_paths[0]]}


def import_tensors(
  tensors: Mapping[str, np.ndarray], table: Table, abstract: Mapping[str, Any], *,
  what: str = 'checkpoint', dtype=None, allocate: Callable[..., np.ndarray] = np.empty,
  finite: bool = False,
) -> dict[str, Any]:
  """PyTorch tensors -> nested dict of NumPy arrays, complete or refused.

  Args:
    tensors: lazy or eager mapping. `.shapes` and `.dtypes` are used where they exist, so that a
      lazy mapping is checked before anything is read; `.problems` and `.unreadable` (see
      `hf.TensorFolder`) join what is wrong with the tensors.
    dtype: cast on the way; default: the dtype of the file; a stacked leaf whose layers differ gets
      one that holds all of them exactly.
    allocate: (shape, dtype) -> array to fill; `files.scratch_arrays` gives arrays on disk, for
      models larger than memory.
    finite: refuse tensors that hold infinities or NaN.

  Raises:
    UserError: every damaged, missing, unexpected, misshapen, non-finite or unequal aliased or tied
      tensor, in one message.
  """
  shapes = getattr(tensors, 'shapes', None)
  if shapes is None:
    shapes = {name: tuple(array.shape) for name, array in tensors.items()}
  dtypes = getattr(tensors, 'dtypes', None)
  if dtypes is None:
    dtypes = {name: array.dtype for name, array in tensors.items()}
  if dtype is not None:
    dtype = np.dtype(dtype)
  problems = list(getattr(tensors, 'problems', ()))
  present, found = find_problems(
    table, abstract, shapes, unreadable=getattr(tensors, 'unreadable', ()))
  problems += found
  flat, kinds = paths.flatten(abstract), leaf_dtypes(present, dtypes)
  refused = bool(problems)  # nothing is assembled any more, but the values are looked at as well
  out: dict[str, np.ndarray] = {}
  for entry in present:
    value = np.asarray(tensors[entry.names[0]])
    problems += _value_problems(entry, value, tensors, finite)
    if refused:
      continue
    loaded = entry.row.op.load(value)
    arrays = (loaded,) if isinstance(entry.row.ours, str) else loaded
    for path, array in zip(entry.row.our_paths, arrays, strict=True):
      if path not in out:
        out[path] = allocate(flat[path].shape, dtype or kinds[path])
      place = ... if entry.layer is None else entry.layer
      with np.errstate(over='ignore'):
        out[path][place] = array
      if dtype is not None and is_finite(value) and not is_finite(out[path][place]):
        problems.append(f'{entry.names[0]}: holds values beyond the range of {dtype.name}')
  for name, other in table.tied.items():
    if name in shapes and other in shapes and shapes[name] == shapes[other]:
      if not _equal(tensors[name], tensors[other]):
        problems.append(f'{name}: differs from {other}, to which it is tied')
  errors.raise_all(f'tensors of the {what}', problems)
  return paths.unflatten(out)


def _value_problems(
  entry: Entry, value: np.ndarray, tensors: Mapping[str, np.ndarray], finite: bool
) -> list[str]:
  problems = [f'{alias}: differs from {entry.names[0]}, of which it is an alias'
              for alias in entry.names[1:] if not _equal(value, tensors[alias])]
  if finite and not is_finite(value):
    problems.append(f'{entry.names[0]}: holds infinities or NaN')
  return problems


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
  """Whether two arrays of one shape hold the same values; in pieces, so that it costs no memory."""
  a, b = np.asarray(a).reshape(-1), np.asarray(b).reshape(-1)
  step = 1 << 22
  return all(np.array_equal(a[i:i + step], b[i:i + step]) for i in range(0, a.size, step))


def export_tensors(
  params: Mapping[str, Any], table: Table
) -> Iterator[tuple[str, np.ndarray]]:
  """Our parameters -> (PyTorch name, array), aliases written out, one tensor at a time."""
  flat = paths.flatten(params)

  def read(path: str, layer: int | None) -> np.ndarray:
    array = np.asarray(flat[path])
    return array if layer is None else array[layer]

  return stream_tensors(params, table, read)


def stream_tensors(
  abstract: Mapping[str, Any], table: Table, read: Callable[[str, int | None], np.ndarray],
) -> Iterator[tuple[str, np.ndarray]]:
  """(PyTorch name, array) of parameters that are read one at a time, aliases written out.

  Args:
    read: (path, layer) -> the leaf, or one layer of it where the row has a layer axis.
  """
  for entry in entries(table, abstract):
    arrays = tuple(read(path, entry.layer) for path in entry.row.our_paths)
    value = entry.row.op.save(arrays[0] if isinstance(entry.row.ours, str) else arrays)
    for name in entry.names:
      yield name, np.ascontiguousarray(value).reshape(value.shape)


def linear(ours: str, theirs: str, *, bias: bool = True, **options) -> list[Row]:
  """Rows of a linear layer: kernel (in, out) <-> weight (out, in), and its bias."""
  rows = [Row(f'{ours}/kernel', f'{theirs}.weight', transpose, **options)]
  if bias:
    rows.append(Row(f'{ours}/bias', f'{theirs}.bias', identity, **options))
  return rows


def norm(ours: str, theirs: str, *, bias: bool = True, **options) -> list[Row]:
  """Rows of a norm: scale <-> weight, and its bias."""
  rows = [Row(f'{ours}/scale', f'{theirs}.weight', identity, **options)]
  if bias:
    rows.append(Row(f'{ours}/bias', f'{theirs}.bias', identity, **options))
  return rows


def _where(entry: Entry) -> str:
  path = entry.row.our_paths[0]
  return path if entry.layer is None else f'{path}[{entry.layer}]'
