"""Losses: sums and counts, never means, so that they add up over devices and micro-batches.

Axis letters: b batch, t tokens, d width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import wide, wide_dtype
from hrvlm_jax.language.decoder import Output
from hrvlm_jax.training.head_loss import IGNORED, equal_parts, head_loss


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
  logits_of: Callable[[Float[Array, 'b c d']], Float[Array, 'b c v']], *, chunk: int = 1024,
  ex: Execution = HERE,
) -> tuple[Float[Array, ''], Int[Array, '']]:
  """The same from final-normed states, at most `chunk` places at a time (at least one per row).

  No [b t v] array exists, forward or backward: each chunk's logits are made, reduced and made
  again for the gradient. A chunk takes places of every row, spread over its length, so that it lies
  on the devices as the batch does, whether rows or lengths are cut. Chunks of whole rows would lie
  on few devices; the partitioner then keeps the head in parts and adds up all logits (measured on
  MC-LLaVA-3B: 94 of 112 GB of messages). An `Output` goes to `head_loss` on a mesh and on
  accelerators.
  """
  targets = shifted_targets(jnp.asarray(labels))
  count = (targets != IGNORED).sum()
  if isinstance(logits_of, Output) and (ex.devices > 1 or ex.on != 'cpu'):
    return head_loss(hidden, targets, logits_of, chunk=chunk, ex=ex), count
  length = hidden.shape[1]
  places, parts = equal_parts(length, chunk // hidden.shape[0])
  extra = ((0, 0), (0, places * parts - length))

  def pieces(x):  # [b t ...] -> [parts b places ...]
    return jnp.moveaxis(x.reshape(x.shape[0], places, parts, *x.shape[2:]), 2, 0)

  @jax.checkpoint
  def body(total, piece):
    states, wanted = piece
    logits = ex.constrain('logits', logits_of(ex.constrain('hidden', states)))
    return total + _nll(logits, wanted).sum(), None

  zero = jnp.zeros((), wide_dtype(hidden.dtype))
  total, _ = jax.lax.scan(body, zero, (
    pieces(jnp.pad(hidden, (*extra, (0, 0)))),
    pieces(jnp.pad(targets, extra, constant_values=IGNORED))))
  return total, count
