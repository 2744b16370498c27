"""Long work in parts, in one folder: what is done is noted there and not repeated.

Used by `hrvlm quickstart`, `hrvlm compare` and the miniature claims.
"""

from __future__ import annotations

from collections.abc import Callable
import json
import os
import pathlib
import time
from typing import Any


class Journal:
  """A folder with JSON files and `times.json`: the seconds of every part that is done.

  The seconds of a part that was interrupted count too (`interrupted.json`), unless it was killed.
  Several processes may work on different parts in one folder.
  """

  def __init__(self, folder: str | os.PathLike):
    self.folder = pathlib.Path(folder)
    self.folder.mkdir(parents=True, exist_ok=True)
    self._read_times()

  def _read_times(self) -> None:
    self.times: dict[str, float] = self.read('times.json', {})
    self.cpu_times: dict[str, float] = self.read('cpu_times.json', {})

  def part(self, name: str, fn: Callable[[], None], title: str = '') -> None:
    """Calls `fn` unless the part is done; notes its wall and processor seconds."""
    self._read_times()
    if name in self.times:
      print(f'[{name}] done before ({self.times[name]:.0f} s)', flush=True)
      return
    print(f'[{name}] {title}'.rstrip(), flush=True)
    before = self.read('interrupted.json', {}).get(name, [0.0, 0.0])
    clocks = time.perf_counter(), time.process_time()
    spent = lambda: [old + clock() - start for old, clock, start in
                     zip(before, (time.perf_counter, time.process_time), clocks, strict=True)]
    try:
      fn()
    except BaseException:
      self.write('interrupted.json', self.read('interrupted.json', {}) | {name: spent()})
      raise
    self._read_times()  # another process may have finished parts meanwhile
    self.times[name], self.cpu_times[name] = spent()
    self.write('cpu_times.json', self.cpu_times)
    self.write('times.json', self.times)

  def read(self, name: str, default: Any = None) -> Any:
    """A JSON file of the folder."""
    path = self.folder / name
    return json.loads(path.read_text()) if path.exists() else default

  def write(self, name: str, value: Any) -> None:
    """Writes a JSON file so that it is either old or complete."""
    temporary = self.folder / f'.{name}.{os.getpid()}.tmp'
    temporary.write_text(json.dumps(value, indent=2) + '\n')
    temporary.replace(self.folder / name)
