"""PS3's pre-training through the loop: batches, unusable records, the clamp, resuming."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.build import build_records
from hrvlm_jax.data.rows import ImageRef
from hrvlm_jax.lab.needle import NeedleConfig
from hrvlm_jax.lab.needle.regions import NeedleRegions, probes
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.ps3 import model
from hrvlm_jax.systems.ps3.config import SaliencyConfig, TextConfig, tiny_encoder
from hrvlm_jax.systems.ps3.data import SampleConfig
from hrvlm_jax.systems.ps3.losses import ContrastiveConfig, pretrain_losses
from hrvlm_jax.systems.ps3.pretrain import Pretrain, PretrainOptions
from hrvlm_jax.systems.ps3.recall import WAYS, measure
from hrvlm_jax.systems.ps3.text import tokenizer
from hrvlm_jax.training.batches import make_batches
from hrvlm_jax.training.config import DataConfig, OptimizerConfig, RunConfig, TrainingConfig
from hrvlm_jax.training.loop import train
from hrvlm_jax.training.optimizer import groups_of
from hrvlm_jax.training.step import execution_of, init_state, make_train_step, value_and_grad

SMALL = dataclasses.replace(
  tiny_encoder(max_select=40), saliency=SaliencyConfig(width=8, out=8, depth=1, kernel=16,
                                                       input_size=160),
  text=TextConfig(vocab_size=264, context=24, width=64, depth=1, heads=4, mlp_width=64, out=64,
                  prompt_width=64))


PLAIN = SampleConfig(clean=False)


class WithFaults(NeedleRegions):
  """Every fourth image cannot be decoded."""

  def __getitem__(self, index):
    row = super().__getitem__(index)
    broken = (ImageRef('broken.png', data=b'no image'),)
    return dataclasses.replace(row, images=broken) if index % 4 == 0 else row


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('regions')
  build_records(WithFaults(NeedleConfig.square(), 16, seed=0), path, check=lambda row: None,
                progress=False)
  return path


def run_config(folder, *, regions=PLAIN, annotations=None, **training):
  return RunConfig(
    model=ModelConfig(system='ps3', encoder=SMALL, text=None, image_token=None),
    data=DataConfig(train=str(folder)),
    training=TrainingConfig(**{
      'steps': 4, 'batch_size': 4, 'log_every': 1, 'checkpoint_every': 2, 'loss_chunk': 3,
      'objective': PretrainOptions(regions=regions, annotations=annotations),
      'optimizer': OptimizerConfig(learning_rate=1e-3, warmup=1, clip_norm=None), **training}))


def test_batches_have_the_tuple_of_the_original_and_mark_unusable_records(folder):
  batches = make_batches(run_config(folder))
  seen = [next(batches) for _ in range(4)]
  for batch in seen:
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
      'pixels': ((4, 160, 160, 3), 'uint8'), 'tokens': ((4, 24), 'int32'),
      'target': ((4, 160, 160), 'uint8'), 'is_global': ((4, 1), 'bool'),
      'counted': ((4, 1), 'bool')}
  assert batches.counts == {'kind': 4} or sum(batches.counts.values()) == 4
  assert sum(int((~b['counted']).sum()) for b in seen) == 4
  parts = next(make_batches(run_config(folder, accumulate=2)))
  assert parts['pixels'].shape == (2, 2, 160, 160, 3)
  np.testing.assert_array_equal(parts['tokens'].reshape(4, -1), seen[0]['tokens'])


def test_rows_that_do_not_count_change_nothing():
  rng = np.random.default_rng(0)
  fn = model.build(SMALL)
  params = fn.init(jax.random.key(0))
  target = np.zeros((3, 160, 160), np.uint8)
  target[:, 20:60, 30:90] = 1
  batch = {'pixels': rng.integers(0, 256, (3, 160, 160, 3), np.uint8),
           'tokens': rng.integers(0, 256, (3, 24), np.int32), 'target': target,
           'is_global': np.array([[False], [True], [False]])}
  loss = jax.jit(lambda p, b: Pretrain(PretrainOptions()).loss(fn, p, b, chunk=2))
  first = {key: x[:2] for key, x in batch.items()}
  total, rows = loss(params, first)
  again, counted = loss(params, batch | {'counted': np.array([[True], [True], [False]])})
  assert int(rows) == int(counted) == 2
  np.testing.assert_allclose(total, again, rtol=1e-5)
  none, rows = loss(params, batch | {'counted': np.zeros((3, 1), bool)})
  assert float(none) == 0 and int(rows) == 0


def test_intra_image_contrast_and_the_target_of_all_boxes_are_options(folder):
  options = SampleConfig(clean=False, rows_per_image=2, prior_target='all')
  config = run_config(folder, regions=options)
  batch = next(make_batches(config))
  assert batch['pixels'].shape[0] == 8 and batch['counted'].shape == (8, 1)
  assert batch['image'][:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
  fn = model.build(SMALL)
  params = fn.init(jax.random.key(0))

  @functools.partial(jax.jit, static_argnums=2)
  def losses(p, b, intra):
    return pretrain_losses(fn, p, b, ContrastiveConfig(intra_image=intra, chunk=3))

  out, within = losses(params, batch, False), losses(params, batch, True)
  assert float(within['contrastive']) > float(out['contrastive'])
  np.testing.assert_allclose(within['posterior'], out['posterior'], rtol=1e-6)
  drawn = losses(params, {k: v for k, v in batch.items() if k != 'prior_target'}, False)
  assert abs(float(drawn['prior'] - out['prior'])) > 1e-4
  np.testing.assert_allclose(drawn['posterior'], out['posterior'], rtol=1e-5)


def test_accumulated_gradients_equal_those_of_the_large_batch(folder):
  """Contrast joins the rows of all micro-batches, also rows of one image and unusable ones."""
  options = SampleConfig(clean=False, rows_per_image=2, prior_target='all')
  fn = model.build(SMALL)
  params = fn.init(jax.random.key(0))

  def gradients(parts, **training):
    config = run_config(folder, regions=options, accumulate=parts, remat='layers', **training)
    batch = next(make_batches(config))
    assert batch['tokens'].shape[:-1] == ((8,) if parts == 1 else (2, 4))
    groups = groups_of(config.training, fn.abstract)
    return jax.jit(lambda p, b: value_and_grad(
      fn, config.training, groups, p, b, jax.random.key(0),
      ex=execution_of(config.training)))(params, batch)

  (total, rows, whole), (sums, counted, parts) = gradients(1), gradients(2)
  assert int(rows) == int(counted)
  np.testing.assert_allclose(total, sums, rtol=1e-5)
  largest = max(float(jnp.abs(g).max()) for g in whole.values())
  for path, grad in whole.items():
    np.testing.assert_allclose(parts[path], grad, atol=1e-6 * largest, err_msg=path)
  alone = gradients(2, loss_average='micro_batch')  # contrast within micro-batches: another loss
  assert abs(float(alone[0] / alone[1] - total / rows)) > 1e-3


def test_the_step_keeps_the_logit_scale_in_its_bounds():
  config = run_config('unused').training
  fn = model.build(SMALL)
  groups = groups_of(config, fn.abstract)
  params = fn.init(jax.random.key(0)) | {'logit_scale': jnp.float32(7.0)}
  rng = np.random.default_rng(0)
  batch = {'pixels': rng.integers(0, 256, (2, 160, 160, 3), np.uint8),
           'tokens': rng.integers(0, 256, (2, 24), np.int32)}
  step = jax.jit(make_train_step(fn, config, groups, 0, ex=execution_of(config)))
  state, _ = step(init_state(config, groups, params), batch)
  np.testing.assert_allclose(state['params']['logit_scale'], np.log(100), rtol=1e-6)
  state, _ = step(init_state(config, groups, params | {'logit_scale': jnp.float32(-3.0)}), batch)
  assert float(state['params']['logit_scale']) == 0


def test_the_loop_trains_resumes_and_is_measured(folder, tmp_path):
  config = run_config(folder)
  ended = train(dataclasses.replace(config, training=dataclasses.replace(
    config.training, steps=2)), tmp_path, progress=False)
  assert ended.step == 2 and np.isfinite(ended.loss)
  ended = train(config, tmp_path, progress=False)
  assert ended.step == 4 and ended.compilations == 1
  fn = model.build(SMALL)
  params = store.load_params(tmp_path, fn.abstract)
  tokenize = tokenizer(tokenizer_of('byte'), SMALL.text)
  batches = probes(NeedleConfig.square(), SMALL, tokenize, seed=1, images=4, batch_size=2)
  scores = measure(fn, params, batches, encoder=SMALL, shares=(0.1, 1.0))
  assert [(s.way, s.tokens) for s in scores] == [(w, n) for w in WAYS for n in (50, 500)]
  whole = [s for s in scores if s.share == 1]
  assert all(s.recall == 1 for s in whole) and len({s.accuracy for s in whole}) == 1
  assert all(s.recall < 1 for s in scores if s.share < 1)


def test_models_and_vocabularies_that_do_not_fit(folder):
  config = run_config(folder)
  small = dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, vocab_size=100))
  with pytest.raises(UserError, match=r'gives ids up to 263, model.encoder.text.vocab_size is 100'):
    make_batches(dataclasses.replace(config, model=dataclasses.replace(
      config.model, encoder=small)))
  with pytest.raises(UserError, match='no text tower of its own'):
    make_batches(dataclasses.replace(config, model=dataclasses.replace(
      config.model, encoder=dataclasses.replace(SMALL, text=None))))
  with pytest.raises(UserError, match='go with tar shards only'):
    make_batches(run_config(folder, annotations='other'))
