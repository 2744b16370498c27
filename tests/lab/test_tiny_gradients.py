"""The tiny recipes, numerically: gradients reach every leaf that trains, and no frozen one."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.core import paths
from hrvlm_jax.lab.needle import NeedleConfig, write
from hrvlm_jax.lab.needle.regions import write_regions
from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.training import run_config
from hrvlm_jax.training.batches import make_batches
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.optimizer import groups_of
from hrvlm_jax.training.step import execution_of, value_and_grad
from hrvlm_jax.vlm import model as vlm
from tests import levels

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs' / 'tiny'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """Four images of the task, as conversations and as region records."""
  root = tmp_path_factory.mktemp('task')
  write(NeedleConfig.square(), root / 'needle', 4, seed=0, progress=False)
  write_regions(NeedleConfig.square(), root / 'regions', 4, seed=0, progress=False)
  return root


@pytest.mark.parametrize('name', levels.rows(
  'recipes', sorted(path.stem for path in CONFIGS.glob('*.py')), first=['mc_llava']))
def test_gradients_reach_what_trains_and_nothing_else(name, data):
  source = data / ('regions' if name == 'ps3' else 'needle/needle.json')
  config = run_config.load(RunConfig, str(CONFIGS / f'{name}.py'), [
    ('data.train', str(source)), ('data.tokenizer', 'byte'), ('data.lengths', '(448,)'),
    ('training.init_from', 'none'), ('training.batch_size', '4')])
  fn = vlm.build(config.model)
  groups = groups_of(config.training, fn.abstract)
  batch = next(iter(make_batches(config, Layout(config.mesh))))

  def gradients(key):
    flat = paths.flatten(fn.init(key))
    # Away from the start, where zeros of adapters and LoRA sets hide what is behind them.
    keys = jax.random.split(jax.random.fold_in(key, 1), len(flat))
    moved = {path: leaf + 0.05 * jax.random.normal(k, leaf.shape)
             for k, (path, leaf) in zip(keys, flat.items(), strict=True)}
    found = value_and_grad(fn, config.training, groups, paths.unflatten(moved), batch, None,
                           ex=execution_of(config.training))
    return {path: jnp.abs(g).max() for path, g in found[2].items()}

  largest = jax.jit(gradients)(jax.random.key(0))
  trained = {path for path, group in groups.items() if not group.frozen}
  assert set(largest) == trained
  assert [path for path, value in largest.items() if not value > 0 or not np.isfinite(value)] == []
