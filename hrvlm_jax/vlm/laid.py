"""A stored model laid over a mesh: no host and no device ever holds all of it.

Parameters lie as in training (`parallel.rules`). Every process reads, leaf by leaf or layer by
layer, the box around what its devices hold: of an Orbax checkpoint the chunks that it touches, of
an original's tensors, which are mapped files, its pages, transposed on the way. Layers that
generation holds apart are never stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
import math
import mmap
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from hrvlm_jax.checkpoint import averages, rows, store
from hrvlm_jax.checkpoint.hf import is_finite
from hrvlm_jax.checkpoint.safetensors import will_read
from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import raise_all
from hrvlm_jax.parallel import rules
from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.systems.contract import ModelConfig, sharding_rules
from hrvlm_jax.vlm import model as vlm

Box = tuple[slice, ...]
Key = tuple[tuple[int, int], ...]
Read = Callable[[str, int | None, Box], np.ndarray]
_LARGE = 1 << 20  # bytes


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
         dtype: str = 'float32', weights: str | None = None) -> dict[str, Any]:
  """Parameters of `vlm.build(config, unrolled=True)` in their places.

  Args:
    checkpoint: see `store.load_params`.
    dtype: of activations (`held`).
    weights: 'raw' or 'ema', see `checkpoint.averages.which`.

  Raises:
    UserError: no checkpoint, tensors that do not fit, leaves that cannot be cut (all listed).
  """
  stored, abstract = averages.stored(checkpoint, weights), held(config, dtype)
  raise_all(f'checkpoint {stored.directory} and model do not match',
            store.mismatches(stored.flat, paths.flatten(abstract)))
  places = _places(config, abstract, layout)
  stored.lies(places)

  def read(path: str, layer: int | None, box: Box) -> np.ndarray:
    if layer is None:
      return stored.part(path, box)
    return stored.part(path, (slice(layer, layer + 1), *box))[0]

  return _laid(config, abstract, places, read, layered=lambda path: '/blocks/' in path)


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
  present, problems = rows.find_problems(table, abstract, tensors.shapes,
                                         unreadable=getattr(tensors, 'unreadable', ()))
  sources: dict[str, dict[int | None, Callable[[], np.ndarray]]] = {}
  for entry in present:
    for position, path in enumerate(entry.row.our_paths):
      sources.setdefault(path, {})[entry.layer] = functools.partial(
        _loaded, tensors, entry, position)
  problems += [f'{path}: in no file; convert the folder first, which starts it fresh'
               for path in paths.flatten(abstract) if path not in sources]
  raise_all(f'tensors of the {what}', [*getattr(tensors, 'problems', ()), *problems])
  broken: dict[str, None] = {}

  def read(path: str, layer: int | None, box: Box) -> np.ndarray:
    found = sources[path][layer]()[box]
    if not layout.own:
      will_read(found)
    if not is_finite(found):
      broken[path] = None
    return found

  params = _laid(config, abstract, _places(config, abstract, layout), read,
                 layered=lambda path: None not in sources[path])
  raise_all(f'tensors of the {what}', [f'{path}: holds infinities or NaN' for path in broken])
  return params


def _loaded(tensors: Mapping[str, np.ndarray], entry: rows.Entry, position: int) -> np.ndarray:
  """One of our leaves (or a layer of it) as a view of a mapped tensor, where that is possible."""
  loaded = entry.row.op.load(np.asarray(tensors[entry.names[0]]))
  return loaded if isinstance(entry.row.ours, str) else loaded[position]


def _places(config: ModelConfig, abstract: Any, layout: Layout) -> dict[str, NamedSharding]:
  return paths.flatten(rules.param_shardings(abstract, layout.mesh, rules=sharding_rules(config)))


def _laid(config: ModelConfig, abstract: Any, places: Mapping[str, NamedSharding], read: Read, *,
          layered: Callable[[str], bool]) -> dict[str, Any]:
  """Every leaf in its place, layers that generation holds apart each in its own.

  Args:
    places: of the leaves.
    read: (path, layer or None, box of the leaf or of the layer) -> its values.
    layered: whether a leaf is read layer by layer.
  """
  stacks = tuple(f'{name}/blocks/' for name in config.fusion.unrolled)
  result = {}
  for path, leaf in paths.flatten(abstract).items():
    stack = next((stack for stack in stacks if path.startswith(stack)), None)
    place, made = places[path], functools.partial(_made, dtype=leaf.dtype)
    if stack is not None:
      rest, apart = path.removeprefix(stack), NamedSharding(place.mesh, P(*place.spec[1:]))
      for layer in range(leaf.shape[0]):
        result[f'{stack}{layer}/{rest}'] = made(
          leaf.shape[1:], apart, functools.partial(read, path, layer))
    elif layered(path):
      result[path] = _stacked(leaf.shape, place, functools.partial(read, path), dtype=leaf.dtype)
    else:
      result[path] = made(leaf.shape, place, functools.partial(read, path, None))
  return paths.unflatten(result)


def _boxes(shape: tuple[int, ...], place: NamedSharding) -> tuple[list[Key], Key]:
  """(what the devices of this process hold, as (start, stop) by axis; the box around all of it)."""
  indices = place.addressable_devices_indices_map(shape).values()
  keys = list(dict.fromkeys(_key(index, shape) for index in indices))
  around = tuple((min(key[axis][0] for key in keys), max(key[axis][1] for key in keys))
                 for axis in range(len(shape)))
  return keys, around


def _key(index: Box, shape: tuple[int, ...]) -> Key:
  return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _inside(key: Key, around: Key) -> Box:
  return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(key, around, strict=True))


def _own(shape: Sequence[int], dtype: Any) -> np.ndarray:
  """An empty array; a large one in pages of its own.

  Being aligned it becomes a CPU's device memory as it is, and elsewhere its pages go back at once:
  pieces from the common heap leave holes there, a fifth of the model in the end.
  """
  size = math.prod(shape) * np.dtype(dtype).itemsize
  if size < _LARGE:
    return np.empty(shape, dtype)
  pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  return np.frombuffer(pages, np.uint8, size).view(dtype).reshape(shape)


def _made(shape, place: NamedSharding, read: Callable[[Box], np.ndarray], *, dtype) -> jax.Array:
  """An array of which this process reads, once, the box that its devices hold."""
  keys, around = _boxes(shape, place)
  part = read(tuple(slice(*ends) for ends in around))
  pieces = {}
  for key in keys:
    pieces[key] = _own([stop - start for start, stop in key], dtype)
    pieces[key][...] = part[_inside(key, around)]
  return jax.make_array_from_callback(tuple(shape), place, lambda i: pieces[_key(i, shape)])


def _stacked(shape, place: NamedSharding, read: Callable[[int, Box], np.ndarray], *, dtype
             ) -> jax.Array:
  """The same of stacked layers, one layer after the other."""
  keys, around = _boxes(shape, place)
  pieces = {key: _own([stop - start for start, stop in key], dtype) for key in keys}
  for layer in range(*around[0]):
    part = read(layer, tuple(slice(*ends) for ends in around[1:]))
    for key, piece in pieces.items():
      if key[0][0] <= layer < key[0][1]:
        piece[layer - key[0][0]] = part[_inside(key[1:], around[1:])]
  return jax.make_array_from_callback(tuple(shape), place, lambda i: pieces[_key(i, shape)])


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
