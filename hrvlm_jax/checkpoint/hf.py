"""Hugging Face style folders: reading tensors lazily, writing shards, index and manifest.

Reading accepts one safetensors file, a sharded set with its index, and pickled PyTorch files
(`.bin`, `.pt`, `.pth`), the latter only through torch's weights-only loading. Nothing in a folder
is ever executed. Writing is all or nothing.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
import json
import os
import pathlib
import shutil
from typing import Any

import ml_dtypes
import numpy as np

from hrvlm_jax.checkpoint import files
from hrvlm_jax.checkpoint.safetensors import SafetensorsFile, Spool
from hrvlm_jax.core import installed, json_text
from hrvlm_jax.core.errors import UserError, raise_all

MAX_SHARD_BYTES = 4_990_000_000  # of tensors: with its header a file stays below 5 GB
MANIFEST = 'manifest.json'
_PICKLES = ('.bin', '.pt', '.pth')
_INDEX_LIMIT = 100_000_000  # bytes of an index file


class TensorFolder(Mapping[str, np.ndarray]):
  """The tensors of a folder or file by name, read only when asked for.

  Safetensors arrays are read-only views of the mapped files: they cost no anonymous memory.

  Args:
    path: a weight file, or a folder. In a folder the index (`*.safetensors.index.json`) is taken
      first, then a single safetensors file, then `*.bin.index.json`, then a single pickled file;
      a file named `model` or `pytorch_model` is preferred when there are several.
    strict: False keeps what is whole of damaged files, so that a caller can list their problems
      together with its own.

  Attributes:
    shapes, dtypes: by tensor name, known without reading a tensor.
    metadata: `__metadata__` of the safetensors files, joined.
    files: the weight files.
    problems: what is wrong with the files (`strict=False` only).
    unreadable: names of tensors that are known to exist in a damaged file.

  Raises:
    UserError: no weight file, or several to choose from; damaged, missing or unsafe files; names
      on which index and files disagree (all listed).
  """

  def __init__(self, path: str | os.PathLike, *, strict: bool = True):
    self.path = pathlib.Path(path)
    self.problems: list[str] = []
    index, self.files = _find(self.path, self.problems)
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, np.dtype] = {}
    self.metadata: dict[str, str] = {}
    self.unreadable: Collection[str] = set()
    self._home: dict[str, Mapping[str, np.ndarray]] = {}
    problems, damaged = self.problems, set()
    for file in self.files:
      try:
        part = (PickledFile(file) if file.suffix in _PICKLES else
                SafetensorsFile(file, strict=False))
      except UserError as error:
        problems.append(str(error))
        damaged.add(file.name)
        if index is None:
          self.unreadable = Everything()
        continue
      problems += [f'{file}: {problem}' for problem in part.problems]
      if index is None:
        self.unreadable = part.unreadable
      elif part.problems:
        damaged.add(file.name)
      self.metadata.update(part.metadata)
      for name in part:
        if name in self._home:
          problems.append(f'{name}: in {self._home[name].path.name} and in {file.name}')
        elif index is not None and index.get(name) != file.name:
          where = f'in {index[name]}' if name in index else 'nowhere'
          problems.append(f'{name}: in {file.name}, but the index has it {where}')
        self._home[name] = part
        self.shapes[name], self.dtypes[name] = part.shapes[name], part.dtypes[name]
    present = {file.name for file in self.files}
    for name, file in (index or {}).items():
      if name in self._home:
        continue
      if file in present and file not in damaged:
        problems.append(f'{name}: named by the index, not in {file}')
      self.unreadable.add(name)
    if strict:
      raise_all(f'weights in {self.path}', problems)

  def __getitem__(self, name: str) -> np.ndarray:
    return self._home[name][name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._home)

  def __len__(self) -> int:
    return len(self._home)


class Everything(Collection):
  """The names of a file that cannot be read: any name may be among them."""

  def __contains__(self, name: object) -> bool:
    return True

  def __iter__(self) -> Iterator[str]:
    return iter(())

  def __len__(self) -> int:
    return 0


class PickledFile(Mapping[str, np.ndarray]):
  """A pickled PyTorch state dict, loaded with torch's weights-only unpickler.

  A dictionary `{'state_dict': {...}, ...}` is opened at its `state_dict`.

  Raises:
    UserError: torch is absent; the file holds anything but tensors; the file is damaged.
  """

  problems: Sequence[str] = ()
  unreadable: frozenset[str] = frozenset()

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self.metadata: dict[str, str] = {}
    try:
      import torch
    except ImportError as error:
      raise UserError(f'{path}: reading a pickled PyTorch file needs PyTorch; '
                      f'install it with {installed.add("torch")} or convert the file to '
                      f'safetensors') from error
    state = _torch_load(torch, self.path)
    if isinstance(state, Mapping) and isinstance(state.get('state_dict'), Mapping):
      state = state['state_dict']
    if not isinstance(state, Mapping):
      raise UserError(f'{path}: holds {type(state).__name__}, expected a dictionary of tensors')
    bad = [f'{name}: {type(value).__name__}, expected a tensor'
           for name, value in state.items() if not isinstance(value, torch.Tensor)]
    raise_all(str(path), bad)
    self._state = {str(name): value.detach() for name, value in state.items()}
    self.shapes = {name: tuple(value.shape) for name, value in self._state.items()}
    self.dtypes = {name: _numpy_dtype(torch, name, value) for name, value in self._state.items()}

  def __getitem__(self, name: str) -> np.ndarray:
    tensor = self._state[name].contiguous()
    if self.dtypes[name] == ml_dtypes.bfloat16:  # NumPy knows no bfloat16, but its bits
      import torch
      return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

  def __iter__(self) -> Iterator[str]:
    return iter(self._state)

  def __len__(self) -> int:
    return len(self._state)


def _torch_load(torch: Any, path: pathlib.Path) -> Any:
  import pickle

  try:
    try:
      return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except RuntimeError:  # files older than PyTorch 1.6 are no zip archives and cannot be mapped
      return torch.load(path, map_location='cpu', weights_only=True)
  except pickle.UnpicklingError as error:
    raise UserError(f'{path}: refused, it holds Python objects besides tensors or is damaged; '
                    f'only plain weights are loaded') from error
  except (RuntimeError, EOFError, OSError, ValueError) as error:
    raise UserError(f'{path}: cannot be read as PyTorch weights ({error})') from error


def _numpy_dtype(torch: Any, name: str, tensor: Any) -> np.dtype:
  if tensor.layout != torch.strided or tensor.is_quantized:
    raise UserError(f'{name}: sparse or quantized tensors are not supported')
  if tensor.dtype == torch.bfloat16:
    return np.dtype(ml_dtypes.bfloat16)
  try:
    return torch.empty(0, dtype=tensor.dtype).numpy().dtype
  except TypeError as error:
    raise UserError(f'{name}: dtype {tensor.dtype} is not supported') from error


def _find(
    path: pathlib.Path, problems: list[str]
) -> tuple[dict[str, str] | None, list[pathlib.Path]]:
  """The index (tensor name -> file name), if there is one, and the weight files there are."""
  if path.is_file():
    if path.name.endswith('.index.json'):
      return _read_index(path, problems)
    if path.suffix not in ('.safetensors', *_PICKLES):
      raise UserError(f'{path}: expected a .safetensors, .bin, .pt or .pth file')
    return None, [path]
  if not path.is_dir():
    raise UserError(f'{path}: no such file or folder')
  names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
  for kind in (('.safetensors',), _PICKLES):
    index = [n for n in names if n.endswith(tuple(f'{suffix}.index.json' for suffix in kind))]
    single = [n for n in names if n.endswith(kind)]
    for found, indexed in ((index, True), (single, False)):
      preferred = [n for n in found if n.split('.')[0] in ('model', 'pytorch_model')]
      found = preferred if len(found) > 1 and len(preferred) == 1 else found
      if len(found) > 1:
        raise UserError(f'{path}: several weight files without an index '
                        f'({", ".join(found)}); name one of them')
      if found:
        return _read_index(path / found[0], problems) if indexed else (None, [path / found[0]])
  raise UserError(f'{path}: no weights (.safetensors, .bin, .pt or .pth) in this folder')


def _read_index(
    path: pathlib.Path, problems: list[str]
) -> tuple[dict[str, str], list[pathlib.Path]]:
  data = read_json(path, limit=_INDEX_LIMIT)
  table = data.get('weight_map')
  if not isinstance(table, dict) or not table:
    raise UserError(f'{path}: has no weight_map')
  present, unsafe = [], []
  for file in sorted({str(name) for name in table.values()}):
    # A file name and nothing else: an index must not reach outside its folder.
    if (pathlib.PurePosixPath(file).name != file or '\\' in file or file in ('.', '..')
        or not file.endswith(('.safetensors', *_PICKLES))):
      unsafe.append(f'{file!r} is no plain weight file name; refused')
    elif not (path.parent / file).is_file():
      problems.append(f'{path.parent / file} is missing; {path.name} names it')
    else:
      present.append(path.parent / file)
  raise_all(str(path), unsafe)
  return {str(name): str(file) for name, file in table.items()}, present


def read_json(path: str | os.PathLike, *, limit: int = 50_000_000) -> dict[str, Any]:
  """A JSON file that holds a mapping.

  Raises:
    UserError: absent, larger than `limit` bytes, no JSON, or no mapping.
  """
  path = pathlib.Path(path)
  try:
    if path.stat().st_size > limit:
      raise UserError(f'{path}: {path.stat().st_size} bytes, at most {limit} are read')
    data = json_text.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror})') from error
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path}: no valid JSON ({error})') from error
  if not isinstance(data, dict):
    raise UserError(f'{path}: expected a JSON mapping, found {type(data).__name__}')
  return data


def is_finite(array: np.ndarray) -> bool:
  """Whether an array holds no infinity and no NaN; works in pieces, so that it costs no memory."""
  if array.dtype.kind in 'biu':
    return True
  flat = array.reshape(-1)
  step = 1 << 22
  return all(bool(np.isfinite(flat[i:i + step]).all()) for i in range(0, flat.size, step))


def write_weights(
    folder: str | os.PathLike, tensors: Iterable[tuple[str, np.ndarray]], *,
    stem: str = 'model', max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
  """Writes `<stem>.safetensors`, or shards of at most `max_shard_bytes` of tensors and their index.

  A single tensor larger than that gets a shard of its own. Memory: one tensor.

  Args:
    tensors: (name, array) pairs, consumed one at a time.
    metadata: strings for `__metadata__`; `format: pt`, which transformers insists on, is added.

  Returns:
    The names of the files written.
  """
  folder = pathlib.Path(folder)
  metadata = {'format': 'pt', **(metadata or {})}
  shards: list[Spool] = []
  parts: list[pathlib.Path] = []
  seen: set[str] = set()
  try:
    for name, array in tensors:
      if name in seen:
        raise UserError(f'tensor {name}: written twice')
      seen.add(name)
      if not shards or (shards[-1].nbytes and
                        shards[-1].nbytes + array.nbytes > max_shard_bytes):
        if shards:
          shards[-1].finish(parts[-1], metadata)
        parts.append(folder / f'{stem}-{len(parts) + 1}.partial')
        shards.append(Spool(parts[-1]))
      shards[-1].add(name, array)
    if not shards:
      raise UserError(f'{folder}: no tensor to write')
    shards[-1].finish(parts[-1], metadata)
    return _name_shards(folder, stem, shards, parts)
  finally:
    for shard in shards:
      shard.discard()
    for part in parts:
      part.unlink(missing_ok=True)


def _name_shards(
    folder: pathlib.Path, stem: str, shards: list[Spool], parts: list[pathlib.Path]
) -> list[str]:
  if len(shards) == 1:
    parts[0].rename(folder / f'{stem}.safetensors')
    return [f'{stem}.safetensors']
  table, written = {}, []
  for number, (shard, part) in enumerate(zip(shards, parts), 1):
    written.append(f'{stem}-{number:05d}-of-{len(shards):05d}.safetensors')
    part.rename(folder / written[-1])
    table.update(dict.fromkeys(shard.names, written[-1]))
  total = sum(shard.nbytes for shard in shards)
  index = {'metadata': {'total_size': total}, 'weight_map': dict(sorted(table.items()))}
  written.append(f'{stem}.safetensors.index.json')
  (folder / written[-1]).write_text(json.dumps(index, indent=2) + '\n', encoding='utf-8')
  return written


def write_extra(folder: str | os.PathLike, extra: Mapping[str, Any]) -> None:
  """Writes further files: name -> bytes, text, JSON value, or a path to copy.

  Names may hold sub-folders; they may not leave the folder.
  """
  folder = pathlib.Path(folder)
  for name, content in extra.items():
    target = folder / name
    if not target.resolve().is_relative_to(folder.resolve()):
      raise UserError(f'{name!r}: a file name that leaves the folder; refused')
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, os.PathLike):
      shutil.copyfile(content, target)
    elif isinstance(content, bytes):
      target.write_bytes(content)
    elif isinstance(content, str):
      target.write_text(content, encoding='utf-8')
    else:
      target.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


def write_manifest(folder: str | os.PathLike, facts: Mapping[str, Any] | None = None) -> None:
  """Writes `manifest.json`: size and sha256 of every other file, and `facts` beside them."""
  folder = pathlib.Path(folder)
  listed = {
      str(path.relative_to(folder).as_posix()):
          {'bytes': path.stat().st_size, 'sha256': files.sha256(path)}
      for path in sorted(folder.rglob('*')) if path.is_file() and path.name != MANIFEST
  }
  write_extra(folder, {MANIFEST: {'version': 1, **(facts or {}), 'files': listed}})


def check_manifest(folder: str | os.PathLike) -> None:
  """Compares every file with the manifest.

  Raises:
    UserError: absent manifest; missing, changed or unlisted files (all listed).
  """
  folder = pathlib.Path(folder)
  listed = read_json(folder / MANIFEST).get('files')
  if not isinstance(listed, dict):
    raise UserError(f'{folder / MANIFEST}: lists no files')
  present = {
      path.relative_to(folder).as_posix()
      for path in folder.rglob('*') if path.is_file() and path.name != MANIFEST
  }
  problems = [f'{name}: missing' for name in listed if name not in present]
  problems += [f'{name}: not in the manifest' for name in sorted(present - set(listed))]
  problems += [
      f'{name}: sha256 differs from the manifest'
      for name in sorted(present & set(listed))
      if files.sha256(folder / name) != listed[name]['sha256']
  ]
  raise_all(str(folder), problems)
