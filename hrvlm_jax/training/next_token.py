"""The objective of vision-language models: the next token of the answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.module import Functional
from hrvlm_jax.systems.objective import BatchShapes, Objective
from hrvlm_jax.training import batches
from hrvlm_jax.training.losses import chunked_cross_entropy


class NextToken(Objective):
  """Cross entropy of the labelled tokens, given images and the text before them."""

  evaluator = 'answers'

  def batches(self, run: Any, **options) -> Any:
    """Conversations about images, see `training.batches.conversations`."""
    return batches.conversations(run, **options)

  def batch_shapes(self, run: Any, rows: int, **options) -> BatchShapes:
    """See `training.batches.conversation_shapes`."""
    return batches.conversation_shapes(run, rows, **options)

  def loss(self, fn: Functional, params: Any, batch: Mapping[str, Any], *, key=None,
           ex: Execution = HERE, chunk: int = 1024) -> tuple[jax.Array, jax.Array]:
    """(sum of the next-token losses, number of targets) of one batch."""
    module = fn.bind(params)
    hidden = module(batch, key=key, ex=ex)
    return chunked_cross_entropy(hidden, batch['labels'], module.output, chunk=chunk, ex=ex)
