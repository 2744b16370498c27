"""Pixels and maps on the device: normalised, and resampled as PyTorch does.

Resampling is by separable weight matrices made on the host. Each `*_matrix(n, m)` is float32
[m, n]: output = matrix @ input along one axis. They are constants of a shape, so a resize is two
matrix products and differentiable. Sources: the kernels of `pytorch/pytorch: aten/src/ATen/native`
as described in the systems' specifications.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt8
import numpy as np

from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import wide

# Of CLIP's processors.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(
  pixels: UInt8[Array, '... 3'], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, '... 3']:
  """(x / 255 - mean) / std in float32, inside the compiled step.

  Pixels travel to the device as bytes, a quarter of the traffic. XLA may replace a division by a
  constant with a product: the last bit can differ from `normalise_host`, nothing more
  (tests/core/test_pixels.py).
  """
  x = pixels.astype(jnp.float32) / 255.0
  return (x - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def normalise_host(
  pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...], *, rescale: str = 'product'
) -> np.ndarray:
  """The same in the operation order of the originals' processors, bit for bit.

  Args:
    rescale: 'product' multiplies by 1/255 in float64 and casts (Hugging Face processors),
      'quotient' divides by 255 in float32 (torchvision's ToTensor).
  """
  if rescale == 'product':
    x = (pixels.astype(np.float64) * 0.00392156862745098).astype(np.float32)
  else:
    x = pixels.astype(np.float32) / np.float32(255)
  return (x - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)



def _keys(t: np.ndarray, a: float) -> np.ndarray:
  t = np.abs(t)
  near = (a + 2) * t**3 - (a + 3) * t**2 + 1
  far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
  return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def _fma(a, b, c) -> np.ndarray:
  """a * b + c in float32 with one rounding, as PyTorch's builds for x86-64 contract it."""
  return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


def _cubic_weights(t: np.ndarray) -> list[np.ndarray]:
  """Four float32 weights for the fraction t, with PyTorch's roundings (a = -0.75).

  The first steps of each polynomial are fused multiply-adds, the last products and sums are not:
  bit for bit what PyTorch 2.13 computes on x86-64. The polynomials cancel to some 1e-6, which a
  layer norm over few channels can amplify a thousandfold (the selection network of PS3 upsamples,
  then norms).
  """
  a, one, f = np.float32(-0.75), np.float32(1), np.float32

  def near(x):
    return _fma(a + f(2), x, -(a + f(3))) * x * x + one

  def far(x):
    return _fma(_fma(a, x, -f(5) * a), x, f(8) * a) * x - f(4) * a

  return [far(t + one), near(t), near(one - t), far((one - t) + one)]


@functools.lru_cache(maxsize=256)
def bicubic_taps(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
  """`interpolate(mode='bicubic')`, no antialias: source indices int32 [4, m], clamped, and float32
  weights [4, m].

  The scale is float32 and the coordinate rounded once, as in the original: with a float64 scale, or
  with two roundings, 1000 -> 1512 differs by more than 1e-5.
  """
  scale = np.float32(n) / np.float32(m)
  x = _fma(scale, np.arange(m, dtype=np.float32) + np.float32(0.5), np.float32(-0.5))
  base = np.floor(x)
  index = [np.clip(base.astype(np.int64) + tap, 0, n - 1) for tap in range(-1, 3)]
  return np.stack(index).astype(np.int32), np.stack(_cubic_weights(x - base))


@functools.lru_cache(maxsize=256)
def bicubic_matrix(n: int, m: int) -> np.ndarray:
  """`bicubic_taps` as a matrix; weights of clamped taps add up."""
  if n == m:
    return np.eye(n, dtype=np.float32)
  matrix = np.zeros((m, n), np.float32)
  for index, weights in zip(*bicubic_taps(n, m), strict=True):
    np.add.at(matrix, (np.arange(m), index), weights)
  return matrix


@functools.lru_cache(maxsize=256)
def bicubic_antialias_matrix(n: int, m: int) -> np.ndarray:
  """`interpolate(mode='bicubic', antialias=True)`: a = -0.5, support grows when shrinking,
  taps outside are dropped and the rest renormalised. Used for position tables."""
  if n == m:
    return np.eye(n, dtype=np.float32)
  scale = n / m
  stretch = max(scale, 1.0)
  centre = (np.arange(m) + 0.5) * scale
  weights = _keys((np.arange(n)[None] + 0.5 - centre[:, None]) / stretch, -0.5)
  return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


@functools.lru_cache(maxsize=256)
def bilinear_corners_matrix(n: int, m: int) -> np.ndarray:
  """`interpolate(mode='bilinear', align_corners=True)`, no antialias, float32 coordinates."""
  if n == m:
    return np.eye(n, dtype=np.float32)
  scale = np.float32((n - 1) / (m - 1)) if m > 1 else np.float32(0)
  x = np.arange(m, dtype=np.float32) * scale
  low = np.minimum(x.astype(np.int64), n - 1)
  high = np.minimum(low + 1, n - 1)
  frac = x - low.astype(np.float32)
  matrix = np.zeros((m, n), np.float32)
  np.add.at(matrix, (np.arange(m), low), np.float32(1) - frac)
  np.add.at(matrix, (np.arange(m), high), frac)
  return matrix


@functools.lru_cache(maxsize=256)
def area_matrix(n: int, m: int) -> np.ndarray:
  """`interpolate(mode='area')` = adaptive average: mean over floor(i n/m) .. ceil((i+1) n/m)."""
  matrix = np.zeros((m, n), np.float32)
  for i in range(m):
    start, stop = (i * n) // m, -((-(i + 1) * n) // m)
    matrix[i, start:stop] = np.float32(1) / np.float32(stop - start)
  return matrix


def nearest_index(n: int, m: int) -> np.ndarray:
  """`interpolate(mode='nearest')`: int32 [m] source indices, in float32 arithmetic."""
  ratio = np.float32(n) / np.float32(m)
  index = (np.arange(m, dtype=np.float32) * ratio).astype(np.int64)
  return np.minimum(index, n - 1).astype(np.int32)


def resize(
  x: Float[Array, '... h w c'], rows: np.ndarray, cols: np.ndarray
) -> Float[Array, '... H W c']:
  """Applies a row matrix [H, h] and a column matrix [W, w] in float32; keeps the dtype of x.

  Always at the highest precision: the fast forms of TPU and GPU round weights to half precision.
  An axis whose matrix is the identity (a resize to the same size) is left untouched.
  """
  y = wide(x)
  if not _is_identity(cols):
    y = jnp.einsum('Ww,...hwc->...hWc', cols, y, precision='highest')
  if not _is_identity(rows):
    y = jnp.einsum('Hh,...hwc->...Hwc', rows, y, precision='highest')
  return y.astype(x.dtype)


def bicubic(
  x: Float[Array, '... h w c'], height: int, width: int, *, method: str = 'auto',
  ex: Execution = HERE,
) -> Float[Array, '... H W c']:
  """`interpolate(mode='bicubic')` of images (see `bicubic_matrix`); the same size is untouched.

  Args:
    method: 'taps' gathers four rows and four columns per output (on CPU 30 times faster than dense
      matrices for a 4K image), 'matrix' multiplies (what accelerators are good at; at the highest
      precision, as `resize`); 'auto' takes taps on CPU.

  Raises:
    ValueError: unknown `method`.
  """
  if method not in ('auto', 'taps', 'matrix'):
    raise ValueError(f"bicubic: method must be 'auto', 'taps' or 'matrix', got {method!r}")
  h, w = x.shape[-3:-1]
  if method == 'matrix' or (method == 'auto' and ex.on != 'cpu'):
    y = wide(x)
    if w != width:
      y = jnp.einsum('Ww,...hwc->...hWc', bicubic_matrix(w, width), y, precision='highest')
    if h != height:
      y = jnp.einsum('Hh,...hwc->...Hwc', bicubic_matrix(h, height), y, precision='highest')
    return y.astype(x.dtype)
  y = wide(x)
  # Along a row first, the first tap first: with fused multiply-adds these are PyTorch's roundings.
  for axis, n, m in ((-2, w, width), (-3, h, height)):
    if n == m:
      continue
    index, weights = bicubic_taps(n, m)
    shape = (m, 1, 1) if axis == -3 else (m, 1)
    parts = [jnp.take(y, i, axis=axis, mode='clip') * part.reshape(shape).astype(y.dtype)
             for i, part in zip(index, weights, strict=True)]
    y = parts[0] + parts[1] + parts[2] + parts[3]
  return y.astype(x.dtype)


def area(x: Float[Array, '... h w'], rows: int, cols: int) -> Float[Array, '... H W']:
  """`interpolate(mode='area')` of maps."""
  down, across = area_matrix(x.shape[-2], rows), area_matrix(x.shape[-1], cols)
  return resize(x[..., None], down, across)[..., 0]


def nearest(x: Shaped[Array, '... h w'], rows: int, cols: int) -> Shaped[Array, '... H W']:
  """`interpolate(mode='nearest')` of maps."""
  taken = jnp.take(x, nearest_index(x.shape[-2], rows), axis=-2, mode='clip')
  return jnp.take(taken, nearest_index(x.shape[-1], cols), axis=-1, mode='clip')


def adaptive_max(x: Float[Array, '... h w'], rows: int, cols: int) -> Float[Array, '... H W']:
  """Adaptive max pooling over the windows of `area_matrix`; they may overlap."""
  for axis, size in ((-2, rows), (-1, cols)):
    n = x.shape[axis]
    windows = [((i * n) // size, -((-(i + 1) * n) // size)) for i in range(size)]
    width = max(stop - start for start, stop in windows)
    # Every window is read at a common width; shorter ones repeat their last cell.
    index = np.array([[min(start + j, stop - 1) for j in range(width)] for start, stop in windows])
    taken = jnp.take(x, index.reshape(-1), axis=axis)
    axis_from_end = x.ndim + axis
    shape = (*taken.shape[:axis_from_end], size, width, *taken.shape[axis_from_end + 1:])
    x = taken.reshape(shape).max(axis=axis_from_end + 1)
  return x


def position_table(
  table: Float[Array, 'n d'], grid: tuple[int, int], *, extra: int = 0
) -> Float[Array, 'm d']:
  """Resamples a square learned position table to a (rows, cols) grid, as timm and LLaVA-HR do.

  The first `extra` rows (a class token) are kept. The square part is resampled to the larger side
  with antialiased bicubic weights in float32, then cropped; the same size is returned untouched.
  """
  side = int(round((table.shape[0] - extra) ** 0.5))
  rows, cols = grid
  if (rows, cols) == (side, side):
    return table
  target = max(rows, cols)
  square = table[extra:].reshape(side, side, -1)
  if target != side:
    matrix = bicubic_antialias_matrix(side, target)
    square = resize(square, matrix, matrix)
  cropped = square[:rows, :cols].reshape(rows * cols, -1)
  return jnp.concatenate([table[:extra], cropped]) if extra else cropped


def _is_identity(matrix: np.ndarray) -> bool:
  return matrix.shape[0] == matrix.shape[1] and np.array_equal(
    matrix, np.eye(matrix.shape[0], dtype=matrix.dtype))
