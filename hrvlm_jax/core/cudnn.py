"""Fused attention of NVIDIA GPUs (cuDNN) on any mesh, told lengths instead of arrays of scores.

Rows lie over data and fsdp, heads over tensor, and queries of a full attention over sequence, as
`core.splash` lays them. Axis letters: b batch, t queries, s keys, h query heads, k key/value heads,
d head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from hrvlm_jax.core.execution import Execution
from hrvlm_jax.core.splash import empty_rows

DTYPES = (jnp.bfloat16, jnp.float16)


def attention(
  q: Float[Array, 'b t h d'],
  k: Float[Array, 'b s k d'],
  v: Float[Array, 'b s k d'],
  *,
  valid: Bool[Array, '#b s'] | None = None,
  segments: Int[Array, '#b t'] | None = None,
  kv_segments: Int[Array, '#b s'] | None = None,
  causal: bool = False,
  scale: float,
  ex: Execution,
) -> Float[Array, 'b t h d']:
  """As `core.attention.attention`, t == s where causal; queries that are padding yield zeros.

  The kernel reads the first keys of every row. Where padding may stand anywhere, keys (and the
  queries of a causal attention with them) are moved to the front in their order. Packed rows have
  no such order: which keys belong to a query goes in as an array, made on each device for its own
  rows.
  """
  b, t, h, _ = q.shape
  s, kv = k.shape[1:3]
  if valid is not None:
    empty = empty_rows(valid)
    valid = jnp.broadcast_to(valid | empty, (b, s))
    q = jnp.where(empty[..., None, None], 0, q)
  if segments is not None:
    kv_segments = segments if kv_segments is None else kv_segments
    segments, kv_segments = (jnp.broadcast_to(x, (b, x.shape[1])) for x in (segments, kv_segments))

  def local(q, k, v, valid, segments, kv_segments):
    return _on_a_device(q, k, v, valid, segments, kv_segments, causal, scale)

  given = (valid, segments, kv_segments)
  if ex.devices == 1:
    return local(q, k, v, *given)
  rows, heads = ex.spread(b, h)
  tensor = 1 if heads is None else ex.mesh.shape['tensor']
  if kv % tensor:
    times = next(n for n in range(2, h // kv + 1) if kv * n % tensor == 0 and h % (kv * n) == 0)
    k, v = (jnp.repeat(x, times, axis=2) for x in (k, v))
  # The kernel's triangle starts at its first query: a later part of them would need another.
  parts = ex.mesh.shape['sequence']
  over = 'sequence' if parts > 1 and not causal and t % parts == 0 else None
  cut, whole = P(rows, over, heads, None), P(rows, None, heads, None)
  lengths = [None if x is None else P(rows, axis)
             for x, axis in zip(given, (None, over, None), strict=True)]
  run = jax.shard_map(local, mesh=ex.mesh, in_specs=(cut, whole, whole, *lengths), out_specs=cut,
                      check_vma=False)
  return run(q, k, v, *given)


def _on_a_device(q, k, v, valid, segments, kv_segments, causal: bool, scale: float):
  def kernel(q, k, v, mask=None, lengths=None, own=None):
    return jax.nn.dot_product_attention(
      q, k, v, mask=mask, scale=scale, is_causal=causal, query_seq_lengths=own,
      key_value_seq_lengths=lengths, implementation='cudnn')

  if segments is not None:
    mask = segments[:, :, None] == kv_segments[:, None, :]
    if valid is not None:
      mask &= valid[:, None, :]
    if causal:
      mask |= jnp.eye(q.shape[1], dtype=bool)[None]  # every query finds a key
    return kernel(q, k, v, mask=mask[:, None])
  if valid is None:
    return kernel(q, k, v)
  order = jnp.argsort(~valid, axis=1, stable=True)
  front = lambda x, order: jnp.take_along_axis(x, order[..., None, None], axis=1)
  k, v = front(k, order), front(v, order)
  lengths = valid.sum(axis=1, dtype=jnp.int32)
  if not causal:
    return kernel(q, k, v, lengths=lengths)
  y = kernel(front(q, order), k, v, lengths=lengths, own=lengths)
  return front(y, jnp.argsort(order, axis=1))
