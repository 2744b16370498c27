"""`hrvlm eval` on several processes: a model over all their devices, or one for each of them."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from hrvlm_jax.lab.needle import NeedleConfig, write
from tests.vlm import meshes

REPO = pathlib.Path(__file__).resolve().parents[2]
SAMPLES = pathlib.Path(__file__).parent / 'samples'


def answer(out, checkpoint, *arguments, data, processes=1, die=0):
  """Exit status and output of every process; process 0 dies after `die` batches."""
  environment = dict(os.environ, JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES='2', PYTHONPATH=str(REPO),
                     HRVLM_HEARTBEAT_SECONDS='4', TF_CPP_MIN_LOG_LEVEL='2')  # fmt: skip
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  several = lambda i: ['--distributed', 'on', '--coordinator', f'localhost:{port}',
                       '--num-processes', str(processes), '--process-id', str(i)]  # fmt: skip
  children = [subprocess.Popen(
    [sys.executable, '-m', 'tests.evaluation.together', str(die if i == 0 else 0),
     '--checkpoint', str(checkpoint), '--benchmark', 'needle', '--data', str(data),
     '--out', str(out), '--batch-size', '4', '--max-new-tokens', '12', '--quiet', *arguments,
     *(several(i) if processes > 1 else [])],
    cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for i in range(processes)]  # fmt: skip
  outputs = [child.communicate(timeout=400)[0] for child in children]
  return [child.returncode for child in children], outputs


def texts(out):
  return [json.loads(line)['text'] for line in (out / 'predictions.jsonl').open()]


@pytest.mark.full('parallel')
def test_two_processes_answer_one_benchmark(tmp_path):
  checkpoint, data = tmp_path / 'checkpoint', tmp_path / 'task'
  meshes.make('mc_llava', checkpoint)
  write(NeedleConfig.tiny(turns=2), data, 6, seed=5, progress=False)
  run = functools.partial(answer, data=data)
  codes, outputs = run(tmp_path / 'one', checkpoint, '--mesh', 'data=1,tensor=2')
  assert codes == [0], outputs
  expected = texts(tmp_path / 'one')
  assert len(expected) == 12 and len(set(expected)) > 6
  # Each its own model and its own samples: nothing is said of a mesh.
  codes, outputs = run(tmp_path / 'each', checkpoint, processes=2)
  assert codes == [0, 0], outputs
  assert len(list((tmp_path / 'each').glob('predictions-*-of-00002.jsonl'))) == 2
  assert texts(tmp_path / 'each') == expected
  # One model over the devices of both; the first is killed, and the same command goes on.
  mesh = ('--mesh', 'data=2,tensor=2')
  codes, outputs = run(tmp_path / 'both', checkpoint, *mesh, processes=2, die=1)
  assert codes[0] == -9 and codes[1] != 0, outputs
  assert not (tmp_path / 'both' / 'result.json').exists()
  begun = (tmp_path / 'both' / 'predictions-00000-of-00001.jsonl').read_text().splitlines()
  assert 1 <= len(begun) <= 4  # what was complete at the same time
  codes, outputs = run(tmp_path / 'both', checkpoint, *mesh, processes=2)
  assert codes == [0, 0], outputs
  assert 'answers on 4 x cpu, mesh data=2,tensor=2' in outputs[0]
  assert texts(tmp_path / 'both') == expected
  # A mistake on both is a sentence on both.
  codes, outputs = run(tmp_path / 'bad', checkpoint, '--mesh', 'data=3,tensor=2', processes=2)
  assert codes == [2, 2] and all('is 6, which is not the 4 device' in text for text in outputs)


@pytest.mark.full('parallel')
def test_evaluation_inside_a_run_of_two_processes(tmp_path):
  """Answers to held-out questions and a benchmark: those of one process, and in one report."""
  data = tmp_path / 'data'
  config = tmp_path / 'config.py'
  config.write_text(f"""
from tests.launch.run import get_config as start
def get_config():
  config = start({str(data)!r})
  config.training.update(steps=2, checkpoint_every=2, mfu=False)
  config.training.evaluators = (
    dict(name='answers', every=2, data={str(data / 'train.json')!r}, rows=5, max_new_tokens=4),
    dict(name='benchmark', every=2, benchmark='needle', data={str(SAMPLES / 'needle')!r}, samples=3,
         batch_size=4, label='needle'))
  return config
""")
  found = []
  for processes in (1, 2):
    environment = dict(os.environ, JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES=str(4 // processes),
                       PYTHONPATH=str(REPO), TF_CPP_MIN_LOG_LEVEL='2')  # fmt: skip
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    workdir = tmp_path / str(processes)
    several = lambda i: ['--distributed', 'on', '--coordinator', f'localhost:{port}',  # noqa: B023
                         '--num-processes', '2', '--process-id', str(i)]  # fmt: skip
    children = [subprocess.Popen(
      [sys.executable, '-m', 'hrvlm_jax.cli', 'train', '--config', str(config), '--quiet',
       '--workdir', str(workdir), '--mesh', 'data=2,fsdp=2',
       *(several(i) if processes > 1 else [])],
      cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
      for i in range(processes)]  # fmt: skip
    outputs = [child.communicate(timeout=400)[0] for child in children]
    assert not any(child.returncode for child in children), outputs
    assert 'step 2: eval_accuracy' in outputs[0] and 'step 2: needle_' in outputs[0]
    assert all('eval_accuracy' not in output for output in outputs[1:])
    folder = workdir / 'evaluation'
    found.append([(folder / name / '2' / 'answers.jsonl').read_text() for name in ('', 'needle')])
  assert found[0] == found[1] and found[0][0].count('\n') == 5 and found[0][1].count('\n') == 3
