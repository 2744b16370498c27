"""The loss of a batch and the train step: pure functions of parameters and arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hrvlm_jax.core.module import Functional
from hrvlm_jax.training.losses import chunked_cross_entropy


def loss_sum(fn: Functional, params, batch: Mapping[str, Any], *, dtype=jnp.float32, remat=False,
             impl: str = 'xla', key=None, chunk: int = 1024) -> tuple[jax.Array, jax.Array]:
  """(sum of the next-token losses, number of targets) of one batch.

  Sums and counts add up over devices and micro-batches; divide once, by the global count.
  """
  module = fn.bind(params)
  hidden = module(batch, dtype=dtype, remat=remat, impl=impl, key=key)
  return chunked_cross_entropy(hidden, batch['labels'], module.logits, chunk=chunk)
