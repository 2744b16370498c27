"""Questions as a batch that is cut over a mesh: each process makes the rows of its devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from hrvlm_jax.language.generate import bucket
from hrvlm_jax.language.prompt import Text, pad_batch
from hrvlm_jax.parallel import distributed
from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.systems.contract import System

Item = tuple[Sequence[Any], str]  # opened images, question


def filled_up(count: int, layout: Layout) -> int:
  """Rows of a batch of `count` questions: a multiple of the shards, the last one repeated.

  A row more on a device that would have idled costs nothing; rows that do not divide would be
  copied to every device.
  """
  return -(-count // layout.shards) * layout.shards


def cut_batch(system: System, encoder: Any, text: Text, numbers: Sequence[int],
              item: Callable[[int], Item], layout: Layout) -> dict[str, Any]:
  """The batch of the items `numbers` as global arrays; to be called on all processes.

  Shapes are those that the largest row of any process needs.

  Args:
    numbers: a multiple of the shards of `layout`.
    item: number -> (images, question); only asked for what this process encodes.
  """
  if system.shift is None:  # its views belong to the whole batch: every process makes all of it
    items = [item(n) for n in numbers]
    views = [system.views(images, encoder) for images, _ in items]
    rows = _rows(text, items, views)
    length = max(len(row['tokens']) for row in rows)
    batch = pad_batch(rows, bucket(length), 'left') | {'views': system.batch(views, encoder)}
    return placed(batch, layout)
  shards = layout.shards
  own, each = layout.parts(shards), len(numbers) // shards
  items = [item(n) for part in own for n in numbers[part * each:(part + 1) * each]]
  views = [system.views(images, encoder) for images, _ in items]
  rows = _rows(text, items, views)
  needed = [sum(system.count(*image.size, encoder).slots for image in images)
            for images, _ in items]
  length, slots = _most([max(len(row['tokens']) for row in rows), max(needed)], layout)
  slots = each * max(int(slots), 1)
  parts = [system.batch(views[i * each:(i + 1) * each], encoder, slots=slots)
           for i in range(len(own))]
  names = sorted(parts[0])
  shapes = _most([max(part[name].shape[axis] for part in parts)
                  for name in names for axis in range(1, parts[0][name].ndim)], layout)
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


def placed(batch: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
  """A whole batch, the same on every process: cut where an array divides, else copied to all."""
  batch = jax.tree.map(np.asarray, dict(batch))
  divides = lambda x: bool(x.ndim and x.shape[0] and x.shape[0] % layout.shards == 0)
  place = lambda x: (layout.batch({'x': x})['x'] if divides(x) else
                     distributed.replicate(x, layout.mesh))
  return jax.tree.map(place, batch)


def _rows(text: Text, items: Sequence[Item], views: Sequence[Any]) -> list[dict[str, np.ndarray]]:
  return [text.prompt(question, view['tokens'].tolist())
          for (_, question), view in zip(items, views, strict=True)]


def _most(values: Any, layout: Layout) -> np.ndarray:
  """The largest of every number over all processes of a layout."""
  values = np.asarray(values)
  if layout.own:
    return values
  return np.asarray(multihost_utils.process_allgather(values)).max(axis=0)
