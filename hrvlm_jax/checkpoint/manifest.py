"""A checksum of every file of a checkpoint, and checking what is read against it.

`manifest.json` lies beside `checkpoint.json`. It is written when everything else is there and
before the commit file, so a whole checkpoint has a whole manifest. Its checksums are zlib's CRC-32
(3 GB/s on one core; no package for crc32c is needed): they find damage, not forgery. A reader
checks the files that it is about to read, once per process: `chunks.check` says which files hold
the chunks of some leaves, or of the part of them that lies on this process' devices.

HRVLM_VERIFY=0 (`--no-verify`) reads without checking.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import concurrent.futures
import json
import logging
import os
import threading
from typing import Any
import zlib

from etils import epath

from hrvlm_jax.checkpoint import files, layout
from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError, raise_all

NAME = 'manifest.json'
VARIABLE = 'HRVLM_VERIFY'
_BLOCK = 4 << 20
_THREADS = 8
_log = logging.getLogger(__name__)
_checked: set[tuple[str, int, float]] = set()  # files found good: what they were then
_lock = threading.Lock()


def write(place: epath.Path, root: epath.Path, inside: epath.Path, name: str = '') -> None:
  """Writes the manifest of all files that are there now.

  Args:
    place: folder that gets `manifest.json`.
    root: the checkpoint's own folder.
    inside: the folder that is about to be committed, `root` or one in it; its commit file is left
      out.
    name: of `inside` below `root` once it is committed.
  """
  found = {}
  for path in files.all_files(root):
    below = _below(root, path)
    if inside != root and (rest := _below(inside, path)) != os.fspath(path):
      below = f'{name}/{rest}'
    if path.name != NAME and path != inside / layout.COMMIT:
      found[below] = path
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    sums = dict(zip(found, pool.map(_sum, found.values())))
  listed = {name: sums[name] for name in sorted(sums)}
  text = json.dumps({'checksum': 'crc32', 'own': _own(listed), 'files': listed}, indent=1)
  (place / NAME).write_text(text)


class Manifest:
  """The manifest of a checkpoint folder.

  Attributes:
    files: name -> [bytes, checksum]; empty for a checkpoint without one.

  Raises:
    UserError: it is missing though it was written, or damaged itself.
  """

  def __init__(self, folder: epath.Path):
    self.folder = folder
    beside = layout.beside(folder)
    path = beside / NAME
    self.files: dict[str, tuple[int, str]] = {}
    if not path.exists():
      if layout.read_json(beside / layout.MARKER).get('manifest'):
        raise UserError(f'{path}: is missing, though the checkpoint was written with it; '
                        f'{advice(folder)}')
      return
    try:
      content = json_text.loads(path.read_text())
      self.files = {name: (int(size), total) for name, (size, total) in content['files'].items()}
      good = content['own'] == _own(content['files']) and content['checksum'] == 'crc32'
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
      good = False
    if not good:
      raise UserError(f'{path}: the list of checksums is damaged; {advice(folder)}')

  def problems(self, names: Iterable[str]) -> list[str]:
    """A sentence per damaged or missing file among the named ones, and per name that is unknown.

    A file is read once per process; names may be any that the manifest holds.
    """
    if not self.files:
      return []
    todo = {name: self.folder / name for name in names}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      found = list(pool.map(lambda item: self._problem(*item), todo.items()))
    return [text for text in found if text]

  def _problem(self, name: str, path: epath.Path) -> str | None:
    if name not in self.files:
      return f'{name}: is not in {NAME}'
    try:
      facts = path.stat()
      key = (os.fspath(path), facts.length, facts.mtime)
      if key in _checked:
        return None
      size, total = _sum(path)
    except OSError as error:
      return f'{name}: cannot be read ({error.strerror or error})'
    wanted = self.files[name]
    if size != wanted[0]:
      return f'{name}: has {size} bytes, {wanted[0]} were written'
    if total != wanted[1]:
      return f'{name}: the checksum of its bytes is {total}, {wanted[1]} was written'
    with _lock:
      _checked.add(key)
    return None


def check(folder: epath.Path, names: Iterable[str] | None = None) -> None:
  """Checks files of a checkpoint before they are read.

  Args:
    folder: the checkpoint's own folder.
    names: below it; None: all that are not arrays (settings, tokenizer, state of the data).

  Raises:
    UserError: damaged or missing files (all named), and the newest checkpoint beside it that is
      whole, if there is one.
  """
  if not enabled():
    return
  manifest = Manifest(folder)
  if not manifest.files:
    say_unchecked(folder)
    return
  if names is None:
    names = [name for name in manifest.files if not is_array(name)]
  if problems := manifest.problems(names):
    raise_all(f'checkpoint {folder} is damaged', [*problems[:-1], f'{problems[-1]}; '
                                                  f'{advice(folder)}'])


def say_unchecked(folder: epath.Path) -> None:
  """One line, once, for a checkpoint of an earlier release."""
  key = (os.fspath(folder), -1, 0.0)
  with _lock:
    if key in _checked:
      return
    _checked.add(key)
  _log.warning('%s has no %s (it was written by an earlier release): its files are not checked',
               folder, NAME)


def enabled() -> bool:
  """Whether files are checked (HRVLM_VERIFY is not 0)."""
  return os.environ.get(VARIABLE, '1') != '0'


def is_array(name: str) -> bool:
  """Whether a name of the manifest belongs to what Orbax reads."""
  return not name.startswith(f'{layout.BESIDE}/') and (
    name.startswith((f'{layout.ARRAYS}/', 'params/', 'state/')) or '/' not in name
    and name.startswith('_'))


def damaged(folder: epath.Path) -> list[str]:
  """Everything that is wrong with the files of a checkpoint; all of them are read.

  Raises:
    UserError: no whole checkpoint.
  """
  folder = layout.resolve(folder)
  try:
    manifest = Manifest(folder)
  except UserError as error:
    return [str(error)]
  return manifest.problems(manifest.files)


def newest_whole(folder: epath.Path) -> int | None:
  """The newest step beside a training checkpoint (another one) whose files are all undamaged."""
  if folder.parent.name != layout.STEPS or not folder.name.isdigit():
    return None
  for step in reversed(layout.steps(folder.parent.parent)):
    beside = folder.parent / str(step)
    try:
      if step != int(folder.name) and not damaged(beside):
        return step
    except UserError:
      continue
  return None


def advice(folder: epath.Path) -> str:
  """What to do about a damaged checkpoint; looks for one that is whole."""
  if folder.parent.name != layout.STEPS:
    return 'copy or make it again (hrvlm doctor CHECKPOINT reads all its files)'
  step = newest_whole(folder)
  if step is None:
    return 'no other checkpoint of the run is whole'
  return (f'the newest whole one is that of step {step}: hrvlm train --resume-from {step} (or '
          f'last-whole) goes on from it, other verbs take {folder.parent / str(step)}')


def _below(root: epath.Path, path: epath.Path) -> str:
  return os.fspath(path).removeprefix(f'{os.fspath(root)}/')


def _sum(path: epath.Path) -> tuple[int, str]:
  size, total = 0, 0
  with path.open('rb') as file:
    while block := file.read(_BLOCK):
      size, total = size + len(block), zlib.crc32(block, total)
  return size, f'{total:08x}'


def _own(listed: Mapping[str, Any]) -> str:
  return f'{zlib.crc32(json.dumps(listed, sort_keys=True).encode()):08x}'
