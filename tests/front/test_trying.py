"""What the page asks of a model, without the page: answers, knobs, a marked part, links."""

import pathlib

import jax
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.front import trying
from hrvlm_jax.front.model import Model
from hrvlm_jax.front.trying import Kept, Knob, Shown
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.serving.driver import Closed, Driver, Full
from hrvlm_jax.serving.engine import Engine
from hrvlm_jax.systems import registry
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer

PLAIN = dict(box=None, options={}, max_new_tokens=4)


@pytest.fixture(scope='module')
def driver(model):
  made = Driver(Engine(model.answerer, slots=1, length=512), queue=0)
  yield made
  assert made.close(5)


@pytest.fixture(scope='module')
def shown(model, driver):
  return Shown('tiny', model, driver)


def said(shown, *arguments, **settings):
  return ''.join(shown.answer(*arguments, **PLAIN | settings)).strip()


def test_answers_are_those_of_the_model(shown, model, world):
  image = Image.open(world / 'photo.png').convert('RGB')
  first = said(shown, image, [], 'What?', 0)
  assert first == model.ask(image, 'What?', max_new_tokens=4)
  chat = model.chat()
  chat.ask('What?', image, max_new_tokens=4)
  turns = [{'question': 'What?', 'answers': [first]}]
  assert said(shown, image, turns, 'And here?', 0) == chat.ask('And here?', max_new_tokens=4)
  assert said(shown, None, [], 'No image?', 0) == model.ask(None, 'No image?', max_new_tokens=4)
  # Knobs, with the same weights; the model itself stays as it is.
  coarse = dict(max_crops=4, num_tokens=20)
  other = said(shown, image, [], 'What?', 0, options=coarse)
  changed = model.with_encoder(**coarse)
  assert other == changed.ask(image, 'What?', max_new_tokens=4)
  assert changed.answerer.generator.params is model.answerer.generator.params
  assert model.config.encoder.max_crops == 15 and said(shown, image, [], 'What?', 0) == first
  assert shown.overlay(image, 'What?', box=None, options=coarse).size == image.size
  # A marked part: what this system is shown.
  part = image.crop((10, 20, 70, 80))
  assert said(shown, image, [], 'What?', 0, box=(10, 20, 70, 80)) == \
    model.ask(part, 'What?', max_new_tokens=4)


def test_knobs_that_change_the_model_are_refused(model):
  with pytest.raises(UserError, match='changes the parameters'):
    model.with_encoder(vision={**vars(model.config.encoder.vision), 'depth': 1})
  with pytest.raises(UserError, match='nearest known: max_crops'):
    model.with_encoder(max_crop=4)


def test_a_stream_takes_a_place_and_gives_it_back(shown, driver, world, monkeypatch):
  image = Image.open(world / 'photo.png').convert('RGB')
  waiting = shown.answer(image, [], 'What?', 0, **PLAIN | {'max_new_tokens': 100})
  next(waiting)
  with pytest.raises(Full):
    said(shown, image, [], 'And this?', 0)
  waiting.close()
  assert said(shown, image, [], 'And this?', 0) is not None
  with pytest.raises(UserError, match='slot has 512'):
    said(shown, image, [], 'What?', 0, max_new_tokens=1000)
  assert driver.snapshot().pending == 0
  # Beside the slots one at a time; a visitor who leaves gives the turn back.
  monkeypatch.setattr(trying, '_PATIENCE', 0.05)
  coarse = dict(options={'max_crops': 4, 'num_tokens': 20})
  waiting = shown.answer(image, [], 'What?', 0, **PLAIN | coarse)
  next(waiting)
  with pytest.raises(Full):
    said(shown, image, [], 'What?', 0, **coarse)
  waiting.close()
  assert isinstance(said(shown, image, [], 'What?', 0, **coarse), str)
  closed = Driver(driver.engine)
  closed.close()
  with pytest.raises(Closed):
    next(closed.stream(lambda: None))


def test_fields_of_knobs():
  number = Knob('looks', 6)
  given = ('6', ' 12', 'all', 'None', '')
  assert [number.read(text) for text in given] == [6, 12, 'all', None, None]
  assert Knob('tokens', None).read('None') is None and Knob('tokens', None).read('8') == 8
  assert Knob('smooth', False).read(True) is True and Knob('smooth', False).read('False') is False
  assert Knob('mode', 'after_prompt', ('after_prompt', 'after_image')).read('after_image') == \
    'after_image'
  with pytest.raises(UserError, match="looks: found 'many', expected a whole number"):
    number.read('many')


def test_pictures_of_links_are_kept_and_forgotten(tmp_path):
  kept = Kept(most=2, size=100)
  names = []
  for number in range(3):
    (tmp_path / 'a').write_bytes(bytes([number]) * 20)
    names.append(kept.keep(str(tmp_path / 'a')))
  assert kept.path(names[0]) is None and kept.path('0' * 32) is None
  assert pathlib.Path(kept.path(names[2])).read_bytes() == b'\2' * 20
  (tmp_path / 'a').write_bytes(b'x' * 90)
  kept.keep(str(tmp_path / 'a'))
  assert kept.path(names[2]) is None
  (tmp_path / 'a').write_bytes(b'x' * 101)
  with pytest.raises(UserError, match='too large'):
    kept.keep(str(tmp_path / 'a'))


@pytest.mark.full('systems')
def test_a_system_with_boxes_looks_where_it_is_told():
  config = registry.get('vila_hd').tiny()
  params = jax.jit(vlm.build(config).init)(jax.random.key(0))
  answerer = Answerer(config, params, tokenizer_of('byte'))
  model = Model(config, answerer=answerer, ex=Execution(), name='vila_hd')
  shown = Shown('vila', model, Driver(Engine(answerer, slots=1)))
  assert {knob.name for knob in shown.knobs} == {'looks', 'tokens', 'smooth', 'mode'}
  side = config.encoder.side
  pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
  image, half = Image.fromarray(pixels), side // 2
  found = []
  for box in ((0, 0, half, half), (half, half, side, side)):
    picture = np.asarray(shown.overlay(image, 'Where?', box=box, options={'looks': 1}), np.float64)
    light = picture[:, :picture.shape[1] // max(1, picture.shape[1] // picture.shape[0])].mean(-1)
    middle = [length // 2 for length in light.shape]
    found.append((light[:middle[0], :middle[1]].mean(), light[middle[0]:, middle[1]:].mean()))
    assert isinstance(said(shown, image, [], 'What?', 0, box=box), str)
  # The first quarter is lit when it is marked, the last when that is.
  assert found[0][0] > found[1][0] and found[1][1] > found[0][1]
