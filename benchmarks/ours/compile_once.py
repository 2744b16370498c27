"""Traces and compiles one program from shapes alone; prints the seconds of both as JSON.

    python -m benchmarks.ours.compile_once CASE DTYPE
"""

from __future__ import annotations

import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.case import Options, find_cases, load


def main(name: str, dtype: str) -> None:
  """Compiles the program of our side of a case; nothing is drawn or computed."""
  case = find_cases()[name]
  side = load(case.ours)(case.settings, pathlib.Path('.'), Options(dtype=dtype))
  fn, _ = side.model()
  params = jax.tree.map(lambda s: np.broadcast_to(np.zeros((), s.dtype), s.shape), fn.abstract)
  inputs = side.inputs(np.random.default_rng(0))
  found = {}

  def stop(function, params, *arguments, **facts):
    """Stands for `Side.jit`: keeps the function and its shapes."""
    shape = lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.asarray(x).dtype)
    abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, side.dtype), fn.abstract)
    found.update(function=function, shapes=(abstract, *jax.tree.map(shape, arguments)))

  side.jit = stop
  side.program(fn, params, inputs)
  start = time.perf_counter()
  lowered = jax.jit(found['function']).lower(*found['shapes'])
  traced = time.perf_counter()
  lowered.compile()
  print(json.dumps({'trace_s': traced - start, 'compile_s': time.perf_counter() - traced}))


if __name__ == '__main__':
  main(*sys.argv[1:])
