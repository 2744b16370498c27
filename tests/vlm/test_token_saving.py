"""FastV and ViCrop over a tiny model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint import store
from hrvlm_jax.cli.main import main
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.lab.needle import NeedleConfig, write
from hrvlm_jax.language.decoder import default_positions
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems.baselines import anyres, single_view
from hrvlm_jax.systems.mc_llava import encoder as mc_llava
from hrvlm_jax.vlm import fastv, model as vlm, vicrop
from hrvlm_jax.vlm.answer import Answerer


def test_vicrop_worked_example():
  weights = np.ones((6, 8))
  weights[2, 5], weights[3, 5], weights[2, 6] = 9, 7, 4
  assert vicrop.crop_box(weights, 1600, 900, 336) == (932, 282, 1268, 618)
  assert vicrop.crop_box(weights, 300, 300, 336) == (0, 0, 300, 300)


@pytest.mark.parametrize('size', [(20, 20), (400, 30), (5000, 4000)])
def test_crops_lie_in_the_image(size):
  weights = np.random.default_rng(0).random((6, 8))
  x0, y0, x1, y1 = vicrop.crop_box(weights, *size, 40)
  assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]


def test_large_images_are_split():
  columns, rows, boxes = vicrop.tile_boxes(3000, 1500, 1024)
  assert (columns, rows, len(boxes)) == (4, 2, 8) and boxes[-1] == (2250, 750, 3000, 1500)


def test_fastv_keeps_text_and_the_most_attended_in_order():
  score = jnp.asarray([[0.0, 0.1, 0.4, 0.2, 0.3, 0.0]])
  visual = jnp.asarray([[False, True, True, True, True, False]])
  places, real = fastv.kept_positions(score, visual, jnp.ones((1, 6), bool), 0.5, 4)
  assert places.tolist() == [[0, 2, 4, 5]] and real.all()


@pytest.fixture(scope='module')
def answerer():
  config = single_view.tiny()
  params = jax.jit(vlm.build(config).init)(jax.random.key(0))
  return Answerer(config, params, tokenizer_of('byte'))


def prompts(answerer):
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))
  return image, answerer.batch([([image], 'what?'), ([image], 'a longer question?')])


def test_fastv_that_drops_nothing_is_the_model_itself(answerer):
  pruned = fastv.FastVAnswerer(answerer, fastv.FastV(layer=1, ratio=0.0))
  found = []
  for one in (answerer, pruned):
    embeds, valid, extras = one.generator.prompt(prompts(one)[1])
    out = one.generator.generate(embeds, valid, one.sampling(max_new_tokens=3), keep_logits=True,
                                 extras=extras)
    found.append(out.logits)
  np.testing.assert_allclose(found[1], found[0], atol=1e-4)


def test_fastv_equals_hiding_the_dropped_tokens(answerer):
  saving = fastv.FastVAnswerer(answerer, fastv.FastV(layer=1, ratio=0.5))
  pruned, batch = saving.generator, prompts(saving)[1]

  @jax.jit
  def run(params):
    module = pruned.fn.bind(params)
    embeds, valid, extras = module.prompt(batch)
    length = valid.shape[1]
    logits, _, _ = module.prefill(embeds, valid, slots=length + 16, **extras)
    decoder = module.language
    score = fastv.last_attention(decoder, embeds, valid, 0).mean(axis=1)
    places, real = fastv.kept_positions(score, extras['visual'], valid, 0.5, length - 32)
    stays = jnp.zeros_like(valid).at[jnp.arange(2)[:, None], places].set(real)
    x, _ = decoder.layers(embeds, decoder.context(valid), stop=1)
    hidden = decoder.context(stays, positions=default_positions(valid))
    x, _ = decoder.layers(x, hidden, start=1)
    return logits, decoder.logits(decoder.norm(x[:, -1])), stays.sum(axis=1), valid.sum(axis=1)

  logits, reference, kept, real = run(pruned.params)
  np.testing.assert_array_equal(real - kept, 32)
  np.testing.assert_allclose(logits, reference, atol=1e-4)


def test_fastv_shortens_the_later_caches(answerer):
  saving = fastv.FastVAnswerer(answerer, fastv.FastV(layer=1, ratio=0.5))
  pruned, batch = saving.generator, prompts(saving)[1]
  embeds, valid, extras = pruned.prompt(batch)
  length = valid.shape[1]
  logits, _, cache = jax.eval_shape(
    lambda p: pruned.fn.apply(p, embeds, valid, slots=length + 16, method='prefill', **extras),
    pruned.params)
  assert logits.shape[0] == 2
  assert cache['head'][0]['k'].shape[2] - cache['tail'][0]['k'].shape[2] == 32


def test_fastv_refuses_what_cannot_work(answerer):
  with pytest.raises(UserError, match='layer 2 leaves no layer of 2'):
    fastv.FastVAnswerer(answerer, fastv.FastV(layer=2))


@pytest.mark.parametrize('method', vicrop.METHODS)
def test_vicrop_maps_are_finite_and_answers_come(answerer, method):
  image, _ = prompts(answerer)
  strategy = vicrop.ViCropAnswerer(answerer, vicrop.ViCrop(method=method, layer=1, base=20))
  weights = strategy.importance(image, 'what?')
  assert weights.shape == (8, 8) and np.isfinite(weights).all() and (weights >= 0).all()
  assert weights.max() > 0
  if method != 'grad_att':
    texts = strategy.answer([([image], 'what?')] * 2, max_new_tokens=2)
    assert len(texts) == 2 and texts[0] == texts[1]
    (picture, crop), asked = strategy.shown([([image], 'what?')])[0]
    assert (picture, asked) == (image, 'what?') and max(crop.size) < max(image.size)
  with pytest.raises(UserError, match='the one image of a question, got 0'):
    strategy.answer([([], 'what?')])


def test_vicrop_needs_a_grid_of_the_whole_image():
  config = mc_llava.tiny()
  params = jax.jit(vlm.build(config).init)(jax.random.key(0))
  with pytest.raises(UserError, match='mc_llava'):
    vicrop.ViCropAnswerer(Answerer(config, params, tokenizer_of('byte')), vicrop.ViCrop(layer=1))


def test_pure_gradient_follows_the_pixels_that_decide(answerer):
  """The gradient equals a finite difference of the score; flat areas count for nothing."""
  image, _ = prompts(answerer)
  strategy = vicrop.ViCropAnswerer(answerer, vicrop.ViCrop(method='pure_grad'))
  found, pixels = strategy._gradients([image], 'what?')
  batch = answerer.batch([([image], 'what?')])
  held = answerer.generator

  @jax.jit
  def score(pixels):
    module = held.fn.bind(held.params)
    views = {**batch['views'], 'pixels': pixels}
    embeds, valid, extras = module.prompt({**batch, 'views': views})
    logits, _, _ = module.prefill(embeds, valid, slots=valid.shape[1], **extras)
    return jax.nn.log_softmax(logits).max()

  y, x = np.unravel_index(found[0].argmax(), found[0].shape)
  step, slopes = 2.0, []
  for channel in range(3):
    ends = []
    for sign in (1, -1):
      moved = np.asarray(pixels, np.float32)
      moved[0, y, x, channel] += sign * step
      ends.append(float(score(moved)))
    slopes.append((ends[0] - ends[1]) / (2 * step) * 255 * 0.5)
  assert np.linalg.norm(slopes) == pytest.approx(found[0, y, x], rel=0.05)

  flat = np.zeros((40, 40, 3))
  flat[:20, :20] = np.random.default_rng(0).random((20, 20, 3))
  mask = vicrop.fine_structure(flat)
  assert mask[3:15, 3:15].all() and not mask[25:, 25:].any()
  means = vicrop.block_means(np.arange(16.0).reshape(4, 4), 2, 2)
  assert means.tolist() == [[2.5, 4.5], [10.5, 12.5]]


def test_pure_gradient_needs_one_view():
  config = anyres.tiny()
  params = jax.jit(vlm.build(config).init)(jax.random.key(0))
  strategy = vicrop.ViCropAnswerer(Answerer(config, params, tokenizer_of('byte')),
                                   vicrop.ViCrop(method='pure_grad'))
  with pytest.raises(UserError, match='needs one view of the whole image per image'):
    strategy.importance(Image.new('RGB', (90, 50)), 'what?')


@pytest.fixture(scope='module')
def checkpoint(answerer, tmp_path_factory):
  """The tiny model as a folder, and a picture."""
  folder = tmp_path_factory.mktemp('saving')
  params = jax.jit(vlm.build(answerer.config).init)(jax.random.key(0))
  files = {f'tokenizer/{name}': data for name, data in tokenizer_of('byte').files.items()}
  store.save_params(folder / 'model', params, {'model': to_dict(answerer.config)},
                    extra_files=files)
  prompts(answerer)[0].save(folder / 'picture.png')
  return folder


@pytest.mark.full('systems')
def test_ask_answers_by_a_method(checkpoint, answerer, capsys):
  """What the command prints is what the method answers; wrong settings are named."""
  ask = ['ask', '--checkpoint', str(checkpoint / 'model'), str(checkpoint / 'picture.png'), 'what?',
         '--max-new-tokens', '6']
  image, _ = prompts(answerer)
  saving = fastv.FastVAnswerer(answerer, fastv.FastV(layer=1, ratio=0.75))
  crops = vicrop.ViCropAnswerer(saving, vicrop.ViCrop(layer=1, base=20))
  for method, options in ((saving, ['--fastv.layer=1', '--fastv.ratio=0.75']),
                          (crops, ['--fastv.layer=1', '--fastv.ratio=0.75', '--vicrop',
                                   '--vicrop.layer=1', '--vicrop.base=20'])):
    assert main([*ask, *options]) == 0
    expected, = method.answer([([image], 'what?')], max_new_tokens=6)
    assert capsys.readouterr().out.strip() == expected
  assert main([*ask, '--vicrop']) == 2
  assert 'layer 14 does not exist' in capsys.readouterr().err
  assert main([*ask, '--fastv.lair=1']) == 2
  assert 'nearest known: layer' in capsys.readouterr().err
  assert main([*ask, '--vicrop.layer']) == 2


def test_eval_says_by_which_method_was_answered(checkpoint, capsys):
  task = NeedleConfig.tiny(turns=1)
  write(task, checkpoint / 'task', 2, seed=5, progress=False)
  argv = ['eval', '--benchmark', 'needle', '--data', str(checkpoint / 'task'), '--checkpoint',
          str(checkpoint / 'model'), '--max-new-tokens', '2', '--batch-size', '2', '--quiet',
          '--out', str(checkpoint / 'result')]
  methods = ['--vicrop.layer=1', '--fastv.layer=1', '--fastv.ratio=0.75']
  assert main([*argv, *methods]) == 0
  found = json.loads((checkpoint / 'result/result.json').read_text())['generation']
  assert (found['vicrop']['layer'], found['fastv']) == (1, {'layer': 1, 'ratio': 0.75})
  line = json.loads((checkpoint / 'result/predictions.jsonl').read_text().splitlines()[0])
  assert line['num_image_tokens'] == 2 * 64  # of the image and of the crop
  assert main(argv) == 2
  assert 'differs in generation' in capsys.readouterr().err
