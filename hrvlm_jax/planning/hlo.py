"""What a compiled program does, read from its text: messages between devices, matrix products.

XLA's own cost analysis counts a loop's body once. Here every computation gets the number of times
it runs (loop trip counts multiply through nested loops), so that scanned layers count as often as
they happen. Tested on programs compiled for CPU and for TPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import math
import re

import numpy as np

_BITS = {
  'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 's32': 32, 'u32': 32,
  's64': 64, 'u64': 64, 'f8e4m3fn': 8, 'f8e5m2': 8, 'f8e4m3': 8, 'bf16': 16, 'f16': 16, 'f32': 32,
  'f64': 64, 'c64': 64, 'c128': 128,
}
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_HEAD = re.compile(r'^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*->.*\{\s*$')
_NAME = re.compile(r'^\s*(?:ROOT\s+)?%?([\w.\-]+)\s*=\s*')
_KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
          'collective-permute', 'collective-broadcast')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `name = type opcode(operands), attributes`."""

  name: str
  type: str
  opcode: str
  operands: str
  attributes: str
  root: bool


@dataclasses.dataclass(frozen=True)
class Collective:
  """One message between devices.

  Attributes:
    kind: all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute, ...
    bytes: of the result on one device, each time it runs.
    wire_bytes: what one device sends in a ring, each time.
    group: number of devices taking part.
    times: how often it runs in one call of the program.
    crosses: whether it leaves a slice.
  """

  kind: str
  bytes: int
  wire_bytes: float
  group: int
  times: int
  crosses: bool


@dataclasses.dataclass(frozen=True)
class Module:
  """Computations of a compiled program and how often each runs in one call."""

  computations: dict[str, list[Instruction]]
  entry: str
  times: dict[str, int]
  unknown_loops: int

  @classmethod
  def parse(cls, text: str) -> Module:
    """From `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = '', None
    for line in text.splitlines():
      if current is None:
        if (match := _HEAD.match(line)) and not line.startswith('HloModule'):
          current = match.group(2)
          computations[current] = []
          if match.group(1):
            entry = current
      elif line.startswith('}'):
        current = None
      elif instruction := _instruction(line):
        computations[current].append(instruction)
    times, unknown = _count(computations, entry)
    return cls(computations, entry, times, unknown)

  def collectives(self, slice_of: Sequence[int] | None = None) -> list[Collective]:
    """All messages; copies of one message in several fusions count once.

    A message that runs beside other work is written into every fusion it runs beside, also into
    those of a loop in between: it happens as often as its copy outside of that loop.

    Args:
      slice_of: slice number of every partition, to tell messages that leave a slice.
    """
    found: dict[str, Collective] = {}
    for name, body in self.computations.items():
      if not self.times.get(name):
        continue
      scatters = 'all-reduce-scatter' in name
      for inst in body:
        kind = inst.opcode.removesuffix('-start')
        if kind not in _KINDS or inst.opcode.endswith('-done'):
          continue
        groups = _groups(inst.attributes, len(slice_of) if slice_of else None)
        size = groups[0] if isinstance(groups, tuple) else len(groups[0])
        crosses = bool(slice_of) and not isinstance(groups, tuple) and any(
          len({slice_of[device] for device in group}) > 1 for group in groups)
        payload = _payload(inst, kind)
        if scatters and kind == 'all-reduce':
          kind, payload = 'reduce-scatter', payload // max(size, 1)
        channel = re.search(r'channel_id=(\d+)', inst.attributes)
        key = channel.group(1) if channel else f'{name}/{inst.name}'
        entry = Collective(kind, payload, _wire(kind, payload, size), size, self.times[name],
                           crosses)
        if key not in found or found[key].times > entry.times:
          found[key] = entry
    return list(found.values())

  def matrix_flops(self) -> float:
    """Floating-point operations of all products and convolutions on one device, as executed.

    Recomputation is included, padding by the compiler too; element-wise work is not.
    """
    total = 0.0
    for name, body in self.computations.items():
      times = self.times.get(name, 0)
      if not times:
        continue
      types = {inst.name: inst.type for inst in body}
      for inst in body:
        if inst.opcode == 'dot':
          total += times * _dot_flops(inst, types)
        elif inst.opcode == 'convolution':
          total += times * _convolution_flops(inst, types)
    return total


# --- reading lines -------------------------------------------------------------------------------


def _instruction(line: str) -> Instruction | None:
  match = _NAME.match(line)
  if not match:
    return None
  rest = re.sub(r'/\*.*?\*/', '', line[match.end():])
  end = _type_end(rest)
  opcode = re.match(r'\s*([a-z][\w\-]*)\(', rest[end:])
  if not opcode:
    return None
  start = end + opcode.end()
  stop = _closing(rest, start - 1)
  return Instruction(match.group(1), rest[:end], opcode.group(1), rest[start:stop], rest[stop + 1:],
                     line.lstrip().startswith('ROOT'))


def _type_end(text: str) -> int:
  """End of a type: `f32[2]{0:T(8)}` or a tuple of types."""
  if text.startswith('('):
    return _closing(text, 0) + 1
  depth = 0
  for i, char in enumerate(text):
    if char in '([{':
      depth += 1
    elif char in ')]}':
      depth -= 1
    elif char == ' ' and depth == 0:
      return i
  return len(text)


def _closing(text: str, start: int) -> int:
  depth = 0
  for i in range(start, len(text)):
    if text[i] in '([{':
      depth += 1
    elif text[i] in ')]}':
      depth -= 1
      if depth == 0:
        return i
  return len(text)


def _shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
  return [(kind, tuple(int(n) for n in dims.split(',') if n))
          for kind, dims in _ARRAY.findall(text) if kind in _BITS]


def _bytes(text: str) -> int:
  return sum(math.prod(dims) * _BITS[kind] // 8 for kind, dims in _shapes(text))


def _elements(text: str) -> list[str]:
  """Top-level elements of a tuple type; a plain type is its own only element."""
  if not text.startswith('('):
    return [text]
  parts, depth, begin = [], 0, 1
  for i, char in enumerate(text):
    if char in '([{':
      depth += 1
    elif char in ')]}':
      depth -= 1
    if (char == ',' and depth == 1) or (depth == 0 and i):
      parts.append(text[begin:i].strip())
      begin = i + 1
      if depth == 0:
        break
  return [part for part in parts if part]


# --- how often -----------------------------------------------------------------------------------


def _count(computations, entry) -> tuple[dict[str, int], int]:
  """Runs of every computation in one call, and the number of loops whose length is unknown."""
  callers: dict[str, list[tuple[str, Callable[[int], int]]]] = {name: [] for name in computations}
  unknown = 0
  for name, body in computations.items():
    for inst in body:
      trips = None
      if inst.opcode == 'while':
        trips = _trip_count(inst, computations)
        if trips is None:
          unknown += 1
          trips = 1
      for role, callee in _callees(inst.attributes):
        if callee not in callers:
          continue
        if role == 'body':
          factor = lambda n, trips=trips: n * trips
        elif role == 'condition':
          factor = lambda n, trips=trips: n * (trips + 1)
        else:
          factor = lambda n: n
        callers[callee].append((name, factor))

  times: dict[str, int] = {entry: 1}

  def visit(name: str) -> int:
    if name not in times:
      times[name] = 0  # a computation nobody calls; also ends cycles, which HLO does not have
      times[name] = sum(factor(visit(caller)) for caller, factor in callers[name])
    return times[name]

  for name in computations:
    visit(name)
  return times, unknown


def _callees(attributes: str) -> list[tuple[str, str]]:
  found = re.findall(
    r'\b(body|condition|calls|to_apply|called_computation)=%?([\w.\-]+)', attributes)
  for role in ('branch_computations', 'called_computations'):
    for group in re.findall(role + r'=\{([^}]*)\}', attributes):
      found += [(role, name.strip().lstrip('%')) for name in group.split(',')]
  for name in re.findall(r'\b(?:true|false)_computation=%?([\w.\-]+)', attributes):
    found.append(('branch', name))
  return found


def _trip_count(loop: Instruction, computations) -> int | None:
  """From the annotation if there is one, else from `i < constant` in the condition.

  i starts at 0 and grows by what the body adds to it: products that are computed in pieces while
  the other pieces travel take two pieces a turn.
  """
  known = re.search(r'"known_trip_count":\s*\{"n":\s*"?(\d+)', loop.attributes)
  if known:
    return int(known.group(1))
  condition = re.search(r'\bcondition=%?([\w.\-]+)', loop.attributes)
  if not condition:
    return None
  pending, constants, directions, places = [condition.group(1)], [], [], []
  while pending:
    for inst in computations.get(pending.pop(), ()):
      if inst.opcode == 'constant' and inst.type.startswith(('s32[]', 'u32[]', 's64[]')):
        constants.append(inst.operands)
      if inst.opcode == 'compare':
        directions += re.findall(r'direction=(\w+)', inst.attributes)
      if inst.opcode == 'get-tuple-element':
        places += re.findall(r'\bindex=(\d+)', inst.attributes)
      pending += [name for _, name in _callees(inst.attributes)]
  if directions != ['LT'] or len(constants) != 1 or not constants[0].isdigit():
    return None
  step = _step(loop, computations, int(places[0])) if len(places) == 1 else 1
  return -(-int(constants[0]) // step)


def _step(loop: Instruction, computations, place: int) -> int:
  """What the body adds to the counter at that place of its tuple; 1 where it cannot be read."""
  name = re.search(r'\bbody=%?([\w.\-]+)', loop.attributes)
  body = computations.get(name.group(1), ()) if name else ()
  by_name = {inst.name: inst for inst in body}
  root = next((inst for inst in body if inst.root and inst.opcode == 'tuple'), None)
  operands = _operands(root) if root else []
  new = by_name.get(operands[place]) if place < len(operands) else None
  if new is None or new.opcode != 'add':
    return 1
  terms = [by_name.get(operand) for operand in _operands(new)]
  added = [term.operands for term in terms if term is not None and term.opcode == 'constant']
  return int(added[0]) if len(added) == 1 and added[0].isdigit() and int(added[0]) else 1


# --- messages ------------------------------------------------------------------------------------


def _payload(inst: Instruction, kind: str) -> int:
  """Bytes of the result; `-start` operations return operands beside it."""
  if inst.opcode.endswith('-start') and kind in ('all-gather', 'collective-permute'):
    elements = _elements(inst.type)
    return _bytes(elements[1]) if len(elements) > 1 else _bytes(inst.type)
  return _bytes(inst.type)


def _wire(kind: str, size: int, group: int) -> float:
  """Bytes that one device sends in the usual ring algorithm for a result of `size` bytes."""
  if group <= 1 and kind != 'collective-permute':
    return 0.0
  share = (group - 1) / group
  return {'all-reduce': 2 * size * share, 'reduce-scatter': size * (group - 1),
          'collective-permute': float(size)}.get(kind, size * share)


def _groups(attributes: str, devices: int | None) -> list[list[int]] | tuple[int]:
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
  if match := re.search(r'replica_groups=mesh\[(.*?)\]\s*(?:<=\S+\s*)?\{(.*?)\}', attributes):
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match.group(1))}
    used = re.findall(r"'(\w+)'", match.group(2))
    if ':(' not in match.group(2) and '<=' not in match.group(0):
      numbers = np.arange(math.prod(axes.values())).reshape(list(axes.values()))
      order = [i for i, name in enumerate(axes) if name not in used]
      last = [list(axes).index(name) for name in used]
      size = math.prod(axes[name] for name in used)
      return numbers.transpose(order + last).reshape(-1, size).tolist()
    return (math.prod(axes[name] for name in used),)
  return (devices or 1,)


# --- arithmetic ----------------------------------------------------------------------------------


def _operands(inst: Instruction) -> list[str]:
  return re.findall(r'%([\w.\-]+)', inst.operands) or [
    word.strip() for word in inst.operands.split(',')]


def _operand_types(inst: Instruction, types: dict[str, str]) -> list[str]:
  return [types.get(name, '') for name in _operands(inst)]


def _dims(text: str) -> tuple[int, ...]:
  shapes = _shapes(text)
  return shapes[0][1] if shapes else ()


def _dot_flops(inst: Instruction, types: dict[str, str]) -> float:
  left = _dims((_operand_types(inst, types) + [''])[0])
  contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', inst.attributes)
  dims = [int(n) for n in contracted.group(1).split(',') if n] if contracted else []
  return 2.0 * math.prod(_dims(inst.type)) * math.prod(left[d] for d in dims if d < len(left))


def _convolution_flops(inst: Instruction, types: dict[str, str]) -> float:
  """2 x multiply-adds on real elements: taps that fall on padding or dilation holes cost nothing.

  On TPU every product is a convolution; batches of matrices are spatial dimensions with holes.
  """
  operands = _operand_types(inst, types)
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', inst.attributes)
  if len(operands) < 2 or not labels:
    return 0.0
  left, kernel, result = (
    dict(zip(names, _dims(kind)))
    for names, kind in zip(labels.groups(), (operands[0], operands[1], inst.type)))
  window = _window(inst.attributes)
  pairs = 1
  for i, dim in enumerate(sorted(d for d in kernel if d.isdigit())):
    field = lambda name, default, i=i: window[name][i] if i < len(window[name]) else default
    pairs *= _taps(
      inputs=left.get(dim, 1), outputs=result.get(dim, 1), size=kernel[dim],
      stride=int(field('stride', '1')), low=int(field('pad', '0_0').split('_')[0]),
      holes=int(field('lhs_dilate', '1')), spread=int(field('rhs_dilate', '1')))
  return 2.0 * result.get('b', 1) * result.get('f', 1) * kernel.get('i', 1) * pairs


def _window(attributes: str) -> dict[str, list[str]]:
  found = re.search(r'window=\{([^}]*)\}', attributes)
  fields = dict.fromkeys(('size', 'stride', 'pad', 'lhs_dilate', 'rhs_dilate'), '')
  if found:
    fields |= dict(part.split('=', 1) for part in found.group(1).split() if '=' in part)
  return {name: value.split('x') if value else [] for name, value in fields.items()}


def _taps(*, inputs, outputs, size, stride, low, holes, spread) -> int:
  """(output, tap) pairs of one spatial dimension that meet a real input element."""
  position = (np.arange(outputs)[:, None] * stride - low) + np.arange(size)[None] * spread
  real = (position >= 0) & (position <= (inputs - 1) * holes) & (position % holes == 0)
  return int(real.sum())
