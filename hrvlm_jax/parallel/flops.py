"""Operations of a JAX function before compilation: products and convolutions, loops counted.

Traced without recomputation, a train step's count is what the model needs (forward, gradients of
activations, gradients of trained weights only), which is what utilisation (MFU) is measured by.
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any

import jax


def count_flops(fn: Callable, *args: Any, **kwargs: Any) -> float:
  """Operations (2 per multiply-add) of the products and convolutions in one call of `fn`.

  Args:
    args: arrays or ShapeDtypeStruct trees; nothing is computed.

  Loops of a length that is not known before the run (`while`) count once, branches with the most
  expensive one.
  """
  return _jaxpr(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr)


def _jaxpr(jaxpr) -> float:
  return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation) -> float:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    left = equation.invars[0].aval.shape
    (contracted, _), _ = params['dimension_numbers']
    return 2.0 * _size(equation.outvars[0]) * math.prod(left[d] for d in contracted)
  if name == 'conv_general_dilated':
    kernel = equation.invars[1].aval.shape
    out_features = kernel[params['dimension_numbers'].rhs_spec[0]]
    return 2.0 * _size(equation.outvars[0]) * math.prod(kernel) / out_features
  if name == 'scan':
    return params['length'] * _jaxpr(params['jaxpr'].jaxpr)
  if name == 'cond':
    return max(_jaxpr(branch.jaxpr) for branch in params['branches'])
  inner = [found for value in params.values() for found in _inner(value)]
  return sum(map(_jaxpr, inner))


def _inner(value) -> list:
  """Jaxprs among the parameters of a call-like primitive (jit, checkpoint, custom derivatives)."""
  if hasattr(value, 'eqns'):
    return [value]
  if hasattr(value, 'jaxpr') and hasattr(value.jaxpr, 'eqns'):
    return [value.jaxpr]
  if isinstance(value, (tuple, list)):
    return [found for item in value for found in _inner(item)]
  return []


def _size(variable) -> int:
  return math.prod(variable.aval.shape)
