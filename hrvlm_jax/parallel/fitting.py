"""Which mesh holds a program: arithmetic over the bytes of its parts, the same on every host.

Nothing is compiled. What the parts of a program need on a mesh is counted by the caller (such as
`training.fitting`); here are the meshes to try, what a device holds, and the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import math
import os
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType
import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import AXES
from hrvlm_jax.parallel.mesh import MeshConfig
from hrvlm_jax.parallel.topology import GIB, chip_of

# Of a device's memory; the runtime keeps the rest (v5e: 15.75 of 16 GiB).
USABLE = 0.97
# The arithmetic leaves out what only the compiler knows: it was 40 % above to 27 % below what the
# compiler for TPUs needed for seven published recipes.
SPARE = 0.25
# Cutting heads over more devices than stand close together costs more than it saves.
MOST_TENSOR = 8


@dataclasses.dataclass(frozen=True)
class Need:
  """Bytes of one device, by what they are for, in order."""

  parts: Mapping[str, int]

  @property
  def total(self) -> int:
    return sum(self.parts.values())

  @property
  def words(self) -> str:
    """`parameters 1.63 GiB, optimizer 3.25 GiB, ...`."""
    return ', '.join(f'{name} {size(count)}' for name, count in self.parts.items() if count)


@dataclasses.dataclass(frozen=True)
class Choice:
  """A mesh and what it leaves free.

  Attributes:
    mesh: sizes of all axes.
    need: by arithmetic.
    limit: bytes that a device offers.
  """

  mesh: MeshConfig
  need: Need
  limit: int

  @property
  def fits(self) -> bool:
    return self.need.total <= self.limit * (1 - SPARE)

  @property
  def verdict(self) -> str:
    """Whether it fits, as far as arithmetic can know."""
    if self.fits:
      return 'fits'
    if self.need.total <= self.limit:
      return f'CLOSE: less than {SPARE:.0%} of a device stays free, and this is arithmetic'
    return 'DOES NOT FIT'

  @property
  def words(self) -> str:
    """How much of a device is needed, and the margin."""
    free = 1 - self.need.total / self.limit
    verdict = f'{free:.0%} free' if free >= 0 else f'{size(self.need.total - self.limit)} too much'
    return (f'by arithmetic {size(self.need.total)} of {size(self.limit)} a device, {verdict} '
            f'({self.need.words})')


def size(count: float) -> str:
  """Bytes for people."""
  for unit, name in ((GIB, 'GiB'), (1 << 20, 'MiB')):
    if count >= unit / 10:
      return f'{count / unit:.2f} {name}'
  return f'{count / 1024:.0f} KiB'


def axes_of(mesh: MeshConfig | Mapping[str, int]) -> str:
  """`data=2,fsdp=4`: the axes larger than one, as `--mesh` takes them."""
  sizes = (mesh if isinstance(mesh, Mapping) else
           {field.name: getattr(mesh, field.name) for field in dataclasses.fields(mesh)})
  return ','.join(f'{name}={count}' for name, count in sizes.items() if count != 1) or 'data=1'


def candidates(devices: int, *, slices: int = 1) -> list[MeshConfig]:
  """Meshes to try, the least cut first: copies, then parameters spread over ever more devices, then
  heads cut as well. Parameters are not spread over several slices."""
  each, found = devices // slices, []
  tensors = [n for n in range(1, min(MOST_TENSOR, each) + 1) if each % n == 0 and n & (n - 1) == 0]
  for tensor in tensors:
    rest = each // tensor
    found += [MeshConfig(data=rest // fsdp, fsdp=fsdp, tensor=tensor, dcn_data=slices)
              for fsdp in range(1, rest + 1) if rest % fsdp == 0]
  return found


def smallest(meshes: Iterable[MeshConfig], need: Callable[[MeshConfig], Need | None],
             limit: int) -> Choice | None:
  """The first mesh that fits; else that which needs least; None where none can be cut.

  Args:
    need: bytes of one device, None where the program cannot be cut over the mesh.
    limit: bytes that a device offers.
  """
  best = None
  for mesh in meshes:
    if (needed := need(mesh)) is None:
      continue
    choice = Choice(mesh, needed, limit)
    if choice.fits:
      return choice
    if best is None or needed.total < best.need.total:
      best = choice
  return best


def abstract_mesh(mesh: MeshConfig) -> AbstractMesh:
  """The mesh without devices, for shardings."""
  return AbstractMesh(tuple(mesh.shape[axis] for axis in AXES), AXES,
                      axis_types=(AxisType.Auto,) * len(AXES))


def local_bytes(leaves: Iterable[Any], shardings: Iterable[Any]) -> int:
  """Bytes that one device holds of arrays (or shapes)."""
  return sum(math.prod(place.shard_shape(tuple(leaf.shape))) * np.dtype(leaf.dtype).itemsize
             for leaf, place in zip(leaves, shardings, strict=True))


def slices_of(devices: Sequence[Any]) -> int:
  """Slices that the devices belong to."""
  return len({getattr(device, 'slice_index', 0) or 0 for device in devices})


def device_bytes(devices: Sequence[Any] | None = None, *, shared: bool = True) -> int:
  """What one device offers: of its data sheet, else what it says; of a CPU its share of the memory.

  All processes get the answer of the first.

  Args:
    shared: all processes ask at the same time; False: this one alone, and its own answer counts.

  Raises:
    UserError: a device of an unknown kind that does not tell.
  """
  device = (jax.local_devices() if devices is None else devices)[0]
  if device.platform == 'cpu':
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    found = memory // jax.local_device_count()
  elif (chip := chip_of(device.device_kind)) is not None:
    found = int(chip.hbm_bytes * USABLE)
  else:
    found = int((device.memory_stats() or {}).get('bytes_limit', 0) * USABLE)
    if not found:
      raise UserError(f'mesh: devices of kind {device.device_kind!r} do not say how much memory '
                      'they have; choose a mesh with --mesh, such as --mesh fsdp=8')
  if shared and jax.process_count() > 1:
    mebibytes = multihost_utils.broadcast_one_to_all(np.int32(found >> 20))
    return int(mebibytes) << 20
  return found
