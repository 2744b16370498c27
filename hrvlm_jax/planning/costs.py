"""What work costs on a chip: the constants of `costs.json`, typed."""

from __future__ import annotations

from collections.abc import Mapping
import copy
import dataclasses
import functools
import importlib.resources
import math
import pathlib
from typing import Any

from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError, raise_all, unknown
from hrvlm_jax.parallel.topology import Chip, chips


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
  """The constants for one chip: `Rates` and what holds for all; see `about` in the file.

  Attributes:
    between: bytes a second of one device between slices.
    source: a sentence on constants that are not those of the file; '' where all are.
  """

  chip: str
  rates: Rates
  between: float
  source: str
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
  return json_text.loads(importlib.resources.files(__package__).joinpath('costs.json').read_text())


def costs(chip: str, path: pathlib.Path | None = None) -> Costs:
  """The constants for a TPU: those of `costs.json`, and where it has none what its data sheet says.

  Args:
    path: a file of the same form whose values replace those of costs.json; it need not hold all
      (`hrvlm bench tpu_calibrate` writes one).

  Raises:
    UserError: no TPU is called so, or the file cannot be read or holds other keys (all listed).
  """
  values, source = copy.deepcopy(_file()), ''
  tpus = {name: known for name, known in chips().items() if known.platform == 'tpu'}
  if chip not in tpus:
    raise UserError(f"costs.json: {unknown(chip, tpus, what='chip')}; known: {', '.join(tpus)}")
  if chip not in values['chips']:
    values['chips'][chip] = _by_data_sheet(tpus[chip])
    source = (f'{chip}: peak, memory and links are those of the data sheet, clock and on-chip '
              'memory a guess; never compared with anything')
  if path is not None:
    _replace(values, _read(path), values['chips'], path)
    source = f'constants of {path}: {values["about"]}'
  rates, splash = Rates(**values.pop('chips')[chip]), values.pop('splash')
  del values['about']
  return Costs(
    chip=chip, rates=rates, between=tpus[chip].dcn_bandwidth, source=source,
    splash_stall=splash['stall'], splash_overhead=splash['overhead'],
    splash_steps={int(side): tuple(steps) for side, steps in splash['steps'].items()}, **values)


def _by_data_sheet(chip: Chip) -> dict[str, Any]:
  clock = 1.75e9
  return {'clock': clock, 'hbm': chip.hbm_bandwidth, 'flops_per_cycle': chip.peak_flops / clock,
          'ring': chip.link_bandwidth / chip.torus, 'vmem': 8e12, 'matrix_side': chip.mxu,
          'cores': 1}


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    found = json_text.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UserError(f'{path}: cannot be read as constants (JSON): {error}') from error
  if not isinstance(found, dict):
    raise UserError(f'{path}: found {type(found).__name__}, expected the keys of costs.json')
  return found


def _replace(old: dict, new: dict, rates: dict[str, Any], path: pathlib.Path) -> None:
  """Puts the values of `new` into `old`, refusing what is not of the same form."""
  problems: list[str] = []

  def merge(old: dict, new: dict, names: tuple[str, ...]) -> None:
    for key, value in new.items():
      name = '.'.join((*names, key))
      if names == ('chips',) and key not in old:
        old[key] = dict.fromkeys(next(iter(rates.values())), 0)  # a chip of which all is said
        missing = set(old[key]) - set(value if isinstance(value, dict) else ())
        if missing:
          problems.append(f'{name}: found no {", ".join(sorted(missing))}')
      if names == ('splash', 'steps') and key not in old and key.isdigit():
        old[key] = [0, 0]
      if key not in old:
        problems.append(f'{name}: {unknown(key, old, what="key")}')
      elif isinstance(old[key], dict) and isinstance(value, dict):
        merge(old[key], value, (*names, key))
      elif not _alike(old[key], value):
        problems.append(f'{name}: found {value!r}, expected {_form(old[key])}')
      else:
        old[key] = value

  merge(old, new, ())
  raise_all(f'{path}: constants of a plan', problems)


def _alike(old: Any, new: Any) -> bool:
  number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0
  if isinstance(old, list):
    return isinstance(new, list) and len(new) == len(old) and all(map(number, new))
  return isinstance(new, str) if isinstance(old, str) else not isinstance(old, dict) and number(new)


def _form(old: Any) -> str:
  return {str: 'a text', list: f'{len(old) if isinstance(old, list) else 0} numbers above 0',
          dict: 'keys'}.get(type(old), 'a number above 0')
