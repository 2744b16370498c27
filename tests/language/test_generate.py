"""Generation: buckets, padding sides, sampling, stops, beams, streaming, and what gets compiled."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.core.module import Functional
from hrvlm_jax.language import config as sizes
from hrvlm_jax.language.decoder import Decoder
from hrvlm_jax.language.generate import TextGenerator, bucket, pad_to_bucket
from hrvlm_jax.language.sampling import Sampling, choose, penalise, restrict

CONFIG = sizes.qwen2(vocab_size=40, width=32, depth=2, heads=4, kv_heads=2, mlp_width=48)
PROMPTS = [[3, 7, 9, 11, 2], [5, 6], [1, 2, 3, 4, 5, 6, 7, 8, 9]]


@pytest.fixture(scope='module')
def params():
  fn = Functional(lambda rngs: Decoder(CONFIG, rngs=rngs))
  # Larger weights than at initialisation, so that the logits are not all alike.
  return jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, fn.init(jax.random.key(0)))


@pytest.fixture(scope='module')
def generator(params):
  return TextGenerator(CONFIG, params)


def padded(prompts, length, side):
  ids = np.zeros((len(prompts), length), np.int32)
  valid = np.zeros((len(prompts), length), bool)
  for row, prompt in enumerate(prompts):
    place = slice(0, len(prompt)) if side == 'right' else slice(length - len(prompt), length)
    ids[row, place], valid[row, place] = prompt, True
  return ids, valid


def greedy_without_cache(params, prompt, steps):
  fn = Functional(lambda rngs: Decoder(CONFIG, rngs=rngs))
  module, ids = fn.bind(params), list(prompt)
  for _ in range(steps):
    # One fixed length: places after the prompt are causal and never read.
    row = jnp.asarray([ids + [0] * (24 - len(ids))])
    hidden = module(module.embed(row), jnp.ones(row.shape, bool))
    ids.append(int(module.logits(hidden)[0, len(ids) - 1].argmax()))
  return ids[len(prompt):]


@pytest.mark.parametrize('side', ['left', 'right'])
def test_a_padded_batch_equals_single_uncached_runs(generator, params, side):
  ids, valid = padded(PROMPTS, 12, side)
  out = generator.generate(ids, valid, Sampling(max_new_tokens=6))
  for row, prompt in enumerate(PROMPTS):
    assert out.tokens[row].tolist() == greedy_without_cache(params, prompt, 6)


def test_a_bucket_compiles_once_whatever_lengths_budgets_and_contents(params):
  generator = TextGenerator(CONFIG, params)
  counts = []
  for length, budget in itertools.product((3, 9, 20, 32), (1, 7, 16)):
    ids, valid = padded(PROMPTS[:2], max(length, 5), 'left')
    generator.generate(ids, valid, Sampling(max_new_tokens=budget))
    counts.append(generator.generator.compilations())
  assert set(counts) == {2}, counts  # one prefill, one loop


def test_rows_end_at_a_stop_token_and_are_padded(generator, params):
  ids, valid = padded(PROMPTS, 12, 'left')
  free = generator.generate(ids, valid, Sampling(max_new_tokens=6)).tokens
  stop = int(free[0, 2])
  out = generator.generate(ids, valid, Sampling(max_new_tokens=6, stop_ids=(stop,), pad_id=39))
  for row, tokens in enumerate(free.tolist()):
    expected = tokens[:tokens.index(stop) + 1] if stop in tokens else tokens
    assert out.rows()[row] == expected
    assert set(out.tokens[row, len(expected):]) <= {39}


def test_streaming_gives_the_same_tokens(generator):
  ids, valid = padded(PROMPTS, 32, 'left')
  sampling = Sampling(max_new_tokens=6)
  whole = generator.generate(ids, valid, sampling).tokens
  pieces = list(generator.generator.stream(generator.embed(ids), valid, sampling))
  np.testing.assert_array_equal(np.stack(pieces, axis=1), whole)


def test_sampling_is_a_function_of_the_key(generator):
  ids, valid = padded(PROMPTS, 12, 'left')
  sampling = Sampling(max_new_tokens=6, temperature=1.5, top_k=10, top_p=0.9)
  run = lambda key: generator.generate(ids, valid, sampling, key=jax.random.key(key)).tokens
  np.testing.assert_array_equal(run(0), run(0))
  assert (run(0) != run(1)).any()


def test_top_k_and_top_p_keep_the_right_sets():
  logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
  kept = lambda **options: np.isfinite(restrict(logits, Sampling(temperature=1, **options)))[0]
  assert kept(top_k=2).tolist() == [True, True, False, False]
  # 0.5 alone reaches 0.5; the token that crosses 0.6 is included.
  assert kept(top_p=0.5).tolist() == [True, False, False, False]
  assert kept(top_p=0.6).tolist() == [True, True, False, False]
  assert kept(top_p=0.99).tolist() == [True, True, True, True]
  np.testing.assert_allclose(  # less the largest one: probabilities are the same
    restrict(logits, Sampling(temperature=0.5)), (logits - logits.max()) * 2, rtol=1e-6)


def test_min_p_keeps_what_is_likely_beside_the_likeliest():
  """Probabilities 0.5, 0.3, 0.15, 0.05; min_p 0.3 asks for at least 0.15 (transformers'
  MinPLogitsWarper keeps equality; 0.31 drops it)."""
  logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
  kept = lambda p: (restrict(logits, Sampling(temperature=1.0, min_p=p)) > -jnp.inf)[0].tolist()
  assert kept(0.29) == [True, True, True, False]
  assert kept(0.31) == [True, True, False, False]
  assert kept(1.0) == [True, False, False, False]
  assert kept(0.0) == [True] * 4


def test_repetitions_cost_what_transformers_says():
  """By hand: what was generated is divided by the penalty, a negative logit multiplied."""
  logits = jnp.asarray([[2.0, -1.0, 0.5, 3.0], [2.0, -1.0, 0.5, 3.0]])
  tokens = jnp.asarray([[0, 1, 3, 3], [2, 2, 0, 0]])
  out = penalise(logits, tokens, 2, Sampling(repetition_penalty=2.0))
  np.testing.assert_allclose(out, [[1.0, -2.0, 0.5, 3.0], [2.0, -1.0, 0.25, 3.0]])
  np.testing.assert_array_equal(penalise(logits, tokens, 0, Sampling(repetition_penalty=2.0)),
                                logits)
  banned = lambda tokens, count, n: np.isinf(penalise(
    jnp.zeros((1, 5)), jnp.asarray([tokens]), count,
    Sampling(no_repeat_ngram_size=n)))[0].nonzero()[0].tolist()
  assert banned([1, 2, 3, 1, 2, 0], 5, 3) == [3]  # 1 2 3 was there, 1 2 stands at the end
  assert banned([1, 2, 3, 1, 2, 0], 5, 2) == [3]
  assert banned([1, 2, 1, 3, 1, 0], 5, 2) == [2, 3]
  assert banned([1, 2, 3, 1, 2, 0], 4, 3) == []
  assert banned([4, 0, 0, 0, 0, 0], 1, 1) == [4]  # what is not written yet does not count
  assert banned([1, 1, 0, 0, 0, 0], 1, 2) == []
  assert banned([1, 2, 3], 3, 7) == []


def test_no_sequence_comes_twice_in_any_way_of_generating(generator):
  """Greedy, stream and beams obey; without the setting this model repeats itself."""
  ids, valid = padded([PROMPTS[0]], 9, 'left')
  pairs = lambda row: list(itertools.pairwise(row))
  plain = generator.generate(ids, valid, Sampling(max_new_tokens=40)).rows()[0]
  assert len(set(pairs(plain))) < len(pairs(plain))
  once = Sampling(max_new_tokens=40, no_repeat_ngram_size=2, repetition_penalty=1.1)
  greedy = generator.generate(ids, valid, once).rows()[0]
  beams = generator.generate(ids, valid, dataclasses.replace(once, beams=2)).rows()[0]
  padded_ids, padded_valid = pad_to_bucket(ids, valid)
  stream = [int(t[0]) for t in generator.generator.stream(
    generator.embed(padded_ids), padded_valid, once)]
  assert stream == greedy
  for row in (greedy, beams):
    assert len(row) == 40 and len(set(pairs(row))) == 39


def test_beams_with_several_end_tokens(generator):
  """More end tokens than beams: enough candidates go on; a vocabulary of end tokens is no crash."""
  ids, valid = padded(PROMPTS, 12, 'left')
  out = generator.generate(ids, valid, Sampling(
    max_new_tokens=5, beams=2, stop_ids=tuple(range(0, 40, 2))))
  assert all(not any(t % 2 == 0 for t in row[:-1]) for row in out.rows())
  every = generator.generate(ids, valid, Sampling(
    max_new_tokens=5, beams=2, stop_ids=tuple(range(40))))
  assert every.lengths.tolist() == [1, 1, 1]


def test_sampled_frequencies_follow_the_probabilities():
  logits = jnp.tile(jnp.log(jnp.array([[0.6, 0.3, 0.1]])), (4000, 1))
  drawn = np.asarray(choose(logits, Sampling(temperature=1.0), jax.random.key(0)))
  share = np.bincount(drawn, minlength=3) / 4000
  np.testing.assert_allclose(share, [0.6, 0.3, 0.1], atol=0.03)


def brute_force_beams(params, prompt, beams, steps):
  """Plain beam search over full recomputation, without stop tokens."""
  fn = Functional(lambda rngs: Decoder(CONFIG, rngs=rngs))
  module = fn.bind(params)
  live = [(0.0, [])]
  for _ in range(steps):
    grown = []
    for score, tokens in live:
      ids = jnp.asarray([list(prompt) + tokens])
      hidden = module(module.embed(ids), jnp.ones(ids.shape, bool))
      logp = np.asarray(jax.nn.log_softmax(module.logits(hidden)[0, -1]))
      grown += [(score + logp[t], [*tokens, t]) for t in np.argsort(-logp)[:2 * beams]]
    live = sorted(grown, key=lambda item: -item[0])[:beams]
  return [int(t) for t in live[0][1]]


def test_beams_equal_a_plain_search(generator, params):
  ids, valid = padded(PROMPTS[:2], 12, 'left')
  out = generator.generate(ids, valid, Sampling(max_new_tokens=4, beams=3))
  for row, prompt in enumerate(PROMPTS[:2]):
    assert out.rows()[row] == brute_force_beams(params, prompt, 3, 4)


def test_linear_buckets_beyond_the_last():
  assert [bucket(n, (8, 16)) for n in (1, 8, 9, 16, 17, 33)] == [8, 8, 16, 16, 32, 48]


@pytest.mark.parametrize('options, message', [
  ({'max_new_tokens': 0}, 'max_new_tokens must be at least 1'),
  ({'top_p': 0.0}, r'top_p must lie in \(0, 1\]'),
  ({'beams': 2, 'temperature': 1.0}, 'beam search is greedy')])
def test_settings_that_make_no_sense(options, message):
  with pytest.raises(ValueError, match=message):
    Sampling(**options)


def test_an_empty_row_is_refused(generator):
  with pytest.raises(ValueError, match='at least one real token'):
    generator.generate(np.zeros((1, 4), np.int32), np.zeros((1, 4), bool), Sampling())


def test_a_cache_is_never_there_twice(generator):
  """The results of what goes on from a cache take its memory: one token's, and a loop's."""
  g = generator.generator
  shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)
  cache = [{name: shape(3, 2, 48, 8) for name in 'kv'} for _ in range(2)]
  size = sum(4 * np.prod(leaf.shape) for leaf in jax.tree.leaves(cache))
  valid, number = shape(3, 48, dtype=bool), shape(dtype=jnp.int32)
  step = g._step.lower(g.params, shape(3, dtype=jnp.int32), valid, cache, number, {}, ex=g.ex)
  loop = g._loop.lower(g.params, shape(3, 40), valid, cache, number, number, jax.random.key(0), {},
                       sampling=Sampling(max_new_tokens=16), keep_logits=False, ex=g.ex)
  for lowered in (step, loop):
    found = lowered.compile().memory_analysis()
    assert found.alias_size_in_bytes >= size
    assert found.temp_size_in_bytes < size
