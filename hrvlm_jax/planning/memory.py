"""Memory of a step on one device, from whatever the compiler says about it.

Every reader gives the same values, bytes: arguments, outputs_not_donated, temporaries, program
(None where unknown), total, and usable where the compiler named it.
"""

from __future__ import annotations

import re
from typing import Any

GIB = 1 << 30
# Code lies in memory, too. It is not generated for a plan; the largest steps had 0.35 GiB.
PROGRAM_ALLOWANCE = int(0.4 * GIB)
_SIZE = r'([\d.]+)([GMK])'
_UNIT = {'G': GIB, 'M': 1 << 20, 'K': 1 << 10}


def _scale(number: str, letter: str) -> int:
  return int(float(number) * _UNIT[letter])


def of_arguments(arguments: int) -> dict[str, Any]:
  """A step whose arguments alone are too much."""
  return {'arguments': arguments, 'temporaries': None, 'total': arguments}


def of_report(text: str, arguments: int) -> dict[str, Any]:
  """From libtpu's `memory-usage-report` of a scheduled program.

  It counts what lies in memory at the peak, arguments included, not the code.

  Raises:
    ValueError: the text is no such report.
  """
  found = re.search(r'^Memory Space: default \(color=0\)\nTotal bytes: (\d+)', text, re.M)
  if not found:
    raise ValueError('memory usage report: found no total of the default memory space')
  total = int(found.group(1))
  return {'arguments': arguments, 'outputs_not_donated': 0,
          'temporaries': max(total - arguments, 0), 'program_allowed_for': PROGRAM_ALLOWANCE,
          'total': total + PROGRAM_ALLOWANCE}


def of_analysis(stats: Any) -> dict[str, Any]:
  """From `compiled.memory_analysis()`."""
  kept = stats.output_size_in_bytes - stats.alias_size_in_bytes
  return {
    'arguments': stats.argument_size_in_bytes, 'outputs_not_donated': kept,
    'temporaries': stats.temp_size_in_bytes, 'program': stats.generated_code_size_in_bytes,
    'total': (stats.argument_size_in_bytes + kept + stats.temp_size_in_bytes
              + stats.generated_code_size_in_bytes)}


def of_log(parts: dict[str, Any], log: str) -> dict[str, Any]:
  """What libtpu's log says it gave the program, where it does.

  `memory_analysis` counts the gaps between temporaries twice: once within their extent, once as
  fragmentation.
  """
  found = re.findall(rf'program HBM usage: {_SIZE} / {_SIZE}', log)
  if not found or 'program' not in parts:
    return parts
  used, usable = _scale(*found[-1][:2]), _scale(*found[-1][2:])
  return parts | {'temporaries': used - parts['program'], 'usable': usable,
                  'total': parts['arguments'] + parts['outputs_not_donated'] + used}


def of_refusal(text: str, arguments: int) -> dict[str, Any] | None:
  """What libtpu says when a program does not fit; None: the text says something else.

  `Used 20.1G of 15.75G hbm` counts all, `required for HLO temporaries (118.15G) exceeds available
  HBM (15.75G)` the temporaries alone.
  """
  if found := re.search(rf'[Uu]sed {_SIZE} of {_SIZE} hbm', text):
    return {'arguments': arguments, 'temporaries': None, 'total': _scale(*found.groups()[:2]),
            'usable': _scale(*found.groups()[2:])}
  if found := re.search(rf'temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)', text):
    temporaries = _scale(*found.groups()[:2])
    return {'arguments': arguments, 'temporaries': temporaries, 'total': arguments + temporaries,
            'usable': _scale(*found.groups()[2:])}
  return None
