"""Trees of arrays as the store takes them: by path, as stored, and where they are read to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hrvlm_jax.core import errors, paths
from hrvlm_jax.core.errors import raise_all

PARAMS = 'params'
REST = 'state'


def _key(entry: Any) -> str:
  for attribute in ('key', 'name', 'idx'):
    if hasattr(entry, attribute):
      return str(getattr(entry, attribute))
  return str(entry)


def flatten(tree: Any) -> dict[str, Any]:
  """Any pytree as {path: leaf}, path joined by '/'; names of dict keys, fields and positions."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {'/'.join(map(_key, path)): leaf for path, leaf in leaves}


def _is_key(leaf: Any) -> bool:
  return hasattr(leaf, 'dtype') and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
  """Name of a random key's implementation, also of an abstract key (known under tracing only)."""
  found = []
  jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
  return found[0]


def storable(leaf: Any) -> Any:
  """A leaf as an array; a random key as its data."""
  if _is_key(leaf):
    return jax.random.key_data(leaf)
  return leaf if isinstance(leaf, (jax.Array, np.ndarray)) else np.asarray(leaf)


def stored_shape(leaf: Any) -> jax.ShapeDtypeStruct:
  """Shape and dtype of an abstract or concrete leaf as it is stored."""
  if _is_key(leaf):
    return jax.eval_shape(jax.random.key_data, leaf)
  array = leaf if hasattr(leaf, 'shape') and hasattr(leaf, 'dtype') else np.asarray(leaf)
  return jax.ShapeDtypeStruct(tuple(array.shape), array.dtype)


def mismatches(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
  """A sentence per parameter on which a checkpoint and a model (both by path) differ."""
  missing = [f'missing in the checkpoint: {p} {tuple(stored_shape(leaf).shape)}'
             for p, leaf in wanted.items() if p not in stored]
  other = [f'not in the model: {p} {tuple(stored[p].shape)}' for p in stored if p not in wanted]
  shapes = [f'shape: {path} is {tuple(stored_shape(leaf).shape)} in the model, '
            f'{tuple(stored[path].shape)} in the checkpoint'
            for path, leaf in wanted.items()
            if path in stored and tuple(stored[path].shape) != tuple(stored_shape(leaf).shape)]
  return errors.rarest_first(missing, other, shapes)


def places_of(wanted: Mapping[str, Any], shardings: Any) -> dict[str, Any]:
  """Where each leaf is read to, None for the host; `shardings` as for `store.load_params`."""
  if shardings == 'host':
    return dict.fromkeys(wanted)
  if isinstance(shardings, Mapping):
    flat = paths.flatten(shardings)
    raise_all('shardings', [f'no sharding for {p}' for p in wanted if p not in flat])
    return {path: flat[path] for path in wanted}
  default = shardings or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if shardings is not None:
    return dict.fromkeys(wanted, shardings)
  return {path: getattr(leaf, 'sharding', None) or default for path, leaf in wanted.items()}


def target(shape: tuple[int, ...], dtype: Any, place: Any) -> Any:
  """What Orbax is told to restore: a NumPy array for the host, else a sharded abstract array."""
  if place is None:
    # Never touched: pages of an empty array cost no memory.
    return np.empty(shape, dtype)
  return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=place)


def split(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
  """Leaves under `params` (by path below it) and all other leaves (by whole path)."""
  flat = flatten(state)
  prefix = f'{PARAMS}/'
  params = {p.removeprefix(prefix): leaf for p, leaf in flat.items() if p.startswith(prefix)}
  return params, {p: leaf for p, leaf in flat.items() if not p.startswith(prefix)}


def join(abstract: Any, parts: Mapping[str, Mapping[str, Any]]) -> Any:
  """The inverse of `split`, with the structure and key types of `abstract`."""
  leaves, treedef = jax.tree_util.tree_flatten(abstract)
  out = []
  for path, like in zip(flatten(abstract), leaves, strict=True):
    inside = path.startswith(f'{PARAMS}/')
    value = parts[PARAMS][path.removeprefix(f'{PARAMS}/')] if inside else parts[REST][path]
    if _is_key(like):
      value = jax.random.wrap_key_data(value, impl=_key_impl(like))
    out.append(value)
  return jax.tree_util.tree_unflatten(treedef, out)
