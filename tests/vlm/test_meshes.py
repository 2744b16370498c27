"""A model that is cut over devices answers with one device's tokens."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]
MESHES = ('data=1,tensor=2,fsdp=2', 'data=1,tensor=4', 'data=1,fsdp=4', 'data=2,tensor=2')


def together(command, several, *, devices):
  """What each process of a command printed.

  Args:
    several: what each process is told beside it, by the port of their meeting.
    devices: of all processes.
  """
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  several = several(port)
  environment = dict(os.environ, JAX_PLATFORMS='cpu', PYTHONPATH=str(REPO),
                     JAX_NUM_CPU_DEVICES=str(devices // len(several)), TF_CPP_MIN_LOG_LEVEL='2',
                     XLA_FLAGS='--xla_backend_optimization_level=0 '
                               '--xla_cpu_use_fusion_emitters=false')  # fmt: skip
  children = [subprocess.Popen([sys.executable, '-m', *map(str, command), *own], cwd=REPO,
                               env=environment, stdout=subprocess.PIPE, text=True)
              for own in several]
  outputs = [child.communicate(timeout=1500)[0] for child in children]
  assert not any(child.returncode for child in children), outputs
  return outputs


def start(arguments, *, devices, processes=1):
  outputs = together(
    ['tests.vlm.meshes', *arguments], lambda port: [[]] if processes == 1 else
    [['--processes', f'localhost:{port},{processes},{i}'] for i in range(processes)],
    devices=devices)
  found = [json.loads(output.splitlines()[-1]) for output in outputs]
  assert all(each == found[0] for each in found)
  return found[0]


def check(found, one):
  assert len(one['at once']) == 5 and len({tuple(row) for row in one['at once']}) > 1
  assert one['one'] == one['at once'][:1] and one['streamed'] == one['one']
  for mesh, answers in found.items():
    assert answers == one, mesh


def test_a_cut_model_answers_like_one_device(tmp_path):
  found = start(['mc_llava', tmp_path / 'checkpoint', 'one', 'data=2,tensor=2'], devices=4)
  check(found, found['one'])


@pytest.mark.full('parallel')
@pytest.mark.parametrize('release, devices, meshes', [
  ('llava_hr_x_13b', 8, ['tensor=2', 'tensor=4', 'fsdp=4', 'data=2,tensor=2', 'fsdp=2,tensor=4']),
  ('vila_hd_8b_4k_siglip', 4, ['tensor=2', 'tensor=4', 'fsdp=4', 'data=2,tensor=2'])])
def test_a_device_holds_its_share(release, devices, meshes):
  """Of the widths of the release: parameters, cache and what a layer needs, and a fifth beyond."""
  environment = dict(os.environ, JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES=str(devices),
                     PYTHONPATH=str(REPO), TF_CPP_MIN_LOG_LEVEL='2')  # fmt: skip
  meshes = [mesh if 'data' in mesh else f'data=1,{mesh}' for mesh in meshes]
  done = subprocess.run([sys.executable, '-m', 'tests.vlm.peaks', release, '8', *meshes], cwd=REPO,
                        env=environment, capture_output=True, text=True, timeout=1200)
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout)
  assert list(found) == meshes
  for mesh, programs in found.items():
    assert set(programs) == {'prefill', 'loop', 'step', 'prompt', 'beams'}
    for name, program in programs.items():
      assert program['peak'] <= 1.2 * sum(program['parts'].values()), (mesh, name, program)
      # A cache is never there twice while tokens are made.
      assert name in ('prefill', 'prompt', 'beams') or program['taken'] >= program['parts']['cache']
      # The arithmetic itself does not count what nobody needs.
      assert program['peak'] >= 0.6 * sum(program['parts'].values()), (mesh, name, program)


@pytest.mark.full('parallel')
@pytest.mark.parametrize('system, more', [
  ('llava_hr_x_13b', ['data=1,tensor=2', 'data=2,tensor=4']),
  ('vila_hd_8b_4k_siglip', ['data=1,tensor=2']), ('pheye', [])])
def test_every_cut_of_every_kind(system, more, tmp_path):
  """Prefix, two passes and cross-attention, with heads and ratios of 13B and 8B releases; also by
  two processes of two devices each."""
  checkpoint = tmp_path / 'checkpoint'
  found = start([system, checkpoint, 'one', *MESHES, *more], devices=8 if more else 4)
  check(found, found['one'])
  check(start([system, checkpoint, *MESHES[2:]], devices=4, processes=2), found['one'])


@pytest.mark.full('parallel')
@pytest.mark.parametrize('processes, mesh', [(2, 'data=1,fsdp=2,tensor=2'), (4, 'data=1,fsdp=4')])
def test_what_several_processes_wrote_is_answered_anywhere(processes, mesh, tmp_path):
  """A training of several processes writes; any mesh of one process or two answers from it."""
  first, run = tmp_path / 'checkpoint', tmp_path / 'run'
  start(['mc_llava', first, 'one'], devices=1)
  together(['hrvlm_jax.cli', 'train', '--quiet', '--config', f'tests/launch/run.py:{tmp_path}/data',
            f'--config.training.init_from={first}', '--config.training.steps=2',
            f'--mesh={mesh}', '--workdir', run, '--distributed', 'on'],
           lambda port: [['--coordinator', f'localhost:{port}', '--num-processes', str(processes),
                          '--process-id', str(i)] for i in range(processes)], devices=4)
  together(['hrvlm_jax.cli', 'export', '--checkpoint', run, '--to', f'{run}_export'],
           lambda port: [[]], devices=1)
  others = [other for other in MESHES if other != mesh]
  found = start(['mc_llava', run, 'one', *others], devices=4)
  check(found, found['one'])
  check(start(['mc_llava', run, *others[-2:]], devices=4, processes=2), found['one'])
