"""Ahead-of-time plans: what is read from a compiled program, and plans through the child."""

import importlib.util
import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel import topology
from hrvlm_jax.parallel.compiler import compiler_options
from hrvlm_jax.parallel.flops import count_flops
from hrvlm_jax.planning import compilation, hlo, memory, plan, report, search

REPO = pathlib.Path(__file__).resolve().parents[2]
TARGET = 'tests.parallel.programs:transformer'
SIZE = {'depth': 3, 'width': 64, 'heads': 2, 'batch': 8, 'length': 16}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
  """The child must find the target, which lies in the tests."""
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(REPO), os.environ.get('PYTHONPATH', '')]))


# --- reading programs ----------------------------------------------------------------------------

# Cut down from a program that libtpu compiled: a loop without annotation, a message that appears in
# two fusions, a fused reduce-scatter, three ways of writing groups.
TPU_TEXT = pathlib.Path(__file__).with_name('tpu_program.txt').read_text()


def test_a_tpu_program():
  module = hlo.Module.parse(TPU_TEXT)
  assert module.entry == 'main.6_spmd' and module.unknown_loops == 0
  assert module.times['body'] == 6 and module.times['condition'] == 7
  found = {m.kind: m for m in module.collectives()}
  assert len(module.collectives()) == 4  # the gather in two fusions is one message
  gather = found['all-gather']
  assert (gather.bytes, gather.group, gather.times) == (1024 * 512 * 2, 4, 6)
  assert gather.wire_bytes == gather.bytes * 3 / 4
  scatter = found['reduce-scatter']
  assert (scatter.bytes, scatter.wire_bytes) == (128 * 1024 * 2, 128 * 1024 * 2 * 3)
  assert (found['all-reduce'].group, found['all-reduce'].times) == (8, 1)
  assert found['collective-permute'].bytes == 8 * 4 * 2
  assert module.matrix_flops() == 6 * 2 * 512 * 512 * 1024


def test_a_product_in_pieces_while_a_message_runs_beside_it():
  """libtpu: two of eight pieces a turn, and a gather that starts before and ends after the loop."""
  gather = lambda n: (f'%g.{n} = bf16[64,8] all-gather(%p.{n}), channel_id=6, '
                      'replica_groups={{0,1,2,3,4,5,6,7}}, frontend_attributes={chain_id="1"}')
  beside = lambda n: f"""
%async_collective_fusion.{n} (p.{n}: bf16[8,8]) -> bf16[64,8] {{
  %p.{n} = bf16[8,8] parameter(0)
  ROOT {gather(n)}
}}
"""
  text = beside(1) + beside(2) + beside(3) + """
%pieces (arg: (u32[], bf16[8,8])) -> (u32[], bf16[8,8]) {
  %arg = (u32[]{:T(128)}, bf16[8,8]) parameter(0)
  %two = u32[] constant(2)
  %i = u32[] get-tuple-element(%arg), index=0
  %x = bf16[8,8] get-tuple-element(%arg), index=1
  %f2 = bf16[64,8] fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
  %y = bf16[8,8] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %moved = bf16[8,8] collective-permute(%y), channel_id=7, source_target_pairs={{0,1},{1,0}}
  %next = u32[] add(%i, %two)
  ROOT %out = (u32[], bf16[8,8]) tuple(%next, %moved)
}

%more (arg.1: (u32[], bf16[8,8])) -> pred[] {
  %eight = u32[] constant(8)
  %arg.1 = (u32[], bf16[8,8]) parameter(0)
  %j = u32[] get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[] compare(%j, %eight), direction=LT
}

ENTRY %main (a: bf16[8,8]) -> bf16[64,8] {
  %a = bf16[8,8] parameter(0)
  %zero = u32[] constant(0)
  %f1 = bf16[64,8] fusion(%a), kind=kCustom, calls=%async_collective_fusion.1
  %init = (u32[], bf16[8,8]) tuple(%zero, %a)
  %loop = (u32[], bf16[8,8]) while(%init), condition=%more, body=%pieces
  ROOT %f3 = bf16[64,8] fusion(%a), kind=kCustom, calls=%async_collective_fusion.3
}
"""
  module = hlo.Module.parse(text)
  assert module.unknown_loops == 0 and module.times['pieces'] == 4
  assert {m.kind: m.times for m in module.collectives()} == {
    'all-gather': 1, 'collective-permute': 4}
  assert module.matrix_flops() == 4 * 2 * 8 * 8 * 8


def test_messages_between_slices():
  module = hlo.Module.parse(TPU_TEXT)
  slice_of = [0] * 8 + [1] * 8
  crossing = {m.kind: m.crosses for m in module.collectives(slice_of)}
  assert crossing == {
    'all-gather': False,  # {0,2,4,6}, {8,10,12,14}, ...
    'reduce-scatter': False,  # [8,2] transposed: {0,2,4,6}, ...
    'all-reduce': True,  # axis_0 of 8 x 2: {0,2,...,14}
    'collective-permute': False,
  }


@pytest.mark.parametrize(
  'window, labels, left, right, result, flops',
  [
    # One matrix product; then a batch of 2 x 8 of them, written in the two ways of libtpu.
    ('size=1', '0bf_io0->0bf', (1, 512, 1024), (1024, 256, 1), (1, 512, 256), 2 * 512 * 1024 * 256),
    ('size=2x8 stride=1x7 lhs_dilate=2x8', '0b1f_0o1i->01bf', (2, 512, 8, 128), (2, 512, 8, 128),
     (2, 8, 512, 512), 2 * 16 * 512 * 512 * 128),
    ('size=1x8 pad=0_0x7_7 rhs_reversal=0x1', '0bf1_1oi0->0b1f', (2, 512, 1024, 1),
     (8, 128, 1024, 1), (2, 512, 8, 128), 2 * 2 * 512 * 1024 * 1024),
    # An image: 14 x 14 patches of 3 channels, then a 3 x 3 convolution with padding.
    ('size=14x14 stride=14x14', 'b01f_01io->b01f', (1, 28, 28, 3), (14, 14, 3, 64), (1, 2, 2, 64),
     2 * 4 * 64 * 14 * 14 * 3),
    ('size=3x3 pad=1_1x1_1', 'b01f_01io->b01f', (1, 4, 4, 8), (3, 3, 8, 8), (1, 4, 4, 8),
     2 * 8 * 8 * (3 * 4 - 2) ** 2),
  ],
)  # fmt: skip
def test_products_on_tpu_are_convolutions(window, labels, left, right, result, flops):
  kind = lambda dims: f'bf16[{",".join(map(str, dims))}]'
  text = f"""
ENTRY %main (a: {kind(left)}, b: {kind(right)}) -> {kind(result)} {{
  %a = {kind(left)} parameter(0)
  %b = {kind(right)} parameter(1)
  ROOT %c = {kind(result)} convolution(%a, %b), window={{{window}}}, dim_labels={labels}
}}
"""
  assert hlo.Module.parse(text).matrix_flops() == flops


def test_a_cpu_program_counts_loops_within_loops():
  def nested(x, w):
    inner = lambda x, _: (jnp.tanh(x @ w), None)
    outer = lambda x, _: (jax.lax.scan(inner, x, None, length=3)[0], None)
    return jax.lax.scan(outer, x, None, length=5)[0]

  x, w = (jax.ShapeDtypeStruct((n, 32), jnp.float32) for n in (16, 32))
  module = hlo.Module.parse(jax.jit(nested).lower(x, w).compile().as_text())
  assert module.unknown_loops == 0
  assert module.matrix_flops() == count_flops(nested, x, w) == 15 * 2 * 16 * 32 * 32


def test_loops_of_unknown_length_are_counted_and_said():
  def until(x):
    return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ x, x)

  x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
  assert hlo.Module.parse(jax.jit(until).lower(x).compile().as_text()).unknown_loops == 1


# --- operations before compilation ---------------------------------------------------------------


def test_count_flops():
  w, x = jax.ShapeDtypeStruct((32, 64), jnp.float32), jax.ShapeDtypeStruct((4, 16, 32), jnp.float32)
  product = 2 * 4 * 16 * 32 * 64
  f = lambda w, x: jnp.sum(x @ w)
  assert count_flops(f, w, x) == product
  assert count_flops(jax.grad(f, argnums=(0, 1)), w, x) == 3 * product
  assert count_flops(jax.grad(f, argnums=0), w, x) == 2 * product  # a frozen input
  assert (
    count_flops(jax.grad(jax.checkpoint(lambda w, x: jnp.sum(jnp.sin(x @ w)))), w, x) == 3 * product
  )
  branch = lambda w, x: jax.lax.cond(x[0, 0, 0] > 0, lambda: jnp.sum(x @ w), lambda: 0.0)
  assert count_flops(branch, w, x) == product
  conv = lambda k, x: jax.lax.conv_general_dilated(
    x, k, (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=8
  )
  image = jax.ShapeDtypeStruct((2, 10, 10, 8), jnp.float32)
  assert (
    count_flops(conv, jax.ShapeDtypeStruct((3, 3, 1, 8), jnp.float32), image) == 2 * 2 * 64 * 8 * 9
  )


# --- plans ---------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def gpu_report():
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('PYTHONPATH', str(REPO))
    return plan.plan(TARGET, SIZE, 'gpu:8', mesh={'data': 2, 'fsdp': 2, 'tensor': 2})


def test_plan_for_gpus_is_labelled_an_estimate(gpu_report):
  assert gpu_report['memory']['kind'].startswith('estimate')
  assert gpu_report['devices'] == 8 and gpu_report['mesh']['tensor'] == 2
  # 12 width^2 numbers a layer over fsdp x tensor, and the batch over data x fsdp.
  parameters = 3 * 12 * 64 * 64 * 4 / 4
  assert gpu_report['memory']['bytes_per_device']['arguments'] == parameters + 8 * 16 * 64 * 4 / 4
  assert gpu_report['memory']['fits'] is True
  assert gpu_report['model_flops'] == 3 * 3 * (2 * 12 * 64 * 64 + 4 * 16 * 64) * 8 * 16
  kinds = set(gpu_report['collectives_per_device'])
  assert 'all-gather' in kinds and 'all-reduce' in kinds
  assert json.loads(json.dumps(gpu_report)) == gpu_report


def test_report_for_people(gpu_report):
  text = report.describe(gpu_report)
  words = ['1 x h100:8: 8 chips', 'mesh data=2 fsdp=2 tensor=2', '3 layers of width 64', 'fits']
  for part in [*words, 'messages per device', 'predicted MFU', 'assumed:', 'estimate']:
    assert part in text


def test_compiler_options_are_known_to_the_compiler():
  # Any backend refuses names and values that XLA does not know; those of TPUs only libtpu knows.
  for platform in ('cpu', 'gpu'):
    options = compiler_options(platform)
    assert jax.jit(lambda x: x + 1, compiler_options=options or None)(1) == 2
  assert compiler_options('h100') == compiler_options('gpu') and not compiler_options('cpu')


def test_roofline_arithmetic():
  chips = topology.parse('v5e:4x4')
  used = {'arguments': 819e9, 'outputs_not_donated': 0, 'temporaries': 0}
  messages = {
    'all-gather': {'wire_bytes': 50e9},
    'all-reduce between slices': {'wire_bytes': 6.25e9},
  }
  seconds, assumed = report.roofline(chips, executed=197e12 * 0.75 * 2, memory=used,
                                     messages=messages)
  expected = {'matrix': 2.0, 'memory': 1.0, 'links': 0.5, 'between_slices': 1.0}
  assert {k: pytest.approx(v) for k, v in seconds.items()} == expected and assumed


def test_plan_for_a_tpu_needs_its_compiler(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='needs libtpu'):
    plan.plan(TARGET, SIZE, 'v5e:2x2', mesh={})


def test_out_of_memory_is_an_answer():
  text = 'RESOURCE_EXHAUSTED: ... Ran out of memory in memory space hbm. Used 20.12G of 15.75G hbm.'
  found = memory.of_refusal(text, 5)
  assert found['total'] == int(20.12 * 2**30) and found['usable'] == int(15.75 * 2**30)
  text = ('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
          'temporaries (118.15G) exceeds available HBM (15.75G).')  # fmt: skip
  found = memory.of_refusal(text, 5)
  assert found['temporaries'] == int(118.15 * 2**30) and found['usable'] == int(15.75 * 2**30)
  assert found['total'] == found['temporaries'] + 5
  assert memory.of_refusal('something else', 5) is None


def test_memory_of_a_program_without_code():
  text = 'Memory Space: default (color=0)\nTotal bytes: 1200 (0.00MiB)\n  cumulative_size; size\n'
  found = memory.of_report(text, 1000)
  assert (found['arguments'], found['temporaries']) == (1000, 200)
  assert found['total'] == 1200 + memory.PROGRAM_ALLOWANCE
  with pytest.raises(ValueError, match='no total'):
    memory.of_report('nothing', 1)


def test_memory_is_what_the_compiler_gave_the_program():
  parts = {'arguments': 100 << 20, 'outputs_not_donated': 0, 'temporaries': 999 << 20,
           'program': 10 << 20, 'total': 1109 << 20}  # fmt: skip
  log = 'I1 a.cc:1] XLA::TPU program HBM usage: 190.50M / 15.75G\n'
  assert memory.of_log(parts, log) == parts | {
    'temporaries': int(180.5 * 2**20), 'total': int(290.5 * 2**20),
    'usable': int(15.75 * 2**30)}
  assert memory.of_log(parts, 'nothing') == parts


def test_arguments_beyond_the_memory_are_not_compiled(monkeypatch, tmp_path):
  monkeypatch.setattr(jax.stages.Lowered, 'compile', None)  # calling it would fail
  request = {'target': TARGET, 'options': {'depth': 8, 'width': 2**15}, 'topology': 'gpu:1',
             'slices': 1, 'mesh': {'data': 1}, 'compiler': {}}
  answer = compilation.compile_step(request, tmp_path)
  known = json.loads((tmp_path / compilation.TRACED).read_text())
  spent = {'effort': 'scheduled', 'compile_seconds': 1, 'compile_cpu_seconds': 1}
  found = report.build(topology.parse('gpu:1'), known | spent, answer['memory'], text=None,
                       reading=None)
  assert not found['memory']['fits'] and 'step' not in found
  state = 12 * 8 * 2**30 * 4  # twelve kernels' worth of 2^15 x 2^15 a layer, float32
  assert found['memory']['bytes_per_device']['total'] == state + 16 * 128 * 2**15 * 4
  assert 'DOES NOT FIT' in report.describe(found)
  assert report.verdict(found).startswith('does not fit')


@pytest.mark.parametrize(
  'target, options, topo, mesh, sentence',
  [
    (TARGET, SIZE | {'wrong': True}, 'gpu:2', {}, 'the options were wrong'),
    (TARGET, SIZE, 'gpu:2', {'data': 3}, r'which is not the 2 device'),
    (TARGET, SIZE, 'nowhere', {}, 'expected CHIP:AxB'),
  ],
)
def test_user_errors_come_through(target, options, topo, mesh, sentence):
  with pytest.raises(UserError, match=sentence):
    plan.plan(target, options, topo, mesh=mesh)


def test_faults_show_the_end_of_the_log():
  with pytest.raises(RuntimeError, match='a fault of the library'):
    plan.plan('tests.parallel.programs:fails', {}, 'gpu:2', mesh={})


def test_search_takes_the_fastest_that_fits(monkeypatch):
  def fake(target, options, topology, *, mesh, slices):
    if mesh['fsdp'] == 1:
      raise UserError('cannot shard')
    rate = {2: 10.0, 4: 20.0, 8: 30.0}[mesh['fsdp']]
    used = {'fits': mesh['fsdp'] != 8, 'usable_bytes': 1, 'bytes_per_device': {'total': 2}}
    return {'memory': used, 'examples_per_second': rate, 'mesh': mesh, 'step': {
      'seconds': 1.0, 'likely_seconds': 1.2, 'mfu': 0.5, 'likely_mfu': 0.4}}

  monkeypatch.setattr(plan, 'plan', fake)
  said = []
  meshes = [{'data': 8 // f, 'fsdp': f} for f in (1, 2, 4, 8)]
  found = search.Search(TARGET, {}, topology.parse('gpu:8'), say=said.append)
  best = found.best(meshes, trains=False)
  assert best['mesh'] == {'data': 2, 'fsdp': 4}
  assert len(found.reports) == 4 and 'cannot shard' in said[0] and 'does not fit' in said[3]
  assert 'data=2 fsdp=4' in said[2] and '1.000 to 1.200 s' in said[2]


def test_mesh_candidates_cover_all_devices():
  for text in ('v5e:16x16', 'v5p:4x4x4', 'tpu7x:2x2x1', 'gpu:1'):
    found = topology.parse(text, slices=2)
    candidates = search.mesh_candidates(found)
    assert candidates
    assert all(math.prod(mesh.values()) == found.devices for mesh in candidates)
    assert len({tuple(mesh.values()) for mesh in candidates}) == len(candidates)
