"""PS3's recipes: the published numbers, and decay exactly where the original decays."""

import json
import pathlib

import jax
from jax.sharding import AbstractMesh
import numpy as np
import pytest

from hrvlm_jax.core import paths
from hrvlm_jax.parallel import rules
from hrvlm_jax.parallel.mesh import AXES
from hrvlm_jax.systems.contract import sharding_rules
from hrvlm_jax.systems.ps3 import weights
from hrvlm_jax.training import run_config
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.optimizer import groups_of, schedule
from hrvlm_jax.training.step import init_state
from hrvlm_jax.vlm import model as vlm

KEYS = pathlib.Path(__file__).parents[1] / 'goldens' / 'release_keys'


def load(spec):
  return run_config.load(RunConfig, f'ps3:{spec}')


@pytest.mark.parametrize('spec, steps, batch', [
  ('1_5k', 18_600, 4096), ('4k', 18_600, 4096), ('4k,script', 293_100, 256),
  ('1_5k,released,siglip2', 18_600, 4096)])
def test_published_numbers(spec, steps, batch):
  config = load(spec)
  t, o = config.training, config.training.optimizer
  assert (t.steps, t.batch_size, t.accumulate, t.remat) == (steps, batch, 1, 'layers')
  assert (o.learning_rate, o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm, o.ema) == (
    5e-6, 0.9, 0.95, 1e-8, 3e-4, None, None)
  rate = schedule(t)
  np.testing.assert_allclose(float(rate(0)), 5e-6 / 1500, rtol=1e-5)
  np.testing.assert_allclose(float(rate(1499)), 5e-6, rtol=1e-5)
  assert float(rate(steps)) < 1e-12
  regions = t.objective.regions
  assert regions.global_share == 0.25 and regions.clean
  assert config.model.encoder.scales[-1] == (3780 if '4k' in spec else 1512)
  assert config.model.encoder.text.vocab_size == (256_000 if 'siglip2' in spec else 32_000)
  assert t.objective.name == 'ps3_pretrain' and t.objective.annotations == 'ps3_annotations'


def test_steps_of_an_epoch():
  """As the original's loader counts: whole batches for every one of its 4 workers."""
  for words, batch in (('4k', 4096), ('4k,script', 256)):
    batches = -(-1_000_000 // batch)
    assert load(words).training.steps == 75 * 4 * -(-batches // 4)


@pytest.mark.parametrize('name', ['ps3_4k_siglip', 'ps3_1_5k_cradio_v2_l'])
def test_the_same_tensors_are_decayed_as_in_the_original(name):
  """By the original's rule over its own names and shapes, through the name table."""
  lists = [json.loads((KEYS / f'{name}.{part}.json').read_text()) for part in ('vision', 'text')]
  config = weights.vision_from_hf(lists[0]['config'], text=weights.text_from_hf(lists[1]['config']))
  spec = load('4k')
  fn = vlm.build(spec.model.__class__(system='ps3', encoder=config, text=None, image_token=None))
  groups = groups_of(spec.training, fn.abstract)
  shapes = lists[0]['tensors'] | lists[1]['tensors'] | {'logit_scale': [], 'logit_bias': []}
  for row in weights.model_table(config).rows:
    for theirs in row.names:
      first = theirs.replace('{i}', '0')
      wanted = len(shapes[first]) >= 2 and not any(
        word in first for word in ('bn', 'ln', 'bias', 'logit_scale'))
      for ours in row.our_paths:
        assert groups[ours].decay == wanted, (ours, first)


def test_the_state_of_the_4k_model_builds_trains_whole_and_is_cut_over_devices():
  config = load('4k')
  fn = vlm.build(config.model)
  groups = groups_of(config.training, fn.abstract)
  state = jax.eval_shape(lambda p: init_state(config.training, groups, p), fn.abstract)
  size = lambda leaves: sum(int(np.prod(leaf.shape)) for leaf in leaves)
  params = size(paths.flatten(state['params']).values())
  assert params == 575_799_872 + 452_393_712 + 2
  assert size(x for x in jax.tree.leaves(state['opt']) if x.ndim) == 2 * (params - 2)
  mesh = AbstractMesh((1, 64, 1, 1), AXES)
  shardings = rules.state_shardings(state, mesh, rules=sharding_rules(config.model))
  shardings = paths.flatten(shardings['params'])
  flat = paths.flatten(state['params'])
  assert [path for path, place in shardings.items()
          if place.is_fully_replicated and int(np.prod(flat[path].shape)) > 2**20] == []
