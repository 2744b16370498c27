"""Several processes at work in one folder: who does which part.

A part that is being done has a file which names the process and its machine, and which that process
touches twice a minute. A file is stale when its process is gone (on this machine) or when nobody
touched it for ten minutes (on another one, whose processes cannot be seen); whoever finds it takes
the part over.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time

from hrvlm_jax.core import json_text

BEAT, STALE = 30.0, 600.0  # seconds


@contextlib.contextmanager
def exclusive(path: str | os.PathLike) -> Iterator[None]:
  """One process at a time inside the block; the kernel ends the claim of one that dies."""
  with open(path, 'a') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _life(pid: int) -> str:
  """When a process of this machine began, so that its number is not taken for another's; '' where
  the system does not say."""
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]
  except (OSError, IndexError):
    return ''


def _alive(pid: int, life: str) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass  # somebody else's process
  return _life(pid) == life


def holder(path: pathlib.Path) -> str | None:
  """'process 12 on a-machine' that holds a file's part; None: nobody who is still there does."""
  try:
    written, who = path.stat().st_mtime, json_text.loads(path.read_text())
    pid, host, life = int(who['pid']), str(who['host']), str(who['life'])
  except (OSError, ValueError, KeyError, TypeError):
    return None  # none, or one cut short
  here = host == socket.gethostname()
  there = _alive(pid, life) if here else time.time() - written < STALE
  return f'process {pid} on {host}' if there else None


@contextlib.contextmanager
def claimed(path: pathlib.Path) -> Iterator[bool]:
  """Whether the part of this file is ours; while it is, the file says so.

  A part that another thread or process holds is not waited for.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  pid, guard = os.getpid(), path.parent / '.guard'
  text = json.dumps({'pid': pid, 'host': socket.gethostname(), 'life': _life(pid)})
  with exclusive(guard):
    mine = holder(path) is None
    if mine:
      path.write_text(text)
  if not mine:
    yield False
    return
  ended = threading.Event()

  def beat() -> None:
    while not ended.wait(BEAT):
      with contextlib.suppress(OSError):
        os.utime(path)

  threading.Thread(target=beat, daemon=True).start()
  try:
    yield True
  finally:
    ended.set()
    with exclusive(guard):
      if path.exists() and path.read_text() == text:  # nobody took it over meanwhile
        path.unlink()
