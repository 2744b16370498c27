"""What a run learns: the class that an objective derives from.

An objective is named in the run (`training.objective`, see `training.objectives`) and brings all
that is its own: options, batches on the host, loss and gradients on the device. It lies on this
floor so that a system can bring one (PS3's pre-training); nothing here knows any single objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.module import Functional


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
  """What a run says of its objective: the name; further fields in subclasses."""

  name: str


@dataclasses.dataclass(frozen=True)
class BatchShapes:
  """The shapes of a batch, for programs that are compiled before there is data.

  Attributes:
    arrays: ShapeDtypeStructs.
    length: tokens of a row.
    seen: what a row shows, in words.
  """

  arrays: dict[str, Any]
  length: int
  seen: str


class Objective:
  """A loss and what belongs to it. Required: `batches`, `batch_shapes` and `loss`.

  Attributes:
    Options: dataclass of `training.objective`; a subclass of `ObjectiveOptions`.
    evaluator: name of the evaluator that `training.eval_every` runs; None: none is known.
  """

  Options: type[ObjectiveOptions] = ObjectiveOptions
  evaluator: str | None = None

  def __init__(self, options: ObjectiveOptions):
    self.options = options

  def batches(self, run: Any, *, layout: Any = None,
              own: Callable[[int], Sequence[int]] | None = None) -> Any:
    """The checkpointable iterator over training batches (`data.pipeline.Batches`).

    Args:
      run: the `training.config.RunConfig`.
      layout: of the run (`parallel.layout.Layout`); None: no devices are asked for.
      own: number of shards of a batch -> those that are made here; None: all.

    Raises:
      UserError: data that cannot be opened, or settings that do not go together.
    """
    raise NotImplementedError

  def batch_shapes(self, run: Any, rows: int, *, length: int | None = None,
                   image: tuple[int, int] = (1024, 768), images: int = 1) -> BatchShapes:
    """The shapes of a batch of `rows` examples.

    Args:
      length: tokens of a row, visual ones counted; default: the longest of the run.
      image: width and height of the images; images: of one example.

    Raises:
      UserError: they do not fit.
    """
    raise NotImplementedError

  def loss(self, fn: Functional, params: Any, batch: Mapping[str, Any], *, key=None,
           ex: Execution = HERE, chunk: int = 1024) -> tuple[jax.Array, jax.Array]:
    """(sum of the losses, number of targets) of a batch.

    Sums and counts add up over devices and micro-batches; they are divided once, by the global
    count.

    Args:
      key: of random choices; None: there are none.
      ex: what the program is traced for.
      chunk: rows or positions of which the largest intermediate results are made at a time.
    """
    raise NotImplementedError

  def after_update(self, leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What happens to the trained leaves, by path, after every update."""
    return leaves

  def value_and_grad(
    self, fn: Functional, merge: Callable[[Any], Any], trained: dict[str, jax.Array],
    batch: Mapping[str, Any], key: jax.Array, *, parts: int = 1, mean: bool = False,
    ex: Execution = HERE, chunk: int = 1024,
  ) -> tuple[tuple[jax.Array, jax.Array], dict[str, jax.Array]]:
    """((sum of the losses, targets), gradient of the sum by trained leaf) of a step.

    Args:
      merge: trained leaves -> parameters.
      batch: with `parts` > 1 micro-batches [parts ...], one of which is in memory at a time.
      mean: every micro-batch counts as one target, its mean loss.
      ex, chunk: as of `loss`.
    """

    def sums(trained, micro, key):
      total, count = self.loss(fn, merge(trained), micro, key=key, ex=ex, chunk=chunk)
      if mean:
        total, count = total / jnp.maximum(count, 1), jnp.ones_like(count)
      return total, count

    grad = jax.value_and_grad(sums, has_aux=True)
    if parts == 1:
      return grad(trained, batch, key)

    def body(carry, inputs):
      micro, number = inputs
      found = grad(trained, micro, jax.random.fold_in(key, number))
      return jax.tree.map(jnp.add, carry, found), None

    shapes = jax.eval_shape(grad, trained, jax.tree.map(lambda x: x[0], batch), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, (batch, jnp.arange(parts)))[0]
