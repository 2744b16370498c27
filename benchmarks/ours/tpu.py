"""Measures what `hrvlm plan` assumes of a TPU: products, memory, messages, attention, one layer.

Every figure is the time of one turn of a loop within one program: that of a long loop less that of
a short one, so that what starting a program takes is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import datetime
import json
import pathlib
import statistics
import time
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec as P
import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel.topology import Chip, chip_of
from hrvlm_jax.planning import schedule
from hrvlm_jax.planning.costs import Costs, costs

AXIS = 'ring'


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What is measured; the defaults fill a chip, tests take tiny ones.

  Attributes:
    product: m, k, n of a product; elements: side of the matrices that pass through memory.
    messages: bytes that each device gives to a gather, a small and a large number.
    blocks: of the attention kernel; length, heads: of what it works on.
    layer: rows, width, heads of one decoder layer.
    turns: of the short loop; the long one takes four times as many.
    interpret: run the kernel without a TPU.
  """

  product: tuple[int, int, int] = (4096, 4096, 4096)
  elements: int = 8192
  messages: tuple[int, int] = (1 << 14, 1 << 24)
  blocks: tuple[int, ...] = (128, 512, 1024)
  length: int = 4096
  heads: int = 4
  layer: tuple[int, int, int] = (4096, 4096, 32)
  turns: int = 10
  rounds: int = 5
  interpret: bool = False


def devices_here() -> tuple[Sequence[Any], Chip]:
  """The TPUs of this machine and what they are.

  Raises:
    UserError: there is none, or one that topologies.json does not know.
  """
  devices = jax.devices()
  kind = devices[0].device_kind
  if devices[0].platform != 'tpu':
    raise UserError(f'tpu_calibrate measures a TPU, and this machine shows {len(devices)} x {kind} '
                    '(run it on a TPU VM; plans without it use planning/costs.json)')
  chip = chip_of(kind)
  if chip is None:
    raise UserError(f"tpu_calibrate: found '{kind}', a TPU that parallel/topologies.json does not "
                    'name; add its data sheet there')
  return devices, chip


def calibrate(devices: Sequence[Any], chip: Chip, *, folder: pathlib.Path,
              sizes: Sizes = Sizes()) -> dict[str, Any]:
  """Measures and writes `tpu_costs_CHIP.json` for `hrvlm plan --costs`.

  Returns:
    rows (what, measured, assumed until then), written (path), values (of the file).
  """
  known = costs(chip.name)
  clock, rates = known.rates.clock, known.rates
  values: dict[str, Any] = {
    'about': f'measured on {len(devices)} x {devices[0].device_kind}, jax {jax.__version__}, '
             f'{datetime.date.today().isoformat()}'}
  rows = []

  def found(what: str, measured: float, assumed: float | None, unit: str) -> float:
    rows.append({'what': what, 'measured': measured, 'assumed': assumed, 'unit': unit})
    return measured

  with jax.default_device(devices[0]):
    seconds, flops = product(sizes)
    values['product_efficiency'] = found(
      'product', flops / seconds / (rates.flops_per_cycle * clock), known.product_efficiency,
      'of the peak')
    seconds, moved = memory(sizes)
    values['hbm_efficiency'] = found('memory', moved / seconds / rates.hbm, known.hbm_efficiency,
                                     'of the data sheet')
    steps = {}
    for block in sizes.blocks:
      pair = []
      for backward in (False, True):
        seconds, count = attention(sizes, block, backward=backward)
        cycles = (seconds * clock / count - known.splash_overhead) / known.splash_stall
        cycles *= rates.cores
        name = f'attention {block}, {"backward" if backward else "forward"}'
        pair.append(max(found(name, cycles, known.splash_step(block, backward=backward) * block**2,
                              'cycles a grid step'), 1.0))
      steps[str(block)] = pair
    values['splash'] = {'steps': steps}
  if len(devices) > 1:
    ring, latency = messages(devices, sizes, known)
    values['chips'] = {chip.name: {'ring': found('messages', ring, rates.ring, 'bytes/s')}}
    values['latency'] = max(found('latency', latency, known.latency, 's'), 1e-9)
  path = folder / f'tpu_costs_{chip.name}.json'
  folder.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(values, indent=1) + '\n')
  # With the new constants: what is left between reading and measuring is the likely factor.
  with jax.default_device(devices[0]):
    measured, read = layer(sizes, costs(chip.name, path))
  values['likely'] = max(found('one layer, measured / read', measured / read, known.likely, ''),
                         1.0)
  path.write_text(json.dumps(values, indent=1) + '\n')
  return {'rows': rows, 'written': str(path), 'values': values}


def per_turn(body: Callable[[Any], Any], start: Any, sizes: Sizes, *, turns: int | None = None,
             ) -> float:
  """Seconds of one `body(x) -> x` in a loop on the devices where `start` lies."""
  short = turns or sizes.turns
  # The number of turns is an argument: both loops are one program.
  run = jax.jit(lambda n, x: lax.fori_loop(0, n, lambda _, x: body(x), x))

  def once(n: int) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(run(n, start))
    return time.perf_counter() - begin

  once(short)
  pairs = [(once(short), once(4 * short)) for _ in range(sizes.rounds)]
  return max(statistics.median(long - brief for brief, long in pairs) / (3 * short), 1e-12)


def product(sizes: Sizes) -> tuple[float, float]:
  """(seconds, operations) of a product there and back, bf16."""
  m, k, n = sizes.product
  keys = jax.random.split(jax.random.key(0), 3)
  x, a, b = (jax.random.normal(key, shape, jnp.bfloat16) / 64
             for key, shape in zip(keys, ((m, k), (k, n), (n, k))))
  return per_turn(lambda x: x @ a @ b, x, sizes), 4.0 * m * k * n


def memory(sizes: Sizes) -> tuple[float, float]:
  """(seconds, bytes) of x * a + b with all of them in memory, bf16."""
  side = sizes.elements
  keys = jax.random.split(jax.random.key(0), 3)
  x, a, b = (jax.random.normal(key, (side, side), jnp.bfloat16) for key in keys)
  return per_turn(lambda x: x * a + b, x, sizes), 4.0 * side * side * 2


def messages(devices: Sequence[Any], sizes: Sizes, known: Costs) -> tuple[float, float]:
  """(bytes/s one device sends in a ring, seconds a gather takes beside that and its hops)."""
  count = len(devices)
  mesh = Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
  times = []
  for size in sizes.messages:
    def body(x):
      whole = lax.all_gather(x, AXIS, tiled=True)  # its own part of it: the loop depends on it
      return lax.dynamic_slice_in_dim(whole, lax.axis_index(AXIS) * x.shape[0], x.shape[0])

    turn = jax.shard_map(body, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
    x = jax.device_put(jnp.ones((count * size // 2,), jnp.bfloat16),
                       jax.sharding.NamedSharding(mesh, P(AXIS)))
    times.append(per_turn(turn, x, sizes))
  small, large = sizes.messages
  ring = (large - small) * (count - 1) / max(times[1] - times[0], 1e-12)
  return ring, times[0] - small * (count - 1) / ring - count / 2 * known.hop


def attention(sizes: Sizes, block: int, *, backward: bool) -> tuple[float, int]:
  """(seconds, grid steps) of the attention kernel with square blocks, head width 128, full mask."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
    splash_attention_mask as masks,
  )

  names = ('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv', 'block_kv_dkv',
           'block_kv_dkv_compute')
  t = max(sizes.length, block)
  mask = masks.MultiHeadMask([masks.FullMask((t, t))] * sizes.heads)
  kernel = kernels.make_splash_mha_single_device(
    mask, block_sizes=kernels.BlockSizes(**dict.fromkeys(names, block), use_fused_bwd_kernel=True),
    interpret=sizes.interpret)
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, (sizes.heads, t, 128), jnp.bfloat16) for key in keys)
  steps = sizes.heads * (t // block) ** 2
  forward = per_turn(lambda q: kernel(q, k, v), q, sizes, turns=2)
  if not backward:
    return forward, steps

  def both(q):
    out, back = jax.vjp(kernel, q, k, v)
    dq, dk, dv = back(out)
    return (dq + (dk + dv).sum(keepdims=True)).astype(q.dtype)

  return max(per_turn(both, q, sizes, turns=2) - forward, 1e-12), steps


def layer(sizes: Sizes, known: Costs) -> tuple[float, float]:
  """(measured, read) seconds of a decoder layer's forward and backward pass, attention apart."""
  rows, width, heads = sizes.layer
  keys = jax.random.split(jax.random.key(0), 6)
  draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16) / width**0.5
  weights = [draw(key, width, n) for key, n in zip(keys, (3 * width, 4 * width, 4 * width))]
  weights += [draw(keys[3], width, width), draw(keys[4], 4 * width, width)]

  def norm(x):
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt((wide**2).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)

  def forward(x, weights):
    qkv, gate, up, out, down = weights
    q, k, v = jnp.split(norm(x) @ qkv, 3, axis=-1)
    # What attention moves without its scores: heads apart and together.
    parts = [part.reshape(rows, heads, -1).swapaxes(0, 1) for part in (q, k, v)]
    mixed = (parts[0] * parts[1] + parts[2]).swapaxes(0, 1).reshape(rows, width)
    x = x + mixed @ out
    y = norm(x)
    return x + (jax.nn.silu(y @ gate) * (y @ up)) @ down

  def body(x):
    out, back = jax.vjp(forward, x, weights)
    dx, dw = back(out)
    return (dx + sum(w.sum() for w in dw)).astype(x.dtype)

  x = draw(keys[5], rows, width)
  text = jax.jit(body).lower(x).compile().as_text()
  # As a plan reads it: before code is generated there are no cycles of the compiler's own.
  text = text.replace('estimated_cycles', 'cycles_not_read')
  return per_turn(body, x, sizes), schedule.read(text, known).seconds
