"""The moving average of a training's parameters (`optimizer.ema`), in place of the last ones.

In-run evaluation judges the average, so that readers of a checkpoint take it by default; parameters
that were not trained have none and stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hrvlm_jax.checkpoint import layout, store, trees
from hrvlm_jax.checkpoint.leaves import StoredParams
from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError

WEIGHTS = ('raw', 'ema')
_PREFIX = 'ema/'


def averaged(directory: layout.PathLike) -> dict[str, Any]:
  """Shape and dtype of every parameter that has an average, by its path; empty without one."""
  if not (layout.arrays(layout.resolve(directory)) / trees.REST).exists():
    return {}  # parameters alone
  found = store.describe(directory, trees.REST)
  return {path.removeprefix(_PREFIX): leaf for path, leaf in found.items()
          if path.startswith(_PREFIX)}


def which(directory: layout.PathLike, weights: str | None) -> tuple[str, str]:
  """(which parameters are taken, a sentence about it that is empty where there is no choice).

  Args:
    weights: 'raw', 'ema', or None for the default.

  Raises:
    UserError: another word; 'ema' where there is no average.
  """
  if weights not in (None, *WEIGHTS):
    raise UserError(f'weights: found {weights!r}, expected {" or ".join(WEIGHTS)}')
  if not averaged(directory):
    if weights == 'ema':
      raise UserError(f'{directory}: has no moving average (the training had no optimizer.ema); '
                      'take --weights raw')
    return 'raw', ''
  if weights == 'raw':
    return 'raw', f'weights of {directory}: those of the last step (raw), not their average'
  return 'ema', (f'weights of {directory}: the moving average (ema), as in-run evaluation judges; '
                 '--weights raw takes those of the last step')


def load_params(directory: layout.PathLike, abstract: Mapping[str, Any] | None = None, *,
                shardings: Any = None, weights: str | None = None) -> dict[str, Any]:
  """`store.load_params`, with the average where it is taken (see `which`)."""
  params = store.load_params(directory, abstract, shardings=shardings)
  if which(directory, weights)[0] == 'raw':
    return params
  flat, read = paths.flatten(params), stored(directory, 'ema')
  for path in averaged(directory):
    flat[path] = _like(flat[path], read(path))
  return paths.unflatten(flat)


def _like(old: Any, value: Any) -> Any:
  import jax

  value = value.astype(old.dtype)
  return jax.device_put(value, old.sharding) if isinstance(old, jax.Array) else value


def stored(directory: layout.PathLike, weights: str | None = None) -> StoredParams:
  """`StoredParams`, with the average where it is taken."""
  found = StoredParams(directory)
  if which(directory, weights)[0] == 'ema':
    found.move({path: (trees.REST, f'{_PREFIX}{path}') for path in averaged(directory)})
  return found
