"""Every run config in `configs/`: builds, shards, and its gradients reach what it trains.

Released sizes are checked with shapes alone; nothing is computed and no weight is made.
"""

import functools
import json
import pathlib
import re
import runpy

import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp
from jax.sharding import AbstractMesh
import numpy as np
import pytest

from hrvlm_jax.core import paths
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.parallel import rules
from hrvlm_jax.parallel.mesh import AXES
from hrvlm_jax.systems.contract import ModelConfig, sharding_rules
from hrvlm_jax.training.batches import batch_shapes
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.optimizer import groups_of
from hrvlm_jax.training.program import run_dtypes
from hrvlm_jax.training.step import execution_of, init_state, value_and_grad
from hrvlm_jax.vlm import model as vlm
from tests import levels
from tests.configs.golden import RECIPES, load

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
# PS3's are checked beside the rest of PS3.
PUBLISHED = tuple(
  spec for spec in RECIPES if not spec.startswith('ps3:') and spec.count(':') == 1)
# One of each file; the others are the second level's.
FIRST = tuple({spec.partition(':')[0]: spec for spec in reversed(PUBLISHED)}.values())


def test_every_header_says_how_to_run_it():
  problems = []
  for path in CONFIGS.glob('*.py'):
    text = (runpy.run_path(str(path))['__doc__'] or '')
    problems += [f'{path.name}: no {word}' for word in ('Command', 'Hardware', 'Time', 'Expected')
                 if f'{word}:' not in text]
    if f'configs/{path.name}' not in text:
      problems.append(f'{path.name}: its command names another file')
  assert not problems


@pytest.mark.parametrize('spec', levels.rows('recipes', PUBLISHED, first=FIRST))
def test_a_released_size_builds_abstractly(spec):
  """Shapes, shardings on 64 devices, optimizer state: float32 masters, frozen leaves without."""
  config = load(spec)
  fn, t = model_of(json.dumps(to_values(config))), config.training
  groups = groups_of(t, fn.abstract)
  wanted = run_dtypes(t, groups, fn.abstract)
  state = jax.eval_shape(lambda p: init_state(t, groups, p), wanted)
  trained = {path for path, group in groups.items() if not group.frozen}
  flat = paths.flatten(state['params'])
  assert trained and len(trained) < len(flat) + 1
  for path, leaf in flat.items():
    assert leaf.dtype == (jnp.float32 if path in trained else jnp.bfloat16), path
  moments = [leaf for leaf in jax.tree.leaves(state['opt']) if leaf.ndim]
  size = sum(int(np.prod(flat[path].shape)) for path in trained)
  assert sum(int(np.prod(leaf.shape)) for leaf in moments) == 2 * size
  assert all(leaf.dtype == jnp.float32 for leaf in moments)
  mesh = AbstractMesh((4, 16, 1, 1), AXES)
  shardings = rules.state_shardings(state, mesh, rules=sharding_rules(config.model))
  whole = [path for path, leaf in paths.flatten(shardings['params']).items()
           if leaf.is_fully_replicated and int(np.prod(flat[path].shape)) > 2**24]
  assert not whole, 'large leaves lie whole on every device'


@pytest.mark.parametrize('spec', levels.rows('recipes', PUBLISHED, first=FIRST))
def test_gradients_reach_every_trained_leaf(spec):
  reached, trained = gradients(*gradient_key(load(spec)))
  assert sorted(trained - reached) == []


def test_stages_follow_each_other():
  """A stage starts where a command of its header ends, for the size the header shows."""
  for spec in PUBLISHED:
    start = load(spec).training.init_from
    assert start.partition('/')[0] in ('weights', 'runs'), spec
    system, _, argument = spec.partition(':')
    header = runpy.run_path(str(CONFIGS / f'{system}.py'))['__doc__']
    stages = ''.join(re.findall(r'for stage in (.*); do', header)).split() or ['']
    made = [(words.replace('$stage', stage), folder.replace('$stage', stage))
            for words, folder in re.findall(
              r'hrvlm train --config configs/\w+\.py:(\S+)\s+--workdir (\S+)', header)
            for stage in stages]
    assert made and all(load(f'{system}:{words}') for words, _ in made)
    shown, own = made[0][0].partition(',')[0], argument.partition(',')[0]
    if start.startswith('runs/'):
      assert start.replace(own, shown) in [folder for _, folder in made], (
        f'{spec} starts from {start}, which no command of the header makes')


def test_published_numbers():
  stage = load('pheye:x2_672,stage2').training
  assert (stage.steps, stage.batch_size, stage.optimizer.learning_rate) == (7531, 128, 1e-4)
  assert stage.loss_average == 'tokens' and stage.optimizer.schedule == 'cosine'
  stage = load('llava_hr:7b,stage2').training
  assert (stage.steps, stage.batch_size, stage.optimizer.learning_rate) == (5198, 128, 2e-5)
  lora = load('mc_llava:lora').model.text.lora[0]
  assert (lora.rank, lora.alpha, lora.dropout) == (64, 16.0, 0.05)
  sft = load('vila_hd:4k,sft').training
  assert (sft.batch_size, sft.optimizer.learning_rate, sft.optimizer.clip_norm) == (
    1024, 1.5e-5, 5.0)


@pytest.mark.parametrize('name, counts', [('x4_448', 295_136_192), ('x2_672', None)])
def test_the_first_adapter_trains_as_the_paper_or_as_the_code(name, counts):
  """Trained parameters without the first set: the paper's own number."""
  code, paper = (load(f'pheye:{name},stage1,{word}') for word in ('code', 'paper'))
  size = {}
  for key, config in (('code', code), ('paper', paper)):
    flat = paths.flatten(vlm.build(config.model).abstract)
    groups = groups_of(config.training, vlm.build(config.model).abstract)
    size[key] = sum(int(np.prod(flat[p].shape)) for p, g in groups.items() if not g.frozen)
    first = {groups[p].frozen for p in flat if p.endswith('_first')}
    assert first == {key == 'code'}
  assert size['paper'] - size['code'] == 5_913_184
  # The published count holds the unread third norm (2 x 1280) too.
  assert counts is None or size['code'] + 2 * 1280 == counts


def to_values(config):
  return to_dict(config.model)


@functools.cache
def model_of(text):
  return vlm.build(from_dict(ModelConfig, json.loads(text)))


def gradient_key(config):
  """What decides which leaves gradients reach, hashable: stages with the same share one trace."""
  t = config.training
  groups = [to_dict(group) for group in t.groups]
  return (json.dumps(to_values(config)), json.dumps(groups), t.objective.name,
          max(config.data.lengths))


@functools.cache
def gradients(model, groups, objective, length):
  """(leaves whose gradient depends on something, trained leaves), from shapes alone."""
  values = {'model': json.loads(model), 'data': {'train': 'none.json', 'lengths': [length]},
            'training': {'steps': 1, 'batch_size': 1, 'groups': json.loads(groups),
                         'optimizer': {'learning_rate': 1.0}, 'objective': objective}}
  config = from_dict(RunConfig, values)
  fn = model_of(model)
  found = groups_of(config.training, fn.abstract)
  batch = batch_shapes(config, 1, length=length, image=(900, 700)).arrays
  names = []

  def grads(params, batch):
    out = value_and_grad(fn, config.training, found, params, batch, jax.random.key(0),
                         ex=execution_of(config.training))[2]
    names[:] = sorted(out)
    return [out[name] for name in names]

  jaxpr = jax.make_jaxpr(grads)(fn.abstract, batch).jaxpr
  return reached_outputs(jaxpr, names), frozenset(names)


def reached_outputs(jaxpr, names):
  """Outputs that depend on an input; a gradient of nothing but zeros depends on none."""
  found = set()
  for place, name in enumerate(names):
    used = [i == place for i in range(len(names))]
    _, inputs = partial_eval.dce_jaxpr(jaxpr, used)
    if any(inputs):
      found.add(name)
  return frozenset(found)


def test_the_check_of_gradients_finds_a_leaf_that_is_not_reached():
  def loss(params, x):
    def layer(x, leaf):
      return x * leaf['used'] + jax.lax.stop_gradient(leaf['cut']).sum() * 0 + 1, None

    return jax.lax.scan(layer, x, params['layers'])[0].sum() + params['out'].sum()

  params = {'layers': {'used': jnp.ones((3, 2)), 'cut': jnp.ones((3, 2)),
                       'unread': jnp.ones((3, 2))}, 'out': jnp.ones(2)}
  flat = paths.flatten(params)
  names = sorted(flat)

  def grads(flat, x):
    out = jax.grad(lambda f: loss(paths.unflatten(f), x))(flat)
    return [out[name] for name in names]

  jaxpr = jax.make_jaxpr(grads)(flat, jnp.ones(2)).jaxpr
  # The gradient of `out` is a constant 1: it depends on no input, but no weight of a model is so.
  assert reached_outputs(jaxpr, names) == {'layers/used'}
