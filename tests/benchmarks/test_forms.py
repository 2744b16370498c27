"""Holding both sides to instructions, and the forms of a peer, without a peer."""

import ctypes
import os
import subprocess
import sys

import pytest

from benchmarks.harness import contest, forms, isa, runner
from benchmarks.harness.case import Options, find_cases
from hrvlm_jax.cli import bench
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.machine import Machine, read

AVX512 = 'sse2 avx avx2 fma avx512f avx512bw avx512dq avx512vl'
ZEN5 = Machine('AMD', 26, 2, 'avx512', 2, bfloat16=True)
ZEN1 = Machine('AMD', 23, 1, 'avx2', 2, bfloat16=False)


@pytest.mark.parametrize('info, kind, title, bfloat16', [
  ({'vendor_id': 'AuthenticAMD', 'cpu family': '26', 'model': '2',
    'flags': f'{AVX512} avx512_bf16'},
   'amd-26-2-avx512-2c', 'AMD family 26 model 2, AVX-512, 2 cores', True),
  ({'vendor_id': 'AuthenticAMD', 'cpu family': '23', 'model': '1', 'flags': 'sse2 avx avx2 fma'},
   'amd-23-1-avx2-2c', 'AMD family 23 model 1, AVX2, 2 cores', False),
  ({'vendor_id': 'GenuineIntel', 'cpu family': '6', 'model': '143',
    'flags': f'{AVX512} avx512_bf16 amx_tile amx_bf16'},
   'intel-6-143-amx-2c', 'Intel family 6 model 143, AMX, 2 cores', True),
  # avx512f alone (Knights Landing) is not what libraries call AVX-512.
  ({'vendor_id': 'GenuineIntel', 'cpu family': '6', 'model': '87',
    'flags': 'sse2 avx avx2 fma avx512f'}, 'intel-6-87-avx2-2c', None, False),
  ({'CPU implementer': '0x41', 'CPU architecture': '8', 'CPU part': '0xd40',
    'Features': 'fp asimd sve bf16'}, 'arm-8-3392-sve-2c', None, True),
  ({'CPU implementer': '0x41', 'CPU architecture': '8', 'CPU part': '0xd0c',
    'Features': 'fp asimd'}, 'arm-8-3340-neon-2c', None, False)])
def test_machines_are_read(info, kind, title, bfloat16):
  machine = read(info, cores=2)
  assert (machine.kind, machine.bfloat16) == (kind, bfloat16)
  assert title is None or machine.title == title


def test_a_machine_that_tells_nothing_is_unknown():
  machine = read({}, cores=1)
  assert machine.isa == 'unknown' and machine.bfloat16 is None
  assert machine.title.endswith('unknown instructions, 1 core')


def test_both_sides_are_held_by_all_their_variables():
  held = isa.capped({'PATH': '/bin', 'XLA_FLAGS': '--xla_dump_to=x'}, 'avx2')
  assert held == {
    'PATH': '/bin', 'ONEDNN_MAX_CPU_ISA': 'AVX2', 'ATEN_CPU_CAPABILITY': 'avx2',
    'MKL_ENABLE_INSTRUCTIONS': 'AVX2', 'XLA_FLAGS': '--xla_dump_to=x --xla_cpu_max_isa=AVX2 '
    '--xla_cpu_experimental_ynn_fusion_type='}
  assert isa.capped(held, 'avx2') == held  # the same said by the user is no contradiction
  assert isa.capped({'PATH': '/bin'}, '') == {'PATH': '/bin'}


@pytest.mark.parametrize('cap, own', [
  ('avx2', {'ONEDNN_MAX_CPU_ISA': 'AVX512_CORE'}), ('avx2', {'ATEN_CPU_CAPABILITY': 'default'}),
  ('avx2', {'MKL_ENABLE_INSTRUCTIONS': 'SSE4_2'}), ('avx2', {'MKL_CBWR': 'COMPATIBLE'}),
  ('avx2', {'XLA_FLAGS': '--xla_a=1 --xla_cpu_max_isa=SSE4_2'}),
  ('', {'ATEN_CPU_CAPABILITY': 'avx2'}),
  ('avx2', {'XLA_FLAGS': '--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT'}),
  ('', {'XLA_FLAGS': '--xla_cpu_max_isa=AVX2'}), ('avx512', {'DNNL_MAX_CPU_ISA': 'AVX2'})])
def test_what_a_user_has_set_is_never_overwritten(cap, own):
  name, = own
  with pytest.raises(UserError, match=f'chooses instructions itself: .*unset {name}'):
    isa.capped(own, cap)


def test_a_machine_is_held_below_what_it_has():
  assert isa.check('avx2', ZEN5) == 'avx2' and isa.check('', ZEN5) == ''
  assert isa.check('avx512', ZEN5) == isa.check('avx2', ZEN1) == ''  # all that it has
  with pytest.raises(UserError, match='AMD family 23 model 1, AVX2, 2 cores. has not'):
    isa.check('avx512', ZEN1)


def test_sides_start_with_the_variables(tmp_path, monkeypatch):
  """What the two processes are started with, before Python reads anything."""
  seen, made = [], forms.preload(tmp_path)

  class Started:
    def __init__(self, command, env, **_):
      seen.append((command, env))

  monkeypatch.setattr(runner.subprocess, 'Popen', Started)
  monkeypatch.setenv('HRVLM_BENCH_SCRATCH', str(tmp_path))
  monkeypatch.setenv('LD_PRELOAD', 'own.so')
  runner.Process('python', 'ours', 'x', tmp_path, Options(), 'avx2')
  runner.Process('python', 'peer', 'x', tmp_path, Options(variant='eager-merged+mkl'), 'avx2')
  (_, ours), (command, peer) = seen
  for env in (ours, peer):
    assert env['ATEN_CPU_CAPABILITY'] == 'avx2' and '--xla_cpu_max_isa=AVX2' in env['XLA_FLAGS']
  assert ours['LD_PRELOAD'] == 'own.so'
  assert peer['LD_PRELOAD'] == f'{made} own.so'
  assert '"variant": "eager-merged"' in command[-1]


def test_wrong_instructions_are_refused_before_any_work(monkeypatch):
  monkeypatch.setattr(bench.machine, 'here', lambda: ZEN1)
  with pytest.raises(UserError, match='has not these instructions'):
    bench.main(['tiny_ps3_low', '--isa', 'avx512'])
  with pytest.raises(UserError, match='leave it out with --device cuda'):
    bench.main(['tiny_ps3_low', '--isa', 'avx2', '--device', 'cuda'])
  monkeypatch.setenv('MKL_CBWR', 'AVX2')
  with pytest.raises(UserError, match='unset MKL_CBWR'):
    bench.main(['tiny_ps3_low'])


def test_mkl_is_told_by_an_object_compiled_here(tmp_path):
  made = forms.preload(tmp_path)
  assert ctypes.CDLL(str(made)).mkl_serv_intel_cpu_true() == 1
  before = made.stat().st_mtime_ns
  assert forms.preload(tmp_path) == made and made.stat().st_mtime_ns == before
  # A process that has the function in a library of its own takes the preloaded one.
  code = 'import ctypes; print(ctypes.CDLL(None).mkl_serv_intel_cpu_true())'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={
    **os.environ, **forms.environment('eager+mkl', tmp_path)})
  assert done.stdout == '1\n', done.stderr
  assert forms.environment('eager', tmp_path) == {}


@pytest.mark.parametrize('used', ['told', 'as it comes'])
def test_both_sides_in_pytorch_are_told_alike(used, monkeypatch):
  """The code of an export is PyTorch too; ours in JAX has no MKL."""
  monkeypatch.setattr(contest, 'peer_products', lambda *_: {'used': used})
  monkeypatch.setattr(runner, 'peer_python', lambda _: 'python')
  ours = lambda name, **options: runner._our_form(find_cases()[name], runner.Settings(**options))
  expected = 'eager+mkl' if used == 'told' else 'eager'
  assert ours('torch_export_ps3_low') == ours('torch_export_ps3_low_jax') == expected
  assert ours('ps3_low') == ours('torch_export_ps3_low', device='cuda') == 'eager'
  assert ours('torch_export_ps3_low', variants=('eager+mkl',)) == 'eager+mkl'
  assert ours('torch_export_ps3_low', variants=('eager',)) == 'eager'


def test_without_a_compiler_the_form_is_skipped_in_words(tmp_path, monkeypatch):
  monkeypatch.delenv('CC', raising=False)
  with pytest.raises(forms.Skipped, match='set HRVLM_BENCH_SCRATCH to a folder without them'):
    forms.preload(tmp_path / 'with blanks')
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(forms.Skipped, match=r'no C compiler here .* install one, for example gcc'):
    forms.preload(tmp_path)
  monkeypatch.setenv('CC', '/bin/false')
  with pytest.raises(forms.Skipped, match='/bin/false failed'):
    forms.preload(tmp_path)
  said = []
  trial = lambda process, form: {'once_s': 1.0}
  start = lambda form: forms.environment(form, tmp_path) or Closed()
  best, tried, process = contest.best(['eager+mkl', 'eager'], start, trial, 'x', said.append)
  assert best == 'eager' and process is None and 'failed' in tried['eager+mkl']['skipped']
  assert 'MKL was not told' in said[0]


class Closed:
  def close(self):
    """Nothing to end."""


def test_the_fastest_form_is_compared_and_another_precision_is_not():
  times = {'eager': 3.0, 'onednn': 2.0, 'compile': UserError('no'), 'bfloat16': 1.0}

  def trial(process, form):
    if isinstance(times[form], Exception):
      raise times[form]
    return {'once_s': times[form]}

  best, tried, _ = contest.best(list(times), lambda form: Closed(), trial, 'x', lambda _: None)
  assert best == 'onednn' and tried['compile'] == {'failed': 'no'}
  assert tried['bfloat16'] == {'once_s': 1.0}
  times['compile'] = UserError('the answer differs')
  with pytest.raises(UserError, match='differs'):  # a wrong answer is no fact about speed
    contest.best(list(times), lambda form: Closed(), trial, 'x', lambda _: None)


def test_forms_follow_the_machine(monkeypatch):
  case = find_cases()['siglip_13']
  choose = lambda machine, used, cap='', asked=None, device='cpu': (
    monkeypatch.setattr(contest.cpu, 'here', lambda: machine),
    contest.choose_forms(case, asked, {'used': used}, cap, device))[1]
  plain = ['eager', 'onednn', 'compile', 'autotune']
  assert choose(ZEN1, 'as it comes') == plain
  assert choose(ZEN5, 'told') == [f'{form}+mkl' for form in (
    *plain, 'bfloat16', 'bfloat16-compile')]
  assert choose(ZEN5, 'told', cap='avx2') == [f'{form}+mkl' for form in plain]
  assert choose(ZEN5, 'told', device='cuda') == ['eager', 'compile', 'autotune']
  assert choose(ZEN1, 'told', asked=('compile',)) == ['compile']
  with pytest.raises(UserError, match='unknown form fast: one of eager'):
    choose(ZEN1, 'told', asked=('fast',))
  with pytest.raises(UserError, match='bfloat16: told of beside a form in float32'):
    choose(ZEN5, 'told', asked=('bfloat16',))
  assert forms.telling_helps(ZEN5) and not forms.telling_helps(Machine('Intel', 6, 143, 'amx'))
  options = contest.side_options(Options(variant='bfloat16-compile+mkl'))
  assert (options.variant, options.dtype) == ('compile', 'bfloat16')


def test_onednn_multiplies_as_the_layer_it_stands_for():
  import torch

  from benchmarks.peers.common import Packed, by_onednn, place

  torch.manual_seed(0)
  model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(),
                              torch.nn.Sequential(torch.nn.Linear(40, 8, bias=False)))
  x = torch.randn(2, 5, 24)
  with torch.no_grad():
    expected = model(x)
    found = place(model, Options(variant='onednn'))(x)
  assert isinstance(model[0], Packed) and isinstance(model[2][0], Packed)
  assert model[0].weight.shape == (40, 24) and model[0].weight.untyped_storage().nbytes() == 4
  torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
  assert by_onednn(torch.nn.MultiheadAttention(8, 2)).out_proj.weight.shape == (8, 8)
