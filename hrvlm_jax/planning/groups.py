"""Who takes part in a message of a compiled program, and how many bytes each one sends."""

from __future__ import annotations

import math
import re

import numpy as np


def wire_bytes(kind: str, size: int, group: int) -> float:
  """Bytes that one device sends in the usual ring algorithm for a result of `size` bytes."""
  if group <= 1 and kind != 'collective-permute':
    return 0.0
  share = (group - 1) / group
  return {'all-reduce': 2 * size * share, 'reduce-scatter': size * (group - 1),
          'collective-permute': float(size)}.get(kind, size * share)


def groups_of(attributes: str, devices: int | None) -> list[list[int]] | tuple[int]:
  """Groups of partitions, or (size,) when only the size can be told."""
  if match := re.search(r'source_target_pairs=\{\{(.*?)\}\}', attributes):
    return [[int(n) for n in pair.split(',')] for pair in match.group(1).split('},{')]
  if match := re.search(r'replica_groups=\{\{(.*?)\}\}', attributes):
    return [[int(n) for n in group.split(',')] for group in match.group(1).split('},{')]
  iota = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes)
  if iota:
    shape, source = ([int(n) for n in part.split(',')] for part in iota.groups()[:2])
    numbers = np.arange(math.prod(source)).reshape(source)
    if iota.group(3):
      numbers = numbers.transpose([int(n) for n in iota.group(3).split(',')])
    return numbers.reshape(shape).tolist()
  if 'replica_groups=mesh[' in attributes:
    return _mesh_groups(attributes)
  return (devices or 1,)


def _mesh_groups(attributes: str) -> list[list[int]] | tuple[int]:
  """Groups written as axes of a mesh: `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`.

  An axis may be used in part: `'b':(2)2` is a piece of 2 that follows 2 more major ones. The
  devices of the mesh are 0, 1, ..., or as `device_ids` says: a list, or numbers in the first shape
  whose axes are then moved.
  """
  match = re.search(
    r'replica_groups=mesh\[(.*?)\]\s*(?:,\s*device_ids=\(((?:[^()]|\([^()]*\))*)\))?\s*'
    r'(?:<=\S+\s*)?\{(.*?)\}', attributes)
  if not match:
    return (1,)
  axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match.group(1))}
  used = {(name, int(before or 1), int(size or axes[name]))
          for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match.group(3))}
  shape, members = [], []  # of the mesh with its axes cut; places of the cut axes in use
  for name, size in axes.items():
    cuts = {1, size}
    for _, before, part in (piece for piece in used if piece[0] == name):
      cuts |= {before, before * part}
    edges = sorted(cuts)
    for low, high in zip(edges, edges[1:]):
      if any(name == n and before <= low and high <= before * part for n, before, part in used):
        members.append(len(shape))
      shape.append(high // low)
  group = math.prod(part for _, _, part in used)
  ids = _device_ids(match.group(2), math.prod(axes.values()))
  if ids is None or '<=' in match.group(0) or math.prod(shape) != ids.size:
    return (group,)
  others = [i for i in range(len(shape)) if i not in members]
  return ids.reshape(shape).transpose(others + members).reshape(-1, group).tolist()


def _device_ids(text: str | None, count: int) -> np.ndarray | None:
  """The devices of a mesh in its order; None: written in a way that is not known."""
  if text is None:
    return np.arange(count)
  if re.fullmatch(r'[\d,\s]+', text):
    ids = np.array([int(n) for n in text.split(',')])
    return ids if ids.size == count else None
  moved = re.fullmatch(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text.strip())
  if not moved:
    return None
  shape = [int(n) for n in moved.group(1).split(',')]
  if math.prod(shape) != count:
    return None
  ids = np.arange(count).reshape(shape)
  if moved.group(2):
    ids = ids.transpose([int(n) for n in moved.group(2).split(',')])
  return ids.reshape(-1)


def group_size(groups: list[list[int]] | tuple[int]) -> int:
  """Devices of one group of `groups_of`."""
  return groups[0] if isinstance(groups, tuple) else len(groups[0])
