"""A stored model laid over a mesh: no host and no device ever holds all of it.

Parameters lie as in training (`parallel.rules`). Of an Orbax checkpoint every process reads what
its devices hold; stacked layers are then taken apart in their places, one leaf after the other, so
that no more than one leaf is there twice. Of an original's tensors, which are mapped files, every
device gets its piece, transposed on the way; layers that generation holds apart are never stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from hrvlm_jax.checkpoint import rows, store
from hrvlm_jax.checkpoint.hf import is_finite
from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import raise_all
from hrvlm_jax.parallel import rules
from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.systems.contract import ModelConfig, sharding_rules
from hrvlm_jax.vlm import model as vlm


def held(config: ModelConfig, dtype: str) -> dict[str, Any]:
  """Shapes and dtypes of the parameters of a model that answers with activations of `dtype`.

  Matrices of the language model are rounded to it as they are read: they are rounded before every
  product anyway, so that answers are the same bits, of half the memory.
  """
  narrow = jnp.dtype(dtype)
  cast = lambda path, leaf: jax.ShapeDtypeStruct(
    leaf.shape, narrow if narrow.itemsize < leaf.dtype.itemsize
    and re.fullmatch(r'language/(.*/)?(kernel|embedding)', path) else leaf.dtype)
  return paths.map_with_path(cast, vlm.build(config).abstract)


def load(checkpoint: str | os.PathLike, config: ModelConfig, layout: Layout, *,
         dtype: str = 'float32') -> dict[str, Any]:
  """Parameters of `vlm.build(config, unrolled=True)` in their places.

  Args:
    checkpoint: see `store.load_params`.
    dtype: of activations (`held`).

  Raises:
    UserError: no checkpoint, tensors that do not fit, leaves that cannot be cut (all listed).
  """
  abstract = held(config, dtype)
  places = rules.param_shardings(abstract, layout.mesh, rules=sharding_rules(config))
  flat = paths.flatten(store.load_params(checkpoint, abstract, shardings=places))
  return unroll(config, flat)


def load_tensors(tensors: Mapping[str, np.ndarray], table: rows.Table, config: ModelConfig,
                 layout: Layout, *, dtype: str = 'float32', what: str = 'checkpoint'
                 ) -> dict[str, Any]:
  """The same from an original's tensors (`checkpoint.hf.TensorFolder`).

  Aliases and tied copies are not compared, as `convert` does: that would read them.

  Raises:
    UserError: damaged, missing, unexpected, misshapen or non-finite tensors, parameters that no
      tensor gives (all listed), leaves that cannot be cut.
  """
  abstract = held(config, dtype)
  flat = paths.flatten(abstract)
  places = paths.flatten(
    rules.param_shardings(abstract, layout.mesh, rules=sharding_rules(config)))
  present, problems = rows.find_problems(table, abstract, tensors.shapes,
                                         unreadable=getattr(tensors, 'unreadable', ()))
  sources: dict[str, dict[int | None, Callable[[], np.ndarray]]] = {}
  for entry in present:
    for position, path in enumerate(entry.row.our_paths):
      sources.setdefault(path, {})[entry.layer] = functools.partial(
        _loaded, tensors, entry, position)
  problems += [f'{path}: in no file; convert the folder first, which starts it fresh'
               for path in flat if path not in sources]
  raise_all(f'tensors of the {what}', [*getattr(tensors, 'problems', ()), *problems])
  stacks = tuple(f'{name}/blocks/' for name in config.fusion.unrolled)
  result, broken = {}, []
  for path, leaf in flat.items():
    stack = next((stack for stack in stacks if path.startswith(stack)), None)
    read, place = sources[path], places[path]
    make = functools.partial(_made, path=path, dtype=leaf.dtype, broken=broken)
    if None in read:
      result[path] = make(leaf.shape, place, read[None])
    elif stack is None:
      result[path] = make(leaf.shape, place, read)
    else:
      rest, apart = path.removeprefix(stack), NamedSharding(place.mesh, P(*place.spec[1:]))
      result |= {f'{stack}{number}/{rest}': make(leaf.shape[1:], apart, read[number])
                 for number in range(leaf.shape[0])}
  raise_all(f'tensors of the {what}', broken)
  return paths.unflatten(result)


def _loaded(tensors: Mapping[str, np.ndarray], entry: rows.Entry, position: int) -> np.ndarray:
  """One of our leaves (or a layer of it) as a view of a mapped tensor, where that is possible."""
  loaded = entry.row.op.load(np.asarray(tensors[entry.names[0]]))
  return loaded if isinstance(entry.row.ours, str) else loaded[position]


def _made(shape, place, read, *, path: str, dtype: Any, broken: list[str]) -> jax.Array:
  """An array whose pieces are read as the devices of this process need them.

  Args:
    read: gives the whole; or, by layer, the layers of a stack.
  """
  pieces: dict[Any, np.ndarray] = {}

  def piece(index):
    key = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
    if key not in pieces:
      found = (read()[index] if callable(read) else
               np.stack([read[layer]()[index[1:]] for layer in range(*key[0])]))
      if not is_finite(found):
        broken.append(f'{path}: holds infinities or NaN')
      pieces[key] = np.ascontiguousarray(found, dtype)
    return pieces[key]

  return jax.make_array_from_callback(tuple(shape), place, piece)


def lay(config: ModelConfig, params: Any, layout: Layout) -> dict[str, Any]:
  """The same of parameters of `vlm.build(config)` in the memory of every process."""
  places = rules.param_shardings(params, layout.mesh, rules=sharding_rules(config))
  return unroll(config, paths.flatten(layout.put(params, places)))


def unroll(config: ModelConfig, flat: dict[str, jax.Array]) -> dict[str, Any]:
  """`vlm.unroll` of parameters by path that lie over a mesh; `flat` is emptied."""
  stacks = tuple(f'{name}/blocks/' for name in config.fusion.unrolled)
  result = {}
  for path in list(flat):
    leaf = flat.pop(path)
    stack = next((stack for stack in stacks if path.startswith(stack)), None)
    if stack is None:
      result[path] = leaf
      continue
    rest = path.removeprefix(stack)
    place = NamedSharding(leaf.sharding.mesh, P(*leaf.sharding.spec[1:]))
    for number, layer in enumerate(_apart(leaf.shape[0], place)(leaf)):
      result[f'{stack}{number}/{rest}'] = layer
    leaf.delete()
  return paths.unflatten(result)


@functools.lru_cache(maxsize=256)
def _apart(depth: int, place: NamedSharding):
  return jax.jit(lambda leaf: [leaf[i] for i in range(depth)], out_shardings=[place] * depth)
