"""Split and fields of a table: in a run's training and evaluation, a mixture, the checks."""

import json

import pytest

from hrvlm_jax.cli.main import main
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.rows import Fields
from hrvlm_jax.data.sources import open_source
from hrvlm_jax.language.chat import ASSISTANT, USER, Message
from hrvlm_jax.training import run_config
from hrvlm_jax.training.answers import Answers, AnswersOptions
from hrvlm_jax.training.batches import make_batches
from hrvlm_jax.training.config import RunConfig
from tests.data.test_tables import make_tfds

CONFIG = """
import ml_collections
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.systems import registry


def get_config():
  config = ml_collections.ConfigDict()
  config.model = to_dict(registry.get('single_view').tiny())
  config.data = dict(train='FOLDER', eval='FOLDER', lengths=(256,))
  config.training = dict(steps=1, batch_size=1, optimizer=dict(learning_rate=1e-3))
  return config
"""


def test_split_and_fields_are_keys_of_a_config(tmp_path, capsys):
  folder = tmp_path / '1.0.0'
  make_tfds(folder)
  turned = {'question': 'answer', 'answer': 'question'}  # the other way round, so that it shows
  fields = Fields(**turned)
  source = open_source(folder, split='train[1:]', fields=fields)
  assert len(source) == 2
  assert source[0].messages == (Message(USER, 'yes'), Message(ASSISTANT, 'q1'))
  (tmp_path / 'run.py').write_text(CONFIG.replace('FOLDER', str(folder)))
  load = lambda **keys: run_config.load(
    RunConfig, str(tmp_path / 'run.py'), [(f'data.{k}', str(v)) for k, v in keys.items()])
  config = load(split='train[:1]', fields=turned, eval_split='train[1:]', eval_fields=turned)
  assert config.data.fields == config.data.eval_fields == fields
  made = make_batches(config)
  row = made.mapped(made.transform)[0]
  answer = row['tokens'][row['labels'] != -100]  # the byte tokenizer
  assert bytes(answer[:2].astype('uint8')) == b'q0'
  answers = Answers(AnswersOptions(rows=None))
  answers.prepare(config, layout=None, workdir=tmp_path)
  assert len(answers.source) == 2 and [row['expected'] for row in answers.rows] == ['q1', 'q2']
  # A mixture says it of each part; the check reads what the command says.
  (tmp_path / 'm.mixture.json').write_text(json.dumps({'parts': [
    {'path': '1.0.0', 'split': 'train[2:]', 'fields': turned}]}))
  (row,) = [open_source(tmp_path / 'm.mixture.json')[0]]
  assert row.messages[-1].text == 'q2'
  assert main(['data', 'check', str(folder), '--split', 'train[:2]', '--quiet']) == 0
  assert '2 rows' in capsys.readouterr().out
  assert main(['data', 'check', str(folder), '--split', 'test', '--quiet']) == 2
  (tmp_path / 'a.json').write_text('[{"question": "a", "answer": "b"}]')
  with pytest.raises(UserError, match='split belong to tables'):
    open_source(tmp_path / 'a.json', split='train')
