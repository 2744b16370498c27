"""Answering: batched equals single, several images, streams, and what gets compiled."""

import dataclasses

import jax
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems.mc_llava.encoder import tiny
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer, answer_all, is_correct


def image(width, height, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
  return Image.fromarray(pixels)


@pytest.fixture(scope='module')
def answerer():
  config = tiny(max_crops=6, num_tokens=20)
  fn = vlm.build(config)
  params = jax.jit(fn.init)(jax.random.key(0))
  # Larger weights than at initialisation, so that answers depend on the image.
  params['language'] = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params['language'])
  return Answerer(config, params, tokenizer_of('byte'))


ITEMS = [([image(50, 40)], 'What?'), ([image(200, 90, 1)], 'What is written on the red sign?'),
         ([], 'No image?'), ([image(90, 150, 2), image(40, 40, 3)], 'Which is larger?')]


def test_batched_answers_equal_single_answers(answerer):
  together = answerer.answer(ITEMS, max_new_tokens=8)
  alone = [answerer.answer([item], max_new_tokens=8)[0] for item in ITEMS]
  assert together == alone
  assert len(set(alone)) > 1


def test_streamed_pieces_make_the_same_answer(answerer):
  images, question = ITEMS[1]
  whole = answerer.answer([(images, question)], max_new_tokens=8)[0]
  assert ''.join(answerer.stream(images, question, max_new_tokens=8)).strip() == whole


def test_image_sizes_inside_a_bucket_compile_nothing_new(answerer):
  sizes = ((200, 90), (120, 100), (150, 60), (100, 150))  # 6 or 7 views: one bucket
  counts = []
  answerer.answer([([image(*sizes[0])], 'What is this?')], max_new_tokens=4)
  for number, size in enumerate(sizes):
    answerer.answer([([image(*size, number)], 'What is this?')], max_new_tokens=4)
    counts.append(answerer.generator.compilations())
  assert len({answerer.system.count(*s, answerer.config.encoder).views for s in sizes}) > 1
  assert len(set(counts)) == 1, counts  # prompt, prefill and loop of this bucket are there


def test_a_question_must_say_something(answerer):
  with pytest.raises(UserError, match='the question is empty'):
    answerer.answer([([image(50, 40)], '  ')])


def test_prefix_models_refuse_a_projector_of_another_width():
  with pytest.raises(ValueError, match=r'projector.n_out 128 is not text.width 64'):
    config = tiny()
    dataclasses.replace(config, text=dataclasses.replace(config.text, width=64))


def test_the_last_batch_is_filled_up_and_cut():
  sizes = []

  def double(batch):
    sizes.append(len(batch))
    return [2 * item for item in batch]

  found = list(answer_all(double, [1, 2, 3, 4, 5], batch_size=2))
  assert sizes == [2, 2, 2] and found == [([1, 2], [2, 4]), ([3, 4], [6, 8]), ([5], [10])]
  with pytest.raises(UserError, match='gave 1 answers to 2 questions'):
    list(answer_all(lambda batch: batch[:1], [1, 2], batch_size=2))


def test_an_answer_is_right_whatever_its_case_and_the_space_around_it():
  assert is_correct(' k.\n', 'K') and is_correct('4Tz', '4TZ')
  assert not is_correct('', 'K') and not is_correct('KK', 'K')


def test_matrices_held_in_the_dtype_of_activations_answer_with_the_same_bits(answerer):
  """A bfloat16 model needs half the memory: rounded as it is read, not before every product."""
  from hrvlm_jax.core import paths
  from hrvlm_jax.core.execution import Execution
  from hrvlm_jax.vlm import laid

  params = vlm.build(answerer.config).init(jax.random.key(1))
  params = paths.map_with_path(lambda path, x: x * 4 if path.endswith('kernel') else x, params)
  rounded = jax.tree.map(lambda x, like: x.astype(like.dtype), params,
                         laid.held(answerer.config, 'bfloat16'))
  size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree['language']))
  assert size(rounded) < 0.51 * size(params)
  logits = []
  for tree in (params, rounded):
    model = Answerer(answerer.config, tree, tokenizer_of('byte'), ex=Execution(dtype='bfloat16'))
    embeds, valid, extras = model.generator.prompt(model.batch(ITEMS[:2]))
    logits.append(model.generator.generate(embeds, valid, model.sampling(max_new_tokens=3),
                                           extras=extras, keep_logits=True).logits)
  np.testing.assert_array_equal(*logits)
