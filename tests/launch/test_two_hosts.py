"""The real trainer on two hosts, one of which is killed: `launch.sh simulate` as a user runs it."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]


def test_a_run_outlives_a_host(tmp_path):
  """Kill -9 in mid-step: the other host ends, both resume, and the losses are the undisturbed."""
  sim = tmp_path / 'sim'
  options = ['--hosts', '2', '--devices', '2', '--kill-at-step', '6', '--end-within', '30']
  job = [sys.executable, '-m', 'hrvlm_jax.cli', 'train', '--quiet', '--config',
         f'tests/launch/run.py:{tmp_path / "data"}']  # fmt: skip
  path = f'{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
  done = subprocess.run(
    [shutil.which('bash'), str(REPO / 'scripts' / 'launch.sh'), 'simulate', *options,
     '--workdir', str(sim), '--', *job],
    cwd=REPO, env=os.environ | {'PATH': path}, capture_output=True, text=True, timeout=600,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'killed host 1' in done.stderr and 'host 0 has ended' in done.stderr
  # What JAX's own death on host 0 means is said by the worker script.
  assert 'another host of the run died' in done.stderr
  assert 'resumed at step 5' in done.stderr  # the newest checkpoint is that of step 4
  assert '12 steps, largest relative difference 0 ' in done.stdout
  lines = [json.loads(line) for line in (sim / 'broken' / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == list(range(1, 13))
  # Each host made its part of every batch; together they are the batches of one process.
  log = (sim / 'host.0' / 'simulate' / 'log.0').read_text()
  assert 'process 0 makes 2 of the 4 shards of every batch' in log
  alone = subprocess.run(
    [*job, '--workdir', str(tmp_path / 'alone')], cwd=REPO, capture_output=True, text=True,
    env=os.environ | {'JAX_NUM_CPU_DEVICES': '1'}, timeout=600,
  )  # fmt: skip
  assert alone.returncode == 0, alone.stderr
  single = [json.loads(line) for line in (tmp_path / 'alone' / 'metrics.jsonl').open()]
  np.testing.assert_allclose([row['loss'] for row in lines], [row['loss'] for row in single],
                             rtol=1e-5)  # fmt: skip


@pytest.mark.full('pages')
def test_a_mistake_is_said_by_the_simulation(tmp_path):
  """The documented command with a planted mistake: the sentence, and an end within seconds."""
  path = f'{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
  began = time.monotonic()
  done = subprocess.run(
    [shutil.which('bash'), 'scripts/launch.sh', 'simulate', '--devices', '2', '--kill-at-step', '6',
     '--workdir', str(tmp_path / 'sim'), '--', 'python', '-m', 'hrvlm_jax.cli', 'train', '--quiet',
     '--config', f'tests/launch/run.py:{tmp_path / "data"}',
     '--config.training.optimizer.learning_rate=-1'],
    cwd=REPO, env=os.environ | {'PATH': path}, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode not in (0, None)
  assert 'learning_rate' in done.stderr + done.stdout, done.stderr
  assert time.monotonic() - began < 120
