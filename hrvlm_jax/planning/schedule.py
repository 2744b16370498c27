"""Reads a scheduled TPU program: what one call of it takes on a chip, and what it spends that on.

    reading = schedule.read(compiled.as_text(), 'v5e')
    print(explain.describe(reading))

The text is that of `compiled.as_text()`, or the dump `*after_optimizations_after_buffer_assignment`
that libtpu writes before it generates code (`XLA_FLAGS=--xla_dump_to=DIR --xla_dump_hlo_as_text`).
The latter takes a fraction of the compilation and carries the real schedule, but no cycles of the
compiler's own; it is what `plan` reads.

Instructions run in the order of the text. Loops count their trips; of a conditional the dearest
branch counts. Copies between memories have a queue of their own at memory speed, messages one at
the speed of a ring, and of both only what a `done` waits for costs time. A message carried in
fusions travels while those compute; what is left at its end is waited for. Assumed: the queues do
not slow the work beside them, and a message goes along one axis of the torus. Messages between
slices pass through the hosts (`send`, `recv` of the megascale runtime) and have a queue of their
own at the speed of that network.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
import dataclasses
import re

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.planning import hlo
from hrvlm_jax.planning.costs import Costs, costs
from hrvlm_jax.planning.cycles import FREE, Cost, Kind, Pricing, moves_only
from hrvlm_jax.planning.groups import group_size, groups_of, wire_bytes
from hrvlm_jax.planning.sources import Sources, operation
from hrvlm_jax.planning.traffic import is_message, stored_bytes

_PREFETCHES = ('copy-start', 'slice-start', 'dynamic-slice-start')
# Messages whose steps are all alike take half a group of hops both ways round the ring.
_HALF_WAY = ('all-gather', 'reduce-scatter', 'all-to-all')


@dataclasses.dataclass(frozen=True)
class Charge:
  """Time of one instruction: `cost.cycles` each of the `times` it runs in a call."""

  computation: str
  instruction: hlo.Instruction
  times: int
  cost: Cost

  @property
  def cycles(self) -> float:
    """In all runs of one call."""
    return self.cost.cycles * self.times


@dataclasses.dataclass(frozen=True)
class Message:
  """A message between devices.

  Attributes:
    kind: all-gather, all-reduce, ...
    group: devices taking part.
    bytes, wire_bytes: of the result, and what one device sends, each time.
    times: in one call.
    seconds: it travels, each time.
    how: 'synchronous', 'asynchronous' (start and done), or 'fused' (carried in fusions).
    operation: JAX's name for it.
  """

  kind: str
  group: int
  bytes: int
  wire_bytes: float
  times: int
  seconds: float
  how: str
  operation: str


@dataclasses.dataclass(frozen=True)
class Reading:
  """What one call of a program takes on one device of a chip.

  Attributes:
    costs: the constants used.
    charges: every instruction that takes time; their cycles add up to `cycles`.
    messages: every message, hidden or not.
    prefetched: bytes that asynchronous copies move.
    unknown_loops: loops of unknown length, counted once.
    guessed: kernels whose cost is guessed from their traffic, and how often each runs.
  """

  costs: Costs
  charges: tuple[Charge, ...]
  messages: tuple[Message, ...]
  prefetched: float
  unknown_loops: int
  guessed: dict[str, int]

  @property
  def cycles(self) -> float:
    """Of one call, the optimistic end."""
    return sum(charge.cycles for charge in self.charges)

  @property
  def seconds(self) -> float:
    """Of one call, the optimistic end."""
    return self.cycles / self.costs.rates.clock

  @property
  def likely_seconds(self) -> float:
    """The same with what is not the compiler's own estimate taken `likely` times."""
    own = sum(charge.cycles for charge in self.charges if charge.cost.estimated)
    return (own + (self.cycles - own) * self.costs.likely) / self.costs.rates.clock

  @property
  def flops(self) -> float:
    """Operations of all products, recomputation included."""
    return sum(charge.cost.flops * charge.times for charge in self.charges)

  @property
  def memory_bytes(self) -> float:
    """Traffic between memory and device, prefetches included."""
    return self.prefetched + sum(charge.cost.bytes * charge.times for charge in self.charges)

  @property
  def memory_bound(self) -> float:
    """Seconds that this traffic alone takes: no call is faster."""
    return self.costs.memory_cycles(self.memory_bytes) / self.costs.rates.clock


def read(text: str, chip: str | Costs) -> Reading:
  """Reads the text of a scheduled program.

  Args:
    chip: a TPU by name, or its constants.

  Raises:
    UserError: an unknown chip, or a text that is no scheduled program.
  """
  found = costs(chip) if isinstance(chip, str) else chip
  module = hlo.Module.parse(text)
  if not module.entry:
    raise UserError('program text: found no ENTRY computation, expected the text of a compiled '
                    'program (compiled.as_text() or an after_optimizations dump)')
  if 'is_scheduled=true' not in text[:text.find('\n')]:
    raise UserError('program text: its first line lacks is_scheduled=true; only the order of a '
                    'scheduled program says what hides behind what')
  return _Walk(module, Sources(text), found).reading()


@dataclasses.dataclass
class _Queues:
  """State of the queues while a computation runs; times in cycles from its start.

  `pending`: started instruction, or name of a meeting between slices -> (when it ends, class of
  waiting for it).
  """

  now: float = 0.0
  copies: float = 0.0
  messages: float = 0.0
  between: float = 0.0
  pending: dict[str, tuple[float, Kind]] = dataclasses.field(default_factory=dict)


class _Walk:
  """The walk through a module in the order of its schedule."""

  def __init__(self, module: hlo.Module, sources: Sources, found: Costs):
    self._module, self._sources, self._costs = module, sources, found
    self._pricing = Pricing(module, sources, found)
    self._prices: dict[tuple[str, str], Cost] = {}
    self._charges: list[Charge] = []
    self._messages: list[Message] = []
    self._prefetched = 0.0
    self._unknown_loops = 0
    self._guessed: Counter[str] = Counter()
    # Channel of a message carried in fusions -> (cycles left, runs, where it starts).
    self._carried: dict[str, tuple[float, int, tuple[str, hlo.Instruction]]] = {}

  def reading(self) -> Reading:
    """Walks the whole program."""
    self._run(self._module.entry, 1)
    for left, times, (computation, inst) in self._carried.values():
      self._charge(computation, inst, times, left, Kind.MESSAGE_LEFT)
    found = self._found()
    # A prefetch and the work beside it share one memory: what all of them move takes its time.
    last = self._module.computations[self._module.entry][-1]
    self._charge(self._module.entry, last, 1, found.memory_bound * found.costs.rates.clock
                 - found.cycles, Kind.MEMORY)
    return self._found()

  def _found(self) -> Reading:
    return Reading(self._costs, tuple(self._charges), tuple(self._messages), self._prefetched,
                   self._unknown_loops, dict(self._guessed))

  def _run(self, computation: str, times: int) -> float:
    """Cycles of one run of a computation, which happens `times` times in a call."""
    queues = _Queues()
    for inst in self._module.computations[computation]:
      self._step(computation, inst, times, queues)
    # What was started and never awaited must still arrive before the computation's results count.
    for end, kind in list(queues.pending.values()):
      if kind == Kind.MESSAGE_WAIT:
        last = self._module.computations[computation][-1]
        self._wait(computation, last, times, queues, end, Kind.MESSAGE_LEFT)
    return queues.now

  def _step(self, computation: str, inst: hlo.Instruction, times: int, queues: _Queues) -> None:
    code, clock = inst.opcode, self._costs.rates.clock
    if code in FREE:
      return
    if code in ('while', 'conditional', 'call'):
      queues.now += self._control(inst, times)
      return
    if code in ('send', 'recv') and (meeting := _meeting(inst)):
      self._between(inst, times, queues, meeting)
      return
    if code.endswith('-done'):
      end = queues.pending.pop((hlo.operands(inst) or [''])[0], None)
      if end is not None:
        self._wait(computation, inst, times, queues, *end)
      return
    if code == 'async-update':
      started = (hlo.operands(inst) or [''])[0]
      if started in queues.pending:
        queues.pending[inst.name] = queues.pending.pop(started)
      return
    inside = self._module.inner(inst) if code in ('fusion', 'async-start') else []
    if is_message(inst) and code.endswith('-start'):
      seconds = self._message(computation, inst, times, 'asynchronous')
      queues.messages = max(queues.now, queues.messages) + seconds * clock
      queues.pending[inst.name] = queues.messages, Kind.MESSAGE_WAIT
    elif is_message(inst):
      seconds = self._message(computation, inst, times, 'synchronous')
      queues.messages = max(queues.now, queues.messages) + seconds * clock
      self._wait(computation, inst, times, queues, queues.messages, Kind.MESSAGE)
    elif code == 'async-start' and any(is_message(i) for _, i in inside):
      for name, i in inside:
        if is_message(i):
          seconds = self._message(name, i, times, 'asynchronous')
          queues.messages = max(queues.now, queues.messages) + seconds * clock
      queues.pending[inst.name] = queues.messages, Kind.MESSAGE_WAIT
    elif code in _PREFETCHES or code == 'async-start':
      size = _copied(inst)
      self._prefetched += size * times
      queues.copies = max(queues.now, queues.copies) + self._costs.memory_cycles(size)
      queues.pending[inst.name] = queues.copies, Kind.DMA_WAIT
    else:
      self._compute(computation, inst, times, queues, [
        (name, i) for name, i in inside if is_message(i) and not i.opcode.endswith('-done')])

  def _control(self, inst: hlo.Instruction, times: int) -> float:
    """Cycles of a loop, a conditional (its dearest branch), or a call."""
    callees = hlo.callees(inst.attributes)
    if inst.opcode == 'while':
      trips = hlo.trip_count(inst, self._module.computations)
      if trips is None:
        self._unknown_loops += 1
        trips = 1
      return trips * sum(self._run(name, times * trips) for role, name in callees if role == 'body')
    if inst.opcode == 'call':
      return sum(self._run(name, times) for role, name in callees if role == 'to_apply')
    before, best = self._state(), None
    for _, name in callees:
      self._restore(before)
      cycles = self._run(name, times)
      if best is None or cycles > best[0]:
        best = cycles, self._state()
    if best is None:
      return 0.0
    self._restore(best[1])
    return best[0]

  def _state(self) -> tuple:
    return (list(self._charges), list(self._messages), self._prefetched, self._unknown_loops,
            Counter(self._guessed), dict(self._carried))

  def _restore(self, state: tuple) -> None:
    (charges, messages, self._prefetched, self._unknown_loops, guessed, carried) = state
    self._charges, self._messages = list(charges), list(messages)
    self._guessed, self._carried = Counter(guessed), dict(carried)

  def _compute(self, computation, inst, times, queues, carried) -> None:
    """Work of the device, and the progress of the messages that it carries."""
    key = computation, inst.name
    if key not in self._prices:
      self._prices[key] = self._pricing.cost(computation, inst)
    cost = self._prices[key]
    before = len(self._messages)
    channels = [self._enter(name, i, times) for name, i in carried]
    names = list(dict.fromkeys(channels))
    if inst.name.startswith('async-collective-start') and names:
      return
    finishes = inst.name.startswith('async-collective-done')
    alone = not cost.flops and names and (
      moves_only(self._module.inner(inst)) or any('all-reduce-scatter' in name
                                                  for _, name in hlo.callees(inst.attributes)))
    if names and (finishes or alone):
      kind = Kind.MESSAGE_WAIT if finishes else Kind.MESSAGE
      if not finishes:  # what starts here has nothing beside it
        self._messages[before:] = [dataclasses.replace(message, how='synchronous')
                                   for message in self._messages[before:]]
      for name in names:
        left = max(self._carried.pop(name)[0], 0.0)
        self._charge(computation, inst, times, left, kind)
        queues.now += left
      return
    for name in channels:
      left, runs, first = self._carried[name]
      beside = cost.cycles * times / runs / len(channels)
      self._carried[name] = left - beside, runs, first
    if cost.uncounted:
      self._guessed[_target(inst)] += times
    self._charges.append(Charge(computation, inst, times, cost))
    queues.now += cost.cycles

  def _enter(self, computation: str, inst: hlo.Instruction, times: int) -> str:
    """The channel of a carried message, which starts where it is first seen."""
    match = re.search(r'\bchannel_id=(\d+)', inst.attributes)
    channel = match.group(1) if match else f'{computation}/{inst.name}'
    if channel not in self._carried:
      seconds = self._message(computation, inst, times, 'fused')
      self._carried[channel] = (seconds * self._costs.rates.clock, times, (computation, inst))
    return channel

  # --- messages and charges ----------------------------------------------------------------------

  def _message(self, computation: str, inst: hlo.Instruction, times: int, how: str) -> float:
    """Notes a message; seconds that it travels."""
    kind = is_message(inst)
    group = group_size(groups_of(inst.attributes, self._module.partitions))
    payload = hlo.payload_of(inst, kind)
    if kind == 'all-reduce' and 'reduce-scatter' in computation:
      kind, payload = 'reduce-scatter', payload // max(group, 1)
    wire = wire_bytes(kind, payload, group)
    hops = group / 2 if kind in _HALF_WAY else group if kind == 'all-reduce' else 1
    seconds = wire / self._costs.rates.ring + self._costs.latency + hops * self._costs.hop
    self._messages.append(
      Message(kind, group, payload, wire, times, seconds, how, operation(inst)))
    return seconds

  def _between(self, inst: hlo.Instruction, times: int, queues: _Queues, meeting: str) -> None:
    """A message between slices: what is sent travels, and the `recv` of its name waits for it."""
    if inst.opcode == 'recv':
      queues.pending[inst.name] = queues.pending.pop(meeting, (queues.now, Kind.BETWEEN))
      return
    attribute = lambda name: re.search(rf'_xla_megascale_{name}="([^"]*)"', inst.attributes)
    kind = attribute('transfer_type').group(1).lower().replace('_', '-')
    target = attribute('target')
    slices = len(target.group(1).split('}')[0].split(',')) if target else 2
    size = hlo.bytes_of(hlo.elements(inst.type)[0])
    # What is given to a reduce-scatter is whole; `wire_bytes` asks for its part.
    payload = size // slices if kind == 'reduce-scatter' else size
    wire = wire_bytes(kind, payload, slices)
    seconds = wire / self._costs.between + self._costs.latency
    self._messages.append(Message(kind + ' between slices', slices, payload, wire, times, seconds,
                                  'asynchronous', operation(inst)))
    queues.between = max(queues.now, queues.between) + seconds * self._costs.rates.clock
    queues.pending[meeting] = queues.between, Kind.BETWEEN

  def _wait(self, computation, inst, times, queues: _Queues, end: float, kind: Kind) -> None:
    if end > queues.now:
      self._charge(computation, inst, times, end - queues.now, kind)
      queues.now = end

  def _charge(self, computation: str, inst: hlo.Instruction, times: int, cycles: float,
              kind: Kind) -> None:
    """Time that no work of the instruction's own explains."""
    if cycles > 0:
      place = self._sources.place([inst, *(i for _, i in self._module.inner(inst))])
      self._charges.append(
        Charge(computation, inst, times, Cost(cycles, kind, 0.0, 0.0, False, place)))


def _meeting(inst: hlo.Instruction) -> str | None:
  """The name under which slices meet for a message; None: it goes to the host alone."""
  if '_xla_megascale_transfer_type' not in inst.attributes:
    return None
  match = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', inst.attributes)
  return match.group(1) if match else None


def _copied(inst: hlo.Instruction) -> int:
  """Bytes of an asynchronous copy: a copy's first element, the result of others."""
  parts = hlo.elements(inst.type)
  return stored_bytes(parts[0] if inst.opcode == 'copy-start' or len(parts) < 2 else parts[1])


def _target(inst: hlo.Instruction) -> str:
  match = re.search(r'custom_call_target="([^"]*)"', inst.attributes)
  return match.group(1) if match else inst.opcode


def by(reading: Reading, key: Callable[[Charge], Hashable],
       ) -> list[tuple[Hashable, float, float, float]]:
  """(group, cycles, flops, bytes) of the charges with the same `key(charge)`, dearest first."""
  sums: dict[Hashable, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
  for charge in reading.charges:
    row = sums[key(charge)]
    row[0] += charge.cycles
    row[1] += charge.cost.flops * charge.times
    row[2] += charge.cost.bytes * charge.times
  return sorted(((name, *row) for name, row in sums.items()), key=lambda row: -row[1])
