"""Golden cases: run one folder of expected values and say, per tensor, how far we are.

A case folder holds `config.json` (`system`, `kind` and every size and setting), optionally
`io.safetensors`, `weights.safetensors`, images and further JSON files. A check is chosen by
(system, kind) alone; nothing about a folder is known in advance. Whatever a check leaves untouched,
a tensor or a leaf of a JSON file, fails the case unless it is waived with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import fnmatch
import importlib
import json
import pathlib
import traceback
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open

from hrvlm_jax.core.errors import UserError
from tests.parity.cases import release_keys

WHOLE_MODEL = 1e-4
OPERATOR = 1e-5

_CHECKS: dict[tuple[str, str], Callable[['Case'], None]] = {}
# Modules that register checks; imported on first use.
_MODULES = ('language_models', 'mc_llava', 'data', 'evaluation', 'pheye', 'llava_hr', 'ps3',
            'vila_hd', 'baselines')


def check(system: str, *kinds: str):
  """Registers a function of one `Case` for (system, kind)."""

  def register(fn):
    for kind in kinds:
      _CHECKS[system, kind] = fn
    return fn

  return register


@dataclasses.dataclass(frozen=True)
class Result:
  """One compared value: `difference` is absolute, `limit` what it may be; `reason` of a waiver."""

  key: str
  difference: float
  limit: float
  status: str  # 'ok' | 'different' | 'waived' | 'untouched' | 'error'
  detail: str = ''


@dataclasses.dataclass(frozen=True)
class Report:
  """All results of one case folder."""

  name: str
  system: str
  kind: str
  results: tuple[Result, ...]

  @property
  def passed(self) -> bool:
    """Whether every value was equal or waived."""
    return all(r.status in ('ok', 'waived') for r in self.results)

  def failures(self) -> list[str]:
    """One sentence per failed value."""
    return [f'{r.key}: {r.status} (difference {r.difference:.3g}, limit {r.limit:.3g}) {r.detail}'
            for r in self.results if r.status not in ('ok', 'waived')]


class Case:
  """One golden folder, with a record of what was read and compared.

  Attributes:
    config: config.json as a tracked mapping; reading a leaf marks it touched.
  """

  def __init__(self, folder: str | pathlib.Path):
    self.folder = pathlib.Path(folder)
    self.results: list[Result] = []
    self._touched: set[str] = set()
    self._touched_json: set[tuple] = set()
    self._json: dict[str, Any] = {}
    self._waivers: dict[str, str] = {}
    self._io = self._open('io.safetensors')
    self._weights = self._open('weights.safetensors')
    self.config = self.json('config.json')
    self.system, self.kind = self.config['system'], self.config['kind']

  def _open(self, name):
    path = self.folder / name
    return safe_open(path, framework='numpy') if path.exists() else None

  @property
  def keys(self) -> list[str]:
    """Names of the io tensors."""
    return list(self._io.keys()) if self._io else []

  def has(self, key: str) -> bool:
    """Whether the case holds this io tensor."""
    return key in self.keys

  def json(self, name: str) -> 'TrackedDict | TrackedList':
    """A JSON file of the folder; reading a leaf marks it touched."""
    if name not in self._json:
      self._json[name] = json.loads((self.folder / name).read_text())
    return _tracked(self._json[name], (name,), self._touched_json)

  def image(self, name: str) -> Image.Image:
    """An image of the folder in its own mode."""
    image = Image.open(self.folder / name)
    image.load()
    return image

  def input(self, key: str) -> np.ndarray:
    """A tensor the check computes from (or an expected one it inspects itself)."""
    self._touched.add(key)
    return self._io.get_tensor(key)

  def weights(self) -> dict[str, np.ndarray]:
    """The original's state dict; empty when the case has none."""
    if self._weights is None:
      return {}
    return {key: self._weights.get_tensor(key) for key in list(self._weights.keys())}

  def expect(self, key: str, value, *, tol: float = WHOLE_MODEL, mask=None) -> None:
    """Compares with tolerance tol x max(1, max|reference|); integers and booleans exactly.

    Args:
      mask: boolean array, broadcastable to the tensor: compare there only (padded places that the
        case zeroes).
    """
    reference = self.input(key)
    value = np.asarray(value)
    if reference.dtype.kind in 'iub':
      return self._record_exact(key, reference, value)
    if value.shape != reference.shape:
      return self._add(key, np.inf, 0.0, f'shape {value.shape}, expected {reference.shape}')
    limit = tol * max(1.0, float(np.max(np.abs(reference), initial=0.0)))
    difference = np.abs(value.astype(np.float64) - reference.astype(np.float64))
    if mask is not None:
      difference = np.where(np.broadcast_to(mask, difference.shape), difference, 0.0)
    self._add(key, float(np.max(difference, initial=0.0)), limit)

  def exact(self, key: str, value) -> None:
    """Compares bit for bit (integers, bytes, pixels)."""
    self._record_exact(key, self.input(key), np.asarray(value))

  def _record_exact(self, key, reference, value):
    if value.shape != reference.shape:
      return self._add(key, np.inf, 0.0, f'shape {value.shape}, expected {reference.shape}')
    same = np.array_equal(value, reference)
    gap = 0.0 if same else max(float(np.max(np.abs(
      value.astype(np.float64) - reference.astype(np.float64)), initial=0.0)), 1e-30)
    self._add(key, gap, 0.0)

  def expect_json(self, path: Sequence, value, *, file: str = 'config.json', tol: float = 0.0):
    """Compares a JSON value at `path` (a sequence of keys and indices); floats within `tol`."""
    node = self._json.setdefault(file, json.loads((self.folder / file).read_text()))
    for part in path:
      node = node[part]
    self._mark(node, (file, *path))
    name = f'{file}:' + '/'.join(map(str, path))
    gap = _json_gap(node, _plain(value))
    self._add(name, gap, tol * max(1.0, abs(node) if isinstance(node, float) else 1.0),
              '' if gap <= tol else f'{_plain(value)!r}, expected {node!r}'[:400])

  def waive(self, pattern: str, reason: str) -> None:
    """Leaves io tensors or JSON leaves (`config.json:golden/seed`) out, with the reason."""
    self._waivers[pattern] = reason

  def _add(self, key, difference, limit, detail=''):
    status = 'ok' if difference <= limit else 'different'  # NaN compares false: different
    self.results.append(Result(key, difference, limit, status, detail))

  def _mark(self, node, path):
    self._touched_json.add(path)
    if isinstance(node, dict):
      for key, value in node.items():
        self._mark(value, (*path, key))
    elif isinstance(node, list):
      for index, value in enumerate(node):
        self._mark(value, (*path, index))

  def finish(self) -> Report:
    """Adds what nothing touched and closes the case."""
    names = [key for key in self.keys if key not in self._touched]
    # Every JSON file of the folder counts, whether a check opened it or not.
    for path in sorted(self.folder.glob('*.json')):
      if path.name not in self._json:
        self._json[path.name] = json.loads(path.read_text())
    names += [f'{leaf[0]}:' + '/'.join(map(str, leaf[1:]))
              for file, tree in self._json.items() for leaf in _leaves(tree, (file,))
              if leaf not in self._touched_json]
    for name in names:
      reason = next((why for pattern, why in self._waivers.items()
                     if fnmatch.fnmatchcase(name, pattern)), None)
      status = 'untouched' if reason is None else 'waived'
      self.results.append(Result(name, 0.0, 0.0, status, reason or 'no check touches it'))
    return Report(str(self.folder), self.system, self.kind, tuple(self.results))


class TrackedDict(Mapping):
  """A JSON object whose leaves are marked when read."""

  def __init__(self, data, path, touched):
    self._data, self._path, self._touched = data, path, touched

  def __getitem__(self, key):
    return _tracked(self._data[key], (*self._path, key), self._touched)

  def __iter__(self):
    return iter(self._data)

  def __len__(self):
    return len(self._data)

  def __contains__(self, key):
    return key in self._data

  def plain(self) -> dict:
    """A plain copy; marks every leaf."""
    return {key: _plain(self[key]) for key in self}


class TrackedList(Sequence):
  """A JSON array whose leaves are marked when read."""

  def __init__(self, data, path, touched):
    self._data, self._path, self._touched = data, path, touched

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self._data)))]
    index = index if index >= 0 else len(self._data) + index
    return _tracked(self._data[index], (*self._path, index), self._touched)

  def __len__(self):
    return len(self._data)

  def plain(self) -> list:
    """A plain copy; marks every leaf."""
    return [_plain(value) for value in self]


def _tracked(value, path, touched):
  if isinstance(value, dict):
    touched.add(path)
    return TrackedDict(value, path, touched)
  if isinstance(value, list):
    touched.add(path)
    return TrackedList(value, path, touched)
  touched.add(path)
  return value


def _plain(value):
  if isinstance(value, (TrackedDict, TrackedList)):
    return value.plain()
  if isinstance(value, np.ndarray):
    return value.tolist()
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, tuple):
    return [_plain(v) for v in value]
  if isinstance(value, list):
    return [_plain(v) for v in value]
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  return value


def _json_gap(reference, value) -> float:
  """Largest numeric difference of two JSON values; infinite when they differ in kind."""
  if isinstance(reference, bool) or isinstance(value, bool):
    return 0.0 if reference is value else np.inf
  if isinstance(reference, (int, float)) and isinstance(value, (int, float)):
    return float(abs(reference - value))
  if isinstance(reference, list) and isinstance(value, list) and len(reference) == len(value):
    return max((_json_gap(r, v) for r, v in zip(reference, value, strict=True)), default=0.0)
  if isinstance(reference, dict) and isinstance(value, dict) and set(reference) == set(value):
    return max((_json_gap(reference[k], value[k]) for k in reference), default=0.0)
  return 0.0 if reference == value else np.inf


def _leaves(tree, path) -> Iterator[tuple]:
  if isinstance(tree, dict) and tree:
    for key, value in tree.items():
      yield from _leaves(value, (*path, key))
  elif isinstance(tree, list) and tree:
    for index, value in enumerate(tree):
      yield from _leaves(value, (*path, index))
  else:
    yield path


def find_cases(root: str | pathlib.Path) -> list[pathlib.Path]:
  """Every case below `root` (or `root` itself), and every list of a release's tensors.

  A case is a folder whose config.json names a system and a kind; a list (see `release_keys`) a JSON
  file beside no case.

  Raises:
    UserError: no such folder, or no case below it.
  """
  root = pathlib.Path(root)
  if not root.is_dir():
    raise UserError(f'{root}: no such folder; expected a golden case or a folder of cases')
  found = []
  for path in sorted(root.rglob('config.json')):
    try:
      config = json.loads(path.read_text())
    except ValueError as error:
      raise UserError(f'{path}: not valid JSON ({error})') from error
    if isinstance(config, dict) and {'system', 'kind'} <= set(config):
      found.append(path.parent)
  lists = [path for path in sorted(root.rglob('*.json'))
           if path.parent not in found and release_keys.is_list(path)]
  if not found and not lists:
    raise UserError(f"{root}: no golden case below it (a folder whose config.json has 'system' "
                    "and 'kind', or a list of a release's tensors)")
  return found + lists


def run_case(folder: str | pathlib.Path) -> Report:
  """Runs the check of one case folder or list; an exception becomes a failed result.

  Raises:
    UserError: no check is registered for the case's (system, kind), no release of a list's name.
  """
  if pathlib.Path(folder).is_file():
    return _run_list(pathlib.Path(folder))
  for name in _MODULES:
    _import(name)
  case = Case(folder)
  fn = _CHECKS.get((case.system, case.kind))
  if fn is None:
    raise UserError(f'{folder}: no check for system {case.system!r}, kind {case.kind!r}; known: '
                    f'{sorted(_CHECKS)}')
  try:
    fn(case)
  except Exception as error:  # noqa: BLE001 - the report names the case, the next one runs
    detail = ''.join(traceback.format_exception(error))
    case.results.append(Result('(check)', np.inf, 0.0, 'error', detail))
    return Report(str(case.folder), case.system, case.kind, tuple(case.results))
  return case.finish()


def _run_list(path: pathlib.Path) -> Report:
  """Names and shapes of a release: one result for all that agree, one for each that does not."""
  different = release_keys.compare(path)
  results = [Result(name, np.inf, 0.0, 'different', detail) for name, detail in different.items()]
  agreeing = len(json.loads(path.read_text())['tensors']) - len(different)
  results.append(Result('tensors', 0.0, 0.0, 'ok', f'{agreeing} names and shapes'))
  return Report(str(path), path.stem, 'release_keys', tuple(results))


def _import(name: str) -> None:
  module = f'tests.parity.cases.{name}'
  try:
    importlib.import_module(module)
  except ModuleNotFoundError as error:
    if error.name != module:
      raise
