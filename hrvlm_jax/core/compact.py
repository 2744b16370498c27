"""Data-dependent choices in fixed shapes."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def first_true(mask: Bool[Array, 'b m'], size: int) -> tuple[Int[Array, 'b k'], Bool[Array, 'b k']]:
  """(int32 indices of the first `size` true places of each row, which of these exist).

  What does not exist has index 0; true places beyond `size` are dropped.
  """
  rows = jnp.arange(mask.shape[0])[:, None]
  rank = jnp.cumsum(mask, axis=1) - 1
  slot = jnp.where(mask & (rank < size), rank, size)
  places = jnp.broadcast_to(jnp.arange(mask.shape[1], dtype=jnp.int32), mask.shape)
  index = jnp.zeros((mask.shape[0], size + 1), jnp.int32).at[rows, slot].set(places)
  # The last column only collected what is not wanted.
  return index[:, :size], jnp.arange(size) < mask.sum(axis=1, keepdims=True)
