"""Dot-product attention behind one switch, and where the True of a mask stand.

Axis letters: b batch, t queries, s keys, h query heads, k key/value heads, d head width.
`xla` works everywhere and is the reference of the tests; `cudnn` and `splash` are fused kernels of
GPU and TPU, in modules of their own. Callers say which places are valid, which belong together and
whether order counts, and never hand over an array of queries times keys. Scores are accumulated in
float32 and the softmax is taken in float32 (the originals multiply q and k in float32 even in half
precision; Phi-2 overflows otherwise).
"""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hrvlm_jax.core import cpu, cudnn, splash
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import ATTENTION, HERE, Execution
from hrvlm_jax.core.layers import MASKED, wide_dtype

IMPLEMENTATIONS = ('xla', 'heads', 'queries', 'cudnn', 'splash', 'interpret', 'auto')
# Scores of one device that the 'xla' path makes at a time (512 MB in float32); more go by queries.
_AT_A_TIME = 2**27
# Queries and keys from which a fused kernel pays: it works on blocks of 128.
_FUSED_FROM = 128


def attention(
  q: Float[Array, 'b t h d'],
  k: Float[Array, 'b s k d'],
  v: Float[Array, 'b s k d'],
  *,
  valid: Bool[Array, '#b s'] | None = None,
  segments: Int[Array, '#b t'] | None = None,
  kv_segments: Int[Array, '#b s'] | None = None,
  causal: bool = False,
  slot: jax.Array | int = 0,
  scale: float | None = None,
  ex: Execution = HERE,
) -> Float[Array, 'b t h d']:
  """softmax(q k^T * scale) v over the keys a query may read; key head j serves query heads
  j*h/k .. (j+1)*h/k - 1. What may be read is that of `visible`.

  A query that is padding yields something finite that depends on the form.

  Args:
    valid: keys that are no padding.
    segments: of the queries: each reads keys of its own segment (packed examples).
    kv_segments: of the keys; default: `segments`.
    causal: no query reads a key behind its own place.
    slot: place of the first query among the keys, where causal.
    scale: default d ** -0.5.
    ex: `attention` is the form: 'xla', 'heads' (one head at a time: memory of one head's scores;
      what 'xla' becomes on a CPU for large inputs, where it is some seven times faster), 'queries'
      (blocks of queries, one after the other: what 'xla' becomes elsewhere where the scores would
      fill a device's memory), 'cudnn' (NVIDIA GPU, half precision), 'splash' (TPU), 'interpret'
      ('splash' interpreted: slow, for tests without a TPU), or 'auto' (the fused kernel of the
      platform where the arguments allow it, else 'xla').

  Raises:
    ValueError: unknown form, or one that this backend or these arguments do not support.
  """
  form = ex.attention
  if form not in IMPLEMENTATIONS:
    raise ValueError(f'attention: the form must be one of {IMPLEMENTATIONS}, got {form!r}')
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  if form in ('auto', 'splash', 'interpret', 'cudnn'):
    _check(form, q, ex)
    form = _choose(form, q, k, causal, slot, ex)
  what = dict(valid=valid, segments=segments, kv_segments=kv_segments, causal=causal)
  if form == 'cudnn':
    return checkpoint_name(cudnn.attention(q, k, v, **what, scale=scale, ex=ex), ATTENTION)
  if form in ('splash', 'interpret'):
    return splash.attention(q, k, v, **what, slot=slot, scale=scale, ex=ex,
                            interpret=form == 'interpret')
  mask = None
  if valid is not None or segments is not None or (causal and q.shape[1] != k.shape[1]):
    mask, causal = visible(q.shape[1], k.shape[1], slot=slot, **what), False
  out = _arrays(q, k, v, mask, causal, scale, form, ex)
  return checkpoint_name(out, ATTENTION)


def visible(
  t: int, s: int, *, valid: Bool[Array, '#b s'] | None = None,
  segments: Int[Array, '#b t'] | None = None, kv_segments: Int[Array, '#b s'] | None = None,
  causal: bool = False, slot: jax.Array | int = 0,
) -> Bool[Array, '#b 1 #t s'] | None:
  """Which of s keys each of t queries may read: valid ones of its own segment, up to its own place
  where causal; None: all.

  A causal query may always read itself, so that a padded row yields finite garbage instead of NaN.
  Arguments as of `attention`.
  """
  mask = None if valid is None else valid[:, None, :]
  if segments is not None:
    kv_segments = segments if kv_segments is None else kv_segments
    same = segments[:, :, None] == kv_segments[:, None, :]
    mask = same if mask is None else mask & same
  if causal:
    rows, cols = jnp.arange(t)[:, None] + slot, jnp.arange(s)[None]
    before = (cols <= rows)[None]
    mask = before if mask is None else before & mask | (cols == rows)[None]
  return None if mask is None else mask[:, None]


def _check(form: str, q: jax.Array, ex: Execution) -> None:
  wanted = {'cudnn': ('gpu', 'an NVIDIA GPU'), 'splash': ('tpu', 'a TPU')}.get(form)
  if wanted and ex.on != wanted[0]:
    raise UserError(f"attention: {form!r} needs {wanted[1]}; use 'xla' or 'auto' here")
  if form == 'cudnn' and q.dtype not in cudnn.DTYPES:
    raise UserError(f"attention: 'cudnn' takes bfloat16 or float16, got {q.dtype}; set "
                    'training.dtype=bfloat16')


def _choose(form: str, q, k, causal, slot, ex: Execution) -> str:
  """The form of these arguments where a fused kernel is asked for, or the platform's own."""
  t, s = q.shape[1], k.shape[1]
  if form == 'auto':
    form = {'tpu': 'splash', 'gpu': 'cudnn'}.get(ex.on, 'xla')
    if form == 'cudnn' and (q.dtype not in cudnn.DTYPES or ex.deterministic):
      form = 'xla'  # the kernel's gradient adds up in no fixed order
    if min(t, s) < _FUSED_FROM:
      form = 'xla'
  if form == 'cudnn':
    # The kernel takes no place of the first query, and widths in units of 16 bytes.
    return 'xla' if q.shape[-1] % 8 or (causal and t != s) else 'cudnn'
  # The place of the queries is part of the kernel: a few queries at a place that the program finds
  # out (a token that is decoded) are read plainly.
  return 'xla' if form != 'xla' and causal and not isinstance(slot, int) else form


def _arrays(q, k, v, mask, causal, scale, form, ex: Execution):
  """The forms that make arrays of scores."""
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
  if q.shape[1] == 1:  # see `attention_weights`
    out = jnp.einsum('bkgs,bksd->bkgd', weights[:, :, :, 0], jnp.swapaxes(v, 1, 2))
  else:
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
  wide = dict(preferred_element_type=wide_dtype(q.dtype))
  if t == 1:  # a token and its cache: a product that takes a head's keys as they lie there
    scores = jnp.einsum('bkgd,bksd->bkgs', grouped[:, 0], jnp.swapaxes(k, 1, 2), **wide)
  else:
    scores = jnp.einsum('btkgd,bskd->bkgts', grouped, k, **wide)
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
