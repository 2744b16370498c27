"""A checkpoint is laid over devices without ever being whole, and read no more than needed."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments, processes=1):
  environment = dict(os.environ, JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES=str(8 // processes),
                     PYTHONPATH=str(REPO), TF_CPP_MIN_LOG_LEVEL='2')  # fmt: skip
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  several = [['--processes', f'localhost:{port},{processes},{i}'] for i in range(processes)]
  children = [subprocess.Popen(
    [sys.executable, '-m', 'tests.vlm.laying', *map(str, arguments),
     *(several[i] if processes > 1 else [])],
    cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True) for i in range(processes)]
  outputs = [child.communicate(timeout=800)[0] for child in children]
  assert not any(child.returncode for child in children), outputs
  return [json.loads(output.splitlines()[-1]) for output in outputs if output.strip()]


@pytest.mark.full('parallel')
def test_memory_and_bytes(tmp_path):
  """1.2 GB here; `python -m tests.vlm.laying make FOLDER 30` is 6 GB."""
  folder = tmp_path / 'checkpoint'
  run('make', folder, 6)
  for kind in ('orbax', 'tensors'):
    (one,) = run(kind, folder)
    assert one['bytes'] > 1 << 30 and one['placed'] < 1.02 * one['bytes']
    assert one['beyond'] < 0.5 * (1 << 30), one
    assert 0.9 * one['bytes'] < one['read'] < 1.1 * one['bytes'], one
    for each in run(kind, folder, processes=2):
      assert each['placed'] < 0.52 * each['bytes'] and each['read'] < 0.6 * each['bytes'], each
      assert each['beyond'] < 0.5 * (1 << 30), each
