"""Twenty steps of the real trainer: a mesh of eight devices gives the losses of one device."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]


def train(system: str, steps: int, mesh: str) -> dict[str, list[float]]:
  environment = dict(os.environ, JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES='8', PYTHONPATH=str(REPO))
  environment.pop('XLA_FLAGS', None)
  command = [
    sys.executable,
    '-m',
    'tests.parallel.equivalence',
    system,
    'float32',
    str(steps),
    mesh,
  ]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPO)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def test_a_mixed_mesh_trains_like_one_device():
  """All systems and meshes: `python -m tests.parallel.equivalence SYSTEM float32 20`."""
  losses = train('mc_llava', 20, 'mixed')
  assert len(losses['one']) == 20 and losses['one'][-1] < losses['one'][0]
  np.testing.assert_allclose(losses['mixed'], losses['one'], rtol=1e-5)


@pytest.mark.full('parallel')
@pytest.mark.parametrize('system', ['mc_llava', 'ps3'])
def test_the_kernel_of_a_tpu_on_a_mesh_trains_like_one_device(system):
  """Its parts of rows, heads and lengths, interpreted; looks over kept keys are among them."""
  losses = train(system, 3, 'splash_mixed')
  np.testing.assert_allclose(losses['splash_mixed'], losses['one'], rtol=1e-5)
