"""The device mesh: four named axes, made from a config and from whatever devices there are.

Axes, outermost first:
  data      copies of the model; the batch is cut over it. With several slices the slices are its
            outermost part, because the network between slices is 60-100 times slower.
  fsdp      the batch is cut over it, too, and parameters and optimizer state are spread over it.
  sequence  long token streams are cut over it.
  tensor    heads and hidden features are cut over it; the most communication, so innermost.

Only `parallel` and the training code know these names; layers name a place
and `core.execution.Execution` knows how its values lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any, ClassVar

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from hrvlm_jax.core import bounds
from hrvlm_jax.core.config import from_dict
from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.core.execution import AXES, BATCH_AXES

AUTO = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Sizes of the axes; at most one may be -1, which takes the devices that are left.

  Attributes:
    data, fsdp, sequence, tensor: sizes within one slice.
    dcn_data: number of slices (or of groups of hosts) joined by the slow network.
  """

  data: int = AUTO
  fsdp: int = 1
  sequence: int = 1
  tensor: int = 1
  dcn_data: int = 1

  BOUNDS: ClassVar = {
    **dict.fromkeys(('data', 'fsdp', 'sequence', 'tensor'), '[-1, inf)'), 'dcn_data': bounds.SIZE}

  def __post_init__(self):  # says more than its bounds do
    problems = [
      f'{field.name} must be positive{" or -1" if field.name in AXES else ""}, got {value}'
      for field in dataclasses.fields(self)
      if (value := getattr(self, field.name)) < 1 and (value != AUTO or field.name not in AXES)
    ]
    if sum(getattr(self, axis) == AUTO for axis in AXES) > 1:
      problems.append(f'at most one of {", ".join(AXES)} may be -1')
    if problems:
      raise ValueError('; '.join(problems))

  def resolve(self, devices: int) -> MeshConfig:
    """The config with -1 replaced, for that many devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(self, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size != AUTO) * self.dcn_data
    free = [axis for axis, size in sizes.items() if size == AUTO]
    if devices % known or (not free and known != devices):
      shown = ' x '.join(f'{axis}={size}' for axis, size in sizes.items() if size != AUTO)
      raise UserError(
        f'mesh: {shown} x dcn_data={self.dcn_data} is {known}, which '
        f'{"does not divide" if free else "is not"} the {devices} device(s) there are; change the '
        'sizes (one of them may be -1) or the number of devices')
    return dataclasses.replace(self, **{axis: devices // known for axis in free})

  @property
  def shape(self) -> dict[str, int]:
    """Sizes of the mesh axes (slices are part of `data`)."""
    sizes = {axis: getattr(self, axis) for axis in AXES}
    return sizes | {'data': sizes['data'] * self.dcn_data}


def mesh_config(values: Mapping[str, Any] | MeshConfig | None) -> MeshConfig:
  """`config.mesh` of a run -> MeshConfig; nothing given: all devices on `data`.

  Raises:
    UserError: unknown or impossible sizes.
  """
  if isinstance(values, MeshConfig):
    return values
  return from_dict(MeshConfig, dict(values or {}), path='mesh', title='mesh')


def make_mesh(config: MeshConfig | Mapping[str, Any] | None = None, *,
              devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh of a config over all devices (or over `devices`, real or of a topology).

  Neighbours on the inner axes are neighbours in the chip network.

  Raises:
    UserError: the sizes do not fit the devices, or dcn_data does not fit the slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  config = mesh_config(config).resolve(len(devices))
  inner = tuple(getattr(config, axis) for axis in AXES)
  slices = sorted({getattr(device, 'slice_index', 0) or 0 for device in devices})
  if len(slices) > 1 and config.dcn_data % len(slices):
    raise UserError(f'mesh: there are {len(slices)} slices, expected dcn_data={len(slices)} '
                    f'(found {config.dcn_data})')
  if devices[0].platform != 'tpu':
    # No torus: the order of processes and local devices is the order of closeness.
    array = np.asarray(devices, dtype=object).reshape(
      (config.dcn_data * inner[0], *inner[1:]))
  elif len(slices) > 1:
    array = mesh_utils.create_hybrid_device_mesh(
      inner, (config.dcn_data,) + (1,) * (len(AXES) - 1), devices, allow_split_physical_axes=True)
  else:
    shape = (config.dcn_data * inner[0], *inner[1:])
    array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def single_device_mesh(device: Any = None) -> Mesh:
  """A mesh of one device, so that one code path serves a laptop and a pod."""
  return make_mesh(MeshConfig(data=1), devices=[device or jax.devices()[0]])


def batch_shards(mesh: Mesh | Mapping[str, int]) -> int:
  """Over how many shards a batch is cut; also of the sizes of the axes alone."""
  sizes = getattr(mesh, 'shape', mesh)
  return math.prod(sizes[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
  """The same value on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
  """Examples cut over data and fsdp; `leading` axes (micro-batches) stand before them."""
  return NamedSharding(mesh, P(*(None,) * leading, BATCH_AXES))


def check_batch(batch: Mapping[str, Any], mesh: Mesh, *, leading: int = 0) -> None:
  """Every array of a batch must be divisible over the shards, crops included.

  The crop axis of a batch is shared by all its examples (systems/contract.py), so cutting it evenly
  gives every device the same number of crops whatever the images' own counts are.

  Raises:
    UserError: all arrays that cannot be cut, with the sizes that would do.
  """
  shards = batch_shards(mesh)
  problems = []
  for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
    size = leaf.shape[leading] if len(leaf.shape) > leading else None
    if size is None or size % shards:
      found = 'no example axis' if size is None else f'{size} rows'
      name = jax.tree_util.keystr(path)
      problems.append(f'{name}: found {found}, expected a multiple of {shards}')
  raise_all(f'batch cannot be cut over {shards} shards (data x fsdp)', problems)
