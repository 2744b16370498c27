"""Losses, parameter groups and the train step of a very small MC-LLaVA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language import config as language
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.systems.mc_llava import encoder as host
from hrvlm_jax.systems.mc_llava.encoder import MCLlavaConfig
from hrvlm_jax.training.config import Group, OptimizerConfig, TrainingConfig
from hrvlm_jax.training.losses import chunked_cross_entropy, token_cross_entropy
from hrvlm_jax.training.optimizer import groups_of
from hrvlm_jax.training.step import execution_of, init_state, make_train_step, value_and_grad
from hrvlm_jax.vision.vit import ViTConfig
from hrvlm_jax.vlm import model as vlm

VISION = ViTConfig(image_size=12, patch_size=4, width=16, depth=2, heads=2, mlp_width=16,
                   pool='map')
MODEL = ModelConfig(
  system='mc_llava',
  encoder=MCLlavaConfig(vision=VISION, max_crops=4, num_tokens=8, window=12, growth=2,
                        view_buckets=(1, 5)),
  text=language.phi(vocab_size=30, width=16, depth=2, heads=2, mlp_width=16, init_std=0.2),
  projector=ProjectorConfig(n_in=16, n_out=16))
FROZEN = (Group(pattern='vision/tower/.*', frozen=True), Group(pattern='.*'))


def batch_of(rows, seed=0, parts=1):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, 30, (rows, 20)).astype(np.int32)
  index = np.full((rows, 20), -1, np.int32)
  index[:, 2:10] = np.arange(8)
  labels = np.where(rng.random((rows, 20)) < 0.5, tokens, -100).astype(np.int32)
  labels[:, :10] = -100
  examples = [{'pixels': rng.integers(0, 256, (5, 12, 12, 3)).astype(np.uint8),
               'coords': rng.random((5, 2)).astype(np.float32),
               'gather': host.gather_index(5, MODEL.encoder), 'tokens': np.array([8], np.int32)}
              for _ in range(rows)]
  size = rows // parts
  system = registry.get('mc_llava')
  views = [system.batch(examples[i * size:(i + 1) * size], MODEL.encoder) for i in range(parts)]
  out = {'tokens': tokens, 'visual_index': index, 'labels': labels,
         'valid': np.ones((rows, 20), bool)}
  if parts == 1:
    return out | {'views': views[0]}
  out = {k: v.reshape(parts, size, 20) for k, v in out.items()}
  return out | {'views': {k: np.stack([v[k] for v in views]) for k in views[0]}}


@pytest.fixture(scope='module')
def model():
  fn = vlm.build(MODEL)
  return fn, jax.jit(fn.init)(jax.random.key(0))


def training(**options):
  options = {'optimizer': OptimizerConfig(learning_rate=1e-2, warmup=2), **options}
  return TrainingConfig(steps=10, batch_size=4, **options)


def grads_of(model, config, batch):
  fn, params = model
  groups = groups_of(config, fn.abstract)
  run = jax.jit(lambda p, b: value_and_grad(fn, config, groups, p, b, jax.random.key(0),
                                              ex=execution_of(config)))
  return run(params, batch)


def test_chunked_loss_equals_the_plain_one_and_its_gradient():
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(3, 7, 5)), jnp.float32)
  head = jnp.asarray(rng.normal(size=(5, 11)), jnp.float32)
  labels = rng.integers(0, 11, (3, 7))
  labels[:, :3] = -100
  plain = lambda h: token_cross_entropy(h @ head, labels)[0]
  chunked = lambda h: chunked_cross_entropy(h, labels, lambda x: x @ head, chunk=4)[0]
  np.testing.assert_allclose(plain(hidden), chunked(hidden), rtol=1e-6)
  np.testing.assert_allclose(jax.grad(plain)(hidden), jax.grad(chunked)(hidden), atol=1e-6)
  reference = optax.softmax_cross_entropy_with_integer_labels(hidden[:, 2:-1] @ head, labels[:, 3:])
  np.testing.assert_allclose(plain(hidden), reference.sum(), rtol=1e-6)
  assert int(token_cross_entropy(hidden @ head, labels)[1]) == 3 * 4


def test_accumulated_gradients_equal_those_of_the_large_batch(model):
  whole = grads_of(model, training(), batch_of(4))
  parts = grads_of(model, training(accumulate=2), batch_of(4, parts=2))
  assert int(whole[1]) == int(parts[1])
  np.testing.assert_allclose(whole[0], parts[0], rtol=1e-5)
  largest = max(float(jnp.abs(g).max()) for g in whole[2].values())
  for path, grad in whole[2].items():
    np.testing.assert_allclose(parts[2][path], grad, atol=1e-6 * largest, err_msg=path)


@pytest.mark.parametrize('form', [{'remat': 'layers'}, {'remat': 'dots'}, {'layers': 'unrolled'}])
def test_form_of_the_program_changes_no_gradient(model, form):
  whole = grads_of(model, training(), batch_of(4))
  again = grads_of(model, training(**form), batch_of(4))
  largest = max(float(jnp.abs(g).max()) for g in whole[2].values())
  for path, grad in whole[2].items():
    np.testing.assert_allclose(again[2][path], grad, atol=1e-6 * largest, err_msg=path)


def test_bfloat16_computes_on_float32_masters(model):
  """Gradients arrive in float32 and near those of float32 compute."""
  exact, rough = (grads_of(model, training(dtype=dtype), batch_of(4))
                  for dtype in ('float32', 'bfloat16'))
  assert all(g.dtype == jnp.float32 for g in rough[2].values())
  assert 1e-6 < abs(float(exact[0]) - float(rough[0])) < 0.05 * float(exact[0])


def test_micro_batch_average_is_another_number(model):
  tokens = grads_of(model, training(accumulate=2), batch_of(4, parts=2))
  means = grads_of(model, training(accumulate=2, loss_average='micro_batch'),
                   batch_of(4, parts=2))
  assert int(means[1]) == 2
  assert abs(float(tokens[0] / tokens[1]) - float(means[0] / means[1])) > 1e-4


def test_gradients_reach_every_trained_leaf_and_no_frozen_one(model):
  config = training(groups=FROZEN)
  _, _, grads = grads_of(model, config, batch_of(4))
  assert grads and not any(path.startswith('vision/tower/') for path in grads)
  assert all(bool(jnp.any(g != 0)) for g in grads.values()), [
    path for path, g in grads.items() if not bool(jnp.any(g != 0))]


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_step_moves_trained_leaves_only_and_the_loss_falls(model, name):
  fn, params = model
  config = training(groups=FROZEN, optimizer=OptimizerConfig(
    name=name, learning_rate=2e-2, warmup=1, weight_decay=0.01, ema=0.5))
  groups = groups_of(config, fn.abstract)
  state = init_state(config, groups, params)
  step = jax.jit(make_train_step(fn, config, groups, 0, ex=execution_of(config)))
  losses, batch = [], batch_of(4)
  for _ in range(8):
    state, metrics = step(state, batch)
    losses.append(float(metrics['loss']))
  assert losses[-1] < 0.8 * losses[0]
  before, after = paths.flatten(params), paths.flatten(state['params'])
  for path, leaf in after.items():
    moved = not np.array_equal(leaf, before[path])
    assert moved != path.startswith('vision/tower/'), path
  assert set(state['ema']) == {path for path, group in groups.items() if not group.frozen}
  assert step._cache_size() == 1


def test_a_batch_without_targets_changes_nothing_but_decay(model):
  batch = batch_of(4)
  batch['labels'] = np.full_like(batch['labels'], -100)
  total, count, grads = grads_of(model, training(), batch)
  assert float(total) == 0 and int(count) == 0
  assert all(bool(jnp.all(g == 0)) for g in grads.values())


def test_groups_must_cover_and_train_something(model):
  fn, _ = model
  with pytest.raises(UserError, match='no training group'):
    groups_of(training(groups=(Group(pattern='vision/.*'),)), fn.abstract)
  with pytest.raises(UserError, match='freezes every parameter'):
    groups_of(training(groups=(Group(pattern='.*', frozen=True),)), fn.abstract)


def test_settings_that_make_no_sense():
  with pytest.raises(ValueError, match='no multiple of accumulate'):
    dataclasses.replace(training(), accumulate=3)
  with pytest.raises(ValueError, match='steps must be at least 1'):
    dataclasses.replace(training(), steps=0)
