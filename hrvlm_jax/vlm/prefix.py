"""Prefix fusion: visual tokens take the places the host reserved for them in the prompt."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hrvlm_jax.systems.contract import VisualTokens


def merge(
  text: Float[Array, 'b t d'], visual: VisualTokens, visual_index: Int[Array, 'b t']
) -> Float[Array, 'b t d']:
  """Replaces the places with visual_index >= 0 by that visual token of their row.

  Places are decided on the host by index arithmetic, never by looking for zero embeddings (the
  original's way, which a zero row of the table would break).
  """
  index = jnp.clip(visual_index, 0, visual.values.shape[1] - 1)
  taken = jnp.take_along_axis(visual.values, index[..., None], axis=1)
  return jnp.where(visual_index[..., None] >= 0, taken.astype(text.dtype), text)


def merge_valid(
  valid: Bool[Array, 'b t'], visual: VisualTokens, visual_index: Int[Array, 'b t']
) -> Bool[Array, 'b t']:
  """Drops places whose visual token is padding (counts that are known on the device only)."""
  index = jnp.clip(visual_index, 0, visual.valid.shape[1] - 1)
  real = jnp.take_along_axis(visual.valid, index, axis=1)
  return valid & ((visual_index < 0) | real)
