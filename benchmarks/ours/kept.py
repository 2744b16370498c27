"""What a train step keeps for its backward pass, by source function, the largest first.

    python -m benchmarks.ours.kept train_step_mc_llava_100m

The loss of our side of a case is traced, not computed: the numbers do not depend on the machine.
What a scan over layers stacks is followed to the operation inside that made it. Parameters that the
backward pass reads are not counted, they are there anyway.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
import json
import pathlib
import sys
from typing import Any

import jax
from jax._src import source_info_util  # of which public JAX only prints the text
from jax.extend.core import Literal
import numpy as np

from benchmarks.harness.case import Options, find_cases, load
from hrvlm_jax.core import paths
from hrvlm_jax.training.objectives import objective_of
from hrvlm_jax.training.optimizer import split
from hrvlm_jax.training.step import execution_of

_LIBRARY = 'hrvlm_jax'
_SHOWN = 15
Kept = tuple[str, str, int]  # function, operation and shape, bytes


def residuals(loss, trained: Any) -> list[Kept]:
  """Of a loss with auxiliary output: every array that is kept between its passes."""
  def both(leaves):
    value, backward, aux = jax.vjp(loss, leaves, has_aux=True)
    return value, aux, backward

  traced, (_, _, backward) = jax.make_jaxpr(both, return_shape=True)(trained)
  count = len(jax.tree.leaves(backward))
  inner = traced.jaxpr
  return list(_made(inner, inner.outvars[len(inner.outvars) - count:]))


def _made(jaxpr, variables) -> Iterator[Kept]:
  """Where variables of a program come from."""
  makers = {out: equation for equation in jaxpr.eqns for out in equation.outvars}
  seen = set()
  for variable in variables:
    if isinstance(variable, Literal) or variable in seen:
      continue
    if variable in makers:
      seen.add(variable)
      yield _origin(makers[variable], variable)


def _origin(equation, variable) -> Kept:
  """(function, operation, bytes), from inside loops and calls where there is one."""
  shape, size = variable.aval, variable.aval.size * variable.aval.dtype.itemsize
  place = list(equation.outvars).index(variable)
  while (inside := _inside(equation, place)) is not None:
    equation, place = inside
  return _function(equation), f'{equation.primitive.name} {_short(shape)}', size


def _inside(equation, place: int):
  """The equation in a call's or scan's program that makes an output, and its place; None."""
  program = equation.params.get('jaxpr') or equation.params.get('call_jaxpr')
  program = getattr(program, 'jaxpr', program)
  if program is None or place >= len(program.outvars):
    return None
  wanted = program.outvars[place]
  for inner in program.eqns:
    for number, out in enumerate(inner.outvars):
      if out is wanted:
        return inner, number
  return None


def _function(equation) -> str:
  """The innermost function of the library that an operation stands in."""
  frames = list(source_info_util.user_frames(equation.source_info.traceback))
  own = [frame for frame in frames if f'/{_LIBRARY}/' in frame.file_name] or frames
  if not own:
    return 'unknown'
  path = own[0].file_name.rsplit(f'/{_LIBRARY}/', 1)[-1]
  return f'{path}: {own[0].function_name}'


def _short(aval) -> str:
  return f'{np.dtype(aval.dtype).name}[{",".join(map(str, aval.shape))}]'


def of_case(name: str) -> list[Kept]:
  """What the train step of a case keeps."""
  case = find_cases()[name]
  side = load(case.ours)(case.settings, pathlib.Path(), Options())
  fn, _ = side.model()
  training, groups, _ = side._step(fn)
  objective, ex = objective_of(training), execution_of(training)
  trained, frozen = split(paths.flatten(fn.abstract), groups)
  batch = side._batch(side.inputs(np.random.default_rng(0)))

  def loss(leaves):
    return objective.loss(fn, paths.unflatten(frozen | leaves), batch, key=jax.random.key(0),
                          ex=ex, chunk=training.loss_chunk)

  return residuals(loss, trained)


def summed(kept: list[Kept]) -> list[dict[str, Any]]:
  """By function: bytes, arrays, the largest operation; the largest function first."""
  groups: dict[str, list[Kept]] = collections.defaultdict(list)
  for item in kept:
    groups[item[0]].append(item)
  rows = [{'function': function, 'mb': round(sum(i[2] for i in items) / 1e6, 1),
           'arrays': len(items), 'largest': max(items, key=lambda i: i[2])[1]}
          for function, items in groups.items()]
  return sorted(rows, key=lambda row: -row['mb'])


def main(argv: list[str]) -> None:
  """Prints the rows of each case, or all as JSON."""
  as_json = '--json' in argv
  for name in (arg for arg in argv if not arg.startswith('--')):
    rows = summed(of_case(name))
    if as_json:
      print(json.dumps({'case': name, 'rows': rows}))
      continue
    print(f'{name}: {sum(row["mb"] for row in rows):.0f} MB kept')
    for row in rows[:_SHOWN]:
      print(f'  {row["mb"]:8.1f} MB  {row["arrays"]:3} arrays  {row["function"]}'
            f'  ({row["largest"]})')


if __name__ == '__main__':
  main(sys.argv[1:])
