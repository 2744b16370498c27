"""Losses: sums and counts, never means, so that they add up over devices and micro-batches.

Axis letters: b batch, t tokens, d width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hrvlm_jax.core.layers import wide, wide_dtype

IGNORED = -100


def shifted_targets(labels: Int[Array, 'b t']) -> Int[Array, 'b t']:
  """labels[t + 1] at place t; the last place is ignored."""
  return jnp.concatenate([labels[:, 1:], jnp.full_like(labels[:, :1], IGNORED)], axis=1)


def _nll(logits: Float[Array, '... v'], targets: Int[Array, '...']) -> Float[Array, '...']:
  """Negative log-likelihood per place, 0 where the target is ignored."""
  logits = wide(logits)
  safe = jnp.where(targets == IGNORED, 0, targets)
  chosen = jnp.take_along_axis(logits, safe[..., None], axis=-1)[..., 0]
  return jnp.where(targets == IGNORED, 0.0, jax.nn.logsumexp(logits, axis=-1) - chosen)


def token_cross_entropy(
  logits: Float[Array, 'b t v'], labels: Int[Array, 'b t']
) -> tuple[Float[Array, ''], Int[Array, '']]:
  """Next-token cross entropy: (sum over targets, number of targets).

  Logits at t are held against labels at t + 1; labels of -100 are ignored.
  """
  targets = shifted_targets(jnp.asarray(labels))
  return _nll(logits, targets).sum(), (targets != IGNORED).sum()


def chunked_cross_entropy(
  hidden: Float[Array, 'b t d'], labels: Int[Array, 'b t'],
  logits_of: Callable[[Float[Array, 'n d']], Float[Array, 'n v']], *, chunk: int = 1024,
) -> tuple[Float[Array, ''], Int[Array, '']]:
  """The same from final-normed states, `chunk` places at a time.

  No [b t v] array exists, forward or backward: each chunk's logits are made, reduced and made
  again for the gradient.
  """
  targets = shifted_targets(jnp.asarray(labels)).reshape(-1)
  count = (targets != IGNORED).sum()
  flat = hidden.reshape(-1, hidden.shape[-1])
  chunk = min(chunk, flat.shape[0])
  extra = -flat.shape[0] % chunk
  flat = jnp.pad(flat, ((0, extra), (0, 0))).reshape(-1, chunk, flat.shape[-1])
  parts = jnp.pad(targets, (0, extra), constant_values=IGNORED).reshape(-1, chunk)

  @jax.checkpoint
  def body(total, piece):
    states, wanted = piece
    return total + _nll(logits_of(states), wanted).sum(), None

  zero = jnp.zeros((), wide_dtype(hidden.dtype))
  total, _ = jax.lax.scan(body, zero, (flat, parts))
  return total, count
