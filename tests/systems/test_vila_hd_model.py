"""The two passes of VILA-HD: reuse equals recomputation, batches equal single rows, both losses."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint import store
from hrvlm_jax.checkpoint.rows import export_tensors, import_tensors
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.rows import ImageRef, Row
from hrvlm_jax.data.transforms import ToBatch, ToExample
from hrvlm_jax.interop.convert import convert
from hrvlm_jax.interop.export import export
from hrvlm_jax.lab.measure import cost
from hrvlm_jax.language.chat import Message
from hrvlm_jax.language.prompt import pad_batch, tokenizer_of
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.vila_hd import views as host, weights
from hrvlm_jax.systems.vila_hd.config import tiny
from hrvlm_jax.training.two_pass import TwoPass
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer, text_of

SYSTEM = registry.get('vila_hd')

CONFIG = tiny()
TOKENIZER = tokenizer_of('byte')


def image(width, height, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
  return Image.fromarray(pixels)


@pytest.fixture(scope='module')
def params():
  """Random weights, larger than at the beginning of training: answers depend on what is seen."""
  abstract = vlm.build(CONFIG).abstract
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape) * (0.12 if len(x.shape) > 1 else 0.3),
                          jnp.float32), abstract)


@pytest.fixture(scope='module')
def answerer(params):
  return Answerer(CONFIG, params, TOKENIZER)


ITEMS = [([image(50, 40)], 'What?'), ([], 'No image?'),
         ([image(90, 150, 2), image(40, 40, 3)], 'Which one is larger, and why?')]


def test_reuse_equals_full_recomputation(answerer, params):
  """Rows without an image, with one and with two; padded on the left."""
  batch = answerer.batch(ITEMS)
  assert {'prompt_end', 'views'} <= set(batch)
  fn = vlm.build(CONFIG, unrolled=True)
  held = vlm.unroll(CONFIG, params)

  def run(params, batch):
    results = []
    for reuse in (True, False):
      module = fn.bind(params)
      embeds, valid, extras = module.prompt(batch, reuse=reuse)
      logits, hidden, _ = module.prefill(embeds, valid, slots=valid.shape[1] + 4, **extras)
      results.append((logits, hidden, valid.sum(axis=1), jnp.zeros(embeds.shape[1])))
    return results

  (logits, hidden, count, fresh), (all_logits, all_hidden, all_count, whole) = jax.jit(run)(
    held, batch)
  assert count.tolist() == all_count.tolist()
  assert len(fresh) == len(whole) - CONFIG.encoder.low_tokens  # what the reuse saves
  np.testing.assert_allclose(hidden, all_hidden, atol=2e-5 * float(jnp.abs(all_hidden).max()))
  np.testing.assert_allclose(logits, all_logits, atol=2e-5 * float(jnp.abs(all_logits).max()))


def test_batched_answers_equal_single_answers_and_compile_once(answerer):
  def answer(items):
    embeds, valid, extras = answerer.generator.prompt(answerer.batch(items))
    return answerer.generator.generate(embeds, valid, answerer.sampling(max_new_tokens=6),
                                       keep_logits=True, extras=extras)

  together = answer(ITEMS)
  for row, item in enumerate(ITEMS):
    alone = answer([item])
    assert together.rows()[row] == alone.rows()[0]
    n = int(alone.lengths[0])
    np.testing.assert_allclose(together.logits[row, :n], alone.logits[0, :n],
                               atol=5e-5 * np.abs(alone.logits).max())
  assert np.abs(together.logits[0, 0] - together.logits[2, 0]).max() > 0.1
  before = answerer.generator.compilations()
  # Other pixels and another question: other blocks are complete, nothing new is compiled.
  answer([([image(70, 30, 5)], 'How?')])
  assert answerer.generator.compilations() == before


def test_the_question_decides_where_the_model_looks(answerer):
  ask = lambda question: answerer.generator.info(answerer.batch([([image(80, 80, 7)], question)]))
  one, two = ask('What?'), ask('Why so?')
  assert any((a != b).any() for a, b in zip(one['probs'], two['probs'], strict=True))
  picture = answerer.overlay(image(80, 80, 7), 'What?')
  assert picture.size == (1024, 512)


def test_masked_places_change_nothing(params):
  """Empty slots inside a row: states equal those of the sequence without these places."""
  # 21 patches of 4 x 4 cells: the cut cell has one row and a patch, no complete block.
  encoder = dataclasses.replace(CONFIG.encoder, budgets=(6, 21))
  config = dataclasses.replace(CONFIG, encoder=encoder)
  views = host.views([image(64, 48)], encoder)
  row = text_of(config, TOKENIZER).prompt('What?', views['tokens'].tolist())
  batch = pad_batch([row], len(row['tokens'])) | {'views': SYSTEM.batch([views], encoder)}
  fn = vlm.build(config)

  def run(params, batch):
    module = fn.bind(params)
    visual, _, _ = module.look(batch)
    return module(batch), *module.embed(batch, visual)

  hidden, embeds, valid = jax.jit(run)(params, batch)
  keep = np.asarray(valid[0])
  assert (~keep).sum() == encoder.high_tokens - 5 > 0
  bare = np.asarray(embeds)[:, keep]
  alone = jax.jit(lambda p, x: fn.bind(p).language(x, jnp.ones(x.shape[:2], bool)))(params, bare)
  np.testing.assert_allclose(np.asarray(hidden)[:, keep], alone,
                             atol=2e-5 * float(jnp.abs(alone).max()))


def grounded_batch():
  """Two conversations of a data set, one with a box: through the transforms of the pipeline."""
  refs = []
  for seed in range(2):
    file = io.BytesIO()
    image(60, 40, seed).save(file, 'PNG')
    refs.append(ImageRef(f'{seed}.png', data=file.getvalue()))
  talk = (Message('user', 'Where?'), Message('assistant', 'There.'))
  rows = [Row('a', (refs[0],), talk, extra={'box': [5, 5, 30, 20]}), Row('b', (refs[1],), talk)]
  example = ToExample(text=text_of(CONFIG, TOKENIZER), views=host.views, encoder=CONFIG.encoder,
                      boxes=True)
  collate = ToBatch(batch=SYSTEM.batch, encoder=CONFIG.encoder, lengths=(192,))
  return collate([example(row) for row in rows])


@pytest.mark.full('systems')
def test_both_losses_and_where_their_gradients_go(params):
  """The text loss never reaches selection and head; the selection loss reaches nothing of the text.

  The prompt's first pass is without gradient: the selection loss trains the head, the selection and
  the tower below it, not the language model or the projector.
  """
  batch = grounded_batch()
  assert batch['views']['boxes'].any(axis=1).tolist() == [True, False]

  def grads(params):
    out = []
    for weight in (0.0, 1.0):
      fusion = dataclasses.replace(CONFIG.fusion, selection_weight=weight)
      fn = vlm.build(dataclasses.replace(CONFIG, fusion=fusion))
      out.append(jax.value_and_grad(
        lambda p, fn=fn: (lambda s, n: s / n)(*TwoPass(None).loss(fn, p, batch)))(params))
    (text, text_grads), (both, both_grads) = out
    return text, both, text_grads, jax.tree.map(jnp.subtract, both_grads, text_grads)

  text, both, by_text, by_selection = jax.jit(grads)(params)
  assert np.isfinite([text, both]).all() and both > text + 0.1
  size = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))
  vision = by_text['vision']
  assert size(vision['prompt_head']) == 0 and size(vision['ps3']['selection']) == 0
  assert size(vision['projector']) > 0 and size(by_text['language']) > 0
  vision, noise = by_selection['vision'], 1e-5 * max(1.0, size(by_text['language']))
  assert size(vision['prompt_head']['fc2']['kernel']) > 0
  assert size(vision['ps3']['selection']['proj']) > 0
  assert size(vision['projector']) <= noise and size(by_selection['language']) <= noise


def test_packed_rows_are_refused(params):
  with pytest.raises(UserError, match='switch packing off'):
    vlm.build(CONFIG).apply(params, {'segments': jnp.zeros((1, 2)), 'views': {}}, method='look')


def test_weights_survive_the_round_trip_bit_for_bit(params):
  tensors = dict(export_tensors(params, weights.table(CONFIG)))
  assert {name.split('/')[0] for name in tensors} == set(weights.FOLDERS)
  again = import_tensors(tensors, weights.table(CONFIG), vlm.build(CONFIG).abstract)
  jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, params))


def test_export_writes_three_folders_and_convert_reads_them(params, tmp_path):
  files = {f'tokenizer/{name}': data for name, data in TOKENIZER.files.items()}
  store.save_params(tmp_path / 'checkpoint', params, {'model': to_dict(CONFIG)}, extra_files=files)
  export(tmp_path / 'checkpoint', tmp_path / 'export')
  for folder in registry.get('vila_hd').folders:
    assert (tmp_path / 'export' / folder / 'model.safetensors').is_file()
    assert json.loads((tmp_path / 'export' / folder / 'config.json').read_text())
  assert convert(tmp_path / 'export', tmp_path / 'again') == CONFIG
  again = store.load_params(tmp_path / 'again', vlm.build(CONFIG).abstract)
  jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, params))
  assert Answerer.load(tmp_path / 'again').text.tokenizer.vocabulary == TOKENIZER.vocabulary


def test_any_number_of_looks_and_dynamic_aspect(params):
  """Knobs change counts as the plan says; images of both kinds share a batch."""
  encoder = dataclasses.replace(CONFIG.encoder, looks=3, dynamic_aspect='on')
  fn = vlm.build(dataclasses.replace(CONFIG, encoder=encoder))
  examples = [host.views([image(64, 48, i)], encoder) for i in range(2)]
  views = SYSTEM.batch(examples, encoder)
  views['first'] = np.array([1, 2], np.int32)  # the rule itself needs scales above 2000 pixels
  visual = jax.jit(lambda p, v: fn.apply(p, v, method='encode'))(params, views)
  counts = np.stack([m.sum(axis=(1, 2)) for m in visual.info['maps']], axis=1)
  for row, first in enumerate((1, 2)):
    plan = encoder.plan(first)
    assert counts[row].tolist() == [sum(look[i] for look in plan.counts[0]) for i in range(2)]
  assert visual.values.shape[1] == views['index'].shape[1]


def looked(params, question='What?', **changes):
  """The info of the encoder for one image and question, with other settings of the encoder."""
  encoder = dataclasses.replace(CONFIG.encoder, **changes)
  held = Answerer(dataclasses.replace(CONFIG, encoder=encoder), params, TOKENIZER)
  return held.generator.info(held.batch([([image(64, 48)], question)]))


def test_saliency_does_not_read_the_question(params):
  """Without a prompt the learned prior chooses; with one the questions choose differently."""
  asked = [looked(params, text)['probs'][0] for text in ('What?', 'Where is the cat?')]
  assert np.abs(asked[0] - asked[1]).max() > 1e-4
  saliency = [looked(params, text, mode='after_image')['probs'][0]
              for text in ('What?', 'Where is the cat?')]
  np.testing.assert_array_equal(*saliency)


def test_budgets_tokens_and_smoothing(params):
  """`tokens` counts patches, `budgets` shares them over the scales, areas of a smooth map agree."""
  taken = lambda info: [int(m.sum()) for m in info['maps']]
  assert sum(taken(looked(params, tokens=20))) == 20
  assert taken(looked(params, budgets=(5, 9))) == [5, 9]
  assert taken(looked(params, budgets=(5, 9), looks=2)) == [10, 18]
  low, high = looked(params, smooth=True)['probs']
  for probs in (low, high):
    assert len(np.unique(np.asarray(probs))) <= 36  # 6 x 6 areas
  assert len(np.unique(np.asarray(looked(params)['probs'][1]))) > 20


def test_what_an_answer_costs_is_measured(answerer, tmp_path):
  """Two passes embed less in the second than the cache holds."""
  path = tmp_path / 'a.png'
  image(50, 40).save(path)
  found = cost(answerer, [(str(path), 'What?')] * 2, answers=1, max_new_tokens=4)
  assert found['tokens'] == CONFIG.encoder.low_tokens + CONFIG.encoder.high_tokens
  assert found['encoder_gflops'] > 0 and found['peak_memory_mb'] > 0
