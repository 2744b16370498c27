"""The front door: what it takes, what it says, and that it agrees with itself."""

import base64
import doctest
import io
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

import hrvlm_jax
from hrvlm_jax import UserError, api
from hrvlm_jax.core.errors import UserError as Sentence
from hrvlm_jax.front import model as modelling

SHORT = {'max_new_tokens': 4}


def png(path):
  return path.read_bytes()


@pytest.mark.parametrize('module', [api, modelling, hrvlm_jax], ids=lambda m: m.__name__)
def test_examples_of_the_docstrings_run(module, world, model, monkeypatch):
  monkeypatch.chdir(world)
  names = {name: getattr(hrvlm_jax, name) for name in hrvlm_jax.__all__}
  names |= {'hrvlm_jax': hrvlm_jax, 'model': model}
  found = doctest.testmod(module, extraglobs=names,
                          optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
  assert found.failed == 0 and (found.attempted or module is hrvlm_jax)


def test_every_public_name_has_an_example():
  for name in hrvlm_jax.__all__:
    value = getattr(hrvlm_jax, name)
    if value is not UserError:
      assert '>>>' in value.__doc__, name
  for name, value in vars(modelling.Model).items():
    if callable(value) and not name.startswith('_') and name != 'item':
      assert '>>>' in value.__doc__, name
  assert set(api.__all__) <= set(hrvlm_jax.__all__) and UserError is Sentence
  assert set(hrvlm_jax.__all__) <= set(dir(hrvlm_jax))
  with pytest.raises(AttributeError, match="no attribute 'lod'"):
    _ = hrvlm_jax.lod


def test_importing_loads_no_jax():
  code = ('import sys, hrvlm_jax, hrvlm_jax.api; hrvlm_jax.load, hrvlm_jax.train, '
          'hrvlm_jax.UserError; assert not {"jax", "flax", "numpy"} & set(sys.modules)')
  subprocess.run([sys.executable, '-c', code], check=True)


def test_every_form_of_an_image_is_the_same_image(world, model):
  path = world / 'photo.png'
  pixels = np.asarray(Image.open(path))
  data = f'data:image/png;base64,{base64.b64encode(png(path)).decode()}'
  expected = model.ask(path, 'What?', **SHORT)
  for form in (str(path), png(path), Image.open(path), pixels, pixels.astype(np.float32) / 255,
               data, io.BytesIO(png(path)), {'bytes': png(path), 'path': None}, [str(path)]):
    assert model.ask(form, 'What?', **SHORT) == expected, type(form)
  part = {'type': 'text', 'text': 'What?'}
  for image in ({'type': 'image_url', 'image_url': {'url': data}}, {'type': 'image', 'path': path},
                {'type': 'input_image', 'image_url': data}, {'type': 'image', 'image': pixels},
                {'type': 'image', 'base64': data.partition(',')[2]}):
    for content in ([image, part], [part, image]):
      assert model.ask([{'role': 'user', 'content': content}], **SHORT) == expected
  placeholder = [{'role': 'user', 'content': [{'type': 'image'}, part]}]
  assert model.ask(path, placeholder, **SHORT) == expected
  assert model.ask(path, [{'from': 'human', 'value': '<image>\nWhat?'}], **SHORT) == expected


def test_two_images_ask_for_no_other_buckets(world, model):
  """The quickstart's own buckets end at the views of one image."""
  two = [world / 'runs/quickstart/data/eval/images/000000.png', world / 'other.png']
  assert model.config.encoder.view_buckets == (1, 16)
  one = model.ask(two[0], 'Which?', **SHORT)
  assert model.ask(two, 'Which?', **SHORT) != one
  again = model.compilations()
  assert model.ask(two[::-1], 'Whose?', **SHORT) and model.compilations() == again


def test_batches_and_streams_give_the_same_answers(world, model):
  items = [(world / 'photo.png', 'What?'), (world / 'other.png', 'What is written here?'),
           (None, 'No image?'),
           {'images': [world / 'photo.png', world / 'other.png'], 'question': 'Both?'},
           [{'role': 'system', 'content': 'Short.'}, {'role': 'user', 'content': 'Hello?'}]]
  together = model.batch(items, batch_size=2, max_new_tokens=6)
  alone = [model.ask(*modelling.parts(item), max_new_tokens=6) for item in items]
  assert together == alone and len(set(alone)) > 1
  assert ''.join(model.stream(*items[0], max_new_tokens=6)).strip() == alone[0]
  assert model.batch([]) == []
  warm = [model.ask(*items[0], temperature=1.0, seed=seed, max_new_tokens=6) for seed in (1, 1, 2)]
  assert warm[0] == warm[1] != warm[2]


def test_a_chat_is_its_messages(world, model):
  chat = model.chat(system='Answer.')
  first = chat.ask('What?', world / 'photo.png', **SHORT)
  second = chat.ask('And here?', world / 'other.png', **SHORT)
  said = chat.messages
  assert said[2]['content'] == first and said[4]['content'] == second
  assert model.ask(said[:4], **SHORT) == second
  assert model.ask(said[:2], **SHORT) == first
  # What was said before matters, the system text too.
  assert model.ask(world / 'other.png', 'And here?', **SHORT) != second
  assert chat.overlay().size == (300, 80)
  with pytest.raises(UserError, match='the question is empty'):
    chat.ask('  ')
  with pytest.raises(UserError, match='no such file'):
    chat.ask('What?', 'nowhere.png')
  assert chat.messages == said


def test_repr_says_what_it_is(model):
  text = repr(model)
  for word in ('mc_llava', 'checkpoint', 'M parameters', 'vision', 'float32', 'cpu:0'):
    assert word in text, text


@pytest.mark.parametrize('image, question, words', [
  ('nowhere.png', 'What?', 'nowhere.png: no such file'),
  (3, 'What?', 'found int, expected a path, bytes'),
  (None, None, 'there is no question'),
  (None, ' ', 'the question is empty'),
  (np.zeros((3, 8, 8), np.uint8), 'What?', r'uint8\[3 8 8\].*move the channels'),
  (np.full((8, 8, 3), 255.0), 'What?', 'values from 255 to 255; floats must be from 0 to 1'),
  (np.zeros((8, 8), np.int32), 'What?', 'expected uint8'),
  ('data:image/png;base64,%%%', 'What?', 'is not base64'),
  ('data:image/png,abc', 'What?', 'expected data:image'),
  ('ftp://example.com/a.png', 'What?', 'addresses begin with http'),
  (None, [{'role': 'usr', 'content': 'x'}], "comes from 'usr'"),
  (None, [{'role': 'user', 'content': [{'type': 'imag', 'image': 1}]}],
   r"has type 'imag' \(nearest known: image\)"),
  (None, [{'role': 'user', 'content': [{'type': 'image'}]}], '1 image placeholders without'),
  (None, [{'role': 'assistant', 'content': 'x'}], "comes from 'assistant', expected 'user'"),
  (None, [{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': 'y'}],
   'the last message is an answer'),
  (None, {'role': 'user'}, 'found dict, expected a list'),
])
def test_what_cannot_be_asked_is_a_sentence(model, image, question, words):
  with pytest.raises(UserError, match=words):
    model.ask(image, question, **SHORT)


def test_settings_that_cannot_be_are_named(model):
  with pytest.raises(UserError, match='unknown setting max_tokens .nearest known: max_new_tokens'):
    model.ask(None, 'What?', max_tokens=3)
  with pytest.raises(UserError, match='temperature must be 0 .greedy. or a number'):
    model.ask(None, 'What?', temperature=-1)
  with pytest.raises(UserError, match='beam search knows its answer only at the end'):
    next(model.stream(None, 'What?', beams=2))
  with pytest.raises(UserError, match="item 1: 'x.png': |item 1: x.png: no such file"):
    model.batch([(None, 'What?'), ('x.png', 'What?')])
  with pytest.raises(UserError, match='expected a list of texts'):
    model.score(None, 'What?', 'A')


def test_every_place_a_model_may_lie_in(world, model, tmp_path):
  checkpoint = world / 'runs/quickstart/checkpoint'
  hrvlm_jax.export(checkpoint, tmp_path / 'out')
  other = hrvlm_jax.load(tmp_path / 'out')
  assert 'out' in repr(other)
  ask = lambda m: m.ask(world / 'photo.png', 'What?', **SHORT)
  assert ask(other) == ask(model)
  with pytest.raises(UserError, match='holds no model.*did you mean .*checkpoint'):
    hrvlm_jax.load(world / 'runs/quickstart')
  with pytest.raises(UserError, match='no such folder; expected one, or a name'):
    hrvlm_jax.load(tmp_path / 'nowhere')
  with pytest.raises(UserError, match='a revision belongs to a name'):
    hrvlm_jax.load(checkpoint, revision='main')
  with pytest.raises(UserError, match='nearest known: max_crops'):
    hrvlm_jax.load(checkpoint, encoder={'max_crop': 4})
  with pytest.raises(UserError, match="dtype: found 'flaot32'"):
    hrvlm_jax.load(checkpoint, dtype='flaot32')
  assert hrvlm_jax.load(tmp_path / 'out', encoder={'max_crops': 4}).config.encoder.max_crops == 4
