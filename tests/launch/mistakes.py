"""A run of several processes in which something goes wrong, on one host or on all.

    python -m tests.launch.mistakes CASE PROCESSES FOLDER

starts the processes as a user would (`hrvlm train` with --coordinator), each in a folder of its own
that stands for its host, and prints one JSON object: exit status, seconds after the sentence was
first said and output of every process.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import types

REPO = pathlib.Path(__file__).resolve().parents[2]
# Case -> (exit status, process that fails alone or None, a part of the sentence).
CASES = {
  'config': (2, None, 'learning_rate must be at least 0'),
  'missing': (2, 1, 'train.json: no such file'),
  'row': (2, 1, '.png: no such file'),
  'loss': (2, None, 'the loss is'),
  'disk': (2, 0, 'could not be written'),
  'worker': (5, 1, 'RuntimeError: planted'),
}


@dataclasses.dataclass(frozen=True)
class End:
  """How a process ended: `late` seconds after one of them first said what is wrong."""

  status: int
  late: float
  output: str


def get_config(case: str):
  """The run config; on one host it does what the case says."""
  import ml_collections

  from hrvlm_jax.core.config import to_dict
  from hrvlm_jax.systems import registry
  from hrvlm_jax.training import evaluators

  config = ml_collections.ConfigDict()
  config.model = to_dict(registry.get('mc_llava').tiny())
  config.data = dict(train='train.json', lengths=(160,), shards=4, packing=dict(window=2),
                     bad_rows='fatal')
  config.training = dict(steps=6, batch_size=8, log_every=1, checkpoint_every=2, mfu=False,
                         optimizer=dict(learning_rate=1e-3))
  if case == 'config':
    config.training.optimizer.learning_rate = -1.0
  if case == 'loss':
    config.training.optimizer.update(learning_rate=1e30, clip_norm=None)
  if case == 'worker':
    class Planted(evaluators.Evaluator):
      def run(self, params, step):
        if os.environ['HOST'] == '1':
          raise RuntimeError('planted')
        return {}

    sys.modules['planted'] = types.ModuleType('planted')
    sys.modules['planted'].Planted = Planted
    evaluators.register('planted', 'planted:Planted')
    config.training.evaluators = (dict(name='planted', every=2),)
  if case == 'disk' and os.environ['HOST'] == '0':
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
  return config


def run(case: str, processes: int, folder: pathlib.Path) -> list[End]:
  """Starts them, waits for all."""
  from tests.launch.run import make_data

  make_data(folder / 'data')
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  children = []
  for i in range(processes):
    host = folder / f'host{i}'
    shutil.copytree(folder / 'data', host)
    if i == 1 and case == 'missing':
      (host / 'train.json').unlink()
    if i == 1 and case == 'row':
      for name in ('2.png', '3.png', '5.png'):  # in one of its first batches
        (host / name).unlink()
    environment = dict(os.environ, JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES=str(4 // processes),
                       PYTHONPATH=str(REPO), HOST=str(i), TF_CPP_MIN_LOG_LEVEL='2',
                       XLA_FLAGS='--xla_backend_optimization_level=0 '
                                 '--xla_cpu_use_fusion_emitters=false')  # fmt: skip
    if case == 'disk':  # it has files of its own to write
      environment['JAX_ENABLE_COMPILATION_CACHE'] = '0'
    command = [sys.executable, '-m', 'hrvlm_jax.cli', 'train', '--quiet', '--config',
               f'{REPO}/tests/launch/mistakes.py:{case}', '--workdir', str(folder / 'run'),
               '--distributed', 'on', '--coordinator', f'localhost:{port}', '--num-processes',
               str(processes), '--process-id', str(i)]  # fmt: skip
    log = (folder / f'log.{i}').open('w')
    children.append(subprocess.Popen(command, env=environment, cwd=host, stdout=log,
                                     stderr=subprocess.STDOUT))
  ended: dict[int, float] = {}
  first, sentence = float('inf'), CASES[case][2]
  logs = [folder / f'log.{i}' for i in range(processes)]
  deadline = time.monotonic() + 500
  while len(ended) < processes and time.monotonic() < deadline:
    for i, child in enumerate(children):
      if i not in ended and child.poll() is not None:
        ended[i] = time.monotonic()
    if first == float('inf') and any(sentence in log.read_text() for log in logs):
      first = time.monotonic()
    time.sleep(0.05)
  for child in children:
    if child.poll() is None:
      child.kill()
      child.wait()
  first = min([first, *ended.values()])
  return [End(child.returncode, ended.get(i, float('inf')) - first,
              logs[i].read_text()) for i, child in enumerate(children)]


def problems(case: str, ends: list[End]) -> list[str]:
  """What is not as it should be."""
  status, alone, sentence = CASES[case]
  found = []
  for i, end in enumerate(ends):
    told = f'{socket.gethostname()} (process {alone}) failed: '
    said = [line for line in end.output.splitlines() if sentence in line]
    if end.status != status:
      found.append(f'process {i}: status {end.status}, expected {status}')
    if end.late > 30:
      found.append(f'process {i}: {end.late:.0f} s after it was said')
    if not said:
      found.append(f'process {i}: does not say {sentence!r}')
    elif alone is not None and i != alone and not any(told in line for line in said):
      found.append(f'process {i}: does not say whose failure it is: {said[0]}')
    if 'Fatal Python error' in end.output or 'Check failed' in end.output:
      found.append(f'process {i}: ends in C++')
    if 'unhandled' in end.output or (status == 2 and 'Traceback' in end.output):
      found.append(f'process {i}: a traceback for a mistake')
  return found


if __name__ == '__main__':
  wanted, number, where = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
  result = run(wanted, number, where)
  print(json.dumps([dataclasses.asdict(end) for end in result], indent=2))
  print(problems(wanted, result) or 'as it should be')
