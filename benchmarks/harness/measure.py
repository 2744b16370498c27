"""Memory of a process, the machine it ran on, statistics of rounds."""

from __future__ import annotations

from collections.abc import Sequence
import datetime
import importlib.metadata
import os
import pathlib
import platform
import resource
import statistics

_STATUS, _CLEAR = pathlib.Path('/proc/self/status'), pathlib.Path('/proc/self/clear_refs')


def reset_peak() -> bool:
  """Starts a new peak of resident memory (Linux); False where that is not possible."""
  try:
    _CLEAR.write_text('5')
    return True
  except OSError:
    return False


def peak_bytes() -> int:
  """Largest resident memory of this process since `reset_peak` (else since its start)."""
  if _STATUS.exists():
    for line in _STATUS.read_text().splitlines():
      if line.startswith('VmHWM'):
        return int(line.split()[1]) * 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if platform.system() == 'Darwin' else peak * 1024


def lifetime_peak_bytes() -> int:
  """Largest resident memory of this process since its start, loading included."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if platform.system() == 'Darwin' else peak * 1024


def cpu_seconds() -> float:
  """Processor time of this process, all threads."""
  times = os.times()
  return times.user + times.system


def processor() -> str:
  """Name of the processor."""
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  fields = dict(line.split(':', 1) for line in reversed(lines) if ':' in line)
  pick = lambda key: next((v.strip() for k, v in fields.items() if k.strip() == key), '')
  name = pick('model name') or platform.processor() or platform.machine()
  family = ', '.join(f'{key} {pick(key)}' for key in ('cpu family', 'model') if pick(key))
  return f'{name} ({family})' if family else name


def machine() -> dict[str, str | int | float]:
  """What the numbers belong to; names no host and no path."""
  pages = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return {'processor': processor(), 'cores': len(os.sched_getaffinity(0)),
          'memory_gb': round(pages / 2**30, 1), 'system': platform.system()}


def versions(packages: Sequence[str]) -> dict[str, str]:
  """Versions of Python and of the packages that are installed."""
  found = {'python': platform.python_version()}
  for name in packages:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def today() -> str:
  """The date, UTC."""
  return datetime.datetime.now(datetime.UTC).date().isoformat()


def spread(values: Sequence[float]) -> dict[str, float | list[float]]:
  """Median, least, largest and all values."""
  return {'median': round(statistics.median(values), 4), 'least': round(min(values), 4),
          'largest': round(max(values), 4), 'all': [round(v, 4) for v in values]}
