"""Twenty steps of the real trainer: a mesh of eight devices gives the losses of one device."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np

REPO = pathlib.Path(__file__).resolve().parents[2]


def test_a_mixed_mesh_trains_like_one_device():
  """All systems and meshes: `python -m tests.parallel.equivalence SYSTEM float32 20`."""
  environment = dict(os.environ, JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES='8', PYTHONPATH=str(REPO))
  environment.pop('XLA_FLAGS', None)
  command = [
    sys.executable,
    '-m',
    'tests.parallel.equivalence',
    'mc_llava',
    'float32',
    '20',
    'mixed',
  ]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPO)
  assert done.returncode == 0, done.stderr[-3000:]
  losses = json.loads(done.stdout.splitlines()[-1])
  assert len(losses['one']) == 20 and losses['one'][-1] < losses['one'][0]
  np.testing.assert_allclose(losses['mixed'], losses['one'], rtol=1e-5)
