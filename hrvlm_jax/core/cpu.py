"""Forms of operations that a single CPU runs faster; nothing here is needed for a result.

Every form computes what the plain one does (tests compare them). Callers give an `Execution` or
choose where a program is lowered, and accelerators never come here. The numbers that decide between
forms are in benchmarks/findings.md. Axis letters: n images, t tokens (or queries), s keys, h heads,
k key/value heads, d width, c channels.
"""

from __future__ import annotations

from collections.abc import Callable
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hrvlm_jax.core.execution import Execution
from hrvlm_jax.core.layers import MASKED, wide, wide_dtype

# Rows of a matrix product that a CPU's caches hold well: with the 9477 rows of 13 views at once
# products of these widths ran at 300 GFLOP/s, with up to 2200 rows at 500.
ROWS_AT_ONCE = 2304
# Scores of an attention above which heads go one by one (16 MB in float32).
HEADS_FROM = 2**22
_PIECES = 4
# Numbers of an image from which a convolution's pieces are worth a program of their own each.
_SPREAD_FROM = 2**20
_RUN = 16  # 8 is several times slower, 32 no faster


def few_at_a_time(fn: Callable, x: Float[Array, 'n t d'], ex: Execution) -> Float[Array, 'n t d']:
  """fn(x): all images at once, but on one CPU, where none is trained, as many as its caches like.

  The last part may be smaller.
  """
  size = _images_at_once(x, ex)
  if size == x.shape[0]:
    return fn(x)
  whole = x.shape[0] // size * size
  y = jax.lax.map(fn, x[:whole].reshape(-1, size, *x.shape[1:])).reshape(whole, *x.shape[1:])
  return y if whole == x.shape[0] else jnp.concatenate([y, fn(x[whole:])])


def _images_at_once(x: Float[Array, 'n t d'], ex: Execution) -> int:
  n, tokens = x.shape[:2]
  if x.ndim != 3 or ex.gradients or not ex.one_cpu:
    return n
  return max(min(n, ROWS_AT_ONCE // tokens), 1)


def by_heads(q, k, v, mask, causal, scale):
  """Attention, one (batch row, head) after the other; the backward pass makes each head's scores
  again. Arguments as of `core.attention.attention`, q [n t h d], k and v [n s k d].

  The product with v is divided by the sum of the weights, so that the scores are read once less.
  """
  b, t, heads, width = q.shape
  s, groups = k.shape[1], heads // k.shape[2]
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # [b h t d]
  triangle = jnp.arange(s) <= jnp.arange(t)[:, None] if causal else None

  @jax.checkpoint
  def one(number):
    row, head = number // heads, number % heads
    pick = lambda x, i, j: jax.lax.dynamic_slice(
      x, (i, j, 0, 0), (1, 1, *x.shape[2:])).reshape(x.shape[2:])
    keys, values = pick(k, row, head // groups), pick(v, row, head // groups)
    scores = scale * jnp.matmul(pick(q, row, head), keys.T,
                                preferred_element_type=wide_dtype(q.dtype))
    if mask is not None:
      allowed = pick(mask, row if mask.shape[0] > 1 else 0, head if mask.shape[1] > 1 else 0)
      scores = jnp.where(allowed, scores, MASKED)
    if triangle is not None:
      scores = jnp.where(triangle, scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.matmul(weights.astype(v.dtype), values, preferred_element_type=total.dtype)
    return (out / total).astype(v.dtype)

  out = jax.lax.map(one, jnp.arange(b * heads))
  return jnp.swapaxes(out.reshape(b, heads, t, v.shape[-1]), 1, 2)


def _padded(x, kernel, *, below: int = 0, right: int = 0):
  rows, cols = kernel.shape[0] // 2, kernel.shape[1] // 2
  return jnp.pad(x, ((0, 0), (rows, rows + below), (cols, cols + right), (0, 0)))


def _taps(window, weights, rows, width):
  """The sum of shifted products over `rows` rows, in float32."""
  return sum(wide(window[:, i:i + rows, j:j + width]) * weights[i, j, 0]
             for i in range(weights.shape[0]) for j in range(weights.shape[1]))


def shifted(x, kernel):
  """A depthwise convolution as a sum of shifted products; arguments as of `core.conv.depthwise`.

  The sum is unrolled: XLA makes one loop of it that keeps the sum in registers. Rows go in
  `_PIECES` pieces: a loop's result is stored, where a plain sum would be computed again inside
  each reduction that reads it (the two of a layer norm: ten times slower).
  """
  n, height, width, channels = x.shape
  pieces = min(_PIECES, height)
  each = -(-height // pieces)
  padded = _padded(x, kernel, below=each * pieces - height)
  weights = wide(kernel)

  def add(index, out):
    window = jax.lax.dynamic_slice_in_dim(
      padded, index * each, each + kernel.shape[0] - 1, axis=1)
    total = _taps(window, weights, each, width).astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(out, total, index * each, axis=1)

  empty = jnp.zeros((n, each * pieces, width, channels), x.dtype)
  return jax.lax.fori_loop(0, pieces, add, empty)[:, :height]


def spread(x, kernel):
  """`shifted` with all threads, for large images of which no gradient is taken.

  What a loop writes is written by one thread; pieces that are put together are stored too, but each
  is compiled by itself. In a train step nothing is won.
  """
  height, width = x.shape[1:3]
  if x[0].size < _SPREAD_FROM or height < _PIECES:
    return shifted(x, kernel)
  padded, weights = _padded(x, kernel), wide(kernel)
  piece = lambda start, stop: _taps(
    padded[:, start:], weights, stop - start, width).astype(x.dtype)
  ends = [height * i // _PIECES for i in range(_PIECES + 1)]
  return jnp.concatenate([piece(*some) for some in itertools.pairwise(ends)], axis=1)


def shifted_vjp(x, kernel, grad):
  """(dx, dkernel) of `shifted`, both sums of shifted products again.

  dx takes the kernel turned by 180 degrees; dkernel pieces of `_RUN` cells of the gradient as
  kernel, one after the other, because reductions over rows and columns run unvectorised on a CPU
  (ten times slower).
  """
  n, height, width, channels = x.shape
  rows, cols = kernel.shape[:2]
  dx = shifted(grad.astype(x.dtype), kernel[::-1, ::-1])
  extra = -width % _RUN
  padded = _padded(x, kernel, right=extra)
  cotangent = jnp.pad(grad, ((0, 0), (0, 0), (0, extra), (0, 0)))
  runs = (width + extra) // _RUN

  def add(index, total):
    image, y, start = index // (height * runs), index // runs % height, index % runs * _RUN
    cut = lambda a, h, w: wide(jax.lax.dynamic_slice(
      a, (image, y, start, 0), (1, h, w, channels))[0])
    window, taps = cut(padded, rows, _RUN + cols - 1), cut(cotangent, 1, _RUN)[0]
    return total + sum(window[:, q:q + cols] * taps[q] for q in range(_RUN))

  zero = jnp.zeros((rows, cols, channels), wide_dtype(x.dtype))
  dkernel = jax.lax.fori_loop(0, n * height * runs, add, zero)
  return dx, dkernel[:, :, None].astype(kernel.dtype)
