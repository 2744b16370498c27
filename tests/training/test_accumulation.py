"""Gradients of micro-batches add up to those of the large batch, for the systems' own losses.

MC-LLaVA's are in `test_step.py`, PS3's in `test_regions.py`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core import paths
from hrvlm_jax.systems import registry
from hrvlm_jax.training.batches import make_batches
from hrvlm_jax.training.config import DataConfig, OptimizerConfig, RunConfig, TrainingConfig
from hrvlm_jax.training.optimizer import groups_of
from hrvlm_jax.training.step import execution_of, value_and_grad
from hrvlm_jax.vlm import model as vlm
from tests import levels
from tests.parity.cases.training import without_dropout


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """Four pictures; answers of one to thirty characters, a box for all but the second."""
  root = tmp_path_factory.mktemp('data')
  rng, rows = np.random.default_rng(0), []
  for i, length in enumerate((1, 30, 2, 9)):
    Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(root / f'{i}.png')
    turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'A' * length}]
    box = {} if i == 1 else {'box': [3, 4, 20, 20 + i]}
    rows.append({'id': str(i), 'image': f'{i}.png', 'conversations': turns, **box})
  (root / 'train.json').write_text(json.dumps(rows))
  return str(root / 'train.json')


@pytest.mark.parametrize('system, objective', levels.rows('training', [
  ('pheye', 'next_token'), ('llava_hr', 'next_token'), ('vila_hd', 'two_pass')],
  first=[('pheye', 'next_token')]))
def test_accumulated_gradients_equal_those_of_the_large_batch(system, objective, data):
  model = without_dropout(registry.get(system).tiny())
  fn = vlm.build(model)

  def run(parts):
    return RunConfig(
      model=model,
      data=DataConfig(train=data, lengths=(320,), shuffle=False, boxes=objective == 'two_pass'),
      training=TrainingConfig(steps=1, batch_size=4, accumulate=parts, objective=objective,
                              optimizer=OptimizerConfig(learning_rate=1e-3)))

  runs = {parts: run(parts) for parts in (1, 2)}
  batches = {parts: next(iter(make_batches(run))) for parts, run in runs.items()}
  np.testing.assert_array_equal(
    np.asarray(batches[2]['tokens']).reshape(4, -1), batches[1]['tokens'])
  targets = (np.asarray(batches[2]['labels']) >= 0).sum(axis=(1, 2))
  assert targets[0] != targets[1]  # a mean of means would be another loss

  def gradients(key):
    flat = paths.flatten(fn.init(key))
    keys = jax.random.split(key, len(flat))  # away from the zeros of adapters and LoRA sets
    params = paths.unflatten({path: leaf + 0.05 * jax.random.normal(k, leaf.shape)
                              for k, (path, leaf) in zip(keys, flat.items(), strict=True)})
    return {parts: value_and_grad(
      fn, run.training, groups_of(run.training, fn.abstract), params, batches[parts], key,
      ex=execution_of(run.training))
      for parts, run in runs.items()}

  found = jax.jit(gradients)(jax.random.key(0))
  (total, count, whole), (sums, counts, parts) = found[1], found[2]
  assert int(count) == int(counts)
  np.testing.assert_allclose(total, sums, rtol=1e-5)
  largest = max(float(jnp.abs(g).max()) for g in whole.values())
  assert largest > 0
  for path, grad in whole.items():
    np.testing.assert_allclose(parts[path], grad, atol=1e-6 * largest, err_msg=path)
