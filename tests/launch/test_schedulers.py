"""Slurm, GKE, containers: each file is run by a stand-in or held against its published schema."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel.topology import parse
from tests.launch.schema import problems

REPO = pathlib.Path(__file__).resolve().parents[2]
SBATCH = REPO / 'tpu' / 'slurm.sbatch'
CRD = json.loads((REPO / 'tests' / 'launch' / 'jobset_v1alpha2.json').read_text())
# The step of a job on this machine: as many processes as asked for, told of each other as by Slurm.
SRUN = """#!{python}
import os, subprocess, sys
argv = sys.argv[1:]
while argv[0].startswith('--'):
  argv.pop(0)
with open('srun.log', 'a') as log:
  log.write(' '.join(argv) + '\\n')
if os.environ.get('FAKE_STATUS'):
  sys.exit(int(os.environ['FAKE_STATUS']))
tasks = int(os.environ['SLURM_NTASKS'])
step = dict(SLURM_STEP_NUM_TASKS=str(tasks), SLURM_STEP_NODELIST='localhost', SLURM_STEP_ID='0',
            SLURM_STEP_NUM_NODES='1')
running = [subprocess.Popen(argv, env=os.environ | step | dict(
             SLURM_PROCID=str(i), SLURM_LOCALID=str(i)), stdout=open(f'task.{{i}}', 'w'),
             stderr=subprocess.STDOUT) for i in range(tasks)]
sys.exit(max(process.wait() for process in running))
"""


@pytest.fixture
def slurm(tmp_path):
  """A folder with a stand-in for Slurm; runs the batch script there and says what was called."""
  programs = tmp_path / 'bin'
  programs.mkdir()
  (programs / 'srun').write_text(SRUN.format(python=sys.executable))
  (programs / 'scontrol').write_text('#!/bin/sh\necho "scontrol $*" >>srun.log\n')
  hrvlm = tmp_path / 'env' / 'bin' / 'hrvlm'
  hrvlm.parent.mkdir(parents=True)
  hrvlm.write_text(f'#!/bin/sh\nexec {sys.executable} -m hrvlm_jax.cli "$@"\n')
  for path in (*programs.iterdir(), hrvlm):
    path.chmod(0o755)

  def run(*arguments, **env):
    (tmp_path / 'srun.log').write_text('')
    done = subprocess.run(
      ['bash', str(SBATCH), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=600,
      env=os.environ | {'PATH': f'{programs}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '4711',
                        'HRVLM_VENV': 'env', 'PYTHONPATH': str(REPO), **env})
    return done, (tmp_path / 'srun.log').read_text().splitlines()

  return run


def test_the_batch_script_asks_for_a_process_per_gpu_and_a_signal_to_the_steps():
  asked = dict(re.findall(r'^#SBATCH --([\w-]+)(?:=(\S+))?$', SBATCH.read_text(), re.MULTILINE))
  # JAX gives each process of a Slurm step the one GPU of its local number.
  assert asked['ntasks-per-node'] == asked['gpus-per-node']
  assert asked['signal'] == 'TERM@180'  # with B: the batch script alone would be told
  assert 'requeue' in asked and asked['open-mode'] == 'append'
  lines = SBATCH.read_text().splitlines()
  first = next(i for i, line in enumerate(lines) if line and not line.startswith('#'))
  assert not any(line.startswith('#SBATCH') for line in lines[first:])  # sbatch stops reading there


@pytest.mark.parametrize('status, again', [(0, False), (75, True), (2, False), (5, False)])
def test_a_stopped_run_is_queued_again_and_no_other(slurm, status, again):
  done, called = slurm('--config', 'c d', '--workdir', 'W', FAKE_STATUS=str(status))
  assert done.returncode == status, done.stderr
  assert called[0] == 'env/bin/hrvlm train --config c d --workdir W --quiet --stopped-status 75'
  assert called[1:] == (['scontrol requeue 4711'] if again else [])


def test_a_job_without_arguments_is_refused(slurm):
  done, called = slurm()
  assert done.returncode == 2 and 'expected the arguments of hrvlm train' in done.stderr
  assert called == []


@pytest.mark.full('pages')
def test_a_slurm_step_of_two_processes_is_one_run(slurm, tmp_path):
  config = f'{REPO / "tests/launch/run.py"}:{tmp_path / "data"}'
  done, _ = slurm('--config', config, '--workdir', 'W', '--config.training.steps=2',
                  SLURM_NTASKS='2', SLURM_JOB_NODELIST='localhost', JAX_NUM_CPU_DEVICES='2')
  logs = [(tmp_path / f'task.{i}').read_text() for i in range(2)]
  assert done.returncode == 0, done.stderr + '\n'.join(logs)
  assert '4 x cpu in 2 process(es)' in logs[0] and 'finished at step 2' in logs[0], logs[0]
  rows = [json.loads(line) for line in (tmp_path / 'W/metrics.jsonl').read_text().splitlines()]
  assert [row['step'] for row in rows] == [1, 2]


def jobset(*arguments):
  return subprocess.run([sys.executable, 'scripts/jobset.py', *arguments], cwd=REPO,
                        capture_output=True, text=True,
                        env=os.environ | {'PYTHONPATH': str(REPO)})


@pytest.fixture(scope='module')
def made():
  found = importlib.util.spec_from_file_location('_jobset', REPO / 'scripts' / 'jobset.py')
  module = importlib.util.module_from_spec(found)
  found.loader.exec_module(module)
  return module


TRAIN = ['train', '--config', 'llava_hr:7b', '--workdir', 'gs://B/hr1']


@pytest.mark.parametrize('topology, slices, pods, chips, accelerator', [
  ('v6e:4x4', 2, 4, 4, 'tpu-v6e-slice'), ('v6e:2x4', 1, 1, 8, 'tpu-v6e-slice'),
  ('v5e:16x16', 1, 64, 4, 'tpu-v5-lite-podslice'), ('v5e:1x1', 1, 1, 1, 'tpu-v5-lite-podslice'),
  ('v5p:4x4x4', 3, 16, 4, 'tpu-v5p-slice'), ('v4:2x2x2', 1, 2, 4, 'tpu-v4-podslice')])
def test_the_manifest_is_what_the_published_schema_takes(made, topology, slices, pods, chips,
                                                         accelerator):
  spot = slices > 1
  found = made.manifest(name='hr1', topology=parse(topology, slices=slices), image='R/hrvlm:1',
                        arguments=TRAIN, spot=spot, queue='q' if spot else None)
  assert found['apiVersion'] == f'jobset.x-k8s.io/{CRD["version"]}' and CRD['commit']
  assert problems(found, CRD['schema']) == []
  [group] = found['spec']['replicatedJobs']
  job = group['template']['spec']
  pod = job['template']['spec']
  [container] = pod['containers']
  assert group['replicas'] == slices and job['parallelism'] == job['completions'] == pods
  assert container['resources']['limits'] == {'google.com/tpu': chips}
  assert pod['nodeSelector']['cloud.google.com/gke-tpu-accelerator'] == accelerator
  assert pod['nodeSelector']['cloud.google.com/gke-tpu-topology'] == topology.split(':')[1]
  assert ('cloud.google.com/gke-spot' in pod['nodeSelector']) is spot
  assert container['args'] == [*TRAIN, '--quiet', '--stopped-status', '75']


def test_the_schema_refuses_what_an_api_server_refuses(made):
  found = made.manifest(name='hr1', topology=parse('v6e:4x4'), image='i', arguments=TRAIN)
  found['spec']['replicatedJob'] = found['spec'].pop('replicatedJobs')
  found['spec']['failurePolicy']['maxRestarts'] = '50'
  found['spec']['failurePolicy']['rules'][0]['action'] = 'Fail'
  told = problems(found, CRD['schema'])
  assert any('.spec.replicatedJob: unknown' in line for line in told)
  assert any('maxRestarts: found str, expected integer' in line for line in told)
  assert any("found 'Fail', expected one of" in line for line in told)
  job = made.manifest(name='hr1', topology=parse('v6e:4x4'), image='i', arguments=TRAIN)
  del job['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['containers']
  assert any('containers is missing' in line for line in problems(job, CRD['schema']))


def test_the_manifest_as_a_command(made):
  done = jobset('--name', 'hr1', '--topology', 'v6e:4x4', '--image', 'i', '--', *TRAIN)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == made.manifest(
    name='hr1', topology=parse('v6e:4x4'), image='i', arguments=TRAIN)
  for wrong, words in (({'name': 'HR_1'}, 'small letters'), ({'topology': parse('h100:8')}, 'GKE'),
                       ({'arguments': []}, 'nothing to run')):
    given = {'name': 'hr1', 'topology': parse('v6e:4x4'), 'image': 'i', 'arguments': TRAIN} | wrong
    with pytest.raises(UserError, match=words):
      made.manifest(**given)


def test_the_dockerfile_is_pinned_and_has_what_the_pages_build():
  """What a linter of images looks at, and that every install obeys the lock."""
  text = re.sub(r'\\\n\s*', '', (REPO / 'Dockerfile').read_text())
  lines = [line for line in text.splitlines() if line and not line.startswith('#')]
  words = [line.split(' ', 1) for line in lines]
  assert {word for word, _ in words} <= {'FROM', 'RUN', 'ENV', 'WORKDIR', 'COPY', 'ENTRYPOINT',
                                         'CMD'}
  stages = [rest.split() for word, rest in words if word == 'FROM']
  assert [stage[2] for stage in stages] == ['base', 'tpu', 'cuda', 'cpu']
  assert ':' in stages[0][0] and 'latest' not in stages[0][0]
  lock = (REPO / 'requirements.lock').read_text()
  assert f'Python {stages[0][0].split(":")[1].split("-")[0]}' in lock.splitlines()[0]
  for word, rest in words:
    if word == 'RUN' and 'uv pip install' in rest:
      assert '--constraint requirements.lock' in rest or '--no-deps --editable .' in rest, rest
      assert '--no-cache' in rest
    if word == 'RUN' and 'apt-get' in rest:
      assert 'rm -rf /var/lib/apt/lists/*' in rest and '--no-install-recommends' in rest
    if word == 'COPY':
      for name in rest.split()[:-1]:
        assert (REPO / name).exists(), name
    if word in ('ENTRYPOINT', 'CMD'):
      assert isinstance(json.loads(rest), list)
  for name in ('libtpu', 'gcsfs', 'jax-cuda13-plugin', 'jax-cuda13-pjrt'):
    assert re.search(rf'^{name}==', lock, re.MULTILINE), f'{name} floats'
  workflow = (REPO / '.github/workflows/test.yml').read_text()
  assert re.search(r'target: \[cpu, cuda, tpu\]', workflow) and '--target ${{ matrix' in workflow
