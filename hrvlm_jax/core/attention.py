"""Dot-product attention behind one switch, and where the True of a mask stand.

Axis letters: b batch, t queries, s keys, h query heads, k key/value heads, d head width.
`xla` works everywhere and is the reference of the tests; `cudnn` and `splash` are fused kernels of
GPU and TPU. Scores are accumulated in float32 and the softmax is taken in float32 (the originals
multiply q and k in float32 even in half precision; Phi-2 overflows otherwise).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hrvlm_jax.core import cpu
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import MASKED, wide_dtype

IMPLEMENTATIONS = ('xla', 'heads', 'queries', 'cudnn', 'splash', 'auto')
# Scores of one device that the 'xla' path makes at a time (512 MB in float32); more go by queries.
_AT_A_TIME = 2**27


def attention(
  q: Float[Array, 'b t h d'],
  k: Float[Array, 'b s k d'],
  v: Float[Array, 'b s k d'],
  *,
  mask: Bool[Array, '#b #h #t s'] | None = None,
  causal: bool = False,
  scale: float | None = None,
  ex: Execution = HERE,
) -> Float[Array, 'b t h d']:
  """softmax(q k^T * scale + mask) v, key head j serving query heads j*h/k .. (j+1)*h/k - 1.

  Args:
    mask: True where a query may look at a key, broadcastable to [b h t s].
    causal: adds `key index <= query index` (t == s expected).
    scale: default d ** -0.5.
    ex: `attention` is the form: 'xla', 'heads' (one head at a time: memory of one head's scores;
      what 'xla' becomes on a CPU for large inputs, where it is some seven times faster), 'queries'
      (blocks of queries, one after the other: what 'xla' becomes elsewhere where the scores would
      fill a device's memory), 'cudnn' (NVIDIA GPU, half precision), 'splash' (TPU), or 'auto' (the
      fused kernel of the platform where the arguments allow it, else 'xla').

  Raises:
    ValueError: unknown form, or one that this backend or these arguments do not support.
  """
  form = ex.attention
  if form not in IMPLEMENTATIONS:
    raise ValueError(f'attention: the form must be one of {IMPLEMENTATIONS}, got {form!r}')
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  if form == 'auto':
    form = _choose(q, mask, ex)
  if form == 'cudnn':
    return _cudnn(q, k, v, mask, causal, scale, ex)
  if form == 'splash':
    return _splash(q, k, v, mask, causal, scale, ex)
  scores = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
  # One head after the other would gather everything on every device of a mesh.
  if form == 'heads' or (scores > cpu.HEADS_FROM and ex.one_cpu):
    return cpu.by_heads(q, k, v, mask, causal, scale)
  # What a device of a mesh holds: batch and heads are spread over all of them.
  pieces = -(-scores // (_AT_A_TIME * ex.devices))
  if form == 'queries' or pieces > 1:
    return _by_queries(q, k, v, mask, causal, scale, pieces=max(pieces, 2))
  return _at_once(q, k, v, mask, causal, scale)


def _at_once(q, k, v, mask, causal, scale):
  weights = attention_weights(q, k, mask=mask, causal=causal, scale=scale).astype(v.dtype)
  groups = q.shape[2] // k.shape[2]
  weights = weights.reshape(weights.shape[0], k.shape[2], groups, *weights.shape[2:])
  out = jnp.einsum('bkgts,bskd->btkgd', weights, v)
  return out.reshape(*q.shape[:3], v.shape[-1])


def last_true(mask: Bool[Array, 'b t']) -> Int[Array, 'b']:
  """The position of each row's last True: its last real token. A row without any has the last."""
  return mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)


def first_true(mask: Bool[Array, 'b m'], size: int) -> tuple[Int[Array, 'b k'], Bool[Array, 'b k']]:
  """(int32 positions of the first `size` Trues of each row, which of these exist).

  What does not exist has position 0; Trues beyond `size` are dropped.
  """
  rows = jnp.arange(mask.shape[0])[:, None]
  rank = jnp.cumsum(mask, axis=1) - 1
  slot = jnp.where(mask & (rank < size), rank, size)
  positions = jnp.broadcast_to(jnp.arange(mask.shape[1], dtype=jnp.int32), mask.shape)
  index = jnp.zeros((mask.shape[0], size + 1), jnp.int32).at[rows, slot].set(positions)
  # The last column only collected what is not wanted.
  return index[:, :size], jnp.arange(size) < mask.sum(axis=1, keepdims=True)


def attention_weights(
  q: Float[Array, 'b t h d'],
  k: Float[Array, 'b s k d'],
  *,
  mask: Bool[Array, '#b #h #t s'] | None = None,
  causal: bool = False,
  scale: float | None = None,
) -> Float[Array, 'b h t s']:
  """The float32 softmax weights themselves, for analyses and for the `xla` path."""
  b, t, heads, width = q.shape
  s, kv_heads = k.shape[1], k.shape[2]
  scale = width**-0.5 if scale is None else scale
  grouped = q.reshape(b, t, kv_heads, heads // kv_heads, width)
  scores = jnp.einsum('btkgd,bskd->bkgts', grouped, k,
                      preferred_element_type=wide_dtype(q.dtype))
  scores = scores.reshape(b, heads, t, s) * scale
  allowed = mask
  if causal:
    triangle = (jnp.arange(s) <= jnp.arange(t)[:, None])[None, None]
    allowed = triangle if mask is None else mask & triangle
  if allowed is not None:
    scores = jnp.where(allowed, scores, MASKED)
  return jax.nn.softmax(scores, axis=-1)


def _by_queries(q, k, v, mask, causal, scale, *, pieces: int):
  """Equal blocks of queries in turn; the backward pass makes each block's scores again.

  Queries, unlike rows and heads, are not spread over devices, so that every device walks through
  its own. The last block is filled up with queries whose results are dropped.
  """
  t, s = q.shape[1], k.shape[1]
  block = -(-t // pieces)
  block = min(-(-block // 128) * 128, t) if t >= 128 else block  # the matrix unit's side
  pieces = -(-t // block)
  extra = pieces * block - t
  if causal:
    triangle = (jnp.arange(s) <= jnp.arange(t)[:, None])[None, None]
    mask = triangle if mask is None else mask & triangle

  def cut(x, axis):
    x = jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])
    x = x.reshape(*x.shape[:axis], pieces, block, *x.shape[axis + 1:])
    return jnp.moveaxis(x, axis, 0)

  whole = mask is None or mask.shape[2] == 1
  parts = (cut(q, 1), None if whole else cut(mask, 2))
  one = jax.checkpoint(
    lambda part: _at_once(part[0], k, v, mask if whole else part[1], False, scale))
  out = jnp.moveaxis(jax.lax.map(one, parts), 0, 1)
  return out.reshape(q.shape[0], pieces * block, *out.shape[3:])[:, :t]


def _choose(q, mask, ex: Execution) -> str:
  if ex.on == 'gpu' and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0:
    return 'cudnn'
  # The splash kernel is tiled by 128, takes no arbitrary masks and cannot be partitioned.
  if ex.on == 'tpu' and ex.devices == 1 and mask is None and q.shape[1] % 128 == 0:
    return 'splash'
  return 'xla'


def _cudnn(q, k, v, mask, causal, scale, ex: Execution):
  if ex.on != 'gpu':
    raise ValueError("attention: 'cudnn' needs an NVIDIA GPU; use 'xla' or 'auto' here")
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    raise ValueError(f"attention: 'cudnn' takes bfloat16 or float16, got {q.dtype}")
  return jax.nn.dot_product_attention(
    q, k, v, mask=mask, is_causal=causal, scale=scale, implementation='cudnn')


def _splash(q, k, v, mask, causal, scale, ex: Execution, *, interpret: bool = False):
  """TPU splash attention. Head widths that are no multiple of 128 (72, 64) are padded with zeros,
  which changes neither the scores nor the kept output columns."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
    splash_attention_mask as masks,
  )

  if mask is not None:
    raise ValueError("attention: 'splash' takes no mask array; use causal= or 'xla'")
  if not interpret and ex.on != 'tpu':
    raise ValueError("attention: 'splash' needs a TPU; use 'xla' or 'auto' here")
  t, heads, width = q.shape[1:]
  s, kv_heads = k.shape[1:3]
  if t % 128 or s % 128:
    raise ValueError(f"attention: 'splash' needs lengths in multiples of 128, got {t}, {s}")
  padded = math.ceil(width / 128) * 128
  pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padded - width)))
  shape = (t, s)
  one = masks.CausalMask(shape) if causal else masks.FullMask(shape)
  build = kernel.make_splash_mha if heads == kv_heads else kernel.make_splash_mqa
  if heads == kv_heads:
    run = build(masks.MultiHeadMask([one] * heads), head_shards=1, q_seq_shards=1,
                interpret=interpret)
    heads_first = lambda x: jnp.swapaxes(pad(x), 1, 2)
    out = jax.vmap(run)(heads_first(q * jnp.asarray(scale, q.dtype)), heads_first(k),
                        heads_first(v))
    return jnp.swapaxes(out, 1, 2)[..., :width].astype(q.dtype)
  groups = heads // kv_heads
  run = build(masks.MultiHeadMask([one] * groups), head_shards=1, q_seq_shards=1,
              interpret=interpret)
  grouped = pad(q * jnp.asarray(scale, q.dtype)).reshape(q.shape[0], t, kv_heads, groups, padded)
  out = jax.vmap(jax.vmap(run))(
    jnp.einsum('btkgd->bkgtd', grouped), jnp.swapaxes(pad(k), 1, 2), jnp.swapaxes(pad(v), 1, 2))
  return jnp.einsum('bkgtd->btkgd', out).reshape(*q.shape[:3], padded)[..., :width].astype(q.dtype)
