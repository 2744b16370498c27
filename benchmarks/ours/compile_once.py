"""Traces and compiles one program from shapes alone; prints the processor seconds of both as JSON.

    python -m benchmarks.ours.compile_once CASE DTYPE
"""

from __future__ import annotations

import json
import pathlib
import sys
import time

import jax

from benchmarks.harness.case import Options, find_cases, load


def main(name: str, dtype: str) -> None:
  """Compiles the program of our side of a case; nothing is drawn or computed."""
  case = find_cases()[name]
  side = load(case.ours)(case.settings, pathlib.Path('.'), Options(dtype=dtype))
  function, shapes = side.abstract_program()
  start = time.process_time()
  lowered = jax.jit(function).lower(*shapes)
  traced = time.process_time()
  lowered.compile()
  print(json.dumps({'trace_s': traced - start, 'compile_s': time.process_time() - traced}))


if __name__ == '__main__':
  main(*sys.argv[1:])
