"""Memory that large programs free on a CPU: kept by the process instead of given back.

XLA's CPU client allocates the temporaries of a program anew at every call. The C library takes
blocks of such a size from the system and gives them back at once, and so every call pays for each
of their pages being found and cleared again: a fifth of a train step of 100 million parameters.
"""

from __future__ import annotations

import ctypes

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed() -> bool:
  """Freed memory stays with this process, to be used again; True where that could be set.

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
