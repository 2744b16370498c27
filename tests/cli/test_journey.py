"""Train, resume, ask, list, export and convert back, by the commands that a user types."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint import hf, store
from hrvlm_jax.cli.main import main
from hrvlm_jax.lab.needle import NeedleConfig, write

CONFIG = textwrap.dedent("""
    import ml_collections
    from hrvlm_jax.core.config import to_dict
    from hrvlm_jax.systems.mc_llava.encoder import tiny
    def get_config():
      config = ml_collections.ConfigDict()
      config.model = to_dict(tiny(max_crops=4, num_tokens=8))
      config.data = dict(train=DATA, lengths=(96,))
      config.training = dict(steps=2, batch_size=2, log_every=1, checkpoint_every=1,
                             optimizer=dict(learning_rate=1e-3))
      return config
""")


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A work directory after two steps on four pictures."""
  root = tmp_path_factory.mktemp('journey')
  rng = np.random.default_rng(0)
  rows = []
  for i in range(4):
    pixels = rng.integers(0, 256, (80 + 20 * i, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / f'{i}.png')
    turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': f'A{i}'}]
    rows.append({'id': str(i), 'image': f'{i}.png', 'conversations': turns})
  (root / 'train.json').write_text(json.dumps(rows))
  (root / 'run.py').write_text(CONFIG.replace('DATA', repr(str(root / 'train.json'))))
  assert main(['train', '--config', str(root / 'run.py'), '--workdir', str(root / 'w'),
               '--quiet']) == 0
  return root


def test_training_left_metrics_and_checkpoints(folder):
  lines = [json.loads(line) for line in (folder / 'w' / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [1, 2]
  assert all(np.isfinite(line['loss']) for line in lines)
  assert store.steps(folder / 'w')[-1] == 2


def test_training_goes_on_where_it_was(folder, capsys):
  argv = ['train', '--config', str(folder / 'run.py'), '--workdir', str(folder / 'w'), '--quiet']
  assert main([*argv, '--config.training.steps=3']) == 0
  assert 'finished at step 3' in capsys.readouterr().out
  assert main([*argv, '--config.training.steps=3']) == 0
  assert 'finished at step 3, nothing left to do' in capsys.readouterr().out


def test_asking(folder, capsys):
  argv = ['ask', '--checkpoint', str(folder / 'w'), str(folder / '1.png'), 'What?',
          '--max-new-tokens', '4']
  assert main([*argv, '--overlay', str(folder / 'o.png')]) == 0
  greedy = capsys.readouterr().out
  assert greedy.endswith('\n')
  assert Image.open(folder / 'o.png').size[0] >= 100
  assert main([*argv, '--beams', '2']) == 0
  assert main([*argv, '--temperature', '1', '--seed', '3']) == 0
  assert main([*argv, '--encoder.max_crops=0', '--encoder.num_tokens=4']) == 0
  capsys.readouterr()
  assert main([*argv, '--encoder.max_crop=0']) == 2
  assert 'unknown key model.encoder.max_crop (nearest known: max_crops)' in capsys.readouterr().err
  assert main([*argv, '--temperature', '1', '--beams', '2']) == 2


def test_listing_parameters(folder, capsys):
  assert main(['params', '--checkpoint', str(folder / 'w')]) == 0
  from_checkpoint = capsys.readouterr().out
  assert main(['params', '--config', str(folder / 'run.py')]) == 0
  from_config = capsys.readouterr().out
  assert from_checkpoint.splitlines()[-1] == from_config.splitlines()[-1]
  assert 'vision/coord_embed' in from_config and 'no decay' in from_config
  assert main(['params', '--config', str(folder / 'run.py'), '--devices', '2',
               '--config.mesh.fsdp=2', '--config.mesh.data=1']) == 0
  assert '(fsdp' in capsys.readouterr().out
  assert main(['params', '--config', str(folder / 'run.py'), '--depth', '1']) == 0
  assert 'vision/...' in capsys.readouterr().out


def test_exporting_and_converting_back(folder, capsys):
  out, again = folder / 'exported', folder / 'again'
  assert main(['export', '--checkpoint', str(folder / 'w'), '--to', str(out)]) == 0
  hf.check_manifest(out)
  assert main(['export', '--checkpoint', str(folder / 'w'), '--to', str(out)]) == 2
  assert 'the folder is not empty' in capsys.readouterr().err
  assert main(['convert', '--from', str(out), '--to', str(again)]) == 0
  before = store.flatten(store.load_params(folder / 'w', shardings='host'))
  after = store.flatten(store.load_params(again, shardings='host'))
  assert before.keys() == after.keys()
  for path in before:
    np.testing.assert_array_equal(before[path], after[path], err_msg=path)


def test_evaluating_on_eight_devices_killed_and_resumed(folder, capsys):
  """The same verb on one device, on eight, and on eight after a kill -9: the same files."""
  write(NeedleConfig.tiny(turns=2), folder / 'task', 30, seed=5, progress=False)
  argv = ['eval', '--benchmark', 'needle', '--data', str(folder / 'task'), '--checkpoint',
          str(folder / 'w'), '--max-new-tokens', '8', '--quiet']
  assert main([*argv, '--out', str(folder / 'one')]) == 0
  assert 'needle (all), 60 samples: needle_accuracy = ' in capsys.readouterr().out

  command = [sys.executable, '-m', 'hrvlm_jax.cli', *argv, '--out', str(folder / 'eight')]
  environment = os.environ | {'JAX_NUM_CPU_DEVICES': '8', 'JAX_PLATFORMS': 'cpu'}
  shard = folder / 'eight' / 'predictions-00000-of-00001.jsonl'
  process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
  while process.poll() is None and not (shard.exists() and shard.stat().st_size):
    time.sleep(0.01)
  process.kill()
  assert process.wait() == -signal.SIGKILL, 'it ended before it could be killed'
  answered = len(shard.read_bytes().splitlines())
  assert 1 <= answered < 60 and not (folder / 'eight/result.json').exists()
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-2000:]
  one, eight = ((folder / name / 'predictions.jsonl').read_bytes() for name in ('one', 'eight'))
  assert one == eight
  first, second = (json.loads((folder / name / 'result.json').read_text())
                   for name in ('one', 'eight'))
  assert first.pop('finished') and second.pop('finished')
  assert first == second
  assert main([*argv, '--out', str(folder / 'three'), '--batch-size', '0']) == 2
