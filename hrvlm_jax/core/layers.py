"""Layers shared by all encoders and decoders.

Parameters are stored in `param_dtype`; computation follows the dtype of the input. Statistics of
norms are float32 whatever that is. Kernels are (in, out); heads are contiguous on the out axis.
Axis letters: n batch, t tokens, d width, r LoRA rank, h w c image rows, columns, channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from hrvlm_jax.core import bounds
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.module import Module, Param, Rngs


def wide(x: jax.Array) -> jax.Array:
  """At least float32: half precision is promoted, float64 stays (never a cast downwards)."""
  return x.astype(wide_dtype(x.dtype))


def wide_dtype(dtype) -> jnp.dtype:
  """The dtype of `wide`, for `preferred_element_type`."""
  return jnp.promote_types(dtype, jnp.float32)


def unit(x: Float[Array, '... d']) -> Float[Array, '... d']:
  """Vectors of length one, x / max(|x|, 1e-12), in float32; differentiable at 0."""
  x = wide(x)
  square = jnp.square(x).sum(axis=-1, keepdims=True)
  norm = jnp.sqrt(jnp.where(square > 1e-24, square, 1.0))
  return x / jnp.where(square > 1e-24, norm, 1e-12)


# A score that no query may read. Finite, so that a row without any allowed key gives a uniform
# softmax instead of NaN.
MASKED = float(jnp.finfo(jnp.float32).min)

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]
Adapter = str | tuple[tuple[str, int], ...] | None


def normal(std: float) -> Initializer:
  """N(0, std^2)."""
  return lambda key, shape, dtype: (std * jax.random.normal(key, shape)).astype(dtype)


def zeros(key, shape, dtype):
  """All zero (the key is unused, so that every initializer has the same form)."""
  del key
  return jnp.zeros(shape, dtype)


def ones(key, shape, dtype):
  """All one."""
  del key
  return jnp.ones(shape, dtype)


def torch_uniform(fan_in: int) -> Initializer:
  """PyTorch's default for linear and convolution layers: uniform in +-1/sqrt(fan_in)."""
  bound = 1 / math.sqrt(fan_in)
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _elementwise(value, slope):
  """An elementwise function whose backward pass multiplies by its slope, made beside the value.

  Differentiating the formula itself would store every intermediate array of it, six of the hidden
  width for GELU; this stores one. The slope is taken in float32.
  """
  fn = jax.custom_jvp(value)

  @fn.defjvp
  def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    return fn(x), slope(wide(x)).astype(x.dtype) * dx

  return fn


_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def _gelu(x):
  """By erf, as PyTorch: jax.nn.gelu's erfc takes three times as long on a CPU."""
  x32 = wide(x)
  return (0.5 * x32 * (1 + jax.lax.erf(x32 * math.sqrt(0.5)))).astype(x.dtype)


def _gelu_slope(x):
  density = jnp.exp(-0.5 * jnp.square(x)) / math.sqrt(2 * math.pi)
  return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5))) + x * density


def _gelu_tanh_slope(x):
  square = jnp.square(x)
  tanh = jnp.tanh(_SQRT_2_OVER_PI * x * (1 + 0.044715 * square))
  inner = _SQRT_2_OVER_PI * (1 + 3 * 0.044715 * square)
  return 0.5 * (1 + tanh) + 0.5 * x * (1 - jnp.square(tanh)) * inner


def _swish_slope(rate: float):
  """Of x * sigmoid(rate * x)."""
  def slope(x):
    gate = jax.nn.sigmoid(rate * x)
    return gate * (1 + rate * x * (1 - gate))
  return slope


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'gelu': _elementwise(_gelu, _gelu_slope),
  'gelu_tanh': _elementwise(lambda x: jax.nn.gelu(x, approximate=True), _gelu_tanh_slope),
  'quick_gelu': _elementwise(lambda x: x * jax.nn.sigmoid(1.702 * x), _swish_slope(1.702)),
  'silu': _elementwise(lambda x: x * jax.nn.sigmoid(x), _swish_slope(1.0)),
  'relu': jax.nn.relu,
}
_ALIASES = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh'}


def activation_name(name: str) -> str:
  """Our name of an activation that a Hugging Face config may call otherwise."""
  return _ALIASES.get(name, name)


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
  """The activation of a config; Hugging Face's names for the tanh form are accepted.

  Raises:
    ValueError: an unknown name.
  """
  name = activation_name(name)
  if name not in ACTIVATIONS:
    raise ValueError(f'unknown activation {name!r}; known: {sorted(ACTIVATIONS | _ALIASES)}')
  return ACTIVATIONS[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
  """One low-rank adapter set: y += (alpha / rank) * dropout(x) @ a @ b.

  A set without a name is always on; named sets are chosen at the call (`adapter=`). Switching
  sets on adds the leaves `lora_a[_name]`, `lora_b[_name]` and renames nothing. A `frozen` set acts
  but gets no gradient.
  """

  rank: int
  alpha: float
  name: str = ''
  dropout: float = 0.0
  frozen: bool = False

  BOUNDS: ClassVar = {'rank': bounds.SIZE, 'alpha': bounds.ABOVE_ZERO, 'dropout': bounds.DROPOUT}

  def __post_init__(self):
    bounds.check(self)

  @property
  def scale(self) -> float:
    """alpha / rank."""
    return self.alpha / self.rank

  @property
  def leaves(self) -> tuple[str, str]:
    """Names of the two parameters."""
    suffix = f'_{self.name}' if self.name else ''
    return f'lora_a{suffix}', f'lora_b{suffix}'


def _lora_pair(layer: Module, spec: LoRA, ex: Execution) -> tuple[jax.Array, jax.Array]:
  a, b = (ex.constrain('small', getattr(layer, name)[...]) for name in spec.leaves)
  return (jax.lax.stop_gradient(a), jax.lax.stop_gradient(b)) if spec.frozen else (a, b)


def dropout(x: jax.Array, rate: float | np.ndarray, key: jax.Array | None) -> jax.Array:
  """Inverted dropout; the identity without a key or at rate 0.

  Random bits cost more than all else here (a fifth of a step of Pheye on a TPU), so that four
  elements share the 32 bits of a draw. The rate is thereby rounded to a multiple of 1/256 (0.05
  becomes 13/256 = 0.0508), rates above 0 to one of 1/256 to 255/256; what is kept is divided by the
  rounded share, so that means are exact.

  rate: one for all of x, or an array that is broadcast to it.
  """
  if key is None or not np.any(rate):
    return x
  rate = np.asarray(rate)
  keep = np.where(rate > 0, np.clip(np.round((1 - rate) * 256), 1, 255), 256)
  # The four stand along the places of a row, which lie whole on a device where its features do not.
  axis = max(x.ndim - 2, 0)
  size = x.shape[axis]
  draw = jax.random.bits(
    key, (*x.shape[:axis], -(-size // 4), *x.shape[axis + 1:]), jnp.uint32)
  bits = jnp.concatenate([draw >> shift & 255 for shift in (0, 8, 16, 24)], axis=axis)
  bits = jax.lax.slice_in_dim(bits, 0, size, axis=axis)
  share = keep / 256 if keep.ndim else float(keep) / 256
  return jnp.where(bits < keep.astype(np.uint32), x / share, 0).astype(x.dtype)


class Linear(Module):
  """y = x @ kernel + bias, with optional LoRA sets.

  Args (call):
    adapter: None (only an unnamed set acts), the name of a set, or segments along axis 1 of x,
      for example (('first', 1), ('second', 9)) for one global view and nine tiles.
    key: dropout key of the LoRA branch; None at inference.
    ex: pins the low-rank matrices on a mesh.
  """

  def __init__(
    self,
    n_in: int,
    n_out: int,
    *,
    bias: bool = True,
    kernel_init: Initializer | None = None,
    bias_init: Initializer = zeros,
    lora: Sequence[LoRA] = (),
    param_dtype=jnp.float32,
    rngs: Rngs,
  ):
    kernel_init = kernel_init or normal(0.02)
    self.kernel = Param(kernel_init(rngs.params(), (n_in, n_out), param_dtype))
    self.bias = Param(bias_init(rngs.params(), (n_out,), param_dtype)) if bias else None
    self.lora = tuple(lora)
    for spec in self.lora:
      a, b = spec.leaves
      init = torch_uniform(n_in)(rngs.params(), (n_in, spec.rank), jnp.float32)
      setattr(self, a, Param(init))
      setattr(self, b, Param(jnp.zeros((spec.rank, n_out), jnp.float32)))

  def __call__(self, x: Float[Array, '... i'], *, adapter: Adapter = None, key=None,
               ex: Execution = HERE):
    y = x @ self.kernel[...].astype(x.dtype)
    if self.bias is not None:
      y = y + self.bias[...].astype(x.dtype)
    if not self.lora:
      return y
    for number, spec in enumerate(self.lora):
      sub = None if key is None else jax.random.fold_in(key, number)
      if not spec.name or adapter == spec.name:
        y = y + self._low_rank(spec, x, sub, ex)
    if isinstance(adapter, tuple):
      y = y + self._segments(adapter, x, key, ex)
    return y

  def _low_rank(self, spec: LoRA, x, key, ex: Execution):
    a, b = (leaf.astype(x.dtype) for leaf in _lora_pair(self, spec, ex))
    return (dropout(x, spec.dropout, key) @ a @ b) * jnp.asarray(spec.scale, x.dtype)

  def _segments(self, segments, x, key, ex: Execution):
    """The low-rank terms of consecutive ranges of axis 1, each by its own set.

    All sets are multiplied with all of x, as one product each way, and every row keeps the ranks
    of its own set: cutting x and joining the results would copy both (and store the parts again
    for the backward pass), which costs more than the few ranks. A range whose name has no set
    here gets nothing: the original switches adapters off there.
    """
    if sum(length for _, length in segments) != x.shape[1]:
      raise ValueError(f'adapter segments {segments} do not cover axis 1 of {x.shape}')
    names, lengths = zip(*segments, strict=True)
    used = [spec for spec in self.lora if spec.name and spec.name in names]
    if not used:
      return jnp.zeros((), x.dtype)
    per_row = lambda values: np.repeat(np.asarray(values), lengths, axis=0).reshape(
      (1, x.shape[1]) + (1,) * (x.ndim - 3) + (-1,))
    own = per_row([[spec.name == name for spec in used for _ in range(spec.rank)]
                   for name in names])
    rates = {spec.name: spec.dropout for spec in used}
    x = dropout(x, per_row([rates.get(name, 0.0) for name in names]), key)
    pairs = [_lora_pair(self, spec, ex) for spec in used]
    down = jnp.concatenate([a for a, _ in pairs], axis=1).astype(x.dtype)
    up = jnp.concatenate([b * spec.scale for (_, b), spec in zip(pairs, used, strict=True)])
    return jnp.where(own, x @ down, 0) @ up.astype(x.dtype)


# The norms' backward passes are written out: two sums per row from the input, which alone
# is kept. Differentiating the forward formula keeps the centred and the normalised input as well.


def _layer_norm(x, scale, bias, eps):
  return _layer_norm_saved(x, scale, bias, eps)[0]


def _layer_norm_saved(x, scale, bias, eps):
  x32 = wide(x)
  mean = x32.mean(axis=-1, keepdims=True)
  centred = x32 - mean
  inverse = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps)
  y = centred * inverse * scale.astype(x32.dtype)
  if bias is not None:
    y = y + bias.astype(x32.dtype)
  return y.astype(x.dtype), (x, scale, bias, mean, inverse)


def _layer_norm_vjp(eps, saved, grad):
  del eps
  x, scale, bias, mean, inverse = saved
  grad = wide(grad)
  normed = (wide(x) - mean) * inverse
  rows = tuple(range(x.ndim - 1))
  inner = grad * scale.astype(grad.dtype)
  dx = inverse * (inner - inner.mean(axis=-1, keepdims=True)
                  - normed * (inner * normed).mean(axis=-1, keepdims=True))
  dbias = None if bias is None else grad.sum(axis=rows).astype(bias.dtype)
  return dx.astype(x.dtype), (grad * normed).sum(axis=rows).astype(scale.dtype), dbias


_layer_norm = jax.custom_vjp(_layer_norm, nondiff_argnums=(3,))
_layer_norm.defvjp(_layer_norm_saved, _layer_norm_vjp)


def _rms_norm(x, scale, eps):
  return _rms_norm_saved(x, scale, eps)[0]


def _rms_norm_saved(x, scale, eps):
  x32 = wide(x)
  inverse = jax.lax.rsqrt(jnp.square(x32).mean(axis=-1, keepdims=True) + eps)
  return (x32 * inverse).astype(x.dtype) * scale.astype(x.dtype), (x, scale, inverse)


def _rms_norm_vjp(eps, saved, grad):
  del eps
  x, scale, inverse = saved
  grad = wide(grad)
  normed = wide(x) * inverse
  inner = grad * scale.astype(grad.dtype)
  dx = inverse * (inner - normed * (inner * normed).mean(axis=-1, keepdims=True))
  dscale = (grad * normed).sum(axis=tuple(range(x.ndim - 1)))
  return dx.astype(x.dtype), dscale.astype(scale.dtype)


_rms_norm = jax.custom_vjp(_rms_norm, nondiff_argnums=(2,))
_rms_norm.defvjp(_rms_norm_saved, _rms_norm_vjp)


class LayerNorm(Module):
  """Layer norm over the last axis, biased variance, float32 statistics."""

  def __init__(self, width: int, *, eps: float, bias: bool = True, param_dtype=jnp.float32,
               rngs: Rngs):
    del rngs
    self.eps = eps
    self.scale = Param(jnp.ones((width,), param_dtype))
    self.bias = Param(jnp.zeros((width,), param_dtype)) if bias else None

  def __call__(self, x: Float[Array, '... d']) -> Float[Array, '... d']:
    bias = None if self.bias is None else self.bias[...]
    return _layer_norm(x, self.scale[...], bias, self.eps)


class RMSNorm(Module):
  """x * rsqrt(mean(x^2) + eps) in float32, cast to the input dtype, THEN times the scale.

  The order is that of the LLaMA and Qwen2 originals and is visible in bfloat16.
  """

  def __init__(self, width: int, *, eps: float, param_dtype=jnp.float32, rngs: Rngs):
    del rngs
    self.eps = eps
    self.scale = Param(jnp.ones((width,), param_dtype))

  def __call__(self, x: Float[Array, '... d']) -> Float[Array, '... d']:
    return _rms_norm(x, self.scale[...], self.eps)


class Embedding(Module):
  """A table of row vectors, looked up by id; `attend` is the tied output projection."""

  def __init__(self, rows: int, width: int, *, std: float = 0.02, param_dtype=jnp.float32,
               rngs: Rngs):
    self.embedding = Param(normal(std)(rngs.params(), (rows, width), param_dtype))

  def __call__(self, ids: Int[Array, '...'], *, dtype=None) -> Float[Array, '... d']:
    """Rows of `ids`, which must lie in the table (ids beyond it are clamped by XLA)."""
    rows = jnp.take(self.embedding[...], ids, axis=0)
    return rows if dtype is None else rows.astype(dtype)

  def attend(self, x: Float[Array, '... d']) -> Float[Array, '... v']:
    """Scores of every row, accumulated in float32."""
    return jnp.matmul(
      x, self.embedding[...].T.astype(x.dtype), preferred_element_type=wide_dtype(x.dtype)
    )


class PatchEmbed(Module):
  """A P x P convolution of stride P without padding, as one matrix product.

  Rows and columns beyond the last whole patch are never read. The kernel is stored as
  (P, P, C, width); the LoRA pair of a patch convolution (Pheye) acts on the same patch vectors.
  """

  def __init__(
    self,
    patch: int,
    channels: int,
    width: int,
    *,
    bias: bool,
    lora: Sequence[LoRA] = (),
    kernel_init: Initializer | None = None,
    param_dtype=jnp.float32,
    rngs: Rngs,
  ):
    self.patch = patch
    fan_in = patch * patch * channels
    kernel_init = kernel_init or normal(fan_in**-0.5)
    self.kernel = Param(kernel_init(rngs.params(), (patch, patch, channels, width), param_dtype))
    self.bias = Param(jnp.zeros((width,), param_dtype)) if bias else None
    self.lora = tuple(lora)
    for spec in self.lora:
      a, b = spec.leaves
      setattr(self, a, Param(
        torch_uniform(fan_in)(rngs.params(), (patch, patch, channels, spec.rank), jnp.float32)))
      setattr(self, b, Param(jnp.zeros((spec.rank, width), jnp.float32)))

  def __call__(self, images: Float[Array, '... h w c'], *, adapter: Adapter = None, key=None,
               ex: Execution = HERE):
    """[... h w c] -> [... (h//P)(w//P) width], patches in raster order."""
    return self.project(patchify(images, self.patch), adapter=adapter, key=key, ex=ex)

  def project(self, patches: Float[Array, '... n ppc'], *, adapter: Adapter = None, key=None,
              ex: Execution = HERE):
    """Patch vectors in (row, column, channel) order -> tokens; for gathered patches too."""
    y = patches @ self._matrix(self.kernel, patches.dtype)
    if self.bias is not None:
      y = y + self.bias[...].astype(y.dtype)
    for number, spec in enumerate(self.lora):
      if spec.name and not isinstance(adapter, tuple) and adapter != spec.name:
        continue
      sub = None if key is None else jax.random.fold_in(key, number)
      if not isinstance(adapter, tuple):
        y = y + self._low_rank(spec, patches, sub, ex)
        continue
      start = 0
      for name, length in adapter:
        if name == spec.name:
          part = jax.lax.slice_in_dim(patches, start, start + length, axis=1)
          y = y.at[:, start:start + length].add(self._low_rank(spec, part, sub, ex))
        start += length
    return y

  def _matrix(self, kernel, dtype):
    return kernel[...].reshape(-1, kernel.shape[-1]).astype(dtype)

  def _low_rank(self, spec: LoRA, patches, key, ex: Execution):
    a, b = _lora_pair(self, spec, ex)
    low = dropout(patches, spec.dropout, key) @ self._matrix(a, patches.dtype)
    return low @ b.astype(patches.dtype) * jnp.asarray(spec.scale, patches.dtype)


def patchify(images: Float[Array, '... h w c'], patch: int) -> Float[Array, '... n ppc']:
  """Non-overlapping patches in raster order, each flattened as (row, column, channel)."""
  *lead, height, width, channels = images.shape
  rows, cols = height // patch, width // patch
  x = images[..., : rows * patch, : cols * patch, :]
  # Columns and channels stay one axis: a last axis of three is stored as 128 on a TPU.
  x = x.reshape(*lead, rows, patch, cols, patch * channels)
  x = jnp.moveaxis(x, -3, -2)
  return x.reshape(*lead, rows * cols, patch * patch * channels)


class Mlp(Module):
  """fc2(activation(fc1(x))), biases on both unless told otherwise."""

  def __init__(
    self,
    width: int,
    hidden: int,
    *,
    out: int | None = None,
    activation: str,
    bias: bool = True,
    lora: Sequence[LoRA] = (),
    kernel_init: Initializer | None = None,
    bias_init: Initializer = zeros,
    param_dtype=jnp.float32,
    rngs: Rngs,
  ):
    shared = dict(bias=bias, lora=lora, kernel_init=kernel_init, bias_init=bias_init,
                  param_dtype=param_dtype, rngs=rngs)
    self.fc1 = Linear(width, hidden, **shared)
    self.fc2 = Linear(hidden, width if out is None else out, **shared)
    self.activation = activation

  def __call__(self, x: Float[Array, '... d'], *, adapter: Adapter = None, key=None,
               ex: Execution = HERE):
    keys = (None, None) if key is None else jax.random.split(key)
    rest = lambda hidden: self.fc2(activation(self.activation)(hidden), adapter=adapter,
                                   key=keys[1], ex=ex)
    return ex.kept_once(rest)(self.fc1(x, adapter=adapter, key=keys[0], ex=ex))
