"""The lmms-eval adaptor against a minimal copy of its interface (requests, messages, registry)."""

import dataclasses
import sys
import types

from PIL import Image
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation import lmms_eval_plugin as plugin

DOCS = {'local': {'test': [{'q': 'What colour?', 'n': 1}, {'q': 'Why?', 'n': 2}, {'q': 'Who?',
                                                                                  'n': 1}]}}


def to_messages(document):
  images = [{'type': 'image', 'url': Image.new('RGB', (8, 8))}] * document['n']
  return [{'role': 'user', 'content': [*images, {'type': 'text', 'text': document['q']}]}]


def requests(settings=None, form=6):
  settings = settings or {'max_new_tokens': 16, 'until': ['\n\n']}
  rows = [(to_messages, settings, i, 'local', 'test') for i in range(3)]
  rows = [('context', *row) for row in rows] if form == 6 else rows
  return [plugin.chat_request(row, DOCS, i) for i, row in enumerate(rows)]


@pytest.mark.parametrize('form', [5, 6])
def test_answers_come_back_in_order(form):
  calls = []

  def generate(pairs, sampling):
    calls.append((len(pairs), [len(images) for images, _ in pairs], dict(sampling)))
    return [f' {question} yes\n\nand more' for _, question in pairs]

  texts = plugin.run(requests(form=form), generate, batch_size=2)
  assert texts == ['What colour? yes', 'Why? yes', 'Who? yes']
  assert calls == [(2, [1, 1], {'max_new_tokens': 16}), (2, [2, 2], {'max_new_tokens': 16})]


def test_sampling_settings():
  greedy = {'max_new_tokens': 8, 'temperature': 0, 'do_sample': False, 'num_beams': 1, 'top_p': 1.0}
  assert plugin.sampling_of(greedy) == ({'max_new_tokens': 8}, ())
  drawn, until = plugin.sampling_of({'do_sample': True, 'temperature': .7, 'top_p': .9,
                                     'until': 'stop', 'num_beams': 3})
  assert drawn == {'max_new_tokens': 1024, 'temperature': .7, 'top_p': .9}
  assert until == ('stop',)
  assert plugin.sampling_of({'num_beams': 3})[0] == {'max_new_tokens': 1024, 'beams': 3}


def test_cut():
  assert plugin.cut('\n\nanswer\n\nrest', ['\n\n']) == 'answer'
  assert plugin.cut('a b', ['']) == 'a b' and plugin.cut(' a b c', ['c', 'b']) == 'a '


@pytest.mark.parametrize('messages,text', [
  ([{'role': 'user', 'content': [{'type': 'video', 'url': 'x'}]}], 'sends video'),
  ([{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}], 'earlier answers'),
  ([{'role': 'user', 'content': 'a'}] * 2, '2 user messages'),
  ([{'role': 'user', 'content': [{'type': 'image', 'url': 'x.png'}]}], 'image as str'),
  ([{'role': 'user', 'content': ' '}], 'without text'),
])
def test_what_is_not_supported_is_said(messages, text):
  with pytest.raises(UserError, match=text):
    plugin.user_turn(messages)


def test_system_text_comes_first():
  images, text = plugin.user_turn([{'role': 'system', 'content': 'Be brief.'},
                                   {'role': 'user', 'content': 'Why?'}])
  assert images == () and text == 'Be brief.\nWhy?'


def test_unknown_request_form():
  with pytest.raises(UserError, match='with 2 arguments'):
    plugin.chat_request(('context', {'until': []}), DOCS, 0)


def test_manifest_for_the_registry(monkeypatch):
  @dataclasses.dataclass(frozen=True)
  class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None

  registry = types.ModuleType('lmms_eval.models.registry_v2')
  registry.ModelManifest = ModelManifest
  for name in ('lmms_eval', 'lmms_eval.models'):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  monkeypatch.setitem(sys.modules, 'lmms_eval.models.registry_v2', registry)
  found = plugin.manifest()
  assert found.model_id == 'hrvlm_jax' and found.simple_class_path is None
  assert found.chat_class_path == 'hrvlm_jax.evaluation.lmms_eval_model.HrvlmJax'
