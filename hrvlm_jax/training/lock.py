"""One trainer per work directory: a lock file with a heartbeat.

`running.json` says who trains there: host, process, start, and when it was last heard of. It is
written by TensorStore on condition that nobody else has written it meanwhile, which folders (by a
rename under a lock) and buckets (by the object's generation) both can. A lock is stale, and taken
over, 90 seconds after its last sign of life, or at once where it was made on this host by a process
that is gone.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import datetime
import json
import os
import pathlib
import platform
import threading
import time
from typing import Any
import uuid

import tensorstore as ts

from hrvlm_jax.checkpoint import files
from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError

NAME = 'running.json'
WAIT = 'HRVLM_LOCK_WAIT'  # seconds a start waits for another's lock to become stale (babysit: 120)
EVERY, STALE = 20.0, 90.0


class Lock:
  """Held from `with` to its end.

  Args:
    address: the work directory, a folder or an address.
    log: says what is waited for.
    wait: seconds to wait for a lock to be given back or become stale; default: $HRVLM_LOCK_WAIT, 0.
    every, stale: seconds between heartbeats, and after which one that is missing counts.

  Raises:
    UserError: somebody else trains there (host, process, start).
  """

  def __init__(self, address: str, *, log: Callable[[str], None] = print, wait: float | None = None,
               every: float = EVERY, stale: float = STALE):
    self._address, self._log = address, log
    self._wait = float(os.environ.get(WAIT) or 0) if wait is None else wait
    self._every, self._stale = every, stale
    self._made: pathlib.Path | None = None
    if '://' not in address:
      folder = pathlib.Path(address)
      self._made = None if folder.exists() else folder
      folder.mkdir(parents=True, exist_ok=True)
      address = f'file://{os.path.abspath(address)}'
    self._store = ts.KvStore.open(f'{address.rstrip("/")}/').result()
    self._me = {'host': platform.node(), 'pid': os.getpid(), 'machine': _machine(),
                'born': _born(os.getpid()), 'token': uuid.uuid4().hex,
                'start': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')}
    self._stamp: Any = None
    self._done = threading.Event()
    self._thread: threading.Thread | None = None
    self._lost: str | None = None

  def __enter__(self) -> Lock:
    try:
      return self._enter()
    except UserError:
      raise
    except (ValueError, OSError) as error:
      why = files.cause(error) or (str(error).strip().splitlines() or [''])[0][:200]
      raise UserError(f'{self._address}/{NAME}: cannot be written ({why}); may this machine write '
                      'there?') from error

  def _enter(self) -> Lock:
    until, said = time.monotonic() + self._wait, False
    while (other := self._take()) is not None:
      left = until - time.monotonic()
      if left <= 0:
        raise UserError(f'{self._address}: {_who(other)} trains there already (last sign '
                        f'of life {_age(other):.0f} s ago); wait for it, end it, or take another '
                        f'--workdir. If it is gone for certain: it is stale {self._stale:.0f} s '
                        'after its last sign')
      if not said:
        self._log(f'{self._address}: {_who(other)} holds the work directory; waiting until it ends '
                  f'or has been silent for {self._stale:.0f} s (at most {self._wait:.0f} s)')
        said = True
      time.sleep(min(2.0, left))
    self._thread = threading.Thread(target=self._beat, daemon=True, name='lock')
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._done.set()
    if self._thread is not None:
      self._thread.join()
    if self._lost is None:
      with contextlib.suppress(ValueError):  # it will be stale soon
        # Deleted only if it is still ours.
        self._store.write(NAME, None, if_equal=self._stamp).result()
    if self._made is not None:  # a start that is refused leaves nothing
      with contextlib.suppress(OSError):
        self._made.rmdir()

  def check(self) -> None:
    """Raises where somebody else has taken the lock (this process stood still too long).

    Raises:
      UserError: the work directory is another trainer's now.
    """
    if self._lost is not None:
      raise UserError(self._lost)

  def _take(self) -> dict[str, Any] | None:
    """Takes the lock, or returns who has it."""
    found = self._store.read(NAME).result()
    other = _parse(found.value) if found.state == 'value' else None
    if other is not None and not self._is_stale(other):
      return other
    written = self._write(found.stamp.generation)
    return None if written else (_parse(self._store.read(NAME).result().value) or dict(self._me))

  def _write(self, generation: bytes) -> bool:
    content = json.dumps(self._me | {'sign': time.time()}).encode()
    stamp = self._store.write(NAME, content, if_equal=generation).result()
    if not stamp.generation or stamp.generation == _UNKNOWN:
      return False
    self._stamp = stamp.generation
    return True

  def _is_stale(self, other: dict[str, Any]) -> bool:
    if other.get('machine') == self._me['machine']:
      born = _born(other.get('pid'))
      return born is None or born != other.get('born')
    return _age(other) > self._stale

  def _beat(self) -> None:
    while not self._done.wait(self._every):
      try:
        if not self._write(self._stamp):
          other = _parse(self._store.read(NAME).result().value) or {}
          self._lost = (f'{self._address}: {_who(other)} has taken the work directory over, '
                        'because this process gave no sign of life; this run ends')
          return
      except ValueError as error:  # storage that does not answer: the next beat may get through
        self._log(f'{self._address}/{NAME} could not be written: {str(error)[:200]}')


_UNKNOWN = b''


def _parse(content: bytes) -> dict[str, Any] | None:
  """None for what no trainer wrote, or wrote half."""
  try:
    value = json_text.loads(content)
  except ValueError:
    return None
  return value if isinstance(value, dict) and isinstance(value.get('sign'), (int, float)) else None


def _age(other: dict[str, Any]) -> float:
  return max(time.time() - other['sign'], 0.0)


def _who(other: dict[str, Any]) -> str:
  return (f'process {other.get("pid")} on host {other.get("host")}, started '
          f'{other.get("start")},')


def _machine() -> str:
  """What tells this machine (and this set of process numbers) from others of the same name."""
  parts = [platform.node()]
  with contextlib.suppress(OSError):
    parts.append(pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip())
  with contextlib.suppress(OSError):
    parts.append(str(os.stat('/proc/self/ns/pid').st_ino))
  return '/'.join(parts)


def _born(pid: Any) -> str | None:
  """When a process of this machine was started, by the kernel's clock; None: there is none."""
  try:
    fields = pathlib.Path(f'/proc/{int(pid)}/stat').read_text().rpartition(')')[2].split()
    return None if fields[0] in 'ZX' else fields[19]
  except (OSError, TypeError, ValueError, IndexError):
    pass
  if os.path.isdir('/proc/self'):
    return None
  try:  # no /proc: whether it is there is all that can be known
    os.kill(int(pid), 0)
  except (OSError, TypeError, ValueError):
    return None
  return 'unknown'
