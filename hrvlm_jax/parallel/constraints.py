"""The layout of activations at the few places that layers name (core/constraints.py).

Without them the partitioner is free to keep a weight in parts and to add up partial activations
instead, which moves far more bytes than gathering the weight.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from hrvlm_jax.parallel.mesh import BATCH_AXES, batch_shards, replicated


def activation_constraints(mesh: Mesh) -> dict[str, Callable[[jax.Array], jax.Array]]:
  """Constraints for `core.constraints.using` on a mesh; none on a single device.

  hidden [b t d], [b h w c]: the residual stream, cut over examples and, if [b t d], over sequence.
  logits [b t v]: the same, and the vocabulary over tensor, where the head's columns lie.
  small: low-rank matrices and position tables, whole. Left in parts, a small matrix draws the
  partitioner into moving the activations beside it, hundreds of times its own size.

  A dimension that does not divide stays whole: an evaluation batch of one example is no error.
  """
  if mesh.size == 1:
    return {}
  shards, sequence, tensor = batch_shards(mesh), mesh.shape['sequence'], mesh.shape['tensor']

  def pin(x: jax.Array, *, vocabulary: bool) -> jax.Array:
    if x.ndim < 3:
      return x
    spec = [BATCH_AXES if x.shape[0] % shards == 0 else None, *(None,) * (x.ndim - 1)]
    if x.ndim == 3 and sequence > 1 and x.shape[1] % sequence == 0:
      spec[1] = 'sequence'
    if vocabulary and tensor > 1 and x.shape[-1] % tensor == 0:
      spec[-1] = 'tensor'
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

  return {
    'hidden': lambda x: pin(x, vocabulary=False),
    'logits': lambda x: pin(x, vocabulary=True),
    'small': lambda x: jax.lax.with_sharding_constraint(x, replicated(mesh)),
  }
