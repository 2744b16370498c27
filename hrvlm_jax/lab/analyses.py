"""What a trained system does with every question of the evaluation set, beside answering it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from hrvlm_jax.core.images import open_image
from hrvlm_jax.evaluation.analysis.recall import Region, selected
from hrvlm_jax.evaluation.model import EvaluatedModel
from hrvlm_jax.vlm.answer import Answerer, answer_all

Records = Sequence[Mapping[str, Any]]


def attention_global(answerer: Answerer, records: Records, data: pathlib.Path, *,
                     batch_size: int) -> list[float]:
  """Share of cross-attention on the global view, mean over layers, per question.

  Pheye's appendix C on the places that predict the tokens of the right answer. (The paper leaves
  out the place that predicts the first of them; answers here have no other, and that one reads
  nothing but the question.)

  Raises:
    UserError: the model has no cross-attention.
  """
  model = EvaluatedModel(answerer, max_new_tokens=1)
  items = [(open_image(data / record['image']), record['question'], record['answer'])
           for record in records]
  ask = lambda part: model.global_attention(part, predicting=True).mean(axis=1).tolist()
  return [share for _, shares in answer_all(ask, items, batch_size=batch_size) for share in shares]


def recall(answerer: Answerer, records: Records, data: pathlib.Path, *, batch_size: int
           ) -> list[float]:
  """Share of the high-resolution patches under the target's box that are selected, per question.

  Raises:
    UserError: the model does not select patches.
  """
  items = [Region(open_image(data / record['image']), tuple(record['box']), record['question'])
           for record in records]
  ask = lambda part: selected(answerer, part)
  return [share for _, shares in answer_all(ask, items, batch_size=batch_size) for share in shares]


FOUND = {'attention_global': attention_global, 'recall': recall}
