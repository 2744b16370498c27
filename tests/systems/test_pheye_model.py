"""Pheye as a model: adapters per sub-image, switches, merging, mixed batches, generation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core import lora, paths
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.core.module import Functional
from hrvlm_jax.language.generate import Generator, Sampling
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.pheye.config import tiny
from hrvlm_jax.systems.pheye.encoder import Encoder
from hrvlm_jax.vision.vit import ViT
from hrvlm_jax.vlm import model as vlm

SYSTEM = registry.get('pheye')
CONFIG = tiny()


def random_params(fn: Functional, seed: int = 1):
  """Every leaf random, without a compilation; norms near one."""
  rng = np.random.default_rng(seed)
  draw = lambda path, leaf: jnp.asarray(
    float(path.endswith('/scale')) + 0.08 * rng.normal(size=leaf.shape), leaf.dtype)
  return paths.map_with_path(draw, fn.abstract)


def encoder(config):
  return Functional(lambda rngs: Encoder(config, rngs=rngs))


@pytest.fixture(scope='module')
def vision():
  """(config, parameters of the encoder, pixels of two images)."""
  params = random_params(encoder(CONFIG.encoder))
  pixels = np.random.default_rng(2).normal(size=(2, 5, 40, 40, 3)).astype(np.float32)
  return CONFIG.encoder, params, jnp.asarray(pixels)


def test_one_run_equals_two_passes_of_merged_towers(vision):
  """Global view with `first`, tiles with `second`: as two towers with folded kernels."""
  config, params, pixels = vision
  states = jax.jit(lambda p: encoder(config).apply(p, pixels, method='states'))(params)
  plain = Functional(lambda rngs: ViT(config.vision, rngs=rngs))
  run = jax.jit(lambda p, x: plain.apply(p, x))
  first, second = (lora.strip(lora.merge(params['tower'], spec)) for spec in config.tower.lora)
  tiles = pixels[:, 1:].reshape(8, 40, 40, 3)
  np.testing.assert_allclose(states[:, 0], run(first, pixels[:, 0]), atol=1e-4)
  np.testing.assert_allclose(states[:, 1:].reshape(8, *states.shape[2:]), run(second, tiles),
                             atol=1e-4)
  assert float(jnp.abs(states[:, 0] - run(second, pixels[:, 0])).max()) > 0.1


def test_merge_and_unmerge(vision):
  config, params, _ = vision
  spec = config.second
  merged = lora.merge(params['tower'], spec)
  before, after = paths.flatten(params['tower']), paths.flatten(merged)
  changed = {path for path in before if not np.array_equal(before[path], after[path])}
  kernels = {path for path in before if path.endswith('/kernel')}
  assert changed == kernels and len(kernels) == 7  # q k v out fc1 fc2 and the patch convolution
  a, b = (before[f'blocks/mlp/fc1/lora_{x}_second'][1] for x in 'ab')
  np.testing.assert_allclose(
    after['blocks/mlp/fc1/kernel'][1] - before['blocks/mlp/fc1/kernel'][1], 2 * a @ b, atol=1e-5)
  back = paths.flatten(lora.unmerge(merged, spec))
  for path, value in before.items():
    np.testing.assert_allclose(back[path], value, atol=1e-6)
  half = lora.merge(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params['tower']), spec)
  assert half['blocks']['mlp']['fc1']['kernel'].dtype == jnp.bfloat16
  assert not any('lora' in path for path in paths.flatten(lora.strip(merged)))


def test_first_adapter_trains_unless_switched_off(vision):
  config, params, pixels = vision

  def grads(config):
    fn = encoder(config)
    loss = lambda p: jnp.square(fn.bind(p).join(fn.apply(p, pixels, method='states'))).mean()
    return paths.flatten(jax.jit(jax.grad(loss))(params))

  on = grads(config)
  off = grads(dataclasses.replace(config, train_first_adapter=False))
  for path, value in on.items():
    unread = path.startswith(('norm3/', 'tower/post_norm/'))
    assert bool(jnp.any(value)) != unread, path
    if path.endswith('_first'):
      assert not jnp.any(off[path]), path
    else:
      np.testing.assert_allclose(off[path], value, atol=1e-6, err_msg=path)
  assert not jnp.any(on['sub_image/embedding'][5:])  # unused rows


def test_dropout_acts_on_the_adapters_alone(vision):
  """With zero `lora_b` (as initialised) a dropout key changes nothing; otherwise it does."""
  config, params, pixels = vision
  run = jax.jit(lambda p, key: encoder(config).apply(p, pixels, key=key, method='states'))
  flat = paths.flatten(params)
  fresh = paths.unflatten({path: jnp.zeros_like(v) if '/lora_b' in path else v
                           for path, v in flat.items()})
  key = jax.random.key(5)
  np.testing.assert_array_equal(run(fresh, key), run(fresh, jax.random.key(6)))
  assert float(jnp.abs(run(params, key) - run(params, jax.random.key(6))).max()) > 1e-3
  np.testing.assert_array_equal(run(params, key), run(params, key))


@pytest.fixture(scope='module')
def answering():
  """(parameters, generator, views of three images of different shape, left-padded prompts)."""
  params = random_params(vlm.build(CONFIG))
  generator = Generator(vlm.build(CONFIG, unrolled=True), vlm.unroll(CONFIG, params))
  rng = np.random.default_rng(0)
  views = [SYSTEM.views([Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))],
                        CONFIG.encoder) for size in ((30, 90), (70, 20), (55, 55))]
  tokens = rng.integers(0, 250, (3, 8)).astype(np.int32)
  valid = np.arange(8) >= np.array([[0], [3], [5]])
  return params, generator, views, tokens, valid


def prompt(views, tokens, valid):
  return {'tokens': tokens, 'valid': valid, 'views': SYSTEM.batch(views, CONFIG.encoder)}


def test_mixed_batches_answer_like_single_runs(answering):
  """Images of different size and prompts of different length, together and each alone."""
  _, generator, views, tokens, valid = answering
  sampling = Sampling(max_new_tokens=6)

  def run(rows):
    batch = prompt([views[i] for i in rows], tokens[list(rows)], valid[list(rows)])
    embeds, ok, extras = generator.prompt(batch)
    return generator.generate(embeds, ok, sampling, extras=extras, keep_logits=True)

  together = run((0, 1, 2))
  for row in range(3):
    alone = run((row,))
    np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
    np.testing.assert_allclose(together.logits[row], alone.logits[0], atol=1e-4)
  assert len({tuple(t) for t in together.tokens.tolist()}) > 1


def test_keys_are_made_once_and_never_repeated_for_beams(answering):
  """The extras hold one row per image; a beam of one is greedy, scores are log-probabilities."""
  _, generator, views, tokens, valid = answering
  embeds, ok, extras = generator.prompt(prompt(views[:2], tokens[:2], valid[:2]))
  media = extras['media']
  assert [k.shape for k in media.keys] == [(2, 2, 130, 64)] * 2
  out = generator.generate(embeds, ok, Sampling(max_new_tokens=4, beams=3), extras=extras)
  assert out.tokens.shape == (2, 4) and (out.scores < 0).all()
  greedy = generator.generate(embeds, ok, Sampling(max_new_tokens=4), extras=extras,
                              keep_logits=True)
  logp = np.asarray(jax.nn.log_softmax(greedy.logits, axis=-1))
  total = np.take_along_axis(logp, greedy.tokens[..., None], axis=-1).sum((1, 2)) / 4
  assert (out.scores >= total - 1e-5).all()  # three beams find nothing worse than one here


def test_several_texts_of_one_image(answering):
  """Six rows over three images read as rows of their own image."""
  params, _, views, tokens, valid = answering
  fn = vlm.build(CONFIG)
  rows = [0, 0, 1, 1, 2, 2]
  run = jax.jit(lambda b: fn.apply(params, b))
  text = {'tokens': tokens[[0, 1, 2, 0, 1, 2]], 'valid': valid[[0, 1, 2, 0, 1, 2]]}
  shared = run(text | {'views': SYSTEM.batch(views, CONFIG.encoder)})
  own = run(text | {'views': SYSTEM.batch([views[i] for i in rows], CONFIG.encoder)})
  np.testing.assert_allclose(shared, own, atol=1e-4)


def test_attention_share_of_sub_images(answering):
  _, generator, views, tokens, valid = answering
  info = generator.info(prompt(views, tokens, valid))
  assert info['attention_share'].shape == (3, 5)
  np.testing.assert_allclose(info['attention_share'].sum(axis=1), 1, atol=1e-5)


def test_half_precision_keeps_its_dtype(answering):
  params, _, views, tokens, valid = answering
  fn = vlm.build(CONFIG)
  batch = prompt(views, tokens, valid)
  run = lambda dtype: jax.jit(lambda p, b: fn.apply(p, b, ex=Execution(dtype=dtype)))(params, batch)
  half, full = run(jnp.bfloat16), run(jnp.float32)
  assert half.dtype == jnp.bfloat16
  gap = np.abs(np.asarray(half, np.float32) - full)[valid]
  assert gap.mean() < 0.05 * float(jnp.abs(full).mean())
