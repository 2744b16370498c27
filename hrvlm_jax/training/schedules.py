"""Learning-rate schedules: functions of the 0-based optimizer step."""

from __future__ import annotations

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp

SCHEDULES = ('cosine', 'linear', 'constant')


def learning_rate(
  kind: str, *, peak: float, total_steps: int, warmup_steps: int = 0, warmup_from: int = 0
) -> Callable[[jax.Array | int], jax.Array]:
  """Linear warm-up, then cosine or linear decay to 0 at `total_steps`, or constant.

  Args:
    warmup_from: 0: step k of the warm-up has peak * k / warmup (Hugging Face); 1: peak * (k + 1) /
      warmup (open_clip, PS3).

  Raises:
    ValueError: unknown kind, or a warm-up longer than the run.
  """
  if kind not in SCHEDULES:
    raise ValueError(f'schedule must be one of {SCHEDULES}, got {kind!r}')
  if not 0 <= warmup_steps <= total_steps:
    raise ValueError(f'warmup_steps must lie in 0..{total_steps}, got {warmup_steps}')

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    rising = peak * (step + warmup_from) / max(warmup_steps, 1)
    progress = jnp.clip((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0, 1)
    if kind == 'cosine':
      falling = peak * 0.5 * (1 + jnp.cos(math.pi * progress))
    elif kind == 'linear':
      falling = peak * (1 - progress)
    else:
      falling = jnp.full_like(step, peak)
    return jnp.where(step < warmup_steps, rising, falling)

  return rate


def warmup_steps(total_steps: int, ratio: float) -> int:
  """ceil(ratio * total), as Hugging Face's trainer rounds."""
  return math.ceil(ratio * total_steps)
