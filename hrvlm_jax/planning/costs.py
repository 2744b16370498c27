"""What work costs on a chip: the constants of `costs.json`, typed."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
import importlib.resources
import json
import math

from hrvlm_jax.core.errors import UserError, unknown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
  """What one device does in a second; see `about` in the file.

  Attributes:
    clock: cycles a second.
    hbm, ring, vmem: bytes a second of memory, of a ring along one axis, of on-chip memory.
    flops_per_cycle: bf16 operations of all matrix units.
    matrix_side: sides of a product are padded to it.
    cores: that share vector work.
  """

  clock: float
  hbm: float
  flops_per_cycle: float
  ring: float
  vmem: float
  matrix_side: int
  cores: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
  """The constants for one chip: `Rates` and what holds for all; see `about` in the file."""

  chip: str
  rates: Rates
  product_efficiency: float
  hbm_efficiency: float
  pallas_efficiency: float
  likely: float
  latency: float
  hop: float
  overhead: float
  vector_slots: float
  vector: Mapping[str, float]
  depthwise: Mapping[str, float]
  splash_steps: Mapping[int, tuple[float, float]]
  splash_stall: float
  splash_overhead: float

  def memory_cycles(self, size: float) -> float:
    """Cycles in which `size` bytes pass between memory and device, at the full rate."""
    return size / self.rates.hbm * self.rates.clock

  def splash_step(self, block: float, *, backward: bool) -> float:
    """Bundles of a splash grid step an element (query x key), for square blocks of that side.

    Between the known blocks the logarithm is interpolated, outside the nearest one holds.
    """
    sides = sorted(self.splash_steps)
    cost = {side: self.splash_steps[side][backward] / side**2 for side in sides}
    if block <= sides[0] or block >= sides[-1]:
      return cost[sides[0] if block <= sides[0] else sides[-1]]
    high = next(i for i, side in enumerate(sides) if side > block)
    low, top = sides[high - 1], sides[high]
    share = math.log(block / low) / math.log(top / low)
    return cost[low] ** (1 - share) * cost[top] ** share


@functools.cache
def _file() -> dict:
  return json.loads(importlib.resources.files(__package__).joinpath('costs.json').read_text())


def costs(chip: str) -> Costs:
  """The constants for a chip of `costs.json`.

  Raises:
    UserError: the file does not know the chip.
  """
  values = dict(_file())
  if chip not in values['chips']:
    known = values['chips']
    raise UserError(f"costs.json: {unknown(chip, known, what='chip')}; known: {', '.join(known)}")
  rates, splash = Rates(**values.pop('chips')[chip]), values.pop('splash')
  del values['about']
  return Costs(
    chip=chip, rates=rates, splash_stall=splash['stall'], splash_overhead=splash['overhead'],
    splash_steps={int(side): tuple(steps) for side, steps in splash['steps'].items()}, **values)
