"""Convolutions in NHWC: non-overlapping ones as matrix products, depthwise ones per backend.

Kernels are (rows, columns, in, out); a depthwise kernel is (rows, columns, 1, channels). Axis
letters: n images, h w rows and columns, c channels, r s kernel rows and columns.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hrvlm_jax.core.cpu import shifted, shifted_vjp, spread
from hrvlm_jax.core.layers import Initializer, PatchEmbed, normal, wide, wide_dtype, zeros
from hrvlm_jax.core.module import Module, Param, Rngs

DEPTHWISE = ('auto', 'shifted', 'grouped', 'reduced')


def xavier_uniform(fan_in: int, fan_out: int) -> Initializer:
  """Uniform in +-sqrt(6 / (fan_in + fan_out)); fans as PyTorch counts them."""
  bound = math.sqrt(6 / (fan_in + fan_out))
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


class PatchConv(PatchEmbed):
  """A patch embedding whose result stays a map."""

  def __init__(self, patch: int, n_in: int, n_out: int, *, param_dtype=jnp.float32, rngs: Rngs):
    super().__init__(patch, n_in, n_out, bias=True, kernel_init=normal(0.02),
                     param_dtype=param_dtype, rngs=rngs)

  def __call__(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n H W d']:
    rows, cols = x.shape[1] // self.patch, x.shape[2] // self.patch
    return super().__call__(x).reshape(x.shape[0], rows, cols, -1)


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
      a backward pass of the same form; 'reduced' is 'grouped' but for the kernel's gradient, r * s
      sums of shifted products; 'auto' takes 'shifted' where the program is lowered for a CPU,
      'reduced' for a TPU and 'grouped' elsewhere. benchmarks/depthwise.py measures both: on a CPU
      'shifted' is faster by an order of magnitude. On a TPU the grouped form of the kernel's
      gradient is unrolled over all places: a third of the speed, and minutes of compilation.

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


def _grouped_vjp(x, kernel, grad):
  return jax.vjp(_grouped, x, kernel)[1](grad)


def _reduced_vjp(x, kernel, grad):
  rows, cols = kernel.shape[:2]
  height, width = x.shape[1:3]
  padded = jnp.pad(x, ((0, 0), (rows // 2, rows // 2), (cols // 2, cols // 2), (0, 0)))
  total = lambda i, j: (wide(padded[:, i:i + height, j:j + width]) * wide(grad)).sum(axis=(0, 1, 2))
  dkernel = jnp.stack([jnp.stack([total(i, j) for j in range(cols)]) for i in range(rows)])
  dx = _grouped(grad, kernel[::-1, ::-1])
  return dx, dkernel[:, :, None].astype(kernel.dtype)


def _choose(impl, args, *, shifted, reduced, grouped):
  """'auto' is decided where the program is lowered, so that compiling for another machine (an
  ahead-of-time plan) gets that machine's form."""
  if impl == 'auto':
    return jax.lax.platform_dependent(*args, cpu=shifted, tpu=reduced, default=grouped)
  return {'shifted': shifted, 'reduced': reduced, 'grouped': grouped}[impl](*args)


def _forward(x, kernel, impl):  # where no gradient is taken
  return _choose(impl, (x, kernel), shifted=spread, reduced=_grouped, grouped=_grouped)


def _forward_saved(x, kernel, impl):
  y = _choose(impl, (x, kernel), shifted=shifted, reduced=_grouped, grouped=_grouped)
  return y, (x, kernel)


def _backward(impl, saved, grad):
  return _choose(impl, (*saved, grad), shifted=shifted_vjp, reduced=_reduced_vjp,
                 grouped=_grouped_vjp)


_depthwise = jax.custom_vjp(_forward, nondiff_argnums=(2,))
_depthwise.defvjp(_forward_saved, _backward)


def average_pool(x: Float[Array, 'n h w c'], factor: int) -> Float[Array, 'n H W c']:
  """Mean over non-overlapping factor x factor windows, in float32; remainders are not read."""
  n, height, width, channels = x.shape
  rows, cols = height // factor, width // factor
  windows = x[:, :rows * factor, :cols * factor].reshape(n, rows, factor, cols, factor, channels)
  return windows.mean(axis=(2, 4), dtype=wide_dtype(x.dtype)).astype(x.dtype)
