"""`hrvlm data`: the verbs on a small data set with bad rows."""

import json
import re

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.cli import main as cli
from hrvlm_jax.training import run_config
from hrvlm_jax.training.batches import make_batches
from hrvlm_jax.training.config import RunConfig

TALK = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'This.'}]

CONFIG = """
import ml_collections
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.systems import registry

def get_config(name='mc_llava'):
  config = ml_collections.ConfigDict()
  config.model = to_dict(registry.get(name).tiny())
  config.data = dict(train='data.json', lengths=(256, 512, 1024))
  config.training = dict(steps=1, batch_size=4, optimizer=dict(learning_rate=1e-3))
  return config
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  rows = []
  for number, size in enumerate([(60, 40), (200, 100), (90, 90), (40, 200)]):
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(
      tmp_path / f'{number}.png')
    rows.append({'id': str(number), 'image': f'{number}.png', 'conversations': TALK,
                 'box': [5, 5, 30, 30]})
  (tmp_path / 'data.json').write_text(json.dumps(rows, indent=1))
  bad = rows + [rows[0] | {'image': 'none.png'}, rows[0] | {'image': '../x.png'}]
  (tmp_path / 'bad.jsonl').write_text('\n'.join(map(json.dumps, bad)) + '\n{"broken": ')
  (tmp_path / 'config.py').write_text(CONFIG)
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.parametrize('system', ['mc_llava', 'vila_hd'])
def test_show(folder, capsys, system):
  boxes = ['--config.data.boxes=true'] if system == 'vila_hd' else []
  assert cli.main(['data', 'show', '--config', f'config.py:{system}', '--rows', '2', '--out',
                   'out.png', '--colour', 'always', *boxes]) == 0
  text = capsys.readouterr().out
  line = next(line for line in text.splitlines() if line.startswith('views/pixels'))
  assert re.search(r'\d+ x \d+ x \d+ x 3 +uint8 +\d \.\. 25\d$', line)
  assert '\x1b[32mThis.<|im_end|>' in text  # trained
  assert ' visual tokens]\x1b[0m' in text
  picture = np.asarray(Image.open('out.png'))
  assert picture.shape[2] == 3
  red = (picture == (255, 0, 0)).all(-1).sum()
  assert (red > 100) and 'drawn: out.png' in text  # the boxes


def test_show_packed(folder, capsys):
  assert cli.main(['data', 'show', '--config', 'config.py', '--config.data.packing.rows=2',
                   '--rows', '1', '--colour', 'never']) == 0
  text = capsys.readouterr().out
  assert text.count('\u00abThis.<|im_end|>\u00bb') == 2  # two examples in the row that is shown
  assert 'crop slots not used' in text
  assert 'segments' in text


def test_check(folder, capsys):
  assert cli.main(['data', 'check', 'data.json', '--quiet']) == 0
  assert capsys.readouterr().out == '4 rows, none is bad\n'
  assert cli.main(['data', 'check', 'bad.jsonl', '--quiet', '--out', 'faults.jsonl']) == 1
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(']')[0].rsplit('[')[-1] for line in lines[:3]] == ['missing', 'path', 'json']
  assert ['(line 5)' in lines[0], '(line 6)' in lines[1], '(line 7)' in lines[2]] == [True] * 3
  assert lines[-1] == '7 rows, 3 bad: 1 missing, 1 path, 1 json'
  faults = list(map(json.loads, (folder / 'faults.jsonl').read_text().splitlines()))
  assert [fault['row'] for fault in faults] == [4, 5, 6]


def test_check_as_trained(folder, capsys):
  """What the run of a config would leave out, with the counts that training reports."""
  assert cli.main(['data', 'check', '--config', 'config.py', '--quiet']) == 0
  assert capsys.readouterr().out == '4 examples, none is bad\n'
  argv = ['data', 'check', 'bad.jsonl', '--config', 'config.py', '--quiet']
  assert cli.main(argv) == 1
  assert capsys.readouterr().out.splitlines()[-1] == '7 examples, 3 bad: 1 path, 1 json, 1 missing'
  assert cli.main([*argv, '--config.data.packing.window=2']) == 1  # measured before it is opened
  assert '7 examples, 3 bad' in capsys.readouterr().out
  # Two questions: fine for a conversation, not for a template that knows one.
  more = [{'from': 'human', 'value': 'And?'}, {'from': 'gpt', 'value': 'That.'}]
  row = {'image': '0.png', 'conversations': TALK + more}
  (folder / 'two.json').write_text(json.dumps([row, row | {'conversations': TALK}]))
  assert cli.main(['data', 'check', 'two.json', '--quiet']) == 0
  assert cli.main(['data', 'check', 'two.json', '--template', 'pheye', '--quiet']) == 1
  assert 'one question and one answer, found 4 messages' in capsys.readouterr().out
  # A text alone: not for a model that reads one image; a placeholder that stands for no image.
  text = [{'from': 'human', 'value': 'Say hello'}, {'from': 'gpt', 'value': 'hello'}]
  tag = [{'from': 'human', 'value': 'What is <image> in HTML?'}, {'from': 'gpt', 'value': 'A tag'}]
  for name, conversations, template, said in (
      ('text', text, 'pheye', 'reads exactly one image per prompt, found 0'),
      ('tag', tag, 'mc_llava_train', 'has 1 image placeholders for 0 images')):
    (folder / f'{name}.json').write_text(json.dumps([{'conversations': conversations}]))
    assert cli.main(['data', 'check', f'{name}.json', '--quiet']) == 0
    assert cli.main(['data', 'check', f'{name}.json', '--template', template, '--quiet']) == 1
    assert said in capsys.readouterr().out
  assert cli.main(['data', 'check', 'text.json', '--template', 'mc_llava_train', '--quiet']) == 0
  capsys.readouterr()
  pheye = ['--config', 'config.py:pheye', '--quiet']
  assert cli.main(['data', 'check', 'two.json', *pheye]) == 1
  assert capsys.readouterr().out.splitlines()[-1] == '2 examples, 1 bad: 1 example'
  part = {'path': 'two.json', 'format': {'turns': 2, 'each': True}}
  (folder / 'two.mixture.json').write_text(json.dumps({'parts': [part]}))
  assert cli.main(['data', 'check', 'two.mixture.json', *pheye]) == 0
  assert capsys.readouterr().out == '4 examples, none is bad\n'


def test_half_a_character(folder, capsys):
  """Text that was cut inside an emoji: a bad row for the check and for training alike."""
  half = [{'from': 'human', 'value': 'What is \ud83d'}, {'from': 'gpt', 'value': 'This.'}]
  rows = [{'image': '0.png', 'conversations': TALK}, {'image': '0.png', 'conversations': half},
          {'image': '0.png', 'conversations': TALK[:1] + [{'from': 'gpt', 'value': '\ude00!'}]}]
  (folder / 'half.json').write_text(json.dumps(rows))
  for options in ([], ['--config', 'config.py']):
    assert cli.main(['data', 'check', 'half.json', '--quiet', *options]) == 1
    said = capsys.readouterr().out
    assert said.endswith('2 bad: 2 encoding\n') and 'half a character' in said


def test_an_error_of_the_system_is_a_sentence(folder, capsys, monkeypatch):
  import errno

  from hrvlm_jax.data import show

  class Sheet:
    def save(self, path):
      raise OSError(errno.ENOSPC, 'No space left on device', path)

  def shapes(batch):
    raise OSError(errno.ENOSPC, 'No space left on device', 'x.png')

  with monkeypatch.context() as patch:
    patch.setattr(show, 'sheet', lambda panels: Sheet())
    assert cli.main(['data', 'show', '--config', 'config.py', '--out', 'x.png']) == 2
  assert capsys.readouterr().err.startswith('hrvlm data: cannot write x.png: the disk is full')
  assert not (folder / 'x.png').exists()
  monkeypatch.setattr(show, 'shapes', shapes)  # a place that has no sentence of its own
  assert cli.main(['data', 'show', '--config', 'config.py', '--out', 'x.png']) == 2
  said = capsys.readouterr().err
  assert said.startswith('hrvlm data: x.png: ') and said.count('\n') == 1 and 'disk' in said


def test_drawn_crops(folder, capsys):
  """`data.draw`: another number of crops for every image, the same again for the same seed."""
  Image.new('RGB', (160, 160)).save(folder / 'large.png')
  large = {'image': 'large.png', 'conversations': TALK}
  (folder / 'large.json').write_text(json.dumps([large] * 4))

  def views(*overrides):
    config = run_config.load(RunConfig, 'config.py', [('data.train', 'large.json'), *overrides])
    batches = make_batches(config)
    sizes, made = (batches.mapped(f) for f in (batches.transform.measure, batches.transform))
    return [sizes[i].views for i in range(40)], [len(made[i]['views']['pixels']) for i in range(40)]

  drawn = ('data.draw', "{'max_crops': (0, 4)}")
  sizes, made = views(drawn)
  assert sizes == made and set(made) == {1, 5}, set(made)
  assert 4 <= made.count(5) <= 16  # one of five values gives crops
  assert views(drawn) == (sizes, made) and views(drawn, ('seed', '1')) != (sizes, made)
  assert set(views()[1]) == {10}
  for system, value, message in (
      ('mc_llava', "{'max_crop': (0, 4)}", "max_crop: system 'mc_llava' draws max_crops"),
      ('mc_llava', "{'max_crops': (4, 0)}", 'expected the lowest value first'),
      ('mc_llava', "{'max_crops': (-1, 4)}", 'draw must be at least 0'),
      ('mc_llava', '8', 'expected a mapping'),
      ('pheye', "{'max_crops': (0, 4)}", "system 'pheye' draws none")):
    assert cli.main(['data', 'check', '--config', f'config.py:{system}',
                     f'--config.data.draw={value}']) == 2
    assert message in capsys.readouterr().err


def test_build(folder, capsys):
  argv = ['data', 'build', 'bad.jsonl', '--out', 'built', '--shard-rows', '3', '--quiet']
  assert cli.main(argv) == 0
  assert '4 rows in 3 files, checksums verified; 3 bad rows left out' in capsys.readouterr().out
  assert cli.main(argv) == 0
  assert cli.main(['data', 'check', 'built', '--quiet']) == 0
  shard = next((folder / 'built').glob('*.array_record'))
  shard.write_bytes(shard.read_bytes()[:-1] + b'x')
  capsys.readouterr()
  assert cli.main(argv) == 2
  assert 'is damaged' in capsys.readouterr().err


@pytest.mark.parametrize('argv, message', [
  (['shwo'], 'unknown data action shwo (nearest known: show)'),
  (['show'], 'the following arguments are required: --config'),
  (['show', '--config', 'config.py', '--out', 'x.txt'], '--out x.txt'),
  (['show', '--config', 'config.py', '--step', '-1'], '--step -1'),
  (['show', '--config', 'config.py', '--config.data.train=none.json'], 'none.json: no such file'),
  (['check', 'none.json'], 'none.json: no such file'),
  (['check', 'data.json', '--template', 'vicuna'], 'vicuna'),
  (['check', '--quiet'], 'found no data'),
  (['check', '--config', 'config.py', '--image', 'none'], 'the run of --config decides both'),
  (['build', 'data.json', '--out', 'x', '--shard-rows', '0'], '--shard-rows 0'),
])
def test_mistakes(folder, capsys, argv, message):
  assert cli.main(['data', *argv]) == 2
  captured = capsys.readouterr()
  assert message in captured.err and captured.err.count('\n') == 1
