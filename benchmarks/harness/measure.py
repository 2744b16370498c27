"""Memory of a process, the machine it ran on, statistics of rounds."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
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


def machine(capped: str = '', one_core: bool = False) -> dict[str, str | int | float | bool | None]:
  """What the numbers belong to; names no host and no path.

  Args:
    capped: instruction set that both sides were held to, narrower than the machine's own.
    one_core: the sides had one core each.
  """
  from hrvlm_jax.core import machine as cpu

  pages = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  kind = dataclasses.replace(cpu.here(), capped=capped, **({'cores': 1} if one_core else {}))
  return {**dataclasses.asdict(kind), 'processor': cpu.processor().get('model name', ''),
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
