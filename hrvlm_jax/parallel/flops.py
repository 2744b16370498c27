"""Operations of a JAX function before compilation: products and convolutions, loops counted.

Traced without recomputation, a train step's count is what the model needs (forward, gradients of
activations, gradients of trained weights only), which is what utilisation (MFU) is measured by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
import math
from typing import Any, NamedTuple

import jax


class Product(NamedTuple):
  """A product of `batch` pairs of [m k] and [k n] matrices; `kind` is 'dot' or 'conv'."""

  kind: str
  batch: int
  m: int
  k: int
  n: int

  @property
  def flops(self) -> float:
    """Operations, 2 per multiply-add."""
    return 2.0 * self.batch * self.m * self.k * self.n


def count_products(fn: Callable, *args: Any, **kwargs: Any) -> Counter[Product]:
  """How often each shape of product or convolution is computed in one call; see `count_flops`.

  A convolution is given as the product it amounts to: output places x (kernel places and input
  channels of a group) x output channels.
  """
  return Counter(dict(_products(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr)))


def count_flops(fn: Callable, *args: Any, **kwargs: Any) -> float:
  """Operations (2 per multiply-add) of the products and convolutions in one call of `fn`.

  Args:
    args: arrays or ShapeDtypeStruct trees; nothing is computed.

  Loops of a length that is not known before the run (`while`) count once, branches with the most
  expensive one.
  """
  return sum(product.flops * times
             for product, times in count_products(fn, *args, **kwargs).items())


def _products(jaxpr) -> Counter[Product]:
  found: Counter[Product] = Counter()
  for equation in jaxpr.eqns:
    for product, times in _equation(equation):
      found[product] += times
  return found


def _equation(equation) -> Iterator[tuple[Product, int]]:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    (summed, summed_right), (batch, batch_right) = params['dimension_numbers']
    size = lambda shape, left_out: math.prod(
      n for d, n in enumerate(shape) if d not in left_out)
    yield Product('dot', math.prod(left[d] for d in batch), size(left, {*summed, *batch}),
                  math.prod(left[d] for d in summed),
                  size(right, {*summed_right, *batch_right})), 1
  elif name == 'conv_general_dilated':
    kernel = equation.invars[1].aval.shape
    out_features = kernel[params['dimension_numbers'].rhs_spec[0]]
    out = math.prod(equation.outvars[0].aval.shape)
    yield Product('conv', 1, out // out_features, math.prod(kernel) // out_features,
                  out_features), 1
  elif name == 'scan':
    yield from ((product, times * params['length'])
                for product, times in _products(params['jaxpr'].jaxpr).items())
  elif name == 'shard_map':
    # Written for one device of a mesh, computed on all.
    yield from ((product, times * params['mesh'].size)
                for product, times in _products(params['jaxpr']).items())
  elif name == 'cond':
    branches = [_products(branch.jaxpr) for branch in params['branches']]
    cost = lambda branch: sum(product.flops * times for product, times in branch.items())
    yield from max(branches, key=cost).items()
  else:
    for value in params.values():
      for inner in _inner(value):
        yield from _products(inner).items()


def _inner(value) -> list:
  """Jaxprs among the parameters of a call-like primitive (jit, checkpoint, custom derivatives)."""
  if hasattr(value, 'eqns'):
    return [value]
  if hasattr(value, 'jaxpr') and hasattr(value.jaxpr, 'eqns'):
    return [value.jaxpr]
  if isinstance(value, (tuple, list)):
    return [found for item in value for found in _inner(item)]
  return []
