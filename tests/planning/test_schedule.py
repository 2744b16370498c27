"""Scheduled programs of known cost: written by hand, and compiled by libtpu (programs/)."""

import lzma
import math
import pathlib

import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.planning import explain, schedule
from hrvlm_jax.planning.costs import costs
from hrvlm_jax.planning.cycles import GROUPS, Kind, splash_blocks
from hrvlm_jax.planning.hlo import Module
from hrvlm_jax.planning.traffic import Traffic, memory_bytes, stored_bytes

STORED = pathlib.Path(__file__).with_name('programs')
V5E = costs('v5e')
CLOCK, HBM, PEAK = 1.5e9, 819e9, 131072
OVERHEAD = 300
RING, LATENCY, HOP = 100e9, 2e-6, 0.5e-6
TILED = '{1,0:T(8,128)(2,1)}'


def program(entry: str, *others: str, partitions: int = 1) -> str:
  head = f'HloModule m, is_scheduled=true, num_partitions={partitions}\n\n'
  return head + '\n\n'.join([*others, f'ENTRY %main () -> f32[] {{\n{entry}\n}}']) + '\n'


def read(entry: str, *others: str, chip: str = 'v5e', partitions: int = 1) -> schedule.Reading:
  return schedule.read(program(entry, *others, partitions=partitions), chip)


def stored(name: str) -> str:
  return lzma.decompress((STORED / f'{name}.txt.xz').read_bytes()).decode()


def kinds(reading) -> dict[Kind, float]:
  return {name: cycles for name, cycles, *_ in schedule.by(reading, lambda c: c.cost.kind)}


def product(name: str, m: int, k: int, n: int, extra: str = '') -> str:
  """m x k times k x n, both sides on the chip, so that only the matrix unit counts."""
  near = '{1,0:T(8,128)(2,1)S(1)}'
  return (f'  %l.{name} = bf16[{m},{k}]{near} parameter(0)\n'
          f'  %r.{name} = bf16[{k},{n}]{near} parameter(1)\n'
          f'  %{name} = bf16[{m},{n}]{near} convolution(%l.{name}, %r.{name}), '
          f'dim_labels=bf_io->bf{extra}')


def seconds_of(reading) -> float:
  return reading.cycles / CLOCK


def dense(m, k, n) -> float:
  return 2 * m * k * n / PEAK / 0.92 + OVERHEAD


# --- work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'sides, padded',
  [
    ((4096, 2048, 8192), (4096, 2048, 8192)),
    ((4096, 1024, 4096), (4096, 1024, 4096)),
    ((1024, 72, 1024), (1024, 128, 1024)),  # a narrow head is padded to the unit
    # The 729 rows stream (to 736), the 1152 stay.
    ((729, 1152, 1152), (736, 1152, 1152)),
    ((8, 4096, 100), (8, 4096, 128)),  # 8 rows stream past 100 columns
    ((100, 4096, 8), (128, 4096, 8)),
  ],
)
def test_products_are_padded_to_the_matrix_unit(sides, padded):
  reading = read(product('p', *sides))
  assert reading.cycles == pytest.approx(dense(*padded))
  assert reading.flops == 2 * math.prod(sides)


def test_the_ideal_cycles_of_the_known_product():
  reading = read(product('p', 4096, 2048, 8192))
  assert (reading.cycles - OVERHEAD) * 0.92 == pytest.approx(1.049e6, rel=1e-3)
  reading = read(product('p', 4096, 1024, 4096))
  assert (reading.cycles - OVERHEAD) * 0.92 == pytest.approx(262e3, rel=1e-3)
  twice = read(product('p', 4096, 2048, 8192), chip='v5p')
  assert (twice.cycles - OVERHEAD) * 0.92 == pytest.approx(1.049e6 / 2, rel=1e-3)


def test_a_product_takes_the_compilers_cycles_but_not_less_than_its_memory():
  stated = lambda cycles: f', backend_config={{"estimated_cycles":"{cycles}"}}'
  reading = read(product('p', 128, 128, 128, stated(777)))
  assert reading.cycles == 777 and reading.charges[0].cost.estimated
  assert reading.likely_seconds == reading.seconds
  far = product('p', 128, 128, 128, stated(1)).replace('S(1)', '')
  assert read(far).cycles == pytest.approx(3 * 128 * 128 * 2 / HBM * CLOCK)
  # For other work the compiler's number is useless.
  text = f'  %a = f32[1024,1024]{TILED} parameter(0)\n  %b = f32[1024,1024]{TILED} negate(%a)'
  assert read(text + stated(5)).cycles == read(text).cycles


def test_element_wise_work_is_bound_by_memory():
  body = """%fused (p: bf16[8192,8192], q: bf16[8192,8192]) -> bf16[8192,8192] {
  %p = bf16[8192,8192]@ parameter(0)
  %q = bf16[8192,8192]@ parameter(1)
  %two = bf16[] constant(2)
  %twos = bf16[8192,8192]@ broadcast(%two)
  %m = bf16[8192,8192]@ multiply(%p, %twos)
  ROOT %s = bf16[8192,8192]@ add(%m, %q)
}""".replace('@', TILED)
  entry = f"""  %a = bf16[8192,8192]{TILED} parameter(0)
  %b = bf16[8192,8192]{TILED} parameter(1)
  ROOT %f = bf16[8192,8192]{TILED} fusion(%a, %b), kind=kLoop, calls=%fused"""
  reading = read(entry, body)
  moved = 3 * 8192 * 8192 * 2
  assert reading.memory_bytes == moved
  assert reading.cycles == pytest.approx(moved / HBM / 0.9 * CLOCK + OVERHEAD)
  assert reading.cycles == pytest.approx(820e3, rel=1e-3)
  # On the chip the vector units are the bound: 2 operations on 65536 registers, 3.4 a cycle.
  near = read(entry.replace('(2,1)}', '(2,1)S(1)}'), body)
  assert near.cycles == pytest.approx(2 * 8192 * 8192 / 1024 / 3.4 + OVERHEAD)
  assert near.memory_bytes == 0


def test_arrays_are_padded_to_their_tiles():
  assert stored_bytes('bf16[16,729,72]{2,1,0:T(8,128)(2,1)}') == 16 * 736 * 128 * 2
  assert stored_bytes('bf16[16,72,729]{1,2,0:T(8,128)(2,1)}') == 16 * 128 * 736 * 2
  assert stored_bytes('f32[100]{0:T(128)}') == 400
  assert memory_bytes('(f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)})') == 4096


def test_a_fusion_reads_slices_and_writes_in_place():
  deep = '{2,1,0:T(8,128)(2,1)}'
  body = f"""%fused (p: bf16[32,1024,1024], q: bf16[1,1024,1024]) -> bf16[32,1024,1024] {{
  %p = bf16[32,1024,1024]{deep} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[32,1024,1024]{deep} parameter(2)
  %s = bf16[1,1024,1024]{deep} dynamic-slice(%x, %i, %i, %i), dynamic_slice_sizes={{1,1024,1024}}
  ROOT %u = bf16[32,1024,1024]{deep} dynamic-update-slice(%p, %s, %i, %i, %i)
}}"""
  entry = f"""  %a = bf16[32,1024,1024]{deep} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[32,1024,1024]{deep} parameter(2)
  ROOT %f = bf16[32,1024,1024]{deep} fusion(%a, %i, %x), kind=kLoop, calls=%fused"""
  module = Module.parse(program(entry, body))
  fusion = module.computations['main'][-1]
  assert Traffic(module).bytes('main', fusion) == 2 * 1024 * 1024 * 2  # an index costs nothing
  assert set(kinds(read(entry, body))) == {Kind.STACK}


# --- control -------------------------------------------------------------------------------------


def loop(name: str, body: str, trips: int) -> tuple[str, str]:
  condition = f"""%{name}_more (c: (s32[])) -> pred[] {{
  %c = (s32[]) parameter(0)
  %n = s32[] constant({trips})
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}"""
  return condition, f'%{name} (b: (s32[])) -> (s32[]) {{\n{body}\n}}'


def test_loops_count_their_trips_also_within_each_other():
  work = product('p', 512, 512, 512)
  one = read(work).cycles
  call = lambda name: (f'  %w.{name} = (s32[]) while(%z), condition=%{name}_more, body=%{name}')
  ten = read(call('a'), *loop('a', work, 10))
  assert ten.cycles == pytest.approx(10 * one) and ten.flops == 10 * 2 * 512**3
  nested = read(call('a'), *loop('a', call('b') + '\n' + work, 10), *loop('b', work, 3))
  assert nested.cycles == pytest.approx(40 * one)
  annotated = ', backend_config={"known_trip_count":{"n":"7"}}'
  assert read(call('a') + annotated, *loop('a', work, 10)).cycles == pytest.approx(7 * one)
  unknown = read(call('a'), *(part.replace('LT', 'NE') for part in loop('a', work, 10)))
  assert unknown.unknown_loops == 1 and unknown.cycles == pytest.approx(one)
  assert 'TOO LOW' in explain.describe(unknown)


@pytest.mark.parametrize('attributes', ['branch_computations={%small, %large, %small}',
                                        'true_computation=%large, false_computation=%small'])
def test_the_dearest_branch_counts(attributes):
  branch = lambda name, n: f'%{name} (x: f32[]) -> f32[] {{\n{product(name, n, n, n)}\n}}'
  reading = read(f'  %c = f32[] conditional(%i, %x, %y), {attributes}',
                 branch('small', 256), branch('large', 1024))
  assert reading.cycles == pytest.approx(dense(1024, 1024, 1024))
  assert [charge.instruction.name for charge in reading.charges] == ['large']


# --- messages and copies -------------------------------------------------------------------------

GATHER = 'bf16[1024,1024]{1,0:T(8,128)(2,1)}'
GROUP = "replica_groups=mesh['x'=4,'y'=16], device_ids=([16,4]T(1,0)) {'y'}"


def gather_seconds(size=1024 * 1024 * 2, group=16) -> float:
  return size * (group - 1) / group / RING + LATENCY + group / 2 * HOP


def test_a_synchronous_message_blocks():
  reading = read(f'  %a = bf16[64,1024]{TILED} parameter(0)\n'
                 f'  %g = {GATHER} all-gather(%a), channel_id=1, {GROUP}, dimensions={{0}}',
                 partitions=64)
  assert seconds_of(reading) == pytest.approx(gather_seconds())
  assert kinds(reading) == {Kind.MESSAGE: pytest.approx(gather_seconds() * CLOCK)}
  [message] = reading.messages
  assert (message.group, message.how, message.bytes) == (16, 'synchronous', 2 << 20)
  assert message.wire_bytes == (2 << 20) * 15 / 16


def test_an_all_reduce_goes_round_twice_and_a_reduce_scatter_once():
  size, group = 1024 * 1024 * 2, 16
  whole = read(f'  %a = {GATHER} parameter(0)\n  %g = {GATHER} all-reduce(%a), channel_id=1, '
               f'{GROUP}, to_apply=%add', partitions=64)
  assert seconds_of(whole) == pytest.approx(
    2 * size * 15 / 16 / RING + LATENCY + group * HOP)
  body = f"""%all-reduce-scatter.1 (i: bf16[1024,1024]) -> bf16[64,1024] {{
  %i = {GATHER} parameter(0)
  %r = {GATHER} all-reduce(%i), channel_id=9, {GROUP}, to_apply=%add
  ROOT %s = bf16[64,1024]{TILED} dynamic-slice(%r, %z, %z), dynamic_slice_sizes={{64,1024}}
}}"""
  part = read(f'  %a = {GATHER} parameter(0)\n  %f = bf16[64,1024]{TILED} fusion(%a), '
              'kind=kCustom, calls=%all-reduce-scatter.1', body, partitions=64)
  assert seconds_of(part) == pytest.approx(size / 16 * 15 / RING + LATENCY + group / 2 * HOP)
  assert part.messages[0].kind == 'reduce-scatter' and set(kinds(part)) == {Kind.MESSAGE}
  assert part.messages[0].how == 'synchronous'  # nothing runs beside it
  assert explain.summary(part)['synchronous_bytes'] == size / 16


def started(middle: str, *, finish: bool = True) -> schedule.Reading:
  done = f'\n  %d = {GATHER} all-gather-done(%s)' if finish else ''
  return read(f'  %a = bf16[64,1024]{TILED} parameter(0)\n'
              f'  %s = (bf16[64,1024]{TILED}, {GATHER}) all-gather-start(%a), channel_id=1, '
              f'{GROUP}, dimensions={{0}}\n{middle}{done}', partitions=64)


def test_an_asynchronous_message_hides_behind_work():
  long, short = product('p', 4096, 2048, 2048), product('p', 512, 512, 512)
  assert started(long).cycles == read(long).cycles > gather_seconds() * CLOCK
  exposed = started(short)
  assert seconds_of(exposed) == pytest.approx(gather_seconds())
  assert kinds(exposed)[Kind.MESSAGE_WAIT] == pytest.approx(
    gather_seconds() * CLOCK - read(short).cycles)
  assert exposed.messages[0].how == 'asynchronous'


def test_a_message_that_is_never_finished_is_charged():
  short = product('p', 512, 512, 512)
  reading = started(short, finish=False)
  assert seconds_of(reading) == pytest.approx(gather_seconds())
  assert kinds(reading)[Kind.MESSAGE_LEFT] > 0


def test_messages_wait_for_each_other():
  text = '\n'.join(
    f'  %s{i} = (bf16[64,1024]{TILED}, {GATHER}) all-gather-start(%a), channel_id={i}, {GROUP}'
    for i in range(3)) + f'\n  %d = {GATHER} all-gather-done(%s2)'
  reading = read(f'  %a = bf16[64,1024]{TILED} parameter(0)\n{text}', partitions=64)
  assert seconds_of(reading) == pytest.approx(3 * gather_seconds())


def between(middle: str = '', *, kind: str = 'ALL_REDUCE', slices: str = '1,2') -> str:
  """A message between slices as libtpu writes it: sent to the host, received from it."""
  array = 'bf16[1024,8,128]{2,1,0:T(8,128)(2,1)}'
  how = ('is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name='
         '"xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.48_0",'
         f'_xla_megascale_target="{{{slices}}}x{{0:3}}",_xla_megascale_transfer_type="{kind}"}}')
  return f"""  %a = {array} parameter(0)
  %z = token[] after-all()
  %s = ({array}, u32[], token[]) send(%a, %z), channel_id=2, {how}
{middle}
  %r = ({array}, u32[], token[]) recv(%z), channel_id=1, {how}
  %x = token[] send-done(%s), channel_id=2, is_host_transfer=true
  %d = ({array}, token[]) recv-done(%r), channel_id=1, is_host_transfer=true"""


def test_messages_between_slices_pass_the_slow_network():
  size = 1024 * 8 * 128 * 2
  reading = read(between())
  # Two slices: each sends half and receives half twice.
  assert seconds_of(reading) == pytest.approx(2 * size / 2 / 6.25e9 + LATENCY)
  assert set(kinds(reading)) == {Kind.BETWEEN}
  [message] = reading.messages
  assert (message.kind, message.group, message.times) == ('all-reduce between slices', 2, 1)
  four = read(between(slices='1,2,3,4'))
  assert seconds_of(four) == pytest.approx(2 * size * 3 / 4 / 6.25e9 + LATENCY)
  assert read(between(kind='ALL_GATHER')).messages[0].kind == 'all-gather between slices'
  # Work hides it; the reader of v6e knows a faster network.
  work = product('p', 4096, 2048, 8192)
  hidden = read(between(work))
  assert hidden.cycles == pytest.approx(max(read(work).cycles, reading.cycles))
  assert read(between(), chip='v6e').seconds < 0.6 * reading.seconds
  # What goes to the host alone is no message between slices.
  assert not read(between().replace('_xla_megascale', '_other')).messages


@pytest.mark.parametrize('middle, waits', [(512, True), (4096, False)])
def test_a_prefetch_is_waited_for(middle, waits):
  work = product('p', middle, 1024, 1024)
  kind = 'bf16[4096,2048]{1,0:T(8,128)(2,1)'
  reading = read(f'  %a = {kind}}} parameter(0)\n'
                 f'  %s = ({kind}S(1)}}, {kind}}}, u32[]{{:S(2)}}) copy-start(%a)\n{work}\n'
                 f'  %d = {kind}S(1)}} copy-done(%s)')
  copy = 4096 * 2048 * 2 / HBM * CLOCK
  assert reading.prefetched == reading.memory_bytes == 4096 * 2048 * 2
  assert reading.cycles == pytest.approx(max(copy, read(work).cycles))
  assert (Kind.DMA_WAIT in kinds(reading)) == waits


def test_work_and_prefetches_share_the_memory():
  """Each alone would take its own time; both at once take the time of all that is moved."""
  kind = f'bf16[4096,2048]{TILED}'
  near = kind.replace('(2,1)}', '(2,1)S(1)}')
  copy = lambda: (f'  %a = {kind} parameter(0)\n'
                  f'  %s = ({near}, {kind}, u32[]{{:S(2)}}) copy-start(%a)\n')
  size = 4096 * 2048 * 2
  work = f'  %b = {kind} parameter(1)\n  %w = {kind} negate(%b)\n'  # reads and writes as much
  reading = read(f'{copy()}{work}  %d = {near} copy-done(%s)')
  assert reading.memory_bytes == 3 * size
  assert reading.seconds >= reading.memory_bound == pytest.approx(3 * size / HBM)
  left = kinds(reading)[Kind.MEMORY]
  assert left == pytest.approx(reading.cycles - read(work).cycles, rel=1e-6)
  # Where products take longer than all that is moved nothing is added.
  long = read(f'{copy()}{product("p", 4096, 1024, 1024)}\n  %d = {near} copy-done(%s)')
  assert Kind.MEMORY not in kinds(long)


def carried(work_turns: int, *, finish: bool = True) -> schedule.Reading:
  """A gather in fusions: started, beside products, finished."""
  body = lambda name, extra='': f"""%{name} (i: bf16[64,1024]) -> bf16[1024,1024] {{
  %i.{name} = bf16[64,1024]{TILED} parameter(0)
{extra}  %g.{name} = {GATHER} all-gather(%i.{name}), channel_id=6, {GROUP}, dimensions={{0}}
}}"""
  turns = [f'w{i}' for i in range(work_turns)]
  calls = ['  %async-collective-start = bf16[8] fusion(%a), kind=kCustom, calls=%begin']
  calls += [f'  %{name} = bf16[8] fusion(%a), kind=kOutput, calls=%{name}' for name in turns]
  if finish:
    calls.append('  %async-collective-done = bf16[8] fusion(%a), kind=kCustom, calls=%end')
  return read('  %a = bf16[64,1024] parameter(0)\n' + '\n'.join(calls), body('begin'),
              *(body(name, product(f'p{name}', 512, 512, 512) + '\n') for name in turns),
              body('end'), partitions=64)


def test_a_message_carried_in_fusions():
  turn = carried(1).charges[0].cycles
  travel = gather_seconds() * CLOCK
  for finish in (True, False):
    short = carried(2, finish=finish)
    assert short.cycles == pytest.approx(travel) and travel > 2 * turn
    assert len(short.messages) == 1 and short.messages[0].how == 'fused'
    left = kinds(short)[Kind.MESSAGE_WAIT if finish else Kind.MESSAGE_LEFT]
    assert left == pytest.approx(travel - 2 * turn)
  long = carried(40)
  assert long.cycles == pytest.approx(40 * turn) and set(kinds(long)) == {Kind.PRODUCT}


# --- kernels -------------------------------------------------------------------------------------


def kernel(name: str, operands: str, metadata: str = '', config: str = '') -> str:
  return (f'  %{name}.1 = bf16[8,8] custom-call({operands}), custom_call_target="tpu_custom_call", '
          'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{' + metadata + '}"\n}}'
          + config)


def test_a_kernel_by_the_operations_it_states():
  near = '{1,0:T(8,128)S(1)}'
  a = f'  %a = bf16[1024,1024]{near} parameter(0)\n'
  after = '\n' + product('p', 512, 512, 512)
  config = ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"131072000"}}}'
  reading = read(a + kernel('mine', '%a', config=config) + after)
  assert kinds(reading)[Kind.KERNEL] == pytest.approx(1000 / 0.55)
  assert kinds(reading)[Kind.PRODUCT] == pytest.approx(dense(512, 512, 512))
  assert not reading.guessed
  silent = read(a.replace('S(1)', '') + kernel('mine', '%a') + after)
  assert silent.guessed == {'tpu_custom_call': 1}
  assert kinds(silent)[Kind.KERNEL] == pytest.approx((2 * 1024 * 1024 + 128) / HBM * CLOCK)
  assert 'tpu_custom_call (1 x)' in explain.describe(silent)
  assert read(a + '  %b = bf16[8] custom-call(%a), custom_call_target="ConcatBitcast"').cycles == 0


def splash(name: str, *, behind: str = '', blocks: str, heads: int = 4, t: int = 4096,
           s: int = 4096, width: int = 128, chip: str = 'v5e') -> float:
  inputs = [('q', f'bf16[{heads},{t},{width}]'), ('k', f'bf16[{heads},{s},{width}]'),
            ('v', f'bf16[{heads},{s},{width}]'), ('x', f's32[{t},128]'), ('y', f's32[8,{s}]'),
            ('z', f's32[{t},128]'), ('n', 's8[1,4,4]')]
  text = '\n'.join(f'  %{n} = {kind} parameter({i})' for i, (n, kind) in enumerate(inputs))
  reading = read(f'{text}\n{kernel(name, "%n, %n, %q, %k, %v" + behind, blocks)}', chip=chip)
  assert set(kinds(reading)) == {Kind.ATTENTION_KERNEL} and not reading.guessed
  return reading.cycles


def test_splash_by_its_blocks_and_causal_steps():
  forward = r'\"block_q\": 1024, \"block_kv\": 1024, \"block_q_dkv\": 512, \"block_kv_dkv\": 512'
  step = 6087 * 1.10 + 350
  assert splash('splash_mha_fwd', blocks=forward) == pytest.approx(4 * 16 * step)
  segmented = 'splash_mha_fwd_segmented_residuals'
  assert splash(segmented, blocks=forward, behind=', %x, %y') == pytest.approx(4 * 16 * step)
  # Positions of the queries behind the segments: a causal mask, 1 + 2 + 3 + 4 of 16 steps.
  assert splash(segmented, blocks=forward, behind=', %x, %y, %z') == pytest.approx(4 * 10 * step)
  assert splash('splash_mha_fwd', blocks=forward, behind=', %z') == pytest.approx(4 * 10 * step)
  wide = splash('splash_mha_fwd', blocks=forward, width=256)
  assert wide == pytest.approx(4 * 16 * (2 * 6087 * 1.10 + 350))
  v5p = splash('splash_mha_fwd', blocks=forward, chip='v5p')
  assert v5p == pytest.approx(4 * 16 * (6087 * 1.10 / 2 + 350))
  backward = splash('splash_mha_dkv_no_residuals', blocks=forward)  # its own blocks, 512
  assert backward == pytest.approx(4 * 64 * (2946 * 1.10 + 350))


def test_splash_steps_between_known_blocks():
  assert V5E.splash_step(512, backward=False) == 2029 / 512**2
  assert V5E.splash_step(64, backward=True) == 867 / 128**2
  assert V5E.splash_step(2048, backward=True) == 10240 / 1024**2
  between = V5E.splash_step(256, backward=False)
  assert between == pytest.approx(math.sqrt(626 / 128**2 * 2029 / 512**2))


# --- programs that libtpu compiled ---------------------------------------------------------------


@pytest.mark.parametrize(
  'name, cycles',
  [('mm', 1.1385e6), ('ew', 0.8197e6), ('mx', 0.13285e6), ('scan1', 0.5653e6), ('scan10', 5.6048e6),
   ('fsdp', 3.5798e6)],
)  # fmt: skip
def test_compiled_programs_read_as_by_the_prototype(name, cycles):
  reading = schedule.read(stored(name), 'v5e')
  assert reading.cycles == pytest.approx(cycles, rel=1e-4) and not reading.unknown_loops


def test_compiled_products_are_near_their_ideal():
  reading = schedule.read(stored('mm'), 'v5e')
  assert kinds(reading)[Kind.PRODUCT] == pytest.approx(1.0771e6, rel=1e-4)  # 97 % of the peak
  assert kinds(reading)[Kind.DMA_WAIT] == pytest.approx(0.06e6, rel=0.05)
  [row] = [row for row in explain.summary(reading)['places'] if row['class'] == 'product']
  assert (row['file'], row['function']) == ('cases.py', '<lambda>') and row['line'] > 0
  # Without the compiler's numbers, as before code generation: 92 % of the peak.
  bare = schedule.read(stored('mm').replace('estimated_cycles', 'removed'), 'v5e')
  assert kinds(bare)[Kind.PRODUCT] == pytest.approx(dense(4096, 2048, 8192))
  assert bare.likely_seconds == pytest.approx(1.2 * bare.seconds)


def test_the_messages_of_a_compiled_mesh():
  reading = schedule.read(stored('fsdp'), 'v5e')
  table = {(row['kind'], row['how']): row for row in explain.summary(reading)['messages']}
  assert {row['group'] for row in table.values()} == {2}
  # 4 layers; a gather carried beside products is written into several fusions and counts once.
  assert table['all-gather', 'fused']['times'] == 8
  assert table['all-gather', 'fused']['bytes'] == 8 * 2048 * 1024 * 2
  assert table['all-reduce', 'synchronous']['times'] == 12


def test_a_compiled_splash_program():
  reading = schedule.read(stored('splash'), 'v5e')
  kernels = [c for c in reading.charges if c.cost.kind == Kind.ATTENTION_KERNEL]
  assert [splash_blocks(c.instruction) for c in kernels] == [(1024, 1024, False),
                                                            (1024, 1024, True)]
  assert all(c.cost.place.file and c.cost.place.line for c in kernels)
  # 2 rows x 2 heads x 3 of 4 steps.
  assert [c.cycles for c in kernels] == pytest.approx(
    [12 * (6087 * 1.10 + 350), 12 * (10240 * 1.10 + 350)])


@pytest.mark.parametrize('name', ['mm', 'fsdp', 'splash'])
def test_tables_add_up(name):
  found = explain.summary(schedule.read(stored(name), 'v5e'))
  for table in ('classes', 'sources', 'groups'):
    assert sum(row['seconds'] for row in found[table].values()) == pytest.approx(found['seconds'])
    assert sum(row['share'] for row in found[table].values()) == pytest.approx(1)
  assert found['seconds'] < found['likely_seconds'] <= 1.2 * found['seconds'] * (1 + 1e-9)
  assert len(found['places']) <= 10 and found['assumptions']
  products = found['groups'].get('products', {'share': 0})['share']
  assert found['beyond_products'] == pytest.approx(1 - products)


def test_every_class_has_a_group():
  assert sorted(kind for kinds in GROUPS.values() for kind in kinds) == sorted(Kind)


def test_mistakes():
  with pytest.raises(UserError, match='unknown chip v9.*v5e'):
    schedule.read(program('  %a = f32[] parameter(0)'), 'v9')
  with pytest.raises(UserError, match='is_scheduled'):
    schedule.read(program('  %a = f32[] parameter(0)').replace('is_scheduled=true, ', ''), 'v5e')
  with pytest.raises(UserError, match='no ENTRY'):
    schedule.read('not a program', 'v5e')
