"""A checkpoint is laid over devices without ever being whole, and read no more than needed."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]


def run(what, *folders, layers=()):
  """What each process says; each has a folder of its own, as on hosts that share no disk."""
  processes = len(folders)
  environment = dict(os.environ, JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES=str(8 // processes),
                     PYTHONPATH=str(REPO), TF_CPP_MIN_LOG_LEVEL='2')  # fmt: skip
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  several = [['--processes', f'localhost:{port},{processes},{i}'] for i in range(processes)]
  children = [subprocess.Popen(
    [sys.executable, '-m', 'tests.vlm.laying', what, str(folder), *map(str, layers),
     *(several[i] if processes > 1 else [])],
    cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True)
    for i, folder in enumerate(folders)]
  outputs = [child.communicate(timeout=1500)[0] for child in children]
  assert not any(child.returncode for child in children), outputs
  return [json.loads(output.splitlines()[-1]) for output in outputs if output.strip()]


@pytest.mark.full('parallel')
def test_six_gigabytes_are_never_whole(tmp_path):
  """Beside the arrays themselves a process holds little, however many it has laid."""
  folder = tmp_path / 'checkpoint'
  run('make', folder, layers=[30])
  for kind in ('orbax', 'tensors'):
    (one,) = run(kind, folder)
    assert one['bytes'] > 6e9 and one['placed'] < 1.02 * one['bytes']
    assert one['beyond'] < 1e9, (kind, one)
    assert 0.9 * one['bytes'] < one['read'] < 1.1 * one['bytes'], (kind, one)
  shutil.rmtree(tmp_path)  # 12 GB


@pytest.mark.full('parallel')
def test_a_process_reads_its_part(tmp_path):
  """Of 1.2 GB; counted where they are asked for, and where the disk gives them."""
  folders = [tmp_path / '0' / 'checkpoint', tmp_path / '1' / 'checkpoint']
  run('make', folders[0], layers=[6])
  shutil.copytree(tmp_path / '0', tmp_path / '1')
  # Checksums are of whole files, which hold a chunk or two of others; half a row of 8 KB, wherever
  # it begins, lies in more pages than half of them.
  for kind, disk in (('orbax', 0.7), ('tensors', 0.85)):
    for each in run(kind, *folders):
      assert each['placed'] < 0.52 * each['bytes'] and each['read'] < 0.6 * each['bytes'], each
      assert each['disk'] < disk * each['bytes'], (kind, each['disk'], each)
      assert each['beyond'] < 0.3e9, (kind, each)
