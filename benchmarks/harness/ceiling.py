"""How fast this machine multiplies matrices at the shapes of a program, in the same process.

The share of that ceiling says how much of a program's time is matrix products; a machine's best
rate at some friendly shape would not.
"""

from __future__ import annotations

from collections.abc import Callable
import time
from typing import Any

import jax
import jax.numpy as jnp

from hrvlm_jax.parallel.flops import Product, count_products

COVERED = 0.97  # of the operations: the rest is taken at the mean rate of these
_COLD_BYTES = 2**28  # operands of a narrow product are spread over this much memory


def cost(fn: Callable, arguments: tuple, *, dtype: str = 'float32',
         clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
  """Counts the products of `fn` and times their shapes one by one.

  Returns:
    flops: of all products and convolutions. matmul_seconds: what the products would take at our
    own rate. rates: per shape [times, batch, m, k, n, GFLOP/s], the largest first.
  """
  products = count_products(fn, *arguments)
  total = sum(p.flops * times for p, times in products.items())
  dots = sorted(((p, t) for p, t in products.items() if p.kind == 'dot'),
                key=lambda item: -item[0].flops * item[1])
  of_dots = sum(p.flops * t for p, t in dots)
  rows, covered, seconds = [], 0.0, 0.0
  for product, times in dots:
    if covered >= COVERED * of_dots:
      break
    rate = matmul_rate(product, dtype, clock=clock)
    covered += product.flops * times
    seconds += product.flops * times / rate
    rows.append([times, product.batch, product.m, product.k, product.n, round(rate / 1e9, 1)])
  seconds *= of_dots / max(covered, 1.0)
  return {'flops': total, 'dot_flops': of_dots, 'matmul_seconds': round(seconds, 4), 'rates': rows}


def matmul_rate(product: Product, dtype: str = 'float32', *, seconds: float = 0.4,
                clock: Callable[[], float] = time.perf_counter) -> float:
  """Best operations per second of jnp.matmul at one shape.

  A product with few rows reads every weight once from memory in the program, so here several
  right-hand sides take turns: a single one would stay in the cache.
  """
  kind = jnp.dtype(dtype)
  left = (product.batch, product.m, product.k)
  right = (product.batch, product.k, product.n)
  if product.batch == 1:
    left, right = left[1:], right[1:]
  elements = product.batch * product.k * product.n
  narrow = min(product.m, product.n) <= 16
  copies = max(1, min(32, _COLD_BYTES // (elements * kind.itemsize))) if narrow else 1
  a = jnp.full(left, 0.5, kind)
  many = [jnp.full(right, 0.5 + i, kind) for i in range(copies)]
  multiply = jax.jit(jnp.matmul)
  jax.block_until_ready(multiply(a, many[0]))
  best, end, calls = float('inf'), clock() + seconds, 0
  while calls < 2 or clock() < end:
    start = clock()
    for b in many:
      out = multiply(a, b)
    jax.block_until_ready(out)
    best = min(best, (clock() - start) / copies)
    calls += 1
  return product.flops / best
