"""How much attention a token receives, for selections by it (VisionZip).

Axis letters: b rows, n tokens, h heads, p head width, c queries of a chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hrvlm_jax.core.attention import attention_weights


def received(q: Float[Array, 'b n h p'], k: Float[Array, 'b n h p'], *, chunk: int = 256
             ) -> Float[Array, 'b n']:
  """Mean over all queries of the attention that a token receives, summed over heads.

  Args:
    chunk: queries whose weights exist at a time.
  """
  n = q.shape[1]
  room = -(-n // chunk) * chunk
  parts = jnp.pad(q, ((0, 0), (0, room - n), (0, 0), (0, 0)))
  parts = jnp.moveaxis(parts.reshape(q.shape[0], room // chunk, chunk, *q.shape[2:]), 1, 0)
  real = (jnp.arange(room) < n).reshape(-1, chunk)

  def one(part):
    queries, counted = part
    weights = attention_weights(queries, k)  # [b h c n]
    return (weights * counted[:, None]).sum(axis=(1, 2))

  return jax.lax.map(one, (parts, real)).sum(axis=0) / n
