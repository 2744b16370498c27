"""PS3 on the device: equal ways to run looks, tokens at any grid, losses over shards, gradients."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.core import paths, resample
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.core.layers import patchify
from hrvlm_jax.core.module import Functional
from hrvlm_jax.systems.ps3 import SYSTEM, model, selection
from hrvlm_jax.systems.ps3.config import LookConfig, tiny_encoder
from hrvlm_jax.systems.ps3.encoder import Encoder, feature_maps
from hrvlm_jax.systems.ps3.losses import (
  ContrastiveConfig,
  clamp_logit_scale,
  pretrain_losses,
  selection_loss,
  sigmoid_loss,
)
from hrvlm_jax.systems.ps3.patches import scaled
from hrvlm_jax.systems.ps3.plan import make_plan
from hrvlm_jax.systems.ps3.pretrain import Pretrain, PretrainOptions

CONFIG = tiny_encoder(max_select=40)


@functools.cache
def encoder():
  fn = Functional(lambda rngs: Encoder(CONFIG, rngs=rngs))
  params = fn.init(jax.random.key(0))
  # Zero-initialised residuals and tiny layer scales would hide mistakes.
  noise = lambda path, leaf: leaf + 0.1 * jax.random.normal(
    jax.random.key(hash(path) % 1000), leaf.shape)
  return fn, paths.map_with_path(
    lambda path, leaf: noise(path, leaf) if 'residual' in path or 'weight' in path else leaf,
    params)


def images(height, width, batch=2):
  return jax.random.normal(jax.random.key(1), (batch, height, width, 3))


def test_looks_at_once_and_in_sequence_are_equal_and_cover_the_image():
  fn, params = encoder()
  plan = make_plan(160, 160, CONFIG, num_looks='all')
  assert plan.looks == 13 and plan.look_tokens[-1] == 20

  @jax.jit
  def both(params, x):
    module = fn.bind(params)
    low = module.encode_low(x, keep=2)
    probs = module.probabilities(low, None, plan)
    return [module.encode_high(low, x, probs, plan, at_once=way) for way in (False, True)]

  one, other = both(params, images(160, 160))
  assert sorted(one.hidden) == [1, 2] and one.last.shape == (2, plan.tokens, 64)
  for layer in (1, 2):
    np.testing.assert_allclose(one.hidden[layer], other.hidden[layer], atol=2e-5)
  np.testing.assert_array_equal(one.cells, np.arange(sum(plan.cells))[None].repeat(2, 0))
  assert all(np.asarray(m).all() for m in one.maps)
  maps = feature_maps(one.last, one.maps, CONFIG.grid)
  flat = np.concatenate([np.asarray(m).reshape(2, -1, 64) for m in maps], axis=1)
  np.testing.assert_array_equal(flat, one.last)


def test_gathered_tokens_are_those_of_the_whole_grid():
  fn, params = encoder()
  module = fn.bind(params)
  x = images(150, 90)
  plan = make_plan(150, 90, CONFIG, num_looks='all')
  sized = scaled(x, plan)
  whole = []
  for i, (image, grid) in enumerate(zip(sized, plan.grids[1:], strict=True)):
    side = CONFIG.scales[i + 1] // 8
    residual = params['residual'][str(i)].reshape(side, side, -1)[:grid[0], :grid[1]]
    tokens = module.tower.patch_embed.project(patchify(image, 8))
    whole.append(tokens + module.tower.positions(grid) + residual.reshape(tokens.shape[1:]))
  whole = np.concatenate(whole, axis=1)
  rng = np.random.default_rng(0)
  cells = np.sort(np.stack([rng.permutation(whole.shape[1])[:60] for _ in range(2)]), axis=1)
  counts = [[int((row < plan.cells[0]).sum()), int((row >= plan.cells[0]).sum())] for row in cells]
  found = module.embed_high(sized, jnp.asarray(cells), counts, plan)
  np.testing.assert_allclose(found, np.take_along_axis(whole, cells[..., None], 1), atol=2e-5)


def test_choice_is_a_stable_sort_for_any_number_of_ties():
  plan = make_plan(160, 160, CONFIG, num_looks=3)
  rng = np.random.default_rng(0)
  probs = [jnp.asarray(rng.integers(0, 3, (2, *g)) / 3, jnp.float32) for g in plan.grids[1:]]
  chosen = selection.choose(probs, plan)
  for i, p in enumerate(probs):
    order = np.argsort(-np.asarray(p).reshape(2, -1), axis=1, kind='stable')
    start, end = sum(plan.cells[:i]), sum(plan.cells[:i + 1])
    taken = 0
    for look, cells in zip(plan.counts[0], chosen, strict=True):
      mine = [row[(row >= start) & (row < end)] - start for row in np.asarray(cells)]
      np.testing.assert_array_equal(mine, np.sort(order[:, taken:taken + look[i]], axis=1))
      taken += look[i]


def test_views_to_tokens_and_the_other_batch_row_does_not_matter():
  fn, params = encoder()
  config = dataclasses.replace(CONFIG, look=LookConfig(looks=None, tokens=50, smooth=True))
  fn = Functional(lambda rngs: Encoder(config, rngs=rngs))
  rng = np.random.default_rng(0)
  example = lambda n: {'pixels': rng.integers(0, 256, (n, 160, 160, 3), np.uint8),
                       'tokens': np.full(n, 75, np.int32)}
  one, two = example(1), example(2)
  call = jax.jit(lambda p, v: fn.bind(p)(v))
  out = call(params, SYSTEM.batch([one, two], config, slots=3))
  assert out.values.shape == (2, 150, 64)
  assert np.asarray(out.valid).sum(1).tolist() == [75, 150]
  alone = call(params, SYSTEM.batch([one, one], config, slots=3, tokens=150))
  np.testing.assert_allclose(out.values[0, :75], alone.values[0, :75], atol=2e-5)


def test_the_resize_is_that_of_the_matrices():
  x = images(37, 53)
  for size in ((16, 90), (37, 53), (12, 5)):
    np.testing.assert_allclose(resample.bicubic(x, *size, method='taps'),
                               resample.bicubic(x, *size, method='matrix'), atol=3e-6)


def pairs(rows, width=6):
  make = lambda seed: jax.random.normal(jax.random.key(seed), (rows, width))
  return [x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (make(0), make(1))]


def plain_loss(image, text, scale, bias):
  logits = jnp.exp(scale) * image @ text.T + bias
  z = 2 * jnp.eye(len(image)) - 1
  return jax.nn.softplus(-z * logits).sum() / len(image)


@pytest.mark.parametrize('chunk', [None, 3, 4, 100])
def test_chunked_contrast_equals_the_whole_matrix(chunk):
  args = (*pairs(10), jnp.float32(1.2), jnp.float32(-3.0))

  def mean(*a):
    total, rows = sigmoid_loss(*a, chunk=chunk)
    return total / rows

  found = jax.value_and_grad(mean, argnums=(0, 1, 2, 3))(*args)
  wanted = jax.value_and_grad(plain_loss, argnums=(0, 1, 2, 3))(*args)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, wanted)


@pytest.mark.parametrize('chunk', [None, 4])
def test_rows_of_one_image_are_no_negatives_of_each_other(chunk):
  args = (*pairs(7), jnp.float32(1.2), jnp.float32(-1.0))
  group = np.array([0, 0, 1, 1, 1, 2, 3])
  logits = np.exp(1.2) * np.asarray(args[0]) @ np.asarray(args[1]).T - 1
  z = 2 * np.eye(7) - 1
  keep = (group[:, None] != group) | (z > 0)
  wanted = (np.logaddexp(0, -z * logits) * keep).sum()
  total, rows = sigmoid_loss(*args, chunk=chunk, group=jnp.asarray(group))
  np.testing.assert_allclose(total, wanted, rtol=1e-5)
  assert rows == 7 and wanted < float(sigmoid_loss(*args)[0])


def test_no_array_of_the_whole_logit_matrix_exists():
  args = (*pairs(64), jnp.float32(1.2), jnp.float32(-3.0))
  text = str(jax.make_jaxpr(jax.grad(lambda *a: sigmoid_loss(*a, chunk=8)[0]))(*args))
  assert 'f32[64,8]' in text and 'f32[64,64]' not in text


def test_selection_loss_counts_local_rows_only():
  rng = np.random.default_rng(0)
  probs = [jnp.asarray(rng.uniform(0.1, 0.9, (3, n, n)), jnp.float32) for n in (4, 8)]
  targets = [jnp.asarray(rng.uniform(-1, 1, p.shape).clip(0), jnp.float32) for p in probs]
  total, rows = selection_loss(probs, targets, jnp.array([True, False, True]))
  wanted = 0
  for p, t in zip(probs, targets, strict=True):
    hit = np.asarray(t) > 0
    wanted += -np.where(hit, np.log(p), np.log(1 - np.asarray(p)))[[0, 2]].mean((1, 2)).sum() / 2
  np.testing.assert_allclose(total, wanted, rtol=1e-5)
  assert rows == 2
  total, rows = selection_loss(probs, targets, jnp.zeros(3, bool))
  assert total == 0 and rows == 0


@pytest.mark.full('systems')
def test_a_training_step_reaches_every_parameter_and_recomputation_changes_nothing():
  config = tiny_encoder(max_select=40)
  fn = model.build(config)
  params = fn.init(jax.random.key(0))
  rng = np.random.default_rng(0)
  target = np.zeros((4, 160, 160), np.uint8)
  target[:, 30:80, 40:100] = 1
  batch = {'pixels': rng.integers(0, 256, (4, 160, 160, 3), np.uint8),
           'tokens': rng.integers(0, 256, (4, 32), np.int32), 'target': target,
           'is_global': np.array([[False], [True], [False], [False]])}
  losses = ContrastiveConfig(chunk=3)
  run = lambda remat: jax.jit(jax.value_and_grad(
    lambda p, b: pretrain_losses(
      fn, p, b, losses, ex=Execution(remat=remat))['total']))(params, batch)
  value, grads = run('none')
  again, same = run('layers')
  np.testing.assert_allclose(value, again, rtol=1e-6)
  flat = paths.flatten(grads)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, same)
  assert [path for path, g in flat.items() if not np.any(np.asarray(g))] == []
  # The maps of the other scales exist in checkpoints and influence nothing.
  assert not np.any(np.asarray(grads['vision']['selection']['proj']['fc2']['kernel'])[:, 64:])
  assert clamp_logit_scale({'logit_scale': jnp.float32(9)})['logit_scale'] < 4.7
  assert clamp_logit_scale({'other': 9}) == {'other': 9}


SHARDED = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from hrvlm_jax.systems.ps3.losses import sigmoid_loss

ROWS, CHUNK = 2048, 256
mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)
image, text = (unit(jax.random.normal(jax.random.key(i), (ROWS, 16))) for i in range(2))
counted = jax.random.bernoulli(jax.random.key(2), 0.9, (ROWS,))
scale, bias = jnp.float32(1.2), jnp.float32(-3.0)

def naive(image, text, scale, bias):
  logits = jnp.exp(scale) * image @ text.T + bias
  loss = jax.nn.softplus(-(2 * jnp.eye(ROWS) - 1) * logits)
  return (loss * counted * counted[:, None]).sum() / counted.sum()

def shard(*args):
  own = jax.lax.dynamic_slice_in_dim(counted, jax.lax.axis_index('data') * (ROWS // 8), ROWS // 8)
  total, rows = sigmoid_loss(*args, axis='data', chunk=CHUNK, counted=own)
  return jax.lax.psum(total, 'data') / jax.lax.psum(rows, 'data')

def chunked(*args):
  total, rows = sigmoid_loss(*args, chunk=CHUNK, counted=counted)
  return total / rows

mapped = jax.shard_map(shard, mesh=mesh, in_specs=(P('data'), P('data'), P(), P()), out_specs=P())
place = lambda x: jax.device_put(x, NamedSharding(mesh, P('data')))
grad = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3)))
wanted = grad(naive)(image, text, scale, bias)
matrix = ROWS * ROWS * 4
for f in (mapped, chunked):
  args = (place(image), place(text), scale, bias)
  program = grad(f).lower(*args).compile()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
               program(*args), wanted)
  # Temporaries of one device: a few slabs of its own rows by one chunk of columns.
  assert program.memory_analysis().temp_size_in_bytes < matrix / 8, program.memory_analysis()
  sizes = [int(a) * int(b) for a, b in re.findall(r'f32\\[(\\d+),(\\d+)\\]', program.as_text())]
  assert max(sizes) <= ROWS // 8 * CHUNK, max(sizes)
whole = grad(naive).lower(image, text, scale, bias).compile()
assert whole.memory_analysis().temp_size_in_bytes >= matrix  # what the test would see otherwise
print('equal')
"""


def test_a_batch_over_eight_devices_gives_the_same_loss_and_no_device_holds_the_logits():
  flags = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
  out = subprocess.run([sys.executable, '-c', SHARDED], env=flags, capture_output=True, text=True)
  assert out.stdout.strip() == 'equal', out.stderr


def test_the_objective_of_the_training_loop_is_the_sum_over_rows():
  calls = {}

  def losses(fn, params, batch, config, **options):
    calls.update(chunk=config.chunk, **options)
    return {'total': jnp.float32(0.5)}

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('hrvlm_jax.systems.ps3.losses.pretrain_losses', losses)
    total, rows = Pretrain(PretrainOptions()).loss(
      None, {}, {'tokens': np.zeros((6, 3))}, ex=Execution(remat='layers'), key=None, chunk=7)
  assert float(total) == 3 and int(rows) == 6
  assert calls == {'chunk': 7, 'ex': Execution(remat='layers')}
