"""Two kills with signal 9 per system, one of them while a checkpoint is written.

The second level does twenty of one system, and twenty SIGTERM to its process group, with and
without data workers; `scripts/test_kill9.sh` twenty of each system. The program runs apart because
its lives are forks of a process that has no devices yet.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import levels
from tests.training import kill9

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize('system', levels.rows('training', kill9.SYSTEMS, first=['mc_llava']))
def test_losses_are_the_same_bits_after_two_kills(system, tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'tests.training.kill9', '--kills', '2', '--systems', system,
     '--out', str(tmp_path)], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stdout + done.stderr
  row = json.loads(done.stdout.splitlines()[-1])
  assert row['good'] and row['kills'] == 2 and row['steps'] == row['equal_losses'] == 12
  assert row['killed_while_writing'] >= 1 and row['batches_that_differ'] == []


@pytest.mark.full('training')
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('name', ['KILL', 'TERM'])
def test_twenty_of_twenty(name, workers, tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'tests.training.kill9', '--systems', 'mc_llava', '--signal', name,
     '--workers', str(workers), '--out', str(tmp_path)],
    cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=1800)
  assert done.returncode == 0, done.stdout + done.stderr
  row = json.loads(done.stdout.splitlines()[-1])
  assert row['good'] and row['kills'] == 20 and row['steps'] == row['equal_losses'] == 84
  assert row['workers'] == workers and row['signal'] == f'SIG{name}'


def test_a_difference_is_found(tmp_path):
  """The comparison itself: a loss or a batch that differs, a step that is missing."""
  run = tmp_path / 'run'
  run.mkdir()
  lines = [{'step': n, 'loss': 1.0} for n in (1, 2, 4)]
  (run / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  with pytest.raises(SystemExit, match=r'steps in metrics.jsonl are \[1, 2, 4\]'):
    kill9.losses(run)
  (run / 'batches.jsonl').write_text(
    '{"batch": 1, "sha256": "a"}\n{"batch": 2, "sha256": "b"}\n{"batch": 2, "sha256": "c"}\n')
  with pytest.raises(SystemExit, match='batch 2 was another one after a restart'):
    kill9.digests(run)
