"""Every tensor of a checkpoint beside the release it was converted from, in NumPy.

The files are read with safetensors or torch alone, past our own readers, and our layout is undone
by rules of this file, not by the operations of the weight tables, which only pair the names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import math
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from hrvlm_jax.checkpoint.leaves import StoredParams
from hrvlm_jax.checkpoint.rows import Entry, Table, entries
from hrvlm_jax.core import json_text, paths
from hrvlm_jax.core.module import Functional

LIMIT = 1e-4  # of a difference, relative to the largest value of the reference but at least 1

Outputs = dict[str, dict[str, Any]]
_UNDONE = ('identity', 'transpose', 'conv_kernel', 'conv1x1', 'split_rows',
           'reshape', 'batched', 'scale', 'scalar')


class PlainTensors(Mapping[str, np.ndarray]):
  """The tensors of a release by name, each read from its file when asked for.

  Args:
    parts: prefix of the names -> folder or file.
    rename: name in a file -> name in the weight table, of parts without a prefix.

  Raises:
    ImportError: pickled files, and torch is not installed.
  """

  def __init__(self, parts: Mapping[str, pathlib.Path], *, rename: Callable[[str], str] = str):
    self._rename = rename
    self._read: dict[str, Callable[[], np.ndarray]] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    for prefix, place in parts.items():
      for file in _files(place):
        if file.suffix == '.safetensors':
          self._open(prefix, file)
        else:
          self._unpickle(prefix, file)

  def _open(self, prefix: str, path: pathlib.Path) -> None:
    file = safe_open(path, framework='numpy')
    for name in file.keys():  # noqa: SIM118 - no mapping
      new = prefix + (name if prefix else self._rename(name))
      self._read[new] = lambda name=name: file.get_tensor(name)
      self.shapes[new] = tuple(file.get_slice(name).get_shape())

  def _unpickle(self, prefix: str, path: pathlib.Path) -> None:
    import torch

    state = torch.load(path, map_location='cpu', weights_only=True)
    state = state.get('state_dict', state)
    for name, tensor in state.items():
      # NumPy has no bfloat16, float32 holds its values exactly.
      plain = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
      new = prefix + (name if prefix else self._rename(name))
      self._read[new] = lambda plain=plain: plain.detach().numpy()
      self.shapes[new] = tuple(tensor.shape)

  def __getitem__(self, name: str) -> np.ndarray:
    return self._read[name]()

  def __contains__(self, name: object) -> bool:
    return name in self._read

  def __iter__(self) -> Iterator[str]:
    return iter(self._read)

  def __len__(self) -> int:
    return len(self._read)


def _files(place: pathlib.Path) -> list[pathlib.Path]:
  """The weight files of a folder: those an index names, else `model...`, else all."""
  if place.is_file():
    return [place]
  for kinds in (('.safetensors',), ('.bin', '.pt', '.pth')):
    index = [path for kind in kinds for path in place.glob(f'*{kind}.index.json')]
    if len(index) == 1:
      named = json_text.loads(index[0].read_text())['weight_map'].values()
      return [place / name for name in sorted(set(named))]
    found = sorted(path for path in place.iterdir() if path.suffix in kinds)
    preferred = [path for path in found if path.stem in ('model', 'pytorch_model')]
    if found:
      return preferred or found
  return []


def part_of(path: str) -> str:
  """The part a parameter belongs to: `projector`, `language`, `vision/tower`, ..."""
  return '/'.join(path.split('/')[:2]) if path.startswith('vision/') else path.split('/')[0]


def tensors(table: Table, abstract: Any, stored: StoredParams, plain: PlainTensors,
            fresh: list[str]) -> dict[str, Outputs]:
  """Every tensor of the release against its leaf, by part: names, shapes, sums and values.

  Args:
    table, abstract: of the whole model; they pair names with paths and layers.
    fresh: parameters that the release lacks and that were drawn at random.
  """
  found: dict[str, Outputs] = {}
  used = set()

  def add(part: str, key: str, difference: float, name: str) -> None:
    kinds = ('tensors', 'names', 'shapes', 'sums', 'values')
    outputs = found.setdefault(part, {kind: _output(0.0, 0.0) for kind in kinds})
    if key == 'tensors':
      outputs['tensors']['count'] = outputs['tensors'].get('count', 0) + 1
    elif difference > outputs[key]['difference']:
      outputs[key] = _output(difference, 0.0) | {'first': outputs[key].get('first', name)}

  for entry in entries(table, abstract):
    part = part_of(entry.row.our_paths[0])
    names = [name for name in entry.names if name in plain]
    used.update(names)
    if not names:
      if not entry.row.optional and not set(entry.row.our_paths) <= set(fresh):
        add(part, 'names', 1.0, entry.names[0])
      continue
    for name in names:
      add(part, 'tensors', 0.0, name)
      theirs, ours = plain[name], _undone(entry, stored)
      if theirs.shape != ours.shape:
        add(part, 'shapes', 1.0, name)
        continue
      with np.errstate(over='ignore'):
        theirs = theirs.astype(ours.dtype)
      values, sums = _distance(ours, theirs)
      add(part, 'values', values, name)
      add(part, 'sums', sums, name)
  for name in plain:
    if name not in used and not table.is_ignored(name):
      add('files', 'names', 1.0, name)
  return found


def _undone(entry: Entry, stored: StoredParams) -> np.ndarray:
  """A tensor as the release has it, from our leaf or leaves."""
  row = entry.row
  arrays = [stored(path, entry.layer) for path in row.our_paths]
  if entry.names == row.our_paths:  # the house's own layout
    return arrays[0]
  if row.op.name.split('(')[0] not in _UNDONE:  # a system's own rearrangement
    return np.asarray(row.op.save(arrays[0] if isinstance(row.ours, str) else tuple(arrays)))
  parts = []
  for path, x in zip(row.our_paths, arrays, strict=True):
    leaf = path.rpartition('/')[2]
    if len(entry.shape) == 4 and x.ndim == 4:  # (rows, cols, in, out)
      parts.append(x.transpose(3, 2, 0, 1))
    elif len(entry.shape) == 4 and x.ndim == 2:
      parts.append(x.T[:, :, None, None])
    elif x.ndim == 2 and (leaf == 'kernel' or leaf.startswith('lora_')):  # (in, out)
      parts.append(x.T)
    else:
      parts.append(x if len(arrays) > 1 else x.reshape(entry.shape))
  return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
  """(largest difference, difference of the sums); in pieces, and 0 at once for equal bits."""
  a, b = (np.ascontiguousarray(x).reshape(-1) for x in (a, b))
  if np.array_equal(a.view(np.uint8), b.view(np.uint8)):
    return 0.0, 0.0
  largest = total = 0.0
  for i in range(0, a.size, 1 << 22):
    gap = a[i:i + (1 << 22)].astype(np.float64) - b[i:i + (1 << 22)].astype(np.float64)
    largest, total = max(largest, float(np.max(np.abs(gap)))), total + float(gap.sum())
  return (largest, abs(total)) if largest == largest else (math.inf, math.inf)


def bound(fn: Functional, stored: StoredParams, prefix: str) -> Any:
  """A module of the checkpoint's parameters below `prefix`, in the module's own dtype."""
  flat = {path: jnp.asarray(np.asarray(stored(prefix + path), leaf.dtype))
          for path, leaf in paths.flatten(fn.abstract).items()}
  return fn.bind(paths.unflatten(flat))


def difference(found: Any, expected: np.ndarray) -> dict[str, Any]:
  """Largest difference, what it may be, and whether it is."""
  gap = float(np.max(np.abs(np.asarray(found, np.float64) - expected)))
  return _output(gap, LIMIT * max(1.0, float(np.max(np.abs(expected)))))


def _output(gap: float, limit: float) -> dict[str, Any]:
  return {'difference': gap, 'limit': limit, 'status': 'ok' if gap <= limit else 'different'}
