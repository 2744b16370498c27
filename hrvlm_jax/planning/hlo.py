"""What a compiled program does, read from its text: messages between devices, matrix products.

XLA's own cost analysis counts a loop's body once. Here every computation gets the number of times
it runs (loop trip counts multiply through nested loops), so that scanned layers count as often as
they happen. Tested on programs compiled for CPU and for TPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import math
import re

import numpy as np

from hrvlm_jax.planning.groups import group_size, groups_of, wire_bytes

BITS = {
  'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 's32': 32, 'u32': 32,
  's64': 64, 'u64': 64, 'f8e4m3fn': 8, 'f8e5m2': 8, 'f8e4m3': 8, 'bf16': 16, 'f16': 16, 'f32': 32,
  'f64': 64, 'c64': 64, 'c128': 128,
}
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_HEAD = re.compile(r'^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*->.*\{\s*$')
_NAME = re.compile(r'^\s*(?:ROOT\s+)?%?([\w.\-]+)\s*=\s*')
_NEXT = re.compile(r'^\s+(?:ROOT\s+)?%[\w.\-]+\s*=\s')
MESSAGES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
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
  """Computations of a compiled program and how often each runs in one call.

  Attributes:
    computations: name -> its instructions, in the order of the schedule where there is one.
    entry: the computation that a call runs.
    times: runs of every computation in one call; every branch of a conditional counts.
    unknown_loops: loops whose length is unknown; they count once.
    partitions: devices that one program is cut over.
  """

  computations: dict[str, list[Instruction]]
  entry: str
  times: dict[str, int]
  unknown_loops: int
  partitions: int = 1

  @classmethod
  def parse(cls, text: str) -> Module:
    """From `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = '', None
    for line in _logical_lines(text):
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
    partitions = re.search(r'\bnum_partitions=(\d+)', text[:text.find('\n')])
    return cls(computations, entry, times, unknown, int(partitions.group(1)) if partitions else 1)

  @functools.cached_property
  def types(self) -> dict[str, dict[str, str]]:
    """Computation -> instruction -> its type."""
    return {name: {inst.name: inst.type for inst in body}
            for name, body in self.computations.items()}

  def inner(self, inst: Instruction) -> list[tuple[str, Instruction]]:
    """(computation, instruction) of everything that an instruction calls, at any depth."""
    found, pending, seen = [], [name for _, name in callees(inst.attributes)], set()
    while pending:
      name = pending.pop()
      if name in seen or name not in self.computations:
        continue
      seen.add(name)
      for inner in self.computations[name]:
        found.append((name, inner))
        pending += [callee for _, callee in callees(inner.attributes)]
    return found

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
        if kind not in MESSAGES or inst.opcode.endswith('-done'):
          continue
        groups = groups_of(inst.attributes, len(slice_of) if slice_of else self.partitions)
        size = group_size(groups)
        crosses = bool(slice_of) and not isinstance(groups, tuple) and any(
          len({slice_of[device] for device in group}) > 1 for group in groups)
        payload = payload_of(inst, kind)
        if scatters and kind == 'all-reduce':
          kind, payload = 'reduce-scatter', payload // max(size, 1)
        channel = re.search(r'channel_id=(\d+)', inst.attributes)
        key = channel.group(1) if channel else f'{name}/{inst.name}'
        entry = Collective(kind, payload, wire_bytes(kind, payload, size), size, self.times[name],
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
          total += times * dot_flops(inst, types)
        elif inst.opcode == 'convolution':
          total += times * convolution_flops(inst, types)
    return total


# --- reading lines -------------------------------------------------------------------------------


def _logical_lines(text: str) -> Iterator[str]:
  """Lines, those of one instruction joined: Pallas writes its kernel_metadata over several.

  One of them begins with `}`, which elsewhere ends a computation.
  """
  waiting, depth = '', 0
  for line in text.splitlines():
    if waiting and _NEXT.match(line):
      yield waiting  # its braces do not close; the next instruction begins all the same
      waiting, depth = '', 0
    if waiting:
      depth += _open_braces(line)
      waiting += ' ' + line.strip()
      if depth <= 0:
        yield waiting
        waiting, depth = '', 0
    elif line.count('{') > line.count('}') and _NEXT.match(line) and _open_braces(line) > 0:
      waiting, depth = line, _open_braces(line)
    else:
      yield line
  if waiting:
    yield waiting


def _open_braces(line: str) -> int:
  """Braces opened and not closed in a line, those within quotes left out."""
  bare = re.sub(r'"(?:[^"\\]|\\.)*"', '', line)
  return bare.count('{') - bare.count('}')


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
  return [(kind, tuple(int(n) for n in sizes.split(',') if n))
          for kind, sizes in _ARRAY.findall(text) if kind in BITS]


def bytes_of(text: str) -> int:
  """Bytes of all arrays of a type, without padding."""
  return sum(math.prod(shape) * BITS[kind] // 8 for kind, shape in _shapes(text))


def elements(text: str) -> list[str]:
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
        trips = trip_count(inst, computations)
        if trips is None:
          unknown += 1
          trips = 1
      for role, callee in callees(inst.attributes):
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


def callees(attributes: str) -> list[tuple[str, str]]:
  """(role, computation) of everything that an instruction calls directly."""
  found = re.findall(
    r'\b(body|condition|calls|to_apply|called_computation)=%?([\w.\-]+)', attributes)
  for role in ('branch_computations', 'called_computations'):
    for group in re.findall(role + r'=\{([^}]*)\}', attributes):
      found += [(role, name.strip().lstrip('%')) for name in group.split(',')]
  for name in re.findall(r'\b(?:true|false)_computation=%?([\w.\-]+)', attributes):
    found.append(('branch', name))
  return found


def trip_count(loop: Instruction, computations) -> int | None:
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
      pending += [name for _, name in callees(inst.attributes)]
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
  results = operands(root) if root else []
  new = by_name.get(results[place]) if place < len(results) else None
  if new is None or new.opcode != 'add':
    return 1
  terms = [by_name.get(name) for name in operands(new)]
  added = [term.operands for term in terms if term is not None and term.opcode == 'constant']
  return int(added[0]) if len(added) == 1 and added[0].isdigit() and int(added[0]) else 1


# --- messages ------------------------------------------------------------------------------------


def payload_of(inst: Instruction, kind: str) -> int:
  """Bytes of the result; `-start` operations return operands beside it."""
  if inst.opcode.endswith('-start') and kind in ('all-gather', 'collective-permute'):
    parts = elements(inst.type)
    return bytes_of(parts[1]) if len(parts) > 1 else bytes_of(inst.type)
  return bytes_of(inst.type)


# --- arithmetic ----------------------------------------------------------------------------------


def operands(inst: Instruction) -> list[str]:
  """Names of the operands."""
  return re.findall(r'%([\w.\-]+)', inst.operands) or [
    word.strip() for word in inst.operands.split(',')]


def operand_types(inst: Instruction, types: dict[str, str]) -> list[str]:
  """Types of the operands, '' where it is not known."""
  return [types.get(name, '') for name in operands(inst)]


def dims(text: str) -> tuple[int, ...]:
  """Sizes of a type's first array."""
  shapes = _shapes(text)
  return shapes[0][1] if shapes else ()


def dot_flops(inst: Instruction, types: dict[str, str]) -> float:
  """2 x multiply-adds of a dot; `types`: those of its computation."""
  left = dims((operand_types(inst, types) + [''])[0])
  contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', inst.attributes)
  summed = [int(n) for n in contracted.group(1).split(',') if n] if contracted else []
  return 2.0 * math.prod(dims(inst.type)) * math.prod(left[d] for d in summed if d < len(left))


def convolution_flops(inst: Instruction, types: dict[str, str]) -> float:
  """2 x multiply-adds on real elements: taps that fall on padding or dilation holes cost nothing.

  On TPU every product is a convolution; batches of matrices are spatial dimensions with holes.
  """
  sides = operand_types(inst, types)
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', inst.attributes)
  if len(sides) < 2 or not labels:
    return 0.0
  left, kernel, result = (
    dict(zip(names, dims(kind)))
    for names, kind in zip(labels.groups(), (sides[0], sides[1], inst.type)))
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
