"""Multiply-adds of any JAX function, counted in its traced program: no formula, no device.

Counts matrix products (`dot_general`) and convolutions; a scan counts its body times its length, a
condition its dearest branch. A `while` loop has no length in the program, so its body counts once
and is reported.
"""

from collections.abc import Callable
import dataclasses
import math

import jax


@dataclasses.dataclass(frozen=True)
class Traced:
  """Multiply-adds of a program; `open_loops` is the number of loops of unknown length inside."""

  products: int
  convolutions: int
  open_loops: int

  @property
  def multiply_adds(self) -> int:
    return self.products + self.convolutions

  @property
  def flops(self) -> int:
    return 2 * self.multiply_adds


def multiply_adds(function: Callable, *args, **kwargs) -> Traced:
  """Traces `function` and counts.

  Args:
    args, kwargs: arrays or `jax.ShapeDtypeStruct`, so nothing is computed or allocated.

  Example: `multiply_adds(model.apply, model.abstract, views, tokens).flops`.
  """
  return Traced(*_count(jax.make_jaxpr(function)(*args, **kwargs).jaxpr))


def _count(jaxpr) -> tuple[int, int, int]:
  products = convolutions = loops = 0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name == 'dot_general':
      products += _product(equation)
      continue
    if name == 'conv_general_dilated':
      convolutions += _convolution(equation)
      continue
    inner = [_count(sub) for sub in _sub_programs(equation)]
    if name == 'cond' and inner:
      inner = [max(inner, key=lambda counted: counted[0] + counted[1])]
    times = equation.params['length'] if name == 'scan' else 1
    products += times * sum(counted[0] for counted in inner)
    convolutions += times * sum(counted[1] for counted in inner)
    loops += int(name == 'while') + sum(counted[2] for counted in inner)
  return products, convolutions, loops


def _sub_programs(equation):
  for value in equation.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      program = getattr(item, 'jaxpr', item)
      if hasattr(program, 'eqns'):
        yield program


def _product(equation) -> int:
  (contracted, _), _ = equation.params['dimension_numbers']
  left = equation.invars[0].aval.shape
  return math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation) -> int:
  spec = equation.params['dimension_numbers'].rhs_spec  # (out, in, *space)
  kernel = equation.invars[1].aval.shape
  per_output = math.prod(kernel[axis] for axis in spec[1:])
  return math.prod(equation.outvars[0].aval.shape) * per_output
