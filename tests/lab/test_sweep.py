"""Sweeps: a grid and a sweep file, one folder per run, table and plot, resumed."""

import json
import pathlib
import textwrap

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.cli.main import main
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.lab import sweep

ABLATIONS = pathlib.Path(__file__).parents[2] / 'configs' / 'ablations'

CONFIG = """
import ml_collections
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.systems.mc_llava.encoder import MCLlavaConfig
from hrvlm_jax.vision.vit import ViTConfig

ROWS = {'low': (1e-3, (1.5, 2)), 'high': (1e30, None)}


def get_config(row='low'):
  vision = ViTConfig(image_size=12, patch_size=4, width=16, depth=1, heads=2, mlp_width=16)
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = to_dict(ModelConfig(
    system='mc_llava', projector=ProjectorConfig(n_in=16, n_out=16),
    encoder=MCLlavaConfig(vision=vision, max_crops=0, num_tokens=8, window=12, growth=2,
                          view_buckets=(1,)),
    text=language.phi(vocab_size=264, width=16, depth=1, heads=2, mlp_width=16)))
  config.data = dict(train='train.json', lengths=(64,))
  config.training = dict(steps=3, batch_size=2, log_every=1, mfu=False,
                         groups=(dict(pattern='vision/tower/.*', frozen=True), dict(pattern='.*')),
                         optimizer=dict(learning_rate=ROWS[row][0], clip_norm=None))
  return config
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Two pictures with a question each, and the config above."""
  rows = []
  for i in range(2):
    pixels = np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f'{i}.png')
    turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': f'A{i}'}]
    rows.append({'id': str(i), 'image': f'{i}.png', 'conversations': turns})
  (tmp_path / 'train.json').write_text(json.dumps(rows))
  (tmp_path / 'run.py').write_text(textwrap.dedent(CONFIG))
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_a_grid_and_its_resumption(folder, capsys):
  argv = ['sweep', '--config', 'run.py:low', '--config.training.optimizer.learning_rate=1e-3,1e-2',
          '--config.seed=0,1', '--config.training.steps=2', '--out', 'out', '--quiet']
  assert main(argv) == 0
  names = [f'learning_rate={rate}_seed={seed}' for rate in ('1e-3', '1e-2') for seed in (0, 1)]
  rows = json.loads((folder / 'out/results.json').read_text())
  assert [row['name'] for row in rows] == names and all(row['steps'] == 2 for row in rows)
  assert len({row['loss'] for row in rows}) == 4
  table = (folder / 'out/table.txt').read_text().splitlines()
  assert 'training.optimizer.learning_rate' in table[0] and 'training.steps' not in table[0]
  assert len(table) == 5 and Image.open(folder / 'out/plot.png').size[0] > 300
  # One run more and one that was lost: only these two are trained.
  before = {name: (folder / 'out' / name / 'metrics.jsonl').stat().st_mtime_ns for name in names}
  checkpoints = folder / 'out' / names[0] / 'checkpoints'
  checkpoints.rename(folder / 'lost')
  capsys.readouterr()
  assert main([a.replace('seed=0,1', 'seed=0,1,2') for a in argv]) == 0
  said = capsys.readouterr().out
  assert said.count('done before') == 3 and len(json.loads(
    (folder / 'out/results.json').read_text())) == 6
  after = {name: (folder / 'out' / name / 'metrics.jsonl').stat().st_mtime_ns for name in names}
  assert [name for name in names if before[name] != after[name]] == [names[0]]


def test_a_sweep_file_with_a_run_that_fails(folder, capsys):
  assert main(['sweep', '--config', 'run.py', '--out', 'out', '--quiet']) == 2
  assert '1 of 2 runs failed: high' in capsys.readouterr().err
  table = (folder / 'out/table.txt').read_text().splitlines()
  assert table[1].startswith('low') and table[1].endswith('1.5 / 2') and 'failed' in table[2]
  assert 'the loss is' in (folder / 'out/high/FAILED').read_text()
  assert main(['sweep', '--config', 'run.py', '--out', 'out', '--only', 'low', '--quiet']) == 0


def test_mistakes(folder):
  with pytest.raises(UserError, match='is one run: use `hrvlm train`'):
    sweep.entries_of('run.py:low', [])
  with pytest.raises(UserError, match='--only: .*lwo.*low'):
    sweep.entries_of('run.py', [], only='lwo')
  with pytest.raises(UserError, match='unknown key config.sed'):
    sweep.entries_of('run.py', [('sed', '0,1')])
  with pytest.raises(UserError, match='several runs of the same name: a'):
    sweep.run([sweep.Entry('a', None), sweep.Entry('a', None)], folder / 'x')
