"""The safetensors file format, read through a memory map and written tensor by tensor.

Layout (huggingface/safetensors: README): 8 bytes little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}}`, the tensors' bytes without gaps. Here is what the library
safetensors cannot give, and no more: its NumPy interface copies every tensor out of the map where
conversion needs views (no anonymous memory); it refuses a damaged file at the first fault where one
message names them all; its writer wants all tensors in memory at once where export has one.
"""

from collections.abc import Iterator, Mapping
import json
import math
import mmap
import os
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np

from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError, raise_all

# The limit of the reference implementation; a larger header is damage or an attack.
MAX_HEADER_BYTES = 100_000_000

DTYPES: dict[str, np.dtype] = {
    'F64': np.dtype('<f8'), 'F32': np.dtype('<f4'), 'F16': np.dtype('<f2'),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn), 'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
    'I64': np.dtype('<i8'), 'I32': np.dtype('<i4'), 'I16': np.dtype('<i2'), 'I8': np.dtype('i1'),
    'U64': np.dtype('<u8'), 'U32': np.dtype('<u4'), 'U16': np.dtype('<u2'), 'U8': np.dtype('u1'),
    'BOOL': np.dtype('?'),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile(Mapping[str, np.ndarray]):
  """A safetensors file as a mapping of read-only arrays that are views of the mapped file.

  The whole header is checked when the file is opened; no tensor is read before it is asked for.
  An array stays valid for as long as it is referenced.

  Args:
    strict: False keeps the tensors that are whole of a damaged file, see `problems`.

  Attributes:
    shapes, dtypes: by tensor name, in the order of the file.
    metadata: the strings stored under `__metadata__`.
    problems: a sentence per bad tensor; empty for a sound file.
    unreadable: names of the bad tensors.

  Raises:
    UserError: unreadable, truncated or inconsistent file; every bad tensor is named.
  """

  def __init__(self, path: str | os.PathLike, *, strict: bool = True):
    self.path = pathlib.Path(path)
    size, start, header = _read_header(self.path)
    self.metadata: dict[str, str] = header.pop('__metadata__', {})
    self._entries, self.problems = _check_entries(header, size - start)
    if strict:
      raise_all(str(self.path), self.problems)
    self.unreadable = frozenset(name for name in header if name not in self._entries)
    self.shapes = {name: shape for name, (_, shape, _) in self._entries.items()}
    self.dtypes = {name: dtype for name, (dtype, _, _) in self._entries.items()}
    self._start = start
    self._map: mmap.mmap | None = None

  def __getitem__(self, name: str) -> np.ndarray:
    dtype, shape, offset = self._entries[name]
    count = math.prod(shape)
    if not count:
      return np.zeros(shape, dtype)
    if self._map is None:
      with open(self.path, 'rb') as file:
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(self._map, dtype, count, self._start + offset).reshape(shape)
    # Odd files place a tensor off its alignment; such a view is legal but slow and refused by some.
    return array if array.flags.aligned else array.copy()

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for name, value in pairs:
    if name in found:
      raise ValueError(f'the name {name} occurs twice')
    found[name] = value
  return found


def _read_header(path: pathlib.Path) -> tuple[int, int, dict[str, Any]]:
  """File size, where the data starts, and the decoded header."""
  try:
    size = path.stat().st_size
    with open(path, 'rb') as file:
      prefix = file.read(8)
      length = struct.unpack('<Q', prefix)[0] if len(prefix) == 8 else 0
      if len(prefix) < 8 or length < 2:
        raise UserError(f'{path}: not a safetensors file ({size} bytes, no header)')
      if length > MAX_HEADER_BYTES:
        raise UserError(f'{path}: claims a header of {length} bytes, at most {MAX_HEADER_BYTES} '
                        f'are allowed; the file is damaged or no safetensors file')
      if length + 8 > size:
        raise UserError(f'{path}: claims a header of {length} bytes but has {size} bytes in all; '
                        f'the file is truncated')
      text = file.read(length)
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror})') from error
  try:
    header = json_text.loads(text, object_pairs_hook=_no_duplicates)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path}: the header is no valid JSON ({error})') from error
  if not isinstance(header, dict) or not isinstance(header.get('__metadata__', {}), dict):
    raise UserError(f'{path}: the header is no mapping of tensor names')
  return size, 8 + length, header


def _is_size(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_entries(
    header: dict[str, Any], data_bytes: int
) -> tuple[dict[str, tuple[np.dtype, tuple[int, ...], int]], list[str]]:
  """Dtype, shape and offset of every sound tensor, and what all consistency checks found."""
  problems, entries, spans = [], {}, []
  for name, entry in header.items():
    if not isinstance(entry, dict):
      problems.append(f'{name}: no description of a tensor')
      continue
    dtype, shape, offsets = entry.get('dtype'), entry.get('shape'), entry.get('data_offsets')
    if not isinstance(dtype, str) or dtype not in DTYPES:
      problems.append(f'{name}: unknown dtype {dtype!r}; known: {", ".join(DTYPES)}')
    elif not isinstance(shape, list) or not all(map(_is_size, shape)):
      problems.append(f'{name}: bad shape {shape!r}')
    elif (not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets))
          or offsets[0] > offsets[1]):
      problems.append(f'{name}: bad data_offsets {offsets!r}')
    elif offsets[1] > data_bytes:
      problems.append(f'{name}: ends at byte {offsets[1]} of {data_bytes}; the file is truncated')
    elif math.prod(shape) * DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
      problems.append(f'{name}: shape {shape} of {dtype} needs '
                      f'{math.prod(shape) * DTYPES[dtype].itemsize} bytes, '
                      f'the file holds {offsets[1] - offsets[0]}')
    else:
      entries[name] = (DTYPES[dtype], tuple(shape), offsets[0])
      spans.append((offsets[0], offsets[1], name))
  if not problems:
    end = 0
    for first, last, name in sorted(spans):
      if first != end:
        problems.append(f'{name}: starts at byte {first}, expected {end} (gap or overlap)')
      end = last
    if end != data_bytes and not problems:
      problems.append(f'{data_bytes - end} bytes after the last tensor belong to no tensor')
  return entries, problems


def will_read(view: np.ndarray) -> None:
  """Asks the system for the pages of a view of a mapped file, and for no others of that file.

  Without it a page that is touched brings those around it, so that of a matrix of which a process
  needs half of every row, all is read. An array that is no such view is left alone.
  """
  base: Any = view
  while isinstance(base, np.ndarray):
    base = base.base
  base = base.obj if isinstance(base, memoryview) else base
  if not isinstance(base, mmap.mmap) or not view.size or min(view.strides, default=0) < 0:
    return
  start = np.frombuffer(base, np.uint8, 1).ctypes.data
  base.madvise(mmap.MADV_RANDOM)
  axes = sorted((step, count) for step, count in zip(view.strides, view.shape, strict=True)
                if count > 1)
  size = view.itemsize
  while axes and axes[0][0] - size < mmap.PAGESIZE:  # pieces that lie together
    step, count = axes.pop(0)
    size += step * (count - 1)
  offsets = np.array([view.ctypes.data - start])
  for step, count in reversed(axes):
    offsets = (offsets[:, None] + step * np.arange(count)).reshape(-1)
  for offset in offsets.tolist():
    page = offset - offset % mmap.PAGESIZE
    base.madvise(mmap.MADV_WILLNEED, page, offset + size - page)


def dtype_name(dtype: np.dtype) -> str:
  """The format's name of a NumPy dtype.

  Raises:
    UserError: the format has no such dtype.
  """
  dtype = np.dtype(dtype)
  name = _NAMES.get(dtype.newbyteorder('<') if dtype.byteorder == '>' else dtype)
  if name is None:
    raise UserError(f'dtype {dtype} cannot be written as safetensors; known: {", ".join(DTYPES)}')
  return name


class Spool:
  """Collects tensors one at a time and then writes them as one safetensors file.

  The header, which comes first, is known only after the last tensor. Bytes therefore go to a
  spool file next to the target and are copied behind the header at the end; memory stays at one
  tensor.
  """

  def __init__(self, path: str | os.PathLike):
    self._spool = pathlib.Path(f'{path}.spool')
    self._file = open(self._spool, 'w+b')  # noqa: SIM115 - closed by finish() or discard()
    self._entries: list[tuple[str, str, tuple[int, ...], int, int]] = []
    self.names: set[str] = set()
    self.nbytes = 0

  def add(self, name: str, array: np.ndarray) -> None:
    """Appends one tensor; the array is not kept."""
    if name in self.names or name == '__metadata__':
      raise UserError(f'tensor {name}: the name is used twice or reserved')
    kind = dtype_name(array.dtype)
    array = np.asarray(array, order='C')
    if array.dtype.byteorder == '>':
      array = array.astype(array.dtype.newbyteorder('<'))
    self._file.write(memoryview(array.reshape(-1).view(np.uint8)) if array.size else b'')
    self._entries.append((name, kind, array.shape, self.nbytes, array.nbytes))
    self.names.add(name)
    self.nbytes += array.nbytes

  def finish(self, path: str | os.PathLike, metadata: Mapping[str, str]) -> None:
    """Writes the file and removes the spool.

    Tensors of wide elements come first, so that each lies on a multiple of its element size.
    """
    if bad := [key for key, value in metadata.items() if not isinstance(value, str)]:
      raise TypeError(f'__metadata__ of a safetensors file holds strings only; others at {bad}')
    order = sorted(self._entries, key=lambda entry: -DTYPES[entry[1]].itemsize)
    header: dict[str, Any] = {'__metadata__': dict(metadata)} if metadata else {}
    end = 0
    for name, kind, shape, _, nbytes in order:
      header[name] = {'dtype': kind, 'shape': list(shape), 'data_offsets': [end, end + nbytes]}
      end += nbytes
    text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
    text += b' ' * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
      raise UserError(f'{path}: {len(order)} tensors need a header of {len(text)} bytes, '
                      f'at most {MAX_HEADER_BYTES} are allowed')
    with open(path, 'wb') as file:
      file.write(struct.pack('<Q', len(text)) + text)
      for _, _, _, offset, nbytes in order:
        self._file.seek(offset)
        _copy(self._file, file, nbytes)
    self.discard()

  def discard(self) -> None:
    """Removes the spool file."""
    self._file.close()
    self._spool.unlink(missing_ok=True)


def _copy(source: Any, target: Any, nbytes: int) -> None:
  while nbytes:
    block = source.read(min(nbytes, 1 << 24))
    if not block:
      raise OSError('the spool file ended early')
    target.write(block)
    nbytes -= len(block)
