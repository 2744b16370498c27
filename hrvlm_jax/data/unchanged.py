"""Data files must stay as they are while a run reads them: offsets into them are in memory.

A file that is written anew in place is the end of the run with a sentence that names it; nobody
would know which rows were trained. One that is replaced under its name (written elsewhere, then
renamed) does no harm to a process that has it open, and is found by the next one that opens it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import os
import time

from hrvlm_jax.core.errors import UserError


class DataChanged(UserError):
  """A data file is not the one that the run began with; never a row to be skipped."""


class Unchanged:
  """What files were when they were first opened; can be sent to worker processes."""

  def __init__(self, paths: Sequence[str]):
    self._facts = {path: _facts(path) for path in paths}

  def check(self, paths: Sequence[str] | None = None, descriptor: int | None = None) -> None:
    """Raises where a file has another size, time or place on its disk.

    Args:
      paths: some of the files; default: all.
      descriptor: of the one path named, which may have been replaced under its name since.

    Raises:
      DataChanged: the first such file.
    """
    for path in self._facts if paths is None else paths:
      try:
        now = _facts(path if descriptor is None else descriptor)
      except OSError as error:
        raise DataChanged(f'{path}: is gone ({error.strerror}), though the run reads it; {_DO}'
                          ) from error
      if now != self._facts[path]:
        size, when = now[0], time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now[1] / 1e9))
        raise DataChanged(f'{path}: was changed while the run reads it (at {when}; '
                          f'{self._facts[path][0]} bytes then, {size} now); {_DO}')

  @contextlib.contextmanager
  def reading(self, paths: Sequence[str] | None = None) -> Iterator[None]:
    """An error of the body is a changed file's, if one has changed; otherwise it passes."""
    try:
      yield
    except Exception:
      self.check(paths)
      raise


_DO = ('leave data files alone while they are in use (write another file beside it); put the old '
       'one back, and the same command goes on from the last checkpoint')


def _facts(place: str | int) -> tuple[int, int, int]:
  found = os.stat(place)
  return found.st_size, found.st_mtime_ns, found.st_ino
