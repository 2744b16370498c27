"""Layers shared by all encoders and decoders.

Parameters are stored in `param_dtype`; computation follows the dtype of the input. Statistics of
norms are float32 whatever that is. Kernels are (in, out); heads are contiguous on the out axis.
Axis letters: n batch, t tokens, d width, r LoRA rank, h w c image rows, columns, channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hrvlm_jax.core.constraints import constrain
from hrvlm_jax.core.module import Module, Param, Rngs


def wide(x: jax.Array) -> jax.Array:
  """At least float32: half precision is promoted, float64 stays (never a cast downwards)."""
  return x.astype(wide_dtype(x.dtype))


def wide_dtype(dtype) -> jnp.dtype:
  """The dtype of `wide`, for `preferred_element_type`."""
  return jnp.promote_types(dtype, jnp.float32)


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


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
  'silu': jax.nn.silu,
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

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(f'LoRA: rank must be at least 1, got {self.rank}')

  @property
  def scale(self) -> float:
    """alpha / rank."""
    return self.alpha / self.rank

  @property
  def leaves(self) -> tuple[str, str]:
    """Names of the two parameters."""
    suffix = f'_{self.name}' if self.name else ''
    return f'lora_a{suffix}', f'lora_b{suffix}'


def _lora_pair(layer: Module, spec: LoRA) -> tuple[jax.Array, jax.Array]:
  a, b = (constrain('small', getattr(layer, name)[...]) for name in spec.leaves)
  return (jax.lax.stop_gradient(a), jax.lax.stop_gradient(b)) if spec.frozen else (a, b)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Inverted dropout; the identity without a key or at rate 0."""
  if key is None or rate == 0.0:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Linear(Module):
  """y = x @ kernel + bias, with optional LoRA sets.

  Args (call):
    adapter: None (only an unnamed set acts), the name of a set, or segments along axis 1 of x,
      for example (('first', 1), ('second', 9)) for one global view and nine tiles.
    key: dropout key of the LoRA branch; None at inference.
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

  def __call__(self, x: Float[Array, '... i'], *, adapter: Adapter = None, key=None):
    y = x @ self.kernel[...].astype(x.dtype)
    if self.bias is not None:
      y = y + self.bias[...].astype(x.dtype)
    if not self.lora:
      return y
    for number, spec in enumerate(self.lora):
      sub = None if key is None else jax.random.fold_in(key, number)
      if not spec.name or adapter == spec.name:
        y = y + self._low_rank(spec, x, sub)
    if isinstance(adapter, tuple):
      y = y + self._segments(adapter, x, key)
    return y

  def _low_rank(self, spec: LoRA, x, key):
    a, b = (leaf.astype(x.dtype) for leaf in _lora_pair(self, spec))
    return (dropout(x, spec.dropout, key) @ a @ b) * jnp.asarray(spec.scale, x.dtype)

  def _segments(self, segments, x, key):
    """The low-rank term of consecutive ranges of axis 1, each by its own set."""
    sets = {spec.name: spec for spec in self.lora}
    if sum(length for _, length in segments) != x.shape[1]:
      raise ValueError(f'adapter segments {segments} do not cover axis 1 of {x.shape}')
    parts, start = [], 0
    for number, (name, length) in enumerate(segments):
      part = jax.lax.slice_in_dim(x, start, start + length, axis=1)
      sub = None if key is None else jax.random.fold_in(key, len(self.lora) + number)
      if name in sets:
        parts.append(self._low_rank(sets[name], part, sub))
      else:  # a segment without adapters: the original switches them off
        parts.append(jnp.zeros((*part.shape[:-1], self.kernel.shape[-1]), x.dtype))
      start += length
    return jnp.concatenate(parts, axis=1)


class LayerNorm(Module):
  """Layer norm over the last axis, biased variance, float32 statistics."""

  def __init__(self, width: int, *, eps: float, bias: bool = True, param_dtype=jnp.float32,
               rngs: Rngs):
    del rngs
    self.eps = eps
    self.scale = Param(jnp.ones((width,), param_dtype))
    self.bias = Param(jnp.zeros((width,), param_dtype)) if bias else None

  def __call__(self, x: Float[Array, '... d']) -> Float[Array, '... d']:
    x32 = wide(x)
    mean = x32.mean(axis=-1, keepdims=True)
    centred = x32 - mean
    var = jnp.square(centred).mean(axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(var + self.eps) * self.scale[...].astype(x32.dtype)
    if self.bias is not None:
      y = y + self.bias[...].astype(x32.dtype)
    return y.astype(x.dtype)


class RMSNorm(Module):
  """x * rsqrt(mean(x^2) + eps) in float32, cast to the input dtype, THEN times the scale.

  The order is that of the LLaMA and Qwen2 originals and is visible in bfloat16.
  """

  def __init__(self, width: int, *, eps: float, param_dtype=jnp.float32, rngs: Rngs):
    del rngs
    self.eps = eps
    self.scale = Param(jnp.ones((width,), param_dtype))

  def __call__(self, x: Float[Array, '... d']) -> Float[Array, '... d']:
    x32 = wide(x)
    y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(axis=-1, keepdims=True) + self.eps)
    return y.astype(x.dtype) * self.scale[...].astype(x.dtype)


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
    param_dtype=jnp.float32,
    rngs: Rngs,
  ):
    self.patch = patch
    fan_in = patch * patch * channels
    self.kernel = Param(
      normal(fan_in**-0.5)(rngs.params(), (patch, patch, channels, width), param_dtype)
    )
    self.bias = Param(jnp.zeros((width,), param_dtype)) if bias else None
    self.lora = tuple(lora)
    for spec in self.lora:
      a, b = spec.leaves
      setattr(self, a, Param(
        torch_uniform(fan_in)(rngs.params(), (patch, patch, channels, spec.rank), jnp.float32)))
      setattr(self, b, Param(jnp.zeros((spec.rank, width), jnp.float32)))

  def __call__(self, images: Float[Array, '... h w c'], *, adapter: Adapter = None, key=None):
    """[... h w c] -> [... (h//P)(w//P) width], patches in raster order."""
    return self.project(patchify(images, self.patch), adapter=adapter, key=key)

  def project(self, patches: Float[Array, '... n ppc'], *, adapter: Adapter = None, key=None):
    """Patch vectors in (row, column, channel) order -> tokens; for gathered patches too."""
    y = patches @ self._matrix(self.kernel, patches.dtype)
    if self.bias is not None:
      y = y + self.bias[...].astype(y.dtype)
    for number, spec in enumerate(self.lora):
      if spec.name and not isinstance(adapter, tuple) and adapter != spec.name:
        continue
      sub = None if key is None else jax.random.fold_in(key, number)
      if not isinstance(adapter, tuple):
        y = y + self._low_rank(spec, patches, sub)
        continue
      start = 0
      for name, length in adapter:
        if name == spec.name:
          part = jax.lax.slice_in_dim(patches, start, start + length, axis=1)
          y = y.at[:, start:start + length].add(self._low_rank(spec, part, sub))
        start += length
    return y

  def _matrix(self, kernel, dtype):
    return kernel[...].reshape(-1, kernel.shape[-1]).astype(dtype)

  def _low_rank(self, spec: LoRA, patches, key):
    a, b = _lora_pair(self, spec)
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

  def __call__(self, x: Float[Array, '... d'], *, adapter: Adapter = None, key=None):
    keys = (None, None) if key is None else jax.random.split(key)
    hidden = activation(self.activation)(self.fc1(x, adapter=adapter, key=keys[0]))
    return self.fc2(hidden, adapter=adapter, key=keys[1])
