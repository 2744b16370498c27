"""Named places where a caller may pin how activations lie over devices.

Layers do not know meshes. They name a place, `constrain('hidden', x)`, and whoever traces the
program may give that place a function (`parallel.constraints`); without one the value passes
unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import contextvars

import jax

PLACES = ('hidden', 'logits', 'small')

Constraint = Callable[[jax.Array], jax.Array]
_active: contextvars.ContextVar[Mapping[str, Constraint]] = contextvars.ContextVar(
  'activation_constraints', default={})  # noqa: B039  (never written to)


def constrain(place: str, x):
  """`x` (an array or a tree of arrays) with the layout that the caller wants at this place."""
  fn = _active.get().get(place)
  return x if fn is None else jax.tree.map(fn, x)


@contextlib.contextmanager
def using(constraints: Mapping[str, Constraint]) -> Iterator[None]:
  """Programs traced inside apply these constraints.

  Raises:
    ValueError: a place that no layer names.
  """
  if unknown := sorted(set(constraints) - set(PLACES)):
    raise ValueError(f'unknown places {unknown}; known: {list(PLACES)}')
  token = _active.set(dict(constraints))
  try:
    yield
  finally:
    _active.reset(token)
