"""Every system through the same verbs, in its tiny size: train, ask, eval, export, convert.

MC-LLaVA's way is `test_journey.py`.
"""

import json
import textwrap

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint import hf
from hrvlm_jax.cli.main import main
from tests import levels

CONFIG = textwrap.dedent("""
    import ml_collections
    from hrvlm_jax.core.config import to_dict
    from hrvlm_jax.systems import registry
    def get_config():
      config = ml_collections.ConfigDict()
      config.model = to_dict(registry.get(SYSTEM).tiny())
      config.data = dict(train='train.json', lengths=(320,))
      config.training = dict(steps=2, batch_size=2, log_every=1,
                             optimizer=dict(learning_rate=1e-3))
      return config
""")
SIZES = ((30, 90), (120, 40), (64, 64), (33, 40))


@pytest.fixture(scope='module', params=levels.rows(
  'systems', ['pheye', 'llava_hr'], first=['pheye']))
def run(request, tmp_path_factory):
  """(system, folder): a work directory after two steps on pictures of different sizes."""
  root = tmp_path_factory.mktemp(request.param)
  rng, rows = np.random.default_rng(0), []
  for i, size in enumerate(SIZES):
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / f'{i}.png')
    turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': f'A{i}'}]
    rows.append({'id': str(i), 'image': f'{i}.png', 'conversations': turns})
  (root / 'train.json').write_text(json.dumps(rows))
  (root / 'run.py').write_text(CONFIG.replace('SYSTEM', repr(request.param)))
  assert main(['train', '--config', str(root / 'run.py'), '--workdir', str(root / 'w'), '--quiet',
               f'--config.data.train={root / "train.json"}']) == 0
  return request.param, root


def test_trained_and_answers(run, capsys):
  _, root = run
  lines = [json.loads(line) for line in (root / 'w/metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [1, 2]
  assert all(np.isfinite(line['loss']) for line in lines)
  ask = ['ask', '--checkpoint', str(root / 'w'), str(root / '0.png'), 'What?',
         '--max-new-tokens', '3']
  assert main([*ask, '--overlay', str(root / 'o.png')]) == 0
  assert min(Image.open(root / 'o.png').size) >= 30
  capsys.readouterr()


def test_pheye_takes_one_image(run, capsys):
  system, root = run
  ask = ['ask', '--checkpoint', str(root / 'w'), str(root / '0.png'), str(root / '1.png'), 'What?',
         '--max-new-tokens', '3']
  assert main(ask) == (2 if system == 'pheye' else 0)
  assert ('reads exactly one image per prompt, got 2' in capsys.readouterr().err) == \
    (system == 'pheye')


def test_evaluates(run, capsys):
  """Pictures of different sizes in one batch; an image that every system can read."""
  _, root = run
  folder = root / 'realworldqa'
  folder.mkdir()
  rows = []
  for number in range(len(SIZES)):
    (folder / f'{number}.png').write_bytes((root / f'{number}.png').read_bytes())
    rows.append({'id': str(number), 'image': f'{number}.png', 'question': 'How many?\nA. 1\nB. 2',
                 'answer': 'AB'[number % 2]})
  (folder / 'annotations.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  argv = ['eval', '--benchmark', 'realworldqa', '--data', str(folder), '--checkpoint',
          str(root / 'w'), '--max-new-tokens', '3', '--quiet']
  assert main([*argv, '--out', str(root / 'four'), '--batch-size', '4']) == 0
  assert '4 samples' in capsys.readouterr().out
  assert main([*argv, '--out', str(root / 'single'), '--batch-size', '1']) == 0
  four, single = ((root / name / 'predictions.jsonl').read_text() for name in ('four', 'single'))
  assert four == single and len(four.splitlines()) == 4
  assert 'data:image' in (root / 'four/report.html').read_text()


def test_exports_and_comes_back(run):
  system, root = run
  out, again = root / 'out', root / 'again'
  assert main(['export', '--checkpoint', str(root / 'w'), '--to', str(out)]) == 0
  assert main(['convert', '--from', str(out), '--to', str(again)]) == 0
  assert main(['export', '--checkpoint', str(again), '--to', str(root / 'second')]) == 0
  first, second = hf.TensorFolder(out), hf.TensorFolder(root / 'second')
  assert set(first) == set(second) and len(first) > 100
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)
  config = json.loads((out / 'config.json').read_text())
  if system == 'pheye':
    assert (config['level'], config['cross_interval'], config['encoder']) == (2, 2, 'hrvlm')
  else:
    assert (config['model_type'], config['hrvlm']['system']) == ('llava', 'llava_hr')
