"""Splash attention of the TPU on any mesh: any lengths and head widths, padding and packing.

The kernel is jax's (`jax.experimental.pallas.ops.tpu.splash_attention`): scores never leave the
chip's own memory, keys that a causal query cannot see are not read. Rows lie over data and fsdp,
heads over tensor, queries over sequence with their keys gathered whole. What a query may read is
said by segment numbers, never by an array of queries times keys.

Axis letters: b batch, t queries, s keys, h query heads, k key/value heads, d head width.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from hrvlm_jax.core.execution import ATTENTION, Execution

LANES = 128  # lengths and head widths come in multiples of it
PADDING = 0  # segment of what is no token
# Cycles (VLIW bundles of the compiled kernels, head width 128, segment ids on) of one step over a
# square block: forward, and the fused backward. Small blocks are slow: 5.9 times the cycles of
# large ones for the same scores.
STEP = {128: (626, 867), 512: (2029, 2946), 1024: (6087, 10240)}
STALL = 1.10  # what bundles do not show; assumed
GRID_STEP = 350  # cycles a step of the grid costs besides: transfers are set up; assumed


class Blocks(NamedTuple):
  """Lengths that queries and keys are filled up to, and the block of each that is worked on."""

  t: int
  s: int
  q: int
  k: int


def step_cycles(q: int, k: int) -> float:
  """Cycles of forward and backward over one block of q queries and k keys.

  Between the measured blocks the cycles per score are interpolated in the logarithm of the side.
  """
  sizes = np.log(list(STEP))
  each = np.log([sum(cycles) / size**2 for size, cycles in STEP.items()])
  return float(np.exp(np.interp(math.log(q * k) / 2, sizes, each))) * q * k * STALL


@functools.cache
def blocks(t: int, s: int, causal: bool = False, parts: int = 1, offset: int = 0) -> Blocks:
  """The cheapest padding and blocks for so many queries and keys, by the cycles of `STEP`.

  Args:
    parts: of the queries over devices; each holds whole blocks. The dearest part counts.
    offset: position of the first query among the keys, where causal.
  """
  sides = range(LANES, max(STEP) + 1, LANES)
  # jax asks that the square of the parts divide the length of a causal mask.
  fill = lambda n, unit: -(-n // unit) * unit
  best = None
  for q in sides:
    length = fill(t, math.lcm(q * parts, parts**2))
    for k in sides:
      keys = fill(s, k)
      wide, high = keys // k, length // q
      own = range(high - high // parts, high)
      seen = lambda i, q=q, k=k, wide=wide: min(wide, (offset + (i + 1) * q - 1) // k + 1)
      steps = sum(seen(i) for i in own) if causal else len(own) * wide
      cost = steps * step_cycles(q, k) + 2 * GRID_STEP * len(own) * wide
      if best is None or cost < best[0]:
        best = (cost, Blocks(length, keys, q, k))
  return best[1]


def segment_ids(
  q: Float[Array, 'b t h d'], k: Float[Array, 'b s k d'], valid: Bool[Array, '#b s'] | None,
  segments: Int[Array, '#b t'] | None, kv_segments: Int[Array, '#b s'] | None, causal: bool,
  slot: int,
) -> tuple[Int[Array, 'b t'], Int[Array, 'b s']] | None:
  """Numbers of queries and keys, equal where the query may read the key; None: all may.

  Padding has a number of its own, also among the queries of a causal attention, so that every
  query finds a key. A row of keys without a valid one is read whole, see `empty_rows`.
  """
  if valid is None and segments is None:
    return None
  (b, t), s = q.shape[:2], k.shape[1]
  own = jnp.ones((b, t), jnp.int32) if segments is None else segments.astype(jnp.int32) + 1
  if kv_segments is None:
    kv_segments = segments
  keys = jnp.ones((b, s), jnp.int32) if kv_segments is None else kv_segments.astype(jnp.int32) + 1
  if valid is not None:
    if causal:
      own = jnp.where(jax.lax.slice_in_dim(valid, slot, slot + t, axis=1), own, PADDING)
    else:
      valid = valid | empty_rows(valid)
    keys = jnp.where(valid, keys, PADDING)
  return jnp.broadcast_to(own, (b, t)), jnp.broadcast_to(keys, (b, s))


def empty_rows(valid: Bool[Array, 'b s']) -> Bool[Array, 'b 1']:
  """Rows without a valid key. A softmax over scores that are all masked weighs all keys alike; so
  do queries that are zero over all of them."""
  return ~valid.any(axis=1, keepdims=True)


def attention(
  q: Float[Array, 'b t h d'],
  k: Float[Array, 'b s k d'],
  v: Float[Array, 'b s k d'],
  *,
  valid: Bool[Array, '#b s'] | None = None,
  segments: Int[Array, '#b t'] | None = None,
  kv_segments: Int[Array, '#b s'] | None = None,
  causal: bool = False,
  slot: int = 0,
  scale: float,
  ex: Execution,
  interpret: bool = False,
) -> Float[Array, 'b t h d']:
  """As `core.attention.attention`; what queries that are padding read is padding.

  The queries are multiplied by the scale before the kernel, in their own dtype. Heads that do not
  divide over tensor are worked on by every device of it, and so are rows over data and fsdp.

  Args:
    interpret: the kernel is interpreted, for machines without a TPU.
  """
  b, t, h, d = q.shape
  s, kv = k.shape[1:3]
  parts = 1 if ex.devices == 1 else ex.mesh.shape['sequence']
  plan = blocks(t, s, causal, parts, slot if causal else 0)
  ids = segment_ids(q, k, valid, segments, kv_segments, causal, slot)
  if ids is None and plan.s > s and not (causal and slot + t <= s):
    ids = jnp.ones((b, t), jnp.int32), jnp.ones((b, s), jnp.int32)
  q = q * jnp.asarray(scale, q.dtype)
  if valid is not None and not causal:
    q = jnp.where(empty_rows(valid)[..., None, None], 0, q)
  build = functools.partial(_kernel, plan, causal=causal, slot=slot, interpret=interpret)
  if ex.devices == 1:
    return _on_a_device(build(h), plan, causal, q, k, v, ids)[:, :t, :, :d].astype(v.dtype)
  rows, heads = ex.spread(b, h)
  tensor = 1 if heads is None else ex.mesh.shape['tensor']
  if kv % tensor:
    # Each device takes the keys of its query heads: a head that serves several is there twice.
    times = next(n for n in range(2, h // kv + 1) if kv * n % tensor == 0 and h % (kv * n) == 0)
    k, v = (jnp.repeat(x, times, axis=2) for x in (k, v))
  cut = P(rows, 'sequence' if parts > 1 else None, heads, None)
  whole = P(rows, None, heads, None)
  places = (P(*cut[:2]), P(*whole[:2]))
  if parts > 1:
    fill = ((0, 0), (0, plan.t - t))
    q = jnp.pad(q, (*fill, (0, 0), (0, 0)))
    if ids is not None:
      ids = jnp.pad(ids[0], fill, constant_values=_filling(plan, s, causal)), ids[1]
  # A causal mask knows where its queries stand, and so each device gets its own part of it. The
  # other masks are the same for all parts (and jax 0.10.2 cuts them wrongly).
  shared = causal and parts > 1
  kernel = build(h // tensor, parts=parts) if shared else None
  spec = kernel.manual_sharding_spec(NamedSharding(ex.mesh, P(None, 'sequence'))) if shared else P()
  own = plan._replace(t=plan.t // parts)

  def local(kernel, q, k, v, ids):
    if kernel is None:
      kernel = _kernel(own, h // tensor, causal=causal, slot=slot, interpret=interpret)
    return _on_a_device(kernel, own, causal, q, k, v, ids)[:, :q.shape[1], :, :d].astype(v.dtype)

  run = jax.shard_map(local, mesh=ex.mesh, out_specs=cut, check_vma=False,
                      in_specs=(spec, cut, whole, whole, P() if ids is None else places))
  return run(kernel, q, k, v, ids)[:, :t]


def _filling(plan: Blocks, s: int, causal: bool) -> int:
  """Segment of queries that only fill up: one that some key has."""
  return PADDING if causal or plan.s > s else 1


def _kernel(plan: Blocks, heads: int, *, causal: bool, slot: int, interpret: bool, parts: int = 1):
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
    splash_attention_mask as masks,
  )

  shape = (plan.t, plan.s)
  one = masks.CausalMask(shape, slot, shard_count=parts) if causal else masks.FullMask(shape)
  # A block of 1024 keys comes in whole and is worked on in halves, as it was measured.
  compute = 512 if plan.k % 512 == 0 else plan.k
  sizes = kernels.BlockSizes(
    block_q=plan.q, block_kv=plan.k, block_kv_compute=compute, block_q_dkv=plan.q,
    block_kv_dkv=plan.k, block_kv_dkv_compute=compute, use_fused_bwd_kernel=True)
  return kernels.make_splash_mha(
    masks.MultiHeadMask([one] * heads), head_shards=1, q_seq_shards=parts, block_sizes=sizes,
    interpret=interpret, residual_checkpoint_name=ATTENTION)


def _on_a_device(kernel, plan: Blocks, causal: bool, q, k, v, ids) -> Float[Array, 'b T h D']:
  """The kernel over rows, everything filled up to whole blocks: [b T h D], T of the plan."""
  from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

  extra = -q.shape[-1] % LANES  # columns of zeros change neither scores nor the other columns

  def prepared(x, length):
    x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, extra)))
    return jnp.swapaxes(x, 1, 2)

  arrays = prepared(q, plan.t), prepared(k, plan.s), prepared(v, plan.s)
  if ids is None:
    return jnp.swapaxes(jax.vmap(kernel)(*arrays), 1, 2)
  fill = lambda x, length, value: jnp.pad(x, ((0, 0), (0, length - x.shape[1])),
                                          constant_values=value)
  numbers = SegmentIds(fill(ids[0], plan.t, _filling(plan, k.shape[1], causal)),
                       fill(ids[1], plan.s, PADDING))
  return jnp.swapaxes(jax.vmap(kernel)(*arrays, numbers), 1, 2)
