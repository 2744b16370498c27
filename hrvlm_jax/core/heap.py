"""Memory of a process, as the C library takes it from the system and gives it back.

Nothing here changes a result, and where the C library is not glibc nothing happens. What each does
to time and memory of a step: benchmarks/findings.md. Importing this module loads no JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import ctypes
import functools
import glob
import os
import pathlib
import sys

TUNABLES, _HUGE = 'GLIBC_TUNABLES', 'glibc.malloc.hugetlb'
_NEEDED = (2, 35)  # glibc that has the tunable
_SWITCH = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
_ACCELERATORS = ('/dev/nvidia[0-9]*', '/dev/accel*', '/dev/vfio/[0-9]*', '/dev/kfd')
# Seconds of a compilation that leaves enough behind to be collected.
_LONG = 1.0
# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def on_a_cpu(environment: Mapping[str, str]) -> bool:
  """Whether JAX will compute on the CPU: it was told to, or no accelerator has a device file."""
  wanted = environment.get('JAX_PLATFORMS', '')
  return wanted == 'cpu' or not (wanted or any(map(glob.glob, _ACCELERATORS)))


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str] | None:
  """The environment of a process whose large blocks lie on huge pages; None: leave it as it is.

  XLA's CPU client takes the temporaries of a program anew at every call and gives them back behind
  it; each of their pages is found and cleared again, 512 times as many of 4 KB as of 2 MB. A choice
  of the user's in the same variable stands. Nothing is to be done where the system gives huge pages
  to everybody ('always') or to nobody ('never').
  """
  try:
    version = os.confstr('CS_GNU_LIBC_VERSION') or ''
    choice = _SWITCH.read_text()
  except (AttributeError, ValueError, OSError):  # another C library, another system
    return None
  number = tuple(int(part) for part in version.removeprefix('glibc ').split('.')[:2]
                 if part.isdigit())
  said = environment.get(TUNABLES, '')
  if _HUGE in said or number < _NEEDED or '[madvise]' not in choice or not on_a_cpu(environment):
    return None
  return {**environment, TUNABLES: ':'.join(filter(None, (said, f'{_HUGE}=1')))}


def asked_for(environment: Mapping[str, str]) -> bool:
  """Whether an environment asks for huge pages."""
  return f'{_HUGE}=1' in environment.get(TUNABLES, '')


def start_again_with_huge_pages() -> None:
  """The command at hand from its beginning, see `with_huge_pages`; returns where that is nothing.

  glibc reads the variable when a program starts, so the process starts its own program again: it
  keeps its number, files and terminal. Call it before anything is done.
  """
  if (environment := with_huge_pages(os.environ)) is not None:
    with contextlib.suppress(OSError):  # no program to start: it goes on as it is
      os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def trim() -> None:
  """Gives what is free in the heap back to the system."""
  with contextlib.suppress(AttributeError, OSError, TypeError):
    ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def trim_after_compiling() -> None:
  """From now on, in this process, what a long compilation has used goes back to the system.

  It frees hundreds of megabytes in pieces between what lives on, which the C library keeps; the
  temporaries of a step are taken beside them.
  """
  from jax import monitoring

  def listen(event: str, seconds: float, **_) -> None:
    if event.endswith('/backend_compile_duration') and seconds > _LONG:
      trim()

  monitoring.register_event_duration_secs_listener(listen)


def keep_freed() -> bool:
  """Freed memory stays with this process, to be used again; True where that could be set.

  For systems without huge pages: every call of a program otherwise pays for each page of its
  temporaries again. It costs memory: an aligned block rarely fits into the place of the one before,
  so that a few of them, or more, lie side by side.

  Needs glibc, and works for threads that have not allocated yet: call it before JAX is asked for a
  device. The process keeps the size of its peak until it ends.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # another C library, another system
    return False
  # One heap that grows and never shrinks; blocks of their own (mmap) would go back when freed.
  settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
  return all([mallopt(name, value) for name, value in settings])
