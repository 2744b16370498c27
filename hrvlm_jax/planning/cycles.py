"""Cycles and class of one instruction of a scheduled TPU program.

Products take the compiler's own `estimated_cycles` where the program carries them (it does after
code generation), else their padded operations at a stated efficiency; everything else takes the
longer of its memory traffic and its vector operations, because the compiler's numbers for such work
are two to eight times too high. Kernels of Pallas carry none: splash attention is counted by its
grid steps, others by the operations they state.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import math
import re

from hrvlm_jax.planning import hlo
from hrvlm_jax.planning.costs import Costs
from hrvlm_jax.planning.sources import Place, Sources, operation
from hrvlm_jax.planning.traffic import Traffic, first_array, is_message, padded_bytes, stored_bytes

FREE = frozenset({
  'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'after-all', 'iota',
  'partition-id', 'replica-id', 'opt-barrier', 'domain', 'add-dependency'})
LAYOUT = frozenset({
  'copy', 'transpose', 'reshape', 'bitcast', 'slice', 'concatenate', 'pad', 'reverse',
  'bitcast-convert', 'copy-start', 'copy-done'})
PRODUCTS = frozenset({'dot', 'convolution'})
# Beside moves of data, what picks a layer of a stack or puts it back.
_STACKING = LAYOUT | {
  'dynamic-slice', 'dynamic-update-slice', 'select', 'compare', 'and', 'add', 'clamp', 'broadcast'}
# Custom calls that only name memory or state a fact.
_FREE_CALLS = frozenset({
  'AllocateBuffer', 'AssumeGatherIndicesInBound', 'ConcatBitcast', 'Sharding', 'MoveToHost',
  'PinToDevice'})
_VECTOR_REGISTER = 8 * 128  # float32 elements
_ATTENTION = 'core/attention.py'


class Kind(enum.StrEnum):
  """Classes of what a step spends its time on."""

  PRODUCT = 'product'
  CONVOLUTION = 'convolution'
  ATTENTION_PRODUCT = 'attention product'
  ATTENTION_SCORES = 'attention scores'
  ATTENTION_KERNEL = 'attention kernel'
  KERNEL = 'custom call'
  GATHER = 'gather, scatter, sort'
  STACK = 'slices of stacks'
  COPY = 'copies, layouts'
  ELEMENTWISE = 'element-wise, reductions'
  MESSAGE = 'messages, synchronous'
  MESSAGE_WAIT = 'waits for messages'
  MESSAGE_LEFT = 'messages never finished'
  BETWEEN = 'waits for messages between slices'
  DMA_WAIT = 'waits for prefetches'
  MEMORY = 'memory shared by work and prefetches'

  @property
  def group(self) -> str:
    """The coarse class, a key of `GROUPS`."""
    return next(name for name, kinds in GROUPS.items() if self in kinds)


# What a plan's table shows.
GROUPS = {
  'products': (Kind.PRODUCT, Kind.CONVOLUTION),
  'attention': (Kind.ATTENTION_PRODUCT, Kind.ATTENTION_SCORES, Kind.ATTENTION_KERNEL),
  'kernels': (Kind.KERNEL,),
  'element-wise': (Kind.ELEMENTWISE,),
  'memory traffic': (Kind.STACK, Kind.DMA_WAIT, Kind.MEMORY),
  'gathers': (Kind.GATHER,),
  'copies': (Kind.COPY,),
  'synchronous messages': (Kind.MESSAGE,),
  'exposed messages': (Kind.MESSAGE_WAIT, Kind.MESSAGE_LEFT, Kind.BETWEEN),
}


@dataclasses.dataclass(frozen=True)
class Cost:
  """One run of an instruction.

  Attributes:
    cycles: it takes.
    kind: its class.
    flops: operations of its products.
    bytes: memory traffic.
    estimated: the cycles are the compiler's own.
    place: of the source.
    uncounted: it is a kernel whose cost is only guessed from its traffic.
  """

  cycles: float
  kind: Kind
  flops: float
  bytes: float
  estimated: bool
  place: Place
  uncounted: bool = False


class Pricing:
  """Costs of the instructions of one module on one chip."""

  def __init__(self, module: hlo.Module, sources: Sources, costs: Costs):
    self._module, self._sources, self._costs = module, sources, costs
    self._traffic = Traffic(module)

  def cost(self, computation: str, inst: hlo.Instruction) -> Cost:
    """What one run of an instruction costs; calls and loops are the schedule's."""
    c = self._costs
    things = [(computation, inst)]
    if inst.opcode == 'fusion':
      things += self._module.inner(inst)
    products = [(name, i) for name, i in things if i.opcode in PRODUCTS]
    flops = sum(self._flops(name, i) for name, i in products)
    moved = self._traffic.bytes(computation, inst)
    named = [i for _, i in products or things]
    kind, place = self._kind(inst, things, products), self._sources.place(named)
    uncounted = False
    stated = re.search(r'"estimated_cycles":"?(-?\d+)', inst.attributes)
    estimated = bool(stated and int(stated.group(1)) > 0 and flops)
    if estimated:
      cycles = max(float(stated.group(1)), c.memory_cycles(moved))
    elif inst.opcode == 'custom-call':
      cycles, uncounted = self._kernel(computation, inst, moved)
    elif inst.opcode in PRODUCTS or inst.opcode == 'fusion' or inst.opcode in c.vector:
      cycles = self._analytic(things, inst, moved)
    else:
      cycles = self._move(computation, inst, moved)
    # What takes no time only names memory.
    return Cost(cycles, kind, flops, moved if cycles else 0, estimated, place, uncounted)

  # --- cycles ------------------------------------------------------------------------------------

  def _analytic(self, things, inst, moved: float) -> float:
    """The longest of products, vector work, and memory traffic, and what starting it takes."""
    c = self._costs
    matrix = sum(self._product(name, i) for name, i in things if i.opcode in PRODUCTS)
    vector = sum(c.vector[i.opcode] * self._registers(name, i) for name, i in things
                 if i.opcode in c.vector) / c.vector_slots / c.rates.cores
    return max(matrix, vector, c.memory_cycles(moved) / c.hbm_efficiency) + c.overhead

  def _registers(self, computation: str, inst: hlo.Instruction) -> float:
    """Vector registers of what an operation works on: its result, or what it reduces."""
    text = inst.type
    if inst.opcode in ('reduce', 'reduce-window'):
      text = self._module.types[computation].get(hlo.operands(inst)[0], text)
    found = first_array(text)
    return padded_bytes('f32', *found[1:]) / 4 / _VECTOR_REGISTER if found else 0.0

  def _flops(self, computation: str, inst: hlo.Instruction) -> float:
    count = hlo.dot_flops if inst.opcode == 'dot' else hlo.convolution_flops
    return count(inst, self._module.types[computation])

  def _product(self, computation: str, inst: hlo.Instruction) -> float:
    """Cycles of a product whose sides are padded to the matrix unit's.

    Either operand may stay in the unit while the other streams through in rows of 8. Depthwise
    convolutions run on the vector units.
    """
    c = self._costs
    flops = self._flops(computation, inst)
    whole = c.rates.flops_per_cycle * c.product_efficiency
    labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', inst.attributes)
    kinds = hlo.operand_types(inst, self._module.types[computation])
    if inst.opcode == 'dot' or not labels or len(kinds) < 2:
      return flops / whole
    groups = lambda name: int(
      (re.search(rf'\b{name}_group_count=(\d+)', inst.attributes) or (0, 1))[1])
    kernel = dict(zip(labels.group(2), hlo.dims(kinds[1])))
    result = dict(zip(labels.group(3), hlo.dims(inst.type)))
    k, n, m = kernel.get('i', 1), result.get('f', 1), result.get('b', 1)
    if groups('batch') > 1:
      return flops / 2 / 1024 * c.depthwise['kernel_gradient'] / c.rates.cores
    if groups('feature') > 1 and groups('feature') == n:
      return flops / 2 / 1024 * c.depthwise['forward'] / c.rates.cores
    side = c.rates.matrix_side
    grown = lambda size, step: -(-size // step) * step / max(size, 1)
    padding = grown(k, side) * min(grown(n, side) * grown(m, 8), grown(m, side) * grown(n, 8))
    return flops * padding / whole

  def _move(self, computation: str, inst: hlo.Instruction, moved: float) -> float:
    """Copies, slices, gathers, sorts: memory or on-chip memory, whichever is slower."""
    c = self._costs
    types = hlo.operand_types(inst, self._module.types[computation])
    if inst.opcode == 'dynamic-update-slice':
      moved = whole = 2 * sum(stored_bytes(text) for text in types[1:2])
    elif inst.opcode in ('dynamic-slice', 'gather', 'slice'):
      whole = moved
    else:
      whole = stored_bytes(inst.type) + sum(stored_bytes(text) for text in types)
    return max(moved / c.rates.hbm, whole / c.rates.vmem) * c.rates.clock

  # --- kernels -----------------------------------------------------------------------------------

  def _kernel(self, computation: str, inst: hlo.Instruction, moved: float) -> tuple[float, bool]:
    """Cycles of a custom call, and whether they are only guessed from its traffic."""
    c = self._costs
    target = re.search(r'custom_call_target="([^"]*)"', inst.attributes)
    if target and target.group(1) in _FREE_CALLS:
      return 0.0, False
    if is_splash(inst) and (cycles := self._splash(computation, inst)) is not None:
      return cycles, False
    stated = (re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', inst.attributes)
              or re.search(r'\\"flops\\":\s*\\"?(\d+)', inst.attributes))
    flops = float(stated.group(1)) if stated else 0.0
    return max(flops / c.rates.flops_per_cycle / c.pallas_efficiency,
               c.memory_cycles(moved)), not stated

  def _splash(self, computation: str, inst: hlo.Instruction) -> float | None:
    """Grid steps of an attention kernel x what one costs.

    The first two floating-point arrays of three and more dimensions are queries [... t d] and keys
    [... s d]. Steps above the diagonal are left out where the kernel makes its mask itself, as it
    does for causal masks: it then takes the positions of the queries behind the values (and the
    segments, where there are any). A gradient in two kernels (dq, dkv) counts as two fused ones, an
    upper bound. None: the arrays are not found.
    """
    c = self._costs
    types = hlo.operand_types(inst, self._module.types[computation])
    arrays = [(i, hlo.dims(text)) for i, text in enumerate(types)
              if re.match(r'(bf16|f16|f32)\[', text)]
    arrays = [(i, sizes) for i, sizes in arrays if len(sizes) >= 3][:3]
    if len(arrays) < 3:
      return None
    behind = sum(text.startswith('s32[') for text in types[arrays[-1][0] + 1:])
    causal = behind > (2 if 'segmented' in inst.name else 0)
    queries, keys = arrays[0][1], arrays[1][1]
    block_q, block_kv, backward = splash_blocks(inst)
    block_q, block_kv = min(block_q, queries[-2]), min(block_kv, keys[-2])
    rows, columns = -(-queries[-2] // block_q), -(-keys[-2] // block_kv)
    steps = rows * columns
    if causal:
      steps = sum(min(columns, -(-((row + 1) * block_q) // block_kv)) for row in range(rows))
    step = c.splash_step(math.sqrt(block_q * block_kv), backward=backward) * block_q * block_kv
    step *= c.splash_stall * -(-queries[-1] // 128) / c.rates.cores
    return math.prod(queries[:-2]) * steps * (step + c.splash_overhead)

  # --- classes -----------------------------------------------------------------------------------

  def _kind(self, inst: hlo.Instruction, things, products) -> Kind:
    codes = collections.Counter(i.opcode for _, i in things)
    attention = any(place.file.endswith(_ATTENTION) for _, i in products or things
                    for place in self._sources.stack(i))
    if products:
      if any('conv_general_dilated' in operation(i) for _, i in products):
        return Kind.CONVOLUTION
      return Kind.ATTENTION_PRODUCT if attention else Kind.PRODUCT
    if codes['custom-call']:
      return Kind.ATTENTION_KERNEL if any(is_splash(i) for _, i in things) else Kind.KERNEL
    if attention:
      return Kind.ATTENTION_SCORES
    if codes['gather'] or codes['scatter'] or codes['sort'] or codes['select-and-scatter']:
      return Kind.GATHER
    body = set(codes) - FREE - {'fusion', 'call', 'convert'}
    sliced = codes['dynamic-slice'] or codes['dynamic-update-slice']
    if body <= _STACKING and sliced:
      return Kind.STACK
    if body <= LAYOUT:
      return Kind.COPY
    return Kind.ELEMENTWISE


def moves_only(things: list[tuple[str, hlo.Instruction]]) -> bool:
  """Whether instructions hold nothing but messages and what brings their data into place."""
  plain = FREE | _STACKING | {'fusion', 'convert', 'multiply', 'subtract'}
  return all(is_message(inst) or inst.opcode in plain for _, inst in things)


def is_splash(inst: hlo.Instruction) -> bool:
  """A kernel of splash attention, as JAX names it: `splash_mha_fwd_segmented_residuals`."""
  return inst.opcode == 'custom-call' and 'splash' in inst.name


def splash_blocks(inst: hlo.Instruction) -> tuple[int, int, bool]:
  """Block of queries, block of keys (512 where unsaid), and whether it is a gradient's kernel."""
  phase = next((phase for phase in ('dkv', 'dq') if f'_{phase}' in inst.name), '')
  suffix = f'_{phase}' if phase else ''
  block = lambda side: re.search(rf'\bblock_{side}{suffix}\W*:\s*(\d+)', inst.attributes)
  found = [block(side) for side in ('q', 'kv')]
  return *(int(match.group(1)) if match else 512 for match in found), bool(phase)
