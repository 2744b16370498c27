"""Grain's worker processes: they outlive signals to the group, and nothing of the run but the run.

In a worker (`OfWorker`, on arrival): SIGTERM and SIGINT are the trainer's business, which ends its
workers itself; and a worker whose trainer is gone ends within a second. In the trainer
(`Watched`): a worker that dies, killed by hand or for want of memory, is a sentence. Grain sees
that only where the worker was not writing: half a batch in the pipe is waited for for ever, by its
clean-up as well.
"""

from __future__ import annotations

from collections.abc import Callable
import gc
import multiprocessing
import os
import queue
import signal
import threading
import time
from typing import Any

import grain
from grain._src.python.dataset.transformations import process_prefetch

from hrvlm_jax.core.errors import UserError

_NAME = 'grain-process-prefetch'
_LOOK = 0.5  # seconds between looks at the processes


class OfWorker(grain.MapDataset):
  """The parent, unchanged; a process it is sent to becomes a worker as described above."""

  def __len__(self):
    return len(self._parent)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    return self._parent[index]

  def __setstate__(self, state):
    self.__dict__.update(state)
    if multiprocessing.current_process().name.startswith(_NAME):
      _settle()


def _settle() -> None:
  for number in (signal.SIGTERM, signal.SIGINT):
    try:
      signal.signal(number, signal.SIG_IGN)
    except ValueError:  # not in the main thread
      return
  # Not os.getppid(): a trainer that was killed while this process imported has gone by now.
  started = multiprocessing.parent_process()
  parent = os.getppid() if started is None else started.pid

  def watch() -> None:
    while os.getppid() == parent:
      time.sleep(_LOOK)
    os._exit(1)

  threading.Thread(target=watch, daemon=True, name='parent-watch').start()


class Watched:
  """`next` on an iterator that worker processes feed; a worker that died is an error, not a wait.

  Args:
    take: gives the next element, blocking.

  Attributes:
    broken: a worker has died; the iterator must not be asked for anything any more.
  """

  def __init__(self, take: Callable[[], Any]):
    self._take, self.broken = take, False
    self._asked: queue.SimpleQueue = queue.SimpleQueue()
    self._given: queue.SimpleQueue = queue.SimpleQueue()
    self._thread: threading.Thread | None = None
    self._workers: dict[int, Any] = {}

  def __call__(self) -> Any:
    """The next element.

    Raises:
      UserError: a worker died; what `take` raises.
    """
    if self._thread is None:
      self._thread = threading.Thread(target=_serve, args=(self._take, self._asked, self._given),
                                      daemon=True, name='take-batches')
      self._thread.start()
    self._asked.put(True)
    while True:
      try:
        value, error = self._given.get(timeout=_LOOK)
      except queue.Empty:
        self._look()
        continue
      if error is None:
        self._look()
        return value
      if 'terminated unexpectedly' in str(error):  # Grain saw it first
        self._look()
        self._fail(error)
      raise error

  def _look(self) -> None:
    for process in multiprocessing.active_children():
      if process.name.startswith(_NAME):
        self._workers[process.pid] = process
    for process in self._workers.values():
      if process.exitcode not in (None, 0):
        self._fail(None, process)

  def _fail(self, cause: BaseException | None, process: Any = None) -> None:
    self.broken = True
    give_up(self._workers.values())
    how = 'died' if process is None else (
      f'(process {process.pid}) was ended by signal {-process.exitcode}' if process.exitcode < 0
      else f'(process {process.pid}) ended with status {process.exitcode}')
    raise UserError(
      f'a data worker {how}. Signal 9 is mostly the kernel freeing memory: lower data.workers '
      '(each holds the images of its batches), or data.workers=0 reads in the main process; the '
      'same command goes on from the last checkpoint') from cause


def _serve(take: Callable[[], Any], asked: queue.SimpleQueue, given: queue.SimpleQueue) -> None:
  while asked.get():
    try:
      given.put((take(), None))
    except BaseException as error:  # noqa: BLE001 - raised by whoever asked
      given.put((None, error))


def stop_thread(watched: Watched) -> None:
  """Ends the thread that takes batches, unless it waits for a worker that is gone."""
  if watched._thread is not None and not watched.broken:
    watched._asked.put(False)
    watched._thread.join()
    watched._thread = None
    watched._workers.clear()


def give_up(workers: Any) -> None:
  """Kills workers and makes Grain forget them, so that nothing waits for what they were writing."""
  gone = {process.pid for process in workers}
  for process in workers:
    if process.is_alive():
      process.kill()
      process.join(5)
  for found in gc.get_objects():
    if isinstance(found, process_prefetch.ProcessPrefetchDatasetIterator):
      process = found._prefetch_process
      if process is not None and process.pid in gone:
        found._prefetch_process = None
