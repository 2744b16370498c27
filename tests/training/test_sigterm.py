"""SIGTERM to `hrvlm train` in a process of its own: a checkpoint of the step at hand, status 0."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
from PIL import Image

from hrvlm_jax.checkpoint import store
from hrvlm_jax.training import loop
from hrvlm_jax.training.metrics import read_metrics

# So many steps that it ends by the signal and by nothing else; no checkpoint before.
CONFIG = textwrap.dedent("""
    import ml_collections
    from hrvlm_jax.core.config import to_dict
    from hrvlm_jax.systems import registry
    def get_config():
      config = ml_collections.ConfigDict()
      config.model = to_dict(registry.get('mc_llava').tiny())
      config.data = dict(train='train.json', lengths=(128,))
      config.training = dict(steps=100_000, batch_size=1, log_every=1, checkpoint_every=100_000,
                             mfu=False, optimizer=dict(learning_rate=1e-3))
      return config
""")
TIME_LIMIT = 300


def make_data(folder):
  Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(folder / '0.png')
  turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'A'}]
  rows = [{'id': '0', 'image': '0.png', 'conversations': turns}]
  (folder / 'train.json').write_text(json.dumps(rows))


def test_a_checkpoint_and_status_zero(tmp_path):
  make_data(tmp_path)
  (tmp_path / 'run.py').write_text(CONFIG)
  workdir = tmp_path / 'w'
  with (tmp_path / 'log.txt').open('w') as log:
    child = subprocess.Popen(
      [sys.executable, '-m', 'hrvlm_jax.cli', 'train', '--config', 'run.py', '--workdir', 'w',
       '--quiet'], cwd=tmp_path, env=os.environ, stdout=log, stderr=subprocess.STDOUT)
    try:
      until, metrics = time.monotonic() + TIME_LIMIT, workdir / 'metrics.jsonl'
      while not metrics.exists() or metrics.read_bytes().count(b'\n') < 2:
        assert child.poll() is None and time.monotonic() < until, (tmp_path / 'log.txt').read_text()
        time.sleep(0.05)
      child.send_signal(signal.SIGTERM)
      status = child.wait(TIME_LIMIT)
    finally:
      child.kill()
  assert status == 0, (tmp_path / 'log.txt').read_text()
  assert (workdir / loop.PREEMPTED).exists()
  last = read_metrics(workdir)[-1]['step']
  assert store.steps(workdir) == [last] and 2 <= last < 100_000
