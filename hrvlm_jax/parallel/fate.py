"""What fails in one process of a run ends all of them, in seconds and with its sentence.

JAX alone lets the others wait for a process that cannot come: in a collective until the heartbeat
is missed, in the shutdown barrier for five minutes, and then aborts without a word of the cause.
Here the process that failed says why at once and tells the others by the coordination service,
which every process watches in a thread; they print the sentence with the host it came from and end.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from typing import NoReturn

import jax

from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError

MISTAKE, FAILED = 2, 5  # exit status: a mistake of the user, anything else
# Seconds between two looks at the coordination service; of a process for the sentence of another;
# of the first process, whose end would end the others, for the others.
_LOOK, _SECOND, _LAST = 2.0, 3.0, 15.0
_KEY = 'hrvlm/failure'


@contextlib.contextmanager
def shared(verb: str) -> Iterator[None]:
  """A failure of the body in one process ends all processes, with status 2 or 5.

  Leaves JAX's cluster when the body ends well. In a program of one process it does nothing: errors
  pass through.

  Args:
    verb: stands before the sentence, such as `hrvlm train`.
  """
  if not jax.distributed.is_initialized():
    yield
    return
  watch = _Watch(verb)
  try:
    yield
    jax.distributed.shutdown()
  except BaseException as error:  # noqa: BLE001 - the process ends here
    watch.fail(error)
  finally:
    watch.close()


def _service():
  # No public name: the key-value store of the service that jax.distributed.initialize starts. Its
  # numbers of processes are asked without asking for devices.
  from jax._src import distributed

  return distributed.global_state


class _Watch:
  """One process's eye on the others."""

  def __init__(self, verb: str):
    service = _service()
    self._verb, self._client = verb, service.client
    self._process, self._count = service.process_id, service.num_processes
    self._over, self._failing = threading.Event(), threading.Event()
    self._ending = threading.Lock()  # held by the thread that ends the process
    self._thread = threading.Thread(target=self._look, daemon=True)
    self._thread.start()

  def close(self) -> None:
    """Nothing that happens elsewhere matters any more."""
    self._over.set()
    self._thread.join(_SECOND)

  def _look(self) -> None:
    while not (self._over.wait(_LOOK) or self._failing.is_set()):
      found = self._told()
      if found and not (self._over.is_set() or self._failing.is_set()):
        self._follow(found)

  def _told(self, seconds: float = 0.0) -> dict | None:
    """What a process that failed has left, waiting so long for it."""
    deadline = time.monotonic() + seconds
    while True:
      with contextlib.suppress(Exception):  # nothing is there, or the service has gone
        return json_text.loads(self._client.key_value_try_get(_KEY))
      if time.monotonic() >= deadline:
        return None
      time.sleep(0.1)

  def _follow(self, found: dict) -> NoReturn:
    """Ends as another process did."""
    self._ending.acquire()
    print(f'{self._verb}: {found["host"]} (process {found["process"]}) failed: {found["sentence"]}',
          file=sys.stderr)
    self._end(found['status'])

  def fail(self, error: BaseException) -> NoReturn:
    """Says what happened, tells the others, ends."""
    self._failing.set()
    mistake = isinstance(error, UserError)
    if not mistake and (found := self._told(_SECOND)) and found['process'] != self._process:
      # The connection to a process that has gone, most likely: the cause is what that one said.
      print(f'{self._verb}: seen here as {_short(error)}', file=sys.stderr)
      self._follow(found)
    self._ending.acquire()
    if mistake:
      print(f'{self._verb}: {error}', file=sys.stderr, flush=True)
    else:
      traceback.print_exception(error, file=sys.stderr)
      if isinstance(error, jax.errors.JaxRuntimeError):
        print(f'{self._verb}: no other process said that it failed; if the lines above speak of a '
              'connection, another host has died: see its log', file=sys.stderr)
    status = MISTAKE if mistake else FAILED
    told = {'process': self._process, 'host': socket.gethostname(), 'status': status,
            'sentence': str(error) if mistake else _short(error)}
    with contextlib.suppress(Exception):  # another was faster, or the service has gone
      self._client.key_value_set(_KEY, json.dumps(told))
    self._end(status)

  def _end(self, status: int) -> NoReturn:
    """Ends the process without any barrier. The first process is the last to go."""
    with contextlib.suppress(Exception):
      sys.stdout.flush()
      sys.stderr.flush()
    with contextlib.suppress(Exception):
      self._client.key_value_set(f'{_KEY}/heard/{self._process}', 'yes')
    if self._process == 0:
      deadline = time.monotonic() + _LAST
      while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
          if len(self._client.key_value_dir_get(f'{_KEY}/heard/')) >= self._count:
            break
        time.sleep(0.1)
      time.sleep(0.3)
    os._exit(status)


def _short(error: BaseException) -> str:
  """Kind and first line of an error."""
  lines = str(error).strip().splitlines()
  return f'{type(error).__name__}: {lines[0] if lines else "no message"}'
