"""Which files of a checkpoint hold the chunks of which leaves.

Orbax keeps the arrays of a part (`params`, `state`) in one OCDBT database of TensorStore: a tree of
nodes that map keys such as `language.kernel/c/0/3` (a chunk of a zarr array) to a place in a data
file. Small chunks stand in the node itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
import functools
import itertools
import os
from typing import Any

from etils import epath
import tensorstore as ts

from hrvlm_jax.checkpoint import layout, manifest
from hrvlm_jax.core import json_text


def check(folder: epath.Path, part: str, places: Mapping[str, Any] | None) -> None:
  """Checks the files that reading leaves of a part will read (see `manifest.check`).

  Args:
    folder: the checkpoint's own folder.
    part: 'params' or 'state'.
    places: leaf -> (shape, sharding or None) of what is read: with a sharding only the chunks that
      this process' devices need. None: no array is read, only their shapes.

  Raises:
    UserError: damaged or missing files.
  """
  if not manifest.enabled():
    return
  found = manifest.Manifest(folder)
  if not found.files:
    manifest.say_unchecked(folder)
    return
  inside = layout.arrays(folder)
  root = '' if inside == folder else f'{layout.ARRAYS}/'
  prefix = f'{root}{part}/'
  mine = [name for name in found.files if name.startswith(prefix)]
  # What is read first: everything but data files, whose names the nodes give.
  first = [name for name in mine if not _is_data(name.removeprefix(prefix))]
  first += [name for name in found.files if name.startswith(root)
            and '/' not in name.removeprefix(root) and manifest.is_array(name)]
  manifest.check(folder, first)
  base = os.fspath(inside / part)
  store = ts.KvStore.open((base if '://' in base else f'file://{base}') + '/').result()

  def node(location: str) -> Any:
    manifest.check(folder, [prefix + _file(location)])
    return ts.ocdbt.dump(store, location).result()

  top = ts.ocdbt.dump(store).result()
  if top['version_tree_nodes'] or not top['versions']:  # never so in what Orbax writes
    manifest.check(folder, mine)
    return
  keys = dict(_entries(node, top['versions'][-1]['root']['location'], b''))
  used = set()
  for leaf, (shape, sharding) in (places or {}).items():
    name = leaf.replace('/', '.').encode()
    chunks = {key: entry for key, entry in keys.items() if key.startswith(name + b'/c')}
    if not chunks:
      manifest.check(folder, mine)  # stored in a way not known here: check all
      return
    wanted = _wanted(shape, sharding, functools.partial(_grid, keys, name, node))
    used |= {_file(entry['indirect_value']) for key, entry in chunks.items()
             if 'indirect_value' in entry and wanted(_index(key, name))}
  manifest.check(folder, [prefix + name for name in sorted(used)])


def _is_data(name: str) -> bool:
  *folders, _ = name.split('/')
  return folders[-1:] == ['d']


def _file(location: str) -> str:
  """The file of a place: `value:ocdbt.process_0/:d/0123:offset:length`, or without the base."""
  _, *inside = location.split(':')
  return ''.join(inside[:-2])


def _entries(node: Callable[[str], Any], location: str, prefix: bytes
             ) -> Iterator[tuple[bytes, dict[str, Any]]]:
  """(key, entry) of all leaves below a node."""
  found = node(location)
  for entry in found['entries']:
    key = prefix + entry['key']
    if found['height'] == 0:
      yield key, entry
    else:
      common = entry.get('subtree_common_prefix_length', 0)
      yield from _entries(node, entry['location'], prefix + entry['key'][:common])


def _grid(keys: Mapping[bytes, Any], name: bytes, node: Callable[[str], Any]) -> list[int]:
  """The shape of a chunk."""
  entry = keys[name + b'/zarr.json']
  text = entry['inline_value'] if 'inline_value' in entry else node(entry['indirect_value'])
  return json_text.loads(text)['chunk_grid']['configuration']['chunk_shape']


def _index(key: bytes, name: bytes) -> tuple[int, ...]:
  return tuple(map(int, key[len(name) + 3:].decode().split('/'))) if key != name + b'/c' else ()


def _wanted(shape: Iterable[int], sharding: Any, grid: Callable[[], list[int]]
            ) -> Callable[[tuple[int, ...]], bool]:
  """Whether this process' devices need the chunk at an index."""
  shape = tuple(shape)
  if sharding is None or not shape or sharding.is_fully_addressable:
    return lambda index: True
  needed = set()
  chunk = grid()
  for slices in sharding.addressable_devices_indices_map(shape).values():
    spans = [range((s.start or 0) // c, -(-(n if s.stop is None else s.stop) // c))
             for s, c, n in zip(slices, chunk, shape, strict=True)]
    needed |= set(itertools.product(*spans))
  return needed.__contains__
