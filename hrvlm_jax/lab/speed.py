"""How fast this CPU multiplies and moves memory, and what the quickstart takes on it.

Both are measured on all cores that the process may use, and the fastest call counts: what the
machine has while nothing else runs.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import time

import jax
import jax.numpy as jnp

SHAPE = (729, 1152, 1152)  # rows of a ViT: the shape that records of hrvlm bench have in common
_COPIED = 2**27  # bytes that memory is measured with: more than caches hold
SECONDS = 2.0  # of each measurement
# The whole quickstart, idle: (GFLOP/s at SHAPE, seconds). AMD family 26 model 2 (AVX-512), 25
# model 17 (AVX-512) and 23 model 1 (AVX2), 2 cores each. The first and the last were measured
# before huge pages (`core.heap`): there an estimate from above.
RUNS = ((537.7, 540.0), (202.0, 812.0), (71.8, 1740.0))


@dataclasses.dataclass(frozen=True)
class Speed:
  """What was measured.

  Attributes:
    gflops: products in float32, 1e9 operations per second.
    bandwidth: memory read and written, 1e9 bytes per second.
  """

  gflops: float
  bandwidth: float


def measure() -> Speed:
  """Both rates of the CPU, whatever else is here; `SECONDS` each, after a first call that compiles.

  Raises:
    RuntimeError: JAX was told not to use the CPU.
  """
  with jax.default_device(jax.local_devices(backend='cpu')[0]):
    return Speed(products(), bandwidth())


def products(seconds: float | None = None) -> float:
  """GFLOP/s of `jnp.matmul` at `SHAPE` in float32: the best of what fits into `seconds`."""
  m, k, n = SHAPE
  a, b = jnp.full((m, k), 0.5, jnp.float32), jnp.full((k, n), 0.5, jnp.float32)
  multiply = jax.jit(jnp.matmul)
  return 2 * m * k * n / _best(lambda: multiply(a, b), seconds) / 1e9


def bandwidth(seconds: float | None = None) -> float:
  """GB/s of adding one to an array in place: every byte is read once and written once."""
  # In place, so that no page is new; a buffer that is handed over is gone, the result takes over.
  held = [jnp.zeros(_COPIED // 4, jnp.float32)]
  add = jax.jit(lambda x: x + 1, donate_argnums=0)

  def step():
    held[0] = add(held[0])
    return held[0]

  return 2 * _COPIED / _best(step, seconds) / 1e9


def _best(call: Callable[[], jax.Array], seconds: float | None) -> float:
  """Seconds of the fastest call."""
  jax.block_until_ready(call())
  end = time.perf_counter() + (SECONDS if seconds is None else seconds)
  best = float('inf')
  while True:
    start = time.perf_counter()
    jax.block_until_ready(call())
    now = time.perf_counter()
    best = min(best, now - start)
    if now >= end:
      return best


def quickstart_seconds(gflops: float) -> float:
  """What the quickstart takes at a product rate: a part that follows it, and one that does not, as
  the two runs nearest to it say."""
  (fast, least), (slow, most) = RUNS[:2] if gflops > RUNS[1][0] else RUNS[1:]
  work = (most - least) / (1 / slow - 1 / fast)
  return least - work / fast + work / gflops


def words(gflops: float) -> str:
  """The quickstart's time for people: minutes, rounded up."""
  return f'about {max(1, -int(-quickstart_seconds(gflops) // 60))} minutes'
