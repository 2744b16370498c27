"""Convolutions in NHWC: non-overlapping ones as matrix products, depthwise ones per backend.

Kernels are (rows, columns, in, out); a depthwise kernel is (rows, columns, 1, channels). Axis
letters: n images, h w rows and columns, c channels, r s kernel rows and columns.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hrvlm_jax.core.layers import Initializer, normal, patchify, wide, wide_dtype, zeros
from hrvlm_jax.core.module import Module, Param, Rngs

DEPTHWISE = ('auto', 'shifted', 'grouped')
_PIECES = 4
_RUN = 16  # 8 is several times slower, 32 no faster


def xavier_uniform(fan_in: int, fan_out: int) -> Initializer:
  """Uniform in +-sqrt(6 / (fan_in + fan_out)); fans as PyTorch counts them."""
  bound = math.sqrt(6 / (fan_in + fan_out))
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


class PatchConv(Module):
  """A P x P convolution of stride P without padding, as one matrix product.

  Rows and columns beyond the last whole patch are never read.
  """

  def __init__(self, patch: int, n_in: int, n_out: int, *, kernel_init: Initializer | None = None,
               param_dtype=jnp.float32, rngs: Rngs):
    kernel_init = kernel_init or normal(0.02)
    self.patch = patch
    self.kernel = Param(kernel_init(rngs.params(), (patch, patch, n_in, n_out), param_dtype))
    self.bias = Param(jnp.zeros((n_out,), param_dtype))

  def __call__(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n H W d']:
    p = self.patch
    n, rows, cols = x.shape[0], x.shape[1] // p, x.shape[2] // p
    kernel = self.kernel[...].astype(x.dtype)
    y = patchify(x, p) @ kernel.reshape(-1, kernel.shape[-1])
    return y.reshape(n, rows, cols, -1) + self.bias[...].astype(x.dtype)


class DepthwiseConv(Module):
  """One odd-sized kernel per channel, stride 1, zero padding that keeps the size.

  Args:
    impl: see `depthwise`.
  """

  def __init__(self, size: int, channels: int, *, kernel_init: Initializer | None = None,
               impl: str = 'auto', param_dtype=jnp.float32, rngs: Rngs):
    if size % 2 == 0:
      raise ValueError(f'DepthwiseConv: size must be odd, got {size}')
    kernel_init = kernel_init or normal(0.02)
    self.impl = impl
    self.kernel = Param(kernel_init(rngs.params(), (size, size, 1, channels), param_dtype))
    self.bias = Param(zeros(None, (channels,), param_dtype))

  def __call__(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n h w c']:
    y = depthwise(x, self.kernel[...].astype(x.dtype), impl=self.impl)
    return y + self.bias[...].astype(x.dtype)


def depthwise(
  x: Float[Array, 'n h w c'], kernel: Float[Array, 'r s 1 c'], *, impl: str = 'auto'
) -> Float[Array, 'n h w c']:
  """Correlation of every channel with its own kernel, zero padded, summed in float32.

  Args:
    impl: 'grouped' is XLA's grouped convolution; 'shifted' the sum of r * s shifted products, with
      a backward pass of the same form; 'auto' takes 'shifted' where the program is lowered for a
      CPU and 'grouped' elsewhere. benchmarks/depthwise.py measures both: on a CPU 'shifted' is
      faster by an order of magnitude.

  Raises:
    ValueError: unknown `impl`.
  """
  if impl not in DEPTHWISE:
    raise ValueError(f'depthwise: impl must be one of {DEPTHWISE}, got {impl!r}')
  return _depthwise(x, kernel, impl)


def _grouped(x, kernel):
  pads = [(size // 2, size // 2) for size in kernel.shape[:2]]
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), pads, feature_group_count=x.shape[-1],
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def _padded(x, kernel, *, below: int = 0, right: int = 0):
  rows, cols = kernel.shape[0] // 2, kernel.shape[1] // 2
  return jnp.pad(x, ((0, 0), (rows, rows + below), (cols, cols + right), (0, 0)))


def _shifted(x, kernel):
  """The sum is unrolled: XLA makes one loop of it that keeps the sum in registers. Rows go in
  `_PIECES` pieces: a loop's result is stored, where a plain sum would be computed again inside
  each reduction that reads it (the two of a layer norm: ten times slower)."""
  n, height, width, channels = x.shape
  pieces = min(_PIECES, height)
  each = -(-height // pieces)
  padded = _padded(x, kernel, below=each * pieces - height)
  weights = wide(kernel)

  def add(index, out):
    window = jax.lax.dynamic_slice_in_dim(
      padded, index * each, each + kernel.shape[0] - 1, axis=1)
    total = sum(wide(window[:, i:i + each, j:j + width]) * weights[i, j, 0]
                for i in range(kernel.shape[0]) for j in range(kernel.shape[1]))
    return jax.lax.dynamic_update_slice_in_dim(out, total.astype(x.dtype), index * each, axis=1)

  empty = jnp.zeros((n, each * pieces, width, channels), x.dtype)
  return jax.lax.fori_loop(0, pieces, add, empty)[:, :height]


def _shifted_vjp(x, kernel, grad):
  """(dx, dkernel), both sums of shifted products again: dx with the kernel turned by 180 degrees;
  dkernel with pieces of `_RUN` cells of the gradient as kernel, one piece after the other, because
  reductions over rows and columns run unvectorised on a CPU (ten times slower)."""
  n, height, width, channels = x.shape
  rows, cols = kernel.shape[:2]
  dx = _shifted(grad.astype(x.dtype), kernel[::-1, ::-1])
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


def _grouped_vjp(x, kernel, grad):
  return jax.vjp(_grouped, x, kernel)[1](grad)


def _choose(impl, args, shifted, grouped):
  """'auto' is decided where the program is lowered, so that compiling for another machine (an
  ahead-of-time plan) gets that machine's form."""
  if impl == 'auto':
    return jax.lax.platform_dependent(*args, cpu=shifted, default=grouped)
  return shifted(*args) if impl == 'shifted' else grouped(*args)


def _forward(x, kernel, impl):
  return _choose(impl, (x, kernel), _shifted, _grouped)


def _forward_saved(x, kernel, impl):
  return _forward(x, kernel, impl), (x, kernel)


def _backward(impl, saved, grad):
  return _choose(impl, (*saved, grad), _shifted_vjp, _grouped_vjp)


_depthwise = jax.custom_vjp(_forward, nondiff_argnums=(2,))
_depthwise.defvjp(_forward_saved, _backward)


def average_pool(x: Float[Array, 'n h w c'], factor: int) -> Float[Array, 'n H W c']:
  """Mean over non-overlapping factor x factor windows, in float32; remainders are not read."""
  n, height, width, channels = x.shape
  rows, cols = height // factor, width // factor
  windows = x[:, :rows * factor, :cols * factor].reshape(n, rows, factor, cols, factor, channels)
  return windows.mean(axis=(2, 4), dtype=wide_dtype(x.dtype)).astype(x.dtype)
