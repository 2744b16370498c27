"""Many questions to a model that lies over a mesh, on all processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.vlm.answer import Answerer, answer_all
from hrvlm_jax.vlm.cut import Item, cut_batch, filled_up


def answer_over_mesh(answerer: Answerer, count: int, item: Callable[[int], Item], *,
                     batch_size: int, layout: Layout | None = None, **options) -> list[str]:
  """The answers to `count` questions, the same list on every process.

  Args:
    item: number -> (images, question); only asked for what this process encodes.
    batch_size: questions at a time; on a mesh rounded up to a multiple of its shards.
    layout: where the parameters lie; None, or one device: there. Called on all its processes.
    options: fields of `Sampling`.
  """
  whole = layout is None or layout.mesh.size == 1
  opened = lambda number: answerer.opened(item(number))

  def ask(numbers: Sequence[int]) -> list[str]:
    batch = (answerer.batch([opened(n) for n in numbers]) if whole else cut_batch(
      answerer.system, answerer.config.encoder, answerer.text, numbers, opened, layout))
    return answerer.answers(batch, **options)

  size = min(batch_size, count)
  size = size if whole else filled_up(size, layout)
  return [text for _, texts in answer_all(ask, range(count), batch_size=size) for text in texts]
