"""Fewer tokens behind VILA-HD (ToMe, VisionZip, FastV), images scaled down first."""

import dataclasses

import jax
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.cli.ask import take_knobs
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.baselines import single_view
from hrvlm_jax.vision.attended import received
from hrvlm_jax.vlm import fastv, model as vlm, prune
from hrvlm_jax.vlm.answer import Answerer, with_methods
from tests import levels


def even(**settings):
  """The tiny VILA-HD, all patches in 20 looks of 5 and 20."""
  config = registry.get('vila_hd').tiny(looks='all')
  tower = dataclasses.replace(config.encoder.tower, max_select=25)
  return dataclasses.replace(
    config, encoder=dataclasses.replace(config.encoder, tower=tower, **settings))


@pytest.fixture(scope='module')
def answerer():
  config = even()
  params = jax.jit(vlm.build(config).init)(jax.random.key(0))
  return Answerer(config, params, tokenizer_of('byte'))


def items():
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))
  return [([image], 'what?'), ([image], 'a longer question?')]


def logits(one):
  embeds, valid, extras = one.generator.prompt(one.batch(items()))
  out = one.generator.generate(embeds, valid, one.sampling(max_new_tokens=2), keep_logits=True,
                               extras=extras)
  return np.asarray(out.logits), np.asarray(valid)


@pytest.fixture(scope='module')
def whole(answerer):
  return logits(answerer)


NOTHING = {'tome': prune.Prune(keep=1.0), 'fastv': fastv.FastV(layer=1, ratio=0.0),
           'visionzip': prune.Prune(method='visionzip', keep=1.0, contextual=0.0)}


@pytest.mark.parametrize('name', levels.rows('systems', NOTHING, first=['fastv']))
def test_what_takes_nothing_away_is_the_model_itself(answerer, whole, name):
  method = NOTHING[name]
  kind = fastv.FastVAnswerer if isinstance(method, fastv.FastV) else prune.PruneAnswerer
  found, _ = logits(kind(answerer, method))
  np.testing.assert_allclose(found, whole[0], atol=2e-4)


@pytest.mark.parametrize('method', levels.rows(
  'systems', ['tome', 'visionzip'], first=['visionzip']))
def test_a_quarter_of_the_tokens(answerer, whole, method):
  each = answerer.config.encoder.image_tokens
  found, valid = logits(prune.PruneAnswerer(answerer, prune.Prune(method=method, keep=0.25)))
  kept = round(0.25 * each)
  before = answerer.batch(items())['valid']
  assert (valid.sum(axis=1) == before.sum(axis=1) - (each - kept)).all()
  assert valid.shape[1] == before.shape[1] - (each - kept)  # shorter, not only masked
  assert not np.allclose(found, whole[0], atol=1e-3)


@pytest.mark.full('systems')
def test_fastv_drops_half_of_the_second_pass(answerer, whole):
  found, _ = logits(fastv.FastVAnswerer(answerer, fastv.FastV(layer=1, ratio=0.5)))
  assert found.shape == whole[0].shape and not np.allclose(found, whole[0], atol=1e-3)


def test_attention_that_is_received_is_a_mean_over_queries():
  rng = np.random.default_rng(0)
  q, k = (rng.normal(size=(1, 7, 2, 3)).astype(np.float32) for _ in range(2))
  weights = np.einsum('bthp,bshp->bhts', q, k) * 3**-0.5
  weights = np.exp(weights) / np.exp(weights).sum(-1, keepdims=True)
  np.testing.assert_allclose(received(q, k, chunk=4), weights.mean(2).sum(1), rtol=1e-5)


def test_refusals_say_what_to_do(answerer):
  params, text = answerer.generator.params, tokenizer_of('byte')
  with pytest.raises(UserError, match='--encoder.looks=all'):
    prune.PruneAnswerer(Answerer(even(looks=1), params, text))
  with pytest.raises(UserError, match='leave 4 patches out'):  # 16 looks of 6 and 26
    prune.PruneAnswerer(Answerer(registry.get('vila_hd').tiny(looks='all'), params, text))
  with pytest.raises(UserError, match='choose one'):
    with_methods(answerer, {'fastv': {'layer': 1}, 'prune': {}})
  config = single_view.tiny()
  plain = Answerer(config, jax.jit(vlm.build(config).init)(jax.random.key(0)),
                   tokenizer_of('byte'))
  with pytest.raises(UserError, match="use method 'tome'"):
    prune.PruneAnswerer(plain, prune.Prune(method='visionzip'))
  with pytest.raises(UserError, match='keep must lie in'):
    with_methods(plain, {'prune': {'keep': 0.0}})
  # Images are scaled before anything of the model sees them.
  small = with_methods(plain, {'shrink': {'side': 6}})
  picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 96, 3), np.uint8))
  (shown, _), = small.shown([((picture,), 'what?')])
  assert shown[0].size == (6, 6) and small.methods == {'shrink': {'side': 6}}
  again = small.batch([(shown, 'what?')])['views']['pixels']
  assert not np.array_equal(again, plain.batch([((picture,), 'what?')])['views']['pixels'])


def test_budgets_of_the_scales_as_the_original_writes_them():
  """SELECT_NUM_EACH_SCALE=8+24, as a knob of `ask` and `eval`."""
  rest, knobs = take_knobs(['--encoder.budgets=8+24', 'picture.png'])
  assert rest == ['picture.png'] and knobs == {'encoder': {'budgets': (8, 24)}}
  encoder = even(looks=2, **knobs['encoder'])
  assert encoder.encoder.plan().counts[0] == ((8, 24), (8, 24))


@pytest.mark.full('systems')
def test_patches_at_random_are_the_same_for_an_image():
  config = registry.get('vila_hd').tiny(looks=1)
  encoder = dataclasses.replace(config.encoder, mode='random')
  model = vlm.build(dataclasses.replace(config, encoder=encoder))
  params = jax.jit(model.init)(jax.random.key(0))
  answerer = Answerer(dataclasses.replace(config, encoder=encoder), params, tokenizer_of('byte'))
  maps = [np.asarray(answerer.generator.info(answerer.batch([item]))['maps'][-1])
          for item in items()]
  other = Image.fromarray(np.random.default_rng(5).integers(0, 256, (50, 90, 3), np.uint8))
  maps.append(np.asarray(answerer.generator.info(
    answerer.batch([([other], 'what?')]))['maps'][-1]))
  assert np.array_equal(maps[0], maps[1]) and not np.array_equal(maps[0], maps[2])
