"""Many questions to a model that lies over a mesh, on all processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from hrvlm_jax.language.generate import bucket
from hrvlm_jax.language.prompt import pad_batch
from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.vlm.answer import Answerer, answer_all

Item = tuple[Sequence[Any], str]  # images, question


def answer_over_mesh(answerer: Answerer, count: int, item: Callable[[int], Item], *,
                     batch_size: int, layout: Layout | None = None, **options) -> list[str]:
  """The answers to `count` questions, the same list on every process.

  Args:
    item: number -> (images, question); only asked for what this process encodes.
    batch_size: questions at a time; on a mesh rounded up to a multiple of its shards.
    layout: where the parameters lie; None, or one device: there. Called on all its processes.
    options: fields of `Sampling`.
  """
  shards = 1 if layout is None or answerer.system.shift is None else layout.shards

  def ask(numbers: Sequence[int]) -> list[str]:
    if shards == 1:
      batch = answerer.batch([answerer.opened(item(n)) for n in numbers])
    else:
      batch = _cut_batch(answerer, numbers, item, layout)
    return answerer.answers(batch, **options)

  size = -(-min(batch_size, count) // shards) * shards
  return [text for _, texts in answer_all(ask, range(count), batch_size=size) for text in texts]


def _cut_batch(answerer: Answerer, numbers: Sequence[int], item: Callable[[int], Item],
               layout: Layout) -> Any:
  """The batch as global arrays, of which this process makes the rows of its devices.

  Shapes are those that the largest row of any process needs.
  """
  system, encoder, shards = answerer.system, answerer.config.encoder, layout.shards
  own, each = layout.parts(shards), len(numbers) // shards
  items = [answerer.opened(item(n)) for part in own
           for n in numbers[part * each:(part + 1) * each]]
  views = [system.views(images, encoder) for images, _ in items]
  rows = [answerer.text.prompt(question, view['tokens'].tolist())
          for (_, question), view in zip(items, views, strict=True)]
  needed = [sum(system.count(*image.size, encoder).slots for image in images)
            for images, _ in items]
  length, slots = _most([max(len(row['tokens']) for row in rows), max(needed)])
  slots = each * max(int(slots), 1)
  parts = [system.batch(views[i * each:(i + 1) * each], encoder, slots=slots)
           for i in range(len(own))]
  names = sorted(parts[0])
  shapes = _most([max(part[name].shape[axis] for part in parts)
                  for name in names for axis in range(1, parts[0][name].ndim)])
  moved = []
  for part, made in zip(own, parts, strict=True):
    sizes = iter(shapes)
    made = {name: np.pad(made[name], [(0, 0)] + [
      (0, int(next(sizes)) - made[name].shape[axis]) for axis in range(1, made[name].ndim)])
      for name in names}
    moved.append(system.shift(made, encoder, part * slots) if part else made)
  joined = {name: np.concatenate([part[name] for part in moved]) for name in names}
  batch = pad_batch(rows, bucket(int(length)), 'left') | {'views': joined}
  return layout.batch(batch, own=own, shards=shards)


def _most(values: Any) -> np.ndarray:
  """The largest of every number over all processes."""
  values = np.asarray(values)
  if jax.process_count() == 1:
    return values
  return np.asarray(multihost_utils.process_allgather(values)).max(axis=0)
