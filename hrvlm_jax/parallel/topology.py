"""Chips and topologies as data: what a chip can do, and what `v5e:16x16` means.

The numbers stand in topologies.json. An unknown device gives None, never a guess, so that a
utilisation (MFU) computed from them is either right or absent.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import math
import re
from typing import Any

from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError, unknown

GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One accelerator chip.

  Attributes:
    name: `v5e`, `h100`, ...
    device_kinds: what `jax.Device.device_kind` says on it.
    platform: `tpu`, `gpu` or `cpu`.
    torus: dimensions of the chip network of a slice (2 or 3; 0: all-to-all switch).
    devices_per_chip: JAX devices a chip shows; per-device numbers are divided by it.
    chips_per_host: in slices of several hosts; the real count is asked from JAX, not computed.
    peak_bf16_tflops, hbm_gib, hbm_gb_s, link_gb_s, dcn_gb_s: see the file's own explanation.
    max_chips: of one slice.
    accelerator_type, names_count: how Google Cloud names a slice of n chips or cores.
    mxu: side of the matrix unit; smaller or odd sizes are padded to it.
    usable_gib: of hbm_gib, what libtpu gives a program where that is known.
    topology_options: what `jax.experimental.topologies` needs to show one device per core pair.
  """

  name: str
  device_kinds: tuple[str, ...]
  platform: str
  torus: int
  devices_per_chip: int
  chips_per_host: int
  peak_bf16_tflops: float
  hbm_gib: float
  hbm_gb_s: float
  link_gb_s: float
  dcn_gb_s: float
  max_chips: int
  accelerator_type: str
  names_count: str
  mxu: int
  topology_options: dict[str, Any]
  usable_gib: float | None = None

  @property
  def peak_flops(self) -> float:
    """bf16 operations per second of one JAX device."""
    return self.peak_bf16_tflops * 1e12 / self.devices_per_chip

  @property
  def hbm_bytes(self) -> int:
    """Memory of one JAX device."""
    return int(self.hbm_gib * GIB / self.devices_per_chip)

  @property
  def usable_bytes(self) -> int:
    """Memory of one JAX device that a program may fill."""
    return self.hbm_bytes if self.usable_gib is None else int(self.usable_gib * GIB)

  @property
  def hbm_bandwidth(self) -> float:
    """Bytes per second between memory and one JAX device."""
    return self.hbm_gb_s * 1e9 / self.devices_per_chip

  @property
  def link_bandwidth(self) -> float:
    """Bytes per second that one JAX device can send over its links (half of both ways)."""
    return self.link_gb_s * 1e9 / 2 / self.devices_per_chip

  @property
  def dcn_bandwidth(self) -> float:
    """Bytes per second of one JAX device between slices."""
    return self.dcn_gb_s * 1e9 / self.devices_per_chip


@dataclasses.dataclass(frozen=True)
class Topology:
  """`slices` equal slices of `shape` chips."""

  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.slices

  @property
  def devices(self) -> int:
    """JAX devices of all slices."""
    return self.chips * self.chip.devices_per_chip

  @property
  def name(self) -> str:
    return f'{self.chip.name}:{"x".join(map(str, self.shape))}'

  @property
  def accelerator_type(self) -> str | None:
    """Google Cloud's name of one slice (`v5p-128`), None where it is no TPU."""
    if not self.chip.accelerator_type:
      return None
    count = math.prod(self.shape) * (2 if self.chip.names_count == 'cores' else 1)
    return self.chip.accelerator_type.format(n=count)


@functools.cache
def _table() -> tuple[dict[str, Chip], dict[str, str]]:
  text = (importlib.resources.files(__package__) / 'topologies.json').read_text()
  data = json_text.loads(text)
  chips = {
    name: Chip(name=name, **(row | {'device_kinds': tuple(row['device_kinds'])}))
    for name, row in data['chips'].items()
  }
  return chips, data['aliases']


def chips() -> dict[str, Chip]:
  """All known chips by name."""
  return dict(_table()[0])


def chip_named(name: str) -> Chip:
  """The chip of that name (or alias: `gpu` stands for h100).

  Raises:
    UserError: unknown name.
  """
  table, aliases = _table()
  name = aliases.get(name, name)
  if name not in table:
    raise UserError(unknown(name, [*table, *aliases], what='chip'))
  return table[name]


def chip_of(device_kind: str) -> Chip | None:
  """The chip of a `jax.Device.device_kind`; None when it is not in the table."""
  for chip in _table()[0].values():
    if device_kind in chip.device_kinds:
      return chip
  return None


def peak_flops(device_kind: str) -> float | None:
  """bf16 operations per second of one JAX device; None (report 'n/a') for unknown devices."""
  chip = chip_of(device_kind)
  return None if chip is None else chip.peak_flops


def parse(text: str, *, slices: int = 1) -> Topology:
  """`v5e:16x16`, `v5p:4x4x4`, `gpu:8`, `cpu:8` -> Topology.

  Raises:
    UserError: wrong form, unknown chip, wrong number of dimensions, more chips than a slice has.
  """
  match = re.fullmatch(r'([a-z0-9]+):(\d+(?:x\d+)*)', text)
  if not match:
    raise UserError(f"topology: found '{text}', expected CHIP:AxB or CHIP:AxBxC, such as "
                    'v5e:16x16, v5p:4x4x4, gpu:8 or cpu:8')
  chip = chip_named(match.group(1))
  shape = tuple(int(n) for n in match.group(2).split('x'))
  if not chip.torus and len(shape) != 1:
    raise UserError(f'topology {text}: {chip.platform.upper()}s are counted, write '
                    f'{match.group(1)}:{math.prod(shape)}')
  if chip.torus and len(shape) != chip.torus:
    raise UserError(f'topology {text}: {chip.name} slices have {chip.torus} dimensions, '
                    f'found {len(shape)}')
  if not 0 < math.prod(shape) <= chip.max_chips:
    raise UserError(f'topology {text}: found {math.prod(shape)} chips, a {chip.name} slice has '
                    f'1 to {chip.max_chips}')
  if slices < 1:
    raise UserError(f'topology {text}: found {slices} slices, expected at least 1')
  return Topology(chip, shape, slices)
