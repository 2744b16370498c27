"""A step to plan: what a target hands to the planner."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

# Name of the jitted function, by which its module is found among what the compiler writes.
MODULE = 'planned_step'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A step to plan.

  Attributes:
    fn: the function that is compiled.
    args: its arguments as trees of ShapeDtypeStruct WITH shardings.
    donate: numbers of the arguments whose memory the results take.
    out_shardings: as for `jax.jit`.
    model_flops: operations the model needs in one call, recomputation left out (`flops.py`).
    examples, tokens: what one call gets through, for rates.
    notes: sentences for the report (buckets, batch sizes, what is frozen).
  """

  fn: Callable
  args: tuple
  donate: tuple[int, ...] = ()
  out_shardings: Any = None
  model_flops: float
  examples: int
  tokens: int = 0
  notes: tuple[str, ...] = ()
