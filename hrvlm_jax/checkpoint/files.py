"""Writing folders so that a half-written one is never taken for a whole one.

`staged_folder` collects files in a neighbour of the target and renames it into place at the end,
`whole_file` does so with one file;
`scratch_arrays` are arrays larger than memory; `clear_errors` turns what the operating system says
into one sentence.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import errno
import hashlib
import math
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any

import numpy as np

from hrvlm_jax.core.errors import UserError

_CAUSES = {
    errno.ENOSPC: 'the disk is full; free some space or choose another place',
    errno.EDQUOT: 'the disk quota is used up; free some space or choose another place',
    errno.EFBIG: 'the file would be larger than this system allows; choose another place',
    errno.EACCES: 'permission denied; choose a folder that you may write to',
    errno.EPERM: 'permission denied; choose a folder that you may write to',
    errno.EROFS: 'the file system is read-only; choose another place',
    errno.ENOTDIR: 'a part of the path is a file, not a folder',
    errno.ENAMETOOLONG: 'the name is too long',
}


def cause(error: BaseException) -> str | None:
  """What a user can do about an error of the operating system, or None for other errors.

  TensorStore reports such errors as text; the text of the operating system is inside it.
  """
  seen: BaseException | None = error
  while seen is not None:
    if isinstance(seen, OSError) and seen.errno in _CAUSES:
      return _CAUSES[seen.errno]
    if isinstance(seen, OSError) and re.fullmatch(r'\d+ requested and \d+ written', str(seen)):
      return _CAUSES[errno.ENOSPC]  # NumPy's `tofile`, which says no more
    for number, sentence in _CAUSES.items():
      if os.strerror(number) in str(seen) and number != errno.EPERM:
        return sentence
    seen = seen.__cause__ or seen.__context__
  return None


@contextlib.contextmanager
def clear_errors(what: str) -> Iterator[None]:
  """Raises `UserError('<what>: <cause>')` in place of disk-full and permission errors.

  Args:
    what: begins the sentence, as in `cannot write /data/run`.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    if (sentence := cause(error)) is None:
      raise
    raise UserError(f'{what}: {sentence}') from error


@contextlib.contextmanager
def staged_folder(
    path: str | os.PathLike, *, overwrite: bool = False
) -> Iterator[pathlib.Path]:
  """Yields an empty folder to fill; it becomes `path` when the block ends without an error.

  On an error nothing is left behind and an existing `path` stays as it was.

  Args:
    path: the folder to be made. An empty existing folder is taken; one with files only with
      `overwrite`, which replaces it as a whole.

  Raises:
    UserError: `path` holds files and `overwrite` is false; no space or no permission.
  """
  path = pathlib.Path(os.path.abspath(path))
  if path.exists() and not path.is_dir():
    raise UserError(f'{path}: is a file, expected a folder to write')
  if path.is_dir() and any(path.iterdir()) and not overwrite:
    raise UserError(f'{path}: the folder is not empty; choose another one or remove it first')
  stage = path.with_name(f'.{path.name}.partial-{os.getpid()}')
  old = path.with_name(f'.{path.name}.old-{os.getpid()}')
  with clear_errors(f'cannot write {path}'):
    try:
      shutil.rmtree(stage, ignore_errors=True)
      stage.mkdir(parents=True)
      yield stage
      for file in stage.rglob('*'):
        if file.is_file():
          sync(file)
      if path.exists():
        path.rename(old)
      try:
        stage.rename(path)
      except OSError:
        if old.exists():
          old.rename(path)
        raise
    finally:
      shutil.rmtree(stage, ignore_errors=True)
      shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a path to write, with the same ending; it becomes `path` when the block ends without an
  error. On an error `path` is as it was, and nothing lies beside it.

  What is no plain file (`/dev/stdout`, a pipe) is written as it is.

  Raises:
    UserError: no space, no permission, no such folder, a folder of that name.
  """
  shown, path = os.fspath(path), pathlib.Path(os.path.realpath(path))
  if path.is_dir():
    raise UserError(f'{shown}: is a folder, expected the name of a file to write')
  if not path.parent.is_dir():
    raise UserError(f'{shown}: the folder {path.parent} does not exist; make it first')
  with clear_errors(f'cannot write {shown}'):
    if path.exists() and not path.is_file():
      yield path
      return
    part = path.with_name(f'.{path.stem[:100]}.{os.getpid()}.part{path.suffix}')
    try:
      yield part
      sync(part)
      part.replace(path)
    finally:
      part.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_arrays(
    folder: str | os.PathLike,
) -> Iterator[Callable[[tuple[int, ...], np.dtype], np.ndarray]]:
  """Yields `allocate(shape, dtype)`, whose arrays lie in files below `folder` and not in memory.

  The files are removed at the end; choose the disk that the result will be written to.

  Raises:
    UserError: no space or no permission.
  """
  with clear_errors(f'cannot write scratch files in {folder}'):
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(prefix='.scratch-', dir=folder)

  def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if not nbytes:
      return np.empty(shape, dtype)
    with clear_errors(f'cannot write scratch files in {folder}'):
      with tempfile.NamedTemporaryFile(dir=scratch.name, delete=False) as file:
        # Reserved now: a full disk must not end the process in the middle of a copy.
        if hasattr(os, 'posix_fallocate'):
          os.posix_fallocate(file.fileno(), 0, nbytes)
        else:
          file.truncate(nbytes)
      return np.memmap(file.name, np.uint8, 'r+', shape=(nbytes,)).view(dtype).reshape(shape)

  with scratch:
    yield allocate


def sync(path: str | os.PathLike) -> None:
  """Waits until a file's bytes are on the disk, so that a rename cannot overtake them."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def sha256(path: Any) -> str:
  """Checksum of a file (a path, or an `epath` one), read in pieces."""
  found = hashlib.sha256()
  with (path.open('rb') if hasattr(path, 'open') else open(path, 'rb')) as file:
    while block := file.read(1 << 22):
      found.update(block)
  return found.hexdigest()


def describe(paths: Iterable[Any], root: Any) -> dict[str, dict[str, Any]]:
  """Size and checksum of files, by their name below `root`, sorted.

  Args:
    paths: local paths or `epath` ones; one outside `root` is named by its folder and file alone.
  """
  found = {}
  for path in sorted(paths, key=str):
    inside = os.fspath(path).startswith(f'{os.fspath(root)}/')
    name = (os.fspath(path).removeprefix(f'{os.fspath(root)}/') if inside
            else f'{path.parent.name}/{path.name}')
    facts = path.stat()
    size = facts.st_size if hasattr(facts, 'st_size') else facts.length
    found[name] = {'bytes': size, 'sha256': sha256(path)}
  return found


def all_files(folder: Any) -> Iterator[Any]:
  """All files below a folder (a path, or an `epath` one, which knows no recursive glob)."""
  for entry in folder.iterdir():
    if entry.is_dir():
      yield from all_files(entry)
    else:
      yield entry


def digest(described: Mapping[str, Mapping[str, Any]]) -> str:
  """One checksum of several files: their names and contents (see `describe`)."""
  lines = [f'{name} {facts["sha256"]}\n' for name, facts in sorted(described.items())]
  return hashlib.sha256(''.join(lines).encode()).hexdigest()
