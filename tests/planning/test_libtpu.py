"""Plans by the compiler for TPUs itself, one at a time on a machine; no TPU is needed."""

import fcntl
import json
import pathlib
import shlex

import pytest

from hrvlm_jax.cli import main as cli
from hrvlm_jax.parallel.compiler import compiler_options
from hrvlm_jax.planning import explain, plan, report, schedule
from tests.parallel.test_plans import PLANS

REPO = pathlib.Path(__file__).resolve().parents[2]
TARGET = 'tests.parallel.programs:transformer'


@pytest.fixture
def alone(tmp_path_factory, monkeypatch):
  """One compilation of a whole step at a time on this machine, as a user would run it."""
  for name in ('JAX_DEFAULT_MATMUL_PRECISION', 'JAX_COMPILATION_CACHE_DIR'):
    monkeypatch.delenv(name, raising=False)
  with (pathlib.Path(tmp_path_factory.getbasetemp().parent) / 'libtpu.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


@pytest.mark.libtpu
@pytest.mark.full('plans')
@pytest.mark.parametrize('name', PLANS.kept()[0])
def test_the_compiler_still_makes_the_stored_step(name, alone, tmp_path):
  """No class differs by more than 5 %, or by a thousandth of the step where it is small."""
  out = tmp_path / 'report.json'
  command = ['plan', *shlex.split(PLANS.CASES[name]), '--json', str(out)]
  assert cli.run(command) == 0
  found = json.loads(out.read_text())
  text = explain.load(REPO / 'docs' / 'plans' / 'programs' / f'{name}.txt.xz')
  stored = explain.summary(schedule.read(text, found['topology'].split(':')[0]))
  new, seconds = found['account']['groups'], stored['seconds']
  assert found['step']['seconds'] == pytest.approx(seconds, rel=0.05)
  for group in {*new, *stored['groups']}:
    old, now = (rows.get(group, {'seconds': 0.0})['seconds']
                for rows in (stored['groups'], new))
    assert now == pytest.approx(old, rel=0.05, abs=1e-3 * seconds), group


@pytest.mark.libtpu
@pytest.mark.full('plans')
def test_a_small_step_for_a_tpu(alone, tmp_path, monkeypatch):
  """Both efforts agree on memory and products; --explain names the lines of what was compiled."""
  monkeypatch.setenv('PYTHONPATH', str(REPO))
  size = {'depth': 3, 'width': 256, 'heads': 2, 'batch': 8, 'length': 128}
  keep = tmp_path / 'program.txt.xz'
  found = {effort: plan.plan(TARGET, size, 'v5e:2x2', mesh={'fsdp': 2, 'tensor': 2}, effort=effort,
                             keep=keep) for effort in plan.EFFORTS}
  for one in found.values():
    assert one['memory']['fits'] and one['memory']['usable_bytes'] == 15.75 * 2**30
    # Recomputation adds up to a third; nothing is counted twice.
    assert 1.0 <= one['step']['executed_flops_per_device'] / (one['model_flops'] / 4) <= 1.4
    assert any(row['kind'] == 'all-gather' and row['times'] >= 3
               for row in one['account']['messages'])
  scheduled, generated = (found[effort] for effort in plan.EFFORTS)
  assert scheduled['account']['flops'] == generated['account']['flops']
  text = report.describe(scheduled, dearest=True)
  assert 'dearest places' in text and 'programs.py:' in text
  assert explain.load(keep).startswith('HloModule jit_planned_step')
  with pytest.raises(RuntimeError, match='xla_no_such_option'):
    plan.plan(TARGET, size, 'v5e:2x2', mesh={'fsdp': 2, 'tensor': 2},
              compiler={'xla_no_such_option': 'true'})


@pytest.mark.libtpu
@pytest.mark.full('plans')
@pytest.mark.parametrize('chip, topology', [
  ('v5e', 'v5e:2x2'), ('v5p', 'v5p:2x2x1'), ('v6e', 'v6e:2x2'), ('tpu7x', 'tpu7x:2x2x1')])
def test_options_are_known_to_the_compiler(chip, topology, alone, monkeypatch):
  monkeypatch.setenv('PYTHONPATH', str(REPO))
  assert compiler_options(chip)
  size = {'depth': 2, 'width': 256, 'heads': 2, 'batch': 8, 'length': 128}
  assert plan.plan(TARGET, size, topology,
                   mesh={'data': -1, 'fsdp': 2})['memory']['fits']


@pytest.mark.libtpu
@pytest.mark.full('plans')
@pytest.mark.parametrize('topology', ['v5e:1x1', 'v6e:1x1'])
def test_a_single_chip_is_described(topology, alone, monkeypatch):
  """docs/answering.md names slices of one chip: a step of answering on them can be compiled."""
  monkeypatch.setenv('PYTHONPATH', str(REPO))
  size = {'depth': 2, 'width': 256, 'heads': 2, 'batch': 8, 'length': 128}
  found = plan.plan(TARGET, size, topology, mesh={'data': 1})
  assert found['chips'] == found['devices'] == 1 and found['memory']['fits']
