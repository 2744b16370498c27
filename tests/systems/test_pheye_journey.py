"""Pheye through the verbs: train from its tiny config, ask with overlay, export, convert."""

import json
import pathlib

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint import hf
from hrvlm_jax.cli.main import main

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A work directory after two steps on pictures of different sizes."""
  root = tmp_path_factory.mktemp('pheye')
  rng, rows = np.random.default_rng(0), []
  for i, size in enumerate(((30, 90), (120, 40), (64, 64), (10, 10))):
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / f'{i}.png')
    turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': f'A{i}'}]
    rows.append({'id': str(i), 'image': f'{i}.png', 'conversations': turns})
  (root / 'train.json').write_text(json.dumps(rows))
  assert main([
    'train', '--config', str(ROOT / 'configs/tiny/pheye.py'), '--workdir', str(root / 'w'),
    '--quiet', f'--config.data.train={root / "train.json"}',
    '--config.training.steps=2', '--config.training.batch_size=2',
    '--config.training.log_every=1']) == 0
  return root


def test_trained_and_answers(run, capsys):
  lines = [json.loads(line) for line in (run / 'w/metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [1, 2]
  assert all(np.isfinite(line['loss']) for line in lines)
  ask = ['ask', '--checkpoint', str(run / 'w'), str(run / '0.png'), 'What?',
         '--max-new-tokens', '3']
  assert main([*ask, '--overlay', str(run / 'o.png')]) == 0
  assert Image.open(run / 'o.png').size == (90, 30)
  capsys.readouterr()
  assert main([*ask[:3], str(run / '0.png'), str(run / '1.png'), 'What?']) == 2
  assert 'reads exactly one image per prompt, got 2' in capsys.readouterr().err


def test_exports_and_comes_back(run):
  out, again = run / 'out', run / 'again'
  assert main(['export', '--checkpoint', str(run / 'w'), '--to', str(out)]) == 0
  assert main(['convert', '--from', str(out), '--to', str(again)]) == 0
  assert main(['export', '--checkpoint', str(again), '--to', str(run / 'second')]) == 0
  first, second = hf.TensorFolder(out), hf.TensorFolder(run / 'second')
  assert set(first) == set(second) and len(first) > 200
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)
  config = json.loads((out / 'config.json').read_text())
  assert (config['level'], config['cross_interval'], config['encoder']) == (2, 2, 'hrvlm')
