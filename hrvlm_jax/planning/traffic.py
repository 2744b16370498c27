"""Bytes that an instruction of a scheduled TPU program moves between memory and the device.

Arrays in memory are padded to their tiles; those in on-chip memory (`S(1)` and up) move nothing. A
fusion reads of a value what the instructions within it read (a slice of it, say), and writes what
its root writes.
"""

from __future__ import annotations

import math
import re

from hrvlm_jax.planning import hlo

_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?')
_SLICES = ('dynamic-slice', 'slice', 'gather')


def is_message(inst: hlo.Instruction) -> str | None:
  """The kind of a message between devices (start, done or both), or None."""
  kind = inst.opcode.removesuffix('-start').removesuffix('-done')
  return kind if kind in hlo.MESSAGES else None


def stored_bytes(text: str) -> int:
  """Bytes of a type's arrays with their tiles' padding, wherever they lie."""
  return sum(padded_bytes(*match.groups()) for match in _ARRAY.finditer(text)
             if match.group(1) in hlo.BITS)


def memory_bytes(text: str) -> int:
  """Bytes of a type's arrays that lie in memory, with their tiles' padding."""
  return sum(padded_bytes(*match.groups()) for match in _ARRAY.finditer(text)
             if match.group(1) in hlo.BITS
             and not re.search(r'S\([1-9]\)', match.group(3) or ''))


def padded_bytes(kind: str, sizes: str, layout: str | None) -> int:
  """Bytes of one array; its two minor dimensions are padded to the first tile, as `T(8,128)`."""
  shape = [int(n) for n in sizes.split(',') if n]
  tile = re.match(r'\{([\d,]*)[^}]*?T\((\d+),(\d+)\)', layout or '')
  if tile and len(shape) >= 2:
    order = [int(n) for n in tile.group(1).split(',') if n]
    if len(order) >= 2:
      for place, side in zip(order, (int(tile.group(3)), int(tile.group(2)))):
        shape[place] = -(-shape[place] // side) * side
  return math.prod(shape) * hlo.BITS[kind] // 8


def first_array(text: str) -> tuple[str, str, str | None] | None:
  """(element type, sizes, layout) of a type's first array; None: it has none."""
  match = _ARRAY.search(hlo.elements(text)[0]) if text else None
  return match.groups() if match and match.group(1) in hlo.BITS else None


class Traffic:
  """Memory traffic of the instructions of one module."""

  def __init__(self, module: hlo.Module):
    self._module = module
    self._users: dict[str, dict[str, list[tuple[int, hlo.Instruction]]]] = {}
    self._by_name: dict[str, dict[str, hlo.Instruction]] = {}

  def bytes(self, computation: str, inst: hlo.Instruction) -> int:
    """Bytes of one run of an instruction, read and written."""
    types = self._module.types[computation]
    callee = self._callee(inst)
    operands = hlo.operands(inst)
    if inst.opcode == 'dynamic-update-slice':
      return 2 * sum(memory_bytes(types.get(name, '')) for name in operands[1:2])
    if callee is None:
      total = memory_bytes(inst.type) + sum(memory_bytes(types.get(name, '')) for name in operands)
      return min(total, 2 * stored_bytes(inst.type)) if inst.opcode in _SLICES else total
    total = self._written_by_fusion(inst)
    for place, name in enumerate(operands):
      whole = memory_bytes(types.get(name, ''))
      if whole:
        part = self._read(callee, place)
        total += whole if part is None else min(part, whole)
    return total

  def _callee(self, inst: hlo.Instruction) -> str | None:
    """The computation of a fusion."""
    if inst.opcode != 'fusion':
      return None
    match = re.search(r'\bcalls=%?([\w.\-]+)', inst.attributes)
    return match.group(1) if match and match.group(1) in self._module.computations else None

  def _named(self, computation: str) -> dict[str, hlo.Instruction]:
    if computation not in self._by_name:
      self._by_name[computation] = {
        inst.name: inst for inst in self._module.computations[computation]}
    return self._by_name[computation]

  def _uses(self, computation: str, name: str) -> list[tuple[int, hlo.Instruction]]:
    """(operand number, instruction) of everything that takes a value."""
    if computation not in self._users:
      users = self._users[computation] = {}
      for inst in self._module.computations[computation]:
        for place, operand in enumerate(hlo.operands(inst)):
          users.setdefault(operand, []).append((place, inst))
    return self._users[computation].get(name, [])

  def _read(self, computation: str, place: int) -> int | None:
    """Bytes that a fused computation reads of its parameter; None: all of it."""
    for inst in self._module.computations[computation]:
      if inst.opcode == 'parameter' and inst.operands.strip() == str(place):
        return self._read_of(computation, inst.name)
    return None

  def _read_of(self, computation: str, name: str) -> int | None:
    total = 0
    for place, inst in self._uses(computation, name):
      part: int | None = None
      if inst.opcode in _SLICES and place == 0:
        part = stored_bytes(inst.type)
      elif ((inst.opcode == 'dynamic-update-slice' and place != 1)
            or (inst.opcode == 'dynamic-slice' and place)
            or is_message(inst) or (inst.opcode == 'tuple' and inst.root)):
        part = 0  # written in place, an index, counted as a message, or handed on
      elif inst.opcode == 'bitcast':
        part = self._read_of(computation, inst.name)
      elif callee := self._callee(inst):
        part = self._read(callee, place)
      if part is None:
        return None
      total += part
    return total

  def _written_by_fusion(self, inst: hlo.Instruction) -> int:
    """Bytes that a fusion writes to memory; the type outside says where the result lies."""
    whole, callee = memory_bytes(inst.type), self._callee(inst)
    root = next((i for i in self._module.computations[callee] if i.root), None) if callee else None
    return whole if root is None else min(whole, self._written(callee, root))

  def _written(self, computation: str, inst: hlo.Instruction) -> int:
    """Bytes with which a value made within a fused computation is written."""
    named, whole = self._named(computation), memory_bytes(inst.type)
    operands = [named[name] for name in hlo.operands(inst) if name in named]
    if inst.opcode == 'parameter' or is_message(inst):
      return 0
    if inst.opcode == 'dynamic-update-slice' and len(operands) > 1:
      return min(whole, stored_bytes(operands[1].type))
    if inst.opcode == 'bitcast' and operands and operands[0].opcode != 'parameter':
      return min(whole, self._written(computation, operands[0]))
    if inst.opcode == 'fusion':
      return self._written_by_fusion(inst)
    if inst.opcode == 'tuple':
      return sum(self._written(computation, operand) for operand in operands)
    return whole
