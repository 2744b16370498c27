"""A run that stands still says so and ends, with the stacks of all its threads.

Every phase of the loop (compiling, a step, an evaluation, saving, waiting for data, ...) announces
itself. One that takes longer than `training.stall_minutes` (four times that for compiling and
saving) ends the process with status 5, which whoever watches the run takes for a failure and starts
again; the last checkpoint counts. A long phase that moves (an evaluation) announces every piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import faulthandler
import os
import pathlib
import sys
import threading
import time

STATUS = 5
STACKS = 'stalled.txt'
SLOW = {'compiling': 4, 'saving': 4, 'restoring': 4, 'starting': 4}
# Seconds after which a run that prints nothing else says that it lives (babysit watches the log).
SIGN = 600.0


class Watchdog:
  """Watches phases from a thread of its own; used as a context.

  Args:
    minutes: of a phase; 0: no limit.
    workdir: gets `stalled.txt`.
    sign: seconds between lines that say which phase the run is in.
    end: called with the exit status (tests; the default leaves at once, as nothing else can be
      trusted to).
  """

  def __init__(self, minutes: float, workdir: pathlib.Path, *, sign: float = SIGN,
               end: Callable[[int], None] = os._exit):
    self._limit, self._workdir, self._sign, self._end = 60 * minutes, workdir, sign, end
    self._phase, self._since = 'starting', time.monotonic()
    self._done = threading.Event()
    self._thread: threading.Thread | None = None

  def __enter__(self) -> Watchdog:
    self._since = time.monotonic()
    pause = min(max(self._limit / 20, 0.05) if self._limit else 5.0, 5.0, self._sign)
    self._thread = threading.Thread(target=self._watch, args=(pause,), daemon=True, name='watchdog')
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._done.set()
    self._thread.join()

  def begin(self, phase: str) -> None:
    """The phase before has ended, this one begins."""
    self._phase, self._since = phase, time.monotonic()

  def beat(self) -> None:
    """The phase goes on and moves."""
    self._since = time.monotonic()

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """A phase within another one."""
    before = self._phase
    self.begin(name)
    try:
      yield
    finally:
      self.begin(before)

  def _watch(self, pause: float) -> None:
    told = time.monotonic()
    while not self._done.wait(pause):
      now, phase = time.monotonic(), self._phase
      lasted = now - self._since
      limit = self._limit * SLOW.get(phase.split(' ')[0], 1)
      if self._limit and lasted > limit:
        self._stop(phase, lasted, limit)
        return
      if now - told >= self._sign:
        told = now
        print(f'{phase} (for {lasted:.0f} s)', file=sys.stderr, flush=True)

  def _stop(self, phase: str, lasted: float, limit: float) -> None:
    text = (f'the run stands still: {phase} has taken {lasted / 60:.1f} minutes, '
            f'{limit / 60:.1f} are allowed (training.stall_minutes, 0 for no limit); the stacks '
            f'of its threads are in {self._workdir / STACKS}; it ends with status {STATUS}; the '
            'same command goes on from the last checkpoint')
    print(f'hrvlm train: {text}', file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
      with (self._workdir / STACKS).open('w') as file:
        file.write(text + '\n\n')
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    with contextlib.suppress(OSError, ValueError):
      faulthandler.dump_traceback(sys.stderr, all_threads=True)
    self._end(STATUS)
