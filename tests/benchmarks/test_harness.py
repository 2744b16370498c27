"""`hrvlm bench`: cases are found, wrong answers are refused, the page shows every row."""

import dataclasses

import numpy as np
import pytest

from benchmarks.harness import docs, measure, records, runner
from benchmarks.harness.case import Case, find_cases, load
from benchmarks.harness.ceiling import cost
from hrvlm_jax.cli import bench
from hrvlm_jax.core.errors import UserError

CASE = Case(name='made_up', title='Made up', ours='ours.vision:Siglip', peer='peers.vision:siglip',
            peer_name='an original', settings={'views': 1}, target=2.0, memory_target=0.5)
SIDE = {'seconds': measure.spread([1.0, 1.1, 1.2]), 'peak': {'bytes': 2e9, 'lifetime': 3e9}}


MACHINE = {'vendor': 'Abacus', 'family': 7, 'model': 1, 'isa': 'avx2', 'cores': 2, 'capped': '',
           'processor': 'wood', 'memory_gb': 1, 'system': 'Linux'}


def result(**changes):
  """A kept result of `CASE`."""
  return {
    'case': 'made_up', 'title': 'Made up', 'peer': 'an original', 'variant': 'compile',
    'device': 'cpu', 'date': '2026-01-01',
    'machine': MACHINE, 'versions': {'jax': '1'},
    'ours': SIDE, 'peer_run': SIDE, 'ratio': measure.spread([1.5, 2.5, 2.6]), 'memory_ratio': 0.7,
    'differences': {'tokens': 1e-6}, 'met': {'time': True, 'memory': False}} | changes


def test_every_case_names_code_of_ours_that_exists():
  cases = find_cases()
  assert {'ps3_4k', 'ps3_low', 'siglip_13', 'clip_h_10', 'llava_hr_1024', 'phi_decode',
          'pheye_generate', 'vila_hd_two_pass', 'ps3_growth', 'warm_start'} <= set(cases)
  for case in cases.values():
    if hasattr(case, 'ours') or hasattr(case, 'run'):
      assert callable(load(case.ours if hasattr(case, 'ours') else case.run)), case.name
    else:
      assert callable(case.measure), case.name


def test_tiny_cases_cover_every_encoder_and_decoder_case():
  names = set(find_cases())
  for case in find_cases().values():
    if isinstance(case, Case) and case.group in ('vision', 'decode') and case.dtype == 'float32':
      assert f'tiny_{case.name}' in names


@pytest.mark.parametrize('change, message', [
  ({'x': np.ones((2, 3)) + 0.01}, 'differs by'), ({'x': np.ones((3, 2))}, 'differs in shape'),
  ({'y': np.ones((2, 3))}, 'differs in what'), ({'x': np.full((2, 3), np.nan)}, 'differs by')])
def test_a_wrong_answer_is_no_result(tmp_path, change, message):
  np.savez(tmp_path / 'ours.npz', x=np.ones((2, 3)))
  np.savez(tmp_path / 'peer.npz', **change)
  with pytest.raises(UserError, match=message):
    runner.compare(tmp_path / 'ours.npz', tmp_path / 'peer.npz', CASE)


def test_equal_answers_give_their_difference(tmp_path):
  np.savez(tmp_path / 'ours.npz', x=np.array([1.0, 8.0]))
  np.savez(tmp_path / 'peer.npz', x=np.array([1.0, 8.004]))
  found = runner.compare(tmp_path / 'ours.npz', tmp_path / 'peer.npz', CASE)
  assert found == {'x': pytest.approx(5e-4, rel=0.01)}


def test_judgement_follows_the_numbers():
  found = result()
  del found['met']
  found['cost'] = {'flops': 4e9, 'matmul_seconds': 0.5}
  runner.judge(CASE, found)
  assert found['met'] == {'time': True, 'memory': False, 'bound': False}
  assert found['cost']['share_of_ceiling'] == pytest.approx(0.5 / 1.1, abs=1e-3)


def test_page_has_a_row_for_every_case_measured_or_not(tmp_path):
  records.save(result(), tmp_path)
  wide = {**MACHINE, 'isa': 'avx512', 'capped': 'avx2'}
  records.save(result(machine=wide, ratio=measure.spread([1.5])), tmp_path)
  other = dataclasses.replace(CASE, name='other', title='Never run')
  page = docs.page({'made_up': CASE, 'other': other}, tmp_path)
  cpu, gpu = page.split('## GPU')
  one, two = 'Abacus family 7 model 1, AVX', ', 2 cores'
  assert f'| case | what | {one}-512 held to AVX2{two} | {one}2{two} |' in cpu
  assert ('| `made_up` | Made up | 1.50 (>= 2: **missed**); memory 0.70 (<= 0.5: **missed**) '
          '| 2.50 (>= 2: met); memory 0.70 (<= 0.5: **missed**) |') in cpu
  assert '| `other` | Never run | not measured | not measured |' in cpu
  assert '| `made_up` | an original, compile | 1.10 s | 1.10 s | 2.50 (1.50 to 2.60) |' in cpu
  assert f'- wood, {one}2{two}, 1 GB; jax 1; 2026-01-01' in cpu
  assert gpu.count('not measured') >= 2 and '1.10 s' not in gpu


def test_what_is_asked_for_depends_on_the_instructions():
  case = dataclasses.replace(CASE, target={'avx2': 1.3, 'avx512': 1.4}, gpu_target=3.0)
  assert [case.asked('cpu', isa) for isa in ('avx2', 'avx512', 'amx', 'neon')] == [
    (1.3, 0.5), (1.4, 0.5), (1.4, 0.5), (None, 0.5)]
  assert case.asked('gpu', 'avx2') == (3.0, None)


def test_products_are_counted_and_timed():
  found = cost(lambda a, b: (a @ b).sum(), (np.ones((8, 16), np.float32),
                                            np.ones((16, 32), np.float32)))
  assert found['flops'] == 2 * 8 * 16 * 32
  assert found['matmul_seconds'] >= 0 and found['rates'][0][:5] == [1, 1, 8, 16, 32]


def test_our_side_runs_in_a_process_of_its_own(tmp_path, monkeypatch):
  monkeypatch.setenv('HRVLM_BENCH_SCRATCH', str(tmp_path))
  case = find_cases()['tiny_siglip_13']
  found = runner.run_case(case, runner.Settings(alone=True, rounds=2), say=lambda _: None)
  assert len(found['ours']['seconds']['all']) == 2 and found['ours']['compilations'] == 1
  assert found['parameters'] > 0 and 'ratio' not in found
  assert found['ours']['peak']['bytes'] > 1e7
  assert not any(tmp_path.glob('tiny_siglip*'))  # weights are removed


def test_a_failing_side_is_one_sentence(tmp_path, monkeypatch):
  monkeypatch.setenv('HRVLM_BENCH_SCRATCH', str(tmp_path))
  process = runner.Process(runner.sys.executable, 'ours', 'no_such_case', tmp_path,
                           runner.Settings().options())
  with pytest.raises(UserError, match='no_such_case, ours: the process ended'):
    process('load')


def test_missing_peers_are_one_sentence(monkeypatch, tmp_path):
  monkeypatch.setenv('HRVLM_PEERS', str(tmp_path / 'nowhere'))
  with pytest.raises(UserError, match=r'scripts/peers\.sh'):
    runner.peer_python()


@pytest.mark.parametrize('argv, message', [
  (['ps3_4kk'], 'unknown case ps3_4kk .nearest known: ps3_4k.'), (['--rounds', '0'], 'at least 1'),
  (['--device', 'abacus'], 'invalid choice')])
def test_wrong_arguments(argv, message):
  with pytest.raises(UserError, match=message):
    bench.main(argv)


def test_cases_are_listed(capsys):
  bench.main([])
  assert 'ps3_4k' in capsys.readouterr().out


@pytest.mark.full('interop')
@pytest.mark.parametrize('name', ['ps3_4k', 'siglip_13', 'clip_h_10', 'llava_hr_1024'])
def test_exports_agree_with_ours(name, tmp_path, monkeypatch):
  """The model code of an export and ours in JAX, each in a process of its own."""
  monkeypatch.setenv('HRVLM_BENCH_SCRATCH', str(tmp_path))
  case = find_cases()[f'tiny_torch_export_{name}_jax']
  found = runner.run_case(case, runner.Settings(rounds=1, ceiling=False), say=lambda _: None)
  assert max(found['differences'].values()) < 1e-4 and found['ratio']['median'] > 0
  assert 'torch' in found['versions'] and found['ours']['jax_loaded'] is False
