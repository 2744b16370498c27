"""Tuning in one command: the page's commands as they stand, and what it refuses."""

import json
import pathlib
import re
import shlex

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint import store
from hrvlm_jax.cli.main import main
from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.front import finetune
from hrvlm_jax.language.prompt import Text, tokenizer_of
from hrvlm_jax.systems import registry
from hrvlm_jax.training import run_config
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.vlm import model as vlm

ROOT = pathlib.Path(__file__).parents[2]
COLOURS = {'red': (220, 30, 30), 'blue': (30, 30, 220)}


@pytest.fixture
def here(world, monkeypatch, tmp_path):
  """A folder with the quickstart's checkpoint, twenty pictures and their questions."""
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs/quickstart').symlink_to(world / 'runs/quickstart')
  (tmp_path / 'pictures').mkdir()
  rng, rows = np.random.default_rng(0), []
  for number in range(20):
    name = ('red', 'blue')[number % 2]
    pixels = np.clip(np.array(COLOURS[name]) + rng.integers(-25, 26, (40, 50, 3)), 0, 255)
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f'pictures/{number:02d}.png')
    rows.append({'image': f'{number:02d}.png', 'question': 'Which colour is the sign?',
                 'answer': name})
  (tmp_path / 'own.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_the_page_from_twenty_pictures_to_a_tuned_model(here, capsys):
  page = (ROOT / 'docs/finetune.md').read_text()
  commands = [line for block in re.findall(r'```bash\n(.*?)```', page, re.DOTALL)
              for line in block.splitlines() if line.startswith('hrvlm ')]
  outputs = {}
  for command in commands:
    words = shlex.split(command)[1:]
    assert main(words + (['--quiet'] if words[0] in ('finetune', 'eval') else [])) == 0, command
    outputs[words[0]] = capsys.readouterr().out
  said = outputs['finetune']
  assert '18 rows to train on, 2 held out' in said and 'LoRA of rank 16' in said
  assert re.search(r'[\d,]+ of [\d,]+ parameters are trained', said)
  assert 'held out, after: plain 100.0%' in said
  tried = shlex.split(said.split('try: ')[1])
  assert main(tried[1:]) == 0 and capsys.readouterr().out.strip() in COLOURS
  assert outputs['ask'].strip() == 'red'
  assert 'contains = 100.00' in outputs['eval']
  # What is frozen is what it was: the language model under its set, and what nothing reads.
  before, after = (store.flatten(store.load_params(folder, shardings='host'))
                   for folder in ('runs/quickstart/checkpoint', 'runs/mine'))
  assert set(after) - set(before) == {path for path in after if 'lora_' in path}
  moved = {path for path in before if not np.array_equal(before[path], after[path])}
  assert moved and not any(path.startswith('language/') for path in moved)
  assert not any(re.fullmatch(registry.get('mc_llava').frozen, path) for path in moved)

  # An original's folder is converted once, below the run.
  start = finetune._start('runs/mine_exported', here / 'runs/z', {'seed': 1}, lambda text: None)
  assert start == here / 'runs/z/start'
  with pytest.raises(UserError, match='holds another run .seed was 1, is 2.; choose another --out'):
    finetune._same(here / 'runs/z', {'seed': 2})
  with pytest.raises(UserError, match='holds no run of hrvlm finetune'):
    finetune._same(here / 'pictures', {'seed': 2})
  assert not finetune.adapters.lora_sets(finetune._model(start, None, None))

  # Run again, it is done; another rank is refused.
  again = shlex.split(next(line for line in commands if ' finetune ' in line))[1:] + ['--quiet']
  assert main(again) == 0 and 'try: hrvlm ask' in capsys.readouterr().out
  other = ['finetune', 'runs/mine', '--data', 'own.jsonl', '--images', 'pictures', '--lora', '8']
  assert main([*other, '--out', 'runs/x']) == 2
  assert 'has a LoRA set of rank 16 already' in capsys.readouterr().err


@pytest.mark.parametrize('options, words', [
  (dict(lora=0), 'lora: found 0'), (dict(epochs=0), 'epochs: found 0'),
  (dict(epochs=float('inf')), 'epochs: found inf'), (dict(epochs=float('nan')), 'found nan'),
  (dict(held_out=1.0), 'eval: found 1.0'), (dict(metric='plane'), 'nearest known: plain'),
  (dict(learning_rate=-1.0, batch_size=0), 'batch_size: found 0.*; learning_rate: found -1.0'),
])
def test_numbers_that_cannot_be(here, options, words):
  with pytest.raises(UserError, match=words):
    finetune.finetune('runs/quickstart/checkpoint', 'own.jsonl', 'runs/y', images='pictures',
                      **options)
  assert not (here / 'runs/y').exists()


def test_rows_that_cannot_be_used_are_said_and_left_out(here):
  lines = (here / 'own.jsonl').read_text().splitlines()[:3]
  bad = ['{"image": "none.png", "question": "What?", "answer": "red"}', '{"question": "What?"}',
         json.dumps({'conversations': [{'from': 'human', 'value': 'What?'}]})]
  (here / 'mixed.jsonl').write_text('\n'.join(lines + bad) + '\n')
  said = []
  source = finetune.open_source('mixed.jsonl', images='pictures')
  assert len(finetune.usable(source, said.append)) == 3
  assert said[0].startswith('3 of 6 rows cannot be used:') and 'none.png: no such file' in said[0]
  (here / 'bad.jsonl').write_text('\n'.join(bad) + '\n')
  with pytest.raises(UserError, match='3 of 3 rows cannot be used'):
    finetune.usable(finetune.open_source('bad.jsonl', images='pictures'), said.append)
  # Two turns, under a template of one.
  two = {'conversations': [{'from': who, 'value': 'x'} for who in ('human', 'gpt') * 2]}
  (here / 'two.json').write_text(json.dumps([two]))
  rows = finetune.usable(finetune.open_source('two.json'), said.append)
  text = Text(tokenizer=tokenizer_of('byte'), chat='pheye', image_token=None)
  with pytest.raises(UserError, match='two.json, row 0.*has one question and one answer'):
    finetune.fitting(rows, text, said.append)
  with pytest.raises(UserError, match='one row cannot be trained on and held out'):
    finetune.split(1, 0.1, 0)
  parts = finetune.split(20, 0.1, 0)
  assert len(parts['eval']) == 2 and sorted(parts['eval'] + parts['train']) == list(range(20))
  assert parts != finetune.split(20, 0.1, 1) and finetune.split(5, 0, 0)['eval'] == []


@pytest.mark.parametrize('name, stage', [('mc_llava', 'full'), ('llava_hr', '7b,stage2'),
                                         ('pheye', 'x2_448,stage3'), ('vila_hd', '1_5k,sft')])
def test_what_is_frozen_is_what_the_last_published_stage_freezes(name, stage):
  config = run_config.load(RunConfig, f'{ROOT}/configs/{name}.py:{stage}')
  flat = paths.flatten(vlm.build(config.model).abstract)
  rule = lambda path: next(g for g in config.training.groups if re.fullmatch(g.pattern, path))
  frozen = {path for path in flat if rule(path).frozen}
  ours = {path for path in flat if re.fullmatch(registry.get(name).frozen, path)}
  assert frozen == ours and len(frozen) < len(flat)
