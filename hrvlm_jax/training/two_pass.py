"""The objective of two-pass models: next tokens, and where the question made the encoder look."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.module import Functional
from hrvlm_jax.training.losses import IGNORED, chunked_cross_entropy
from hrvlm_jax.training.next_token import NextToken


class TwoPass(NextToken):
  """Text loss + weight * selection loss; the weight is `fusion.selection_weight`.

  Source: `NVlabs/VILA: llava/model/language_model/llava_topdown_llama.py`.
  """

  def loss(self, fn: Functional, params: Any, batch: Mapping[str, Any], *, key=None,
           ex: Execution = HERE, chunk: int = 1024) -> tuple[jax.Array, jax.Array]:
    """(sum of the losses, number of targets).

    A batch without targets (grounding questions alone) counts as one, its text loss being 0; a
    batch without boxes has no selection loss.
    """
    module = fn.bind(params)
    hidden, info = module.run(batch, key=key, ex=ex)
    total, count = chunked_cross_entropy(hidden, batch['labels'], module.output, chunk=chunk,
                                         ex=ex)
    count = jnp.maximum(count, 1)
    weight = module.config.fusion.selection_weight
    if weight and info['probs']:
      loss, _ = module.vision.selection_loss(batch['views'], info)
      total = total + weight * loss * count * batch.get('selection_share', 1.0)
    return total, count

  def value_and_grad(self, fn, merge, trained, batch, key, *, parts=1, mean=False, **options):
    """See `Objective.value_and_grad`."""
    if parts > 1 and not mean:
      batch = micro_batches(batch)
    return super().value_and_grad(fn, merge, trained, batch, key, parts=parts, mean=mean,
                                  **options)


def micro_batches(batch: Mapping[str, Any]) -> dict[str, Any]:
  """Micro-batches [a ...] with what makes them add up to the large batch: `selection_share` [a].

  The text loss is a mean over targets, the selection loss one over images with a box, and a
  micro-batch can have many of the ones and few of the others. Its selection loss counts by its
  share of the boxes instead of its share of the targets.
  """
  labels, boxes = jnp.asarray(batch['labels']), jnp.asarray(batch['views']['boxes'])
  targets = jnp.maximum((labels[:, :, 1:] != IGNORED).sum(axis=(1, 2)), 1)
  found = ((boxes[..., 1] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 2])).sum(axis=1)
  share = found / jnp.maximum(found.sum(), 1) * targets.sum() / targets
  return {**batch, 'selection_share': share.astype(jnp.float32)}
