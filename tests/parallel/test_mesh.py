"""Chips and topologies as data; meshes from configs, on one device and on eight."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel import mesh as meshes, topology

REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
  'text, chips, devices, name',
  [
    ('v5e:16x16', 256, 256, 'v5litepod-256'),
    ('v5p:4x4x4', 64, 64, 'v5p-128'),
    ('v6e:16x16', 256, 256, 'v6e-256'),
    ('v4:2x2x4', 16, 16, 'v4-32'),
    ('tpu7x:4x4x4', 64, 128, 'tpu7x-128'),
    ('gpu:8', 8, 8, None),
    ('cpu:8', 8, 8, None),
  ],
)
def test_topologies(text, chips, devices, name):
  found = topology.parse(text)
  assert (found.chips, found.devices, found.accelerator_type) == (chips, devices, name)
  assert topology.parse(text, slices=2).devices == 2 * devices


@pytest.mark.parametrize(
  'text, sentence',
  [
    ('v5e', "found 'v5e', expected CHIP:AxB"),
    ('v5e:16', 'v5e slices have 2 dimensions, found 1'),
    ('v5p:4x4', 'v5p slices have 3 dimensions'),
    ('v5x:4x4', 'unknown chip v5x'),
    ('v5e:32x32', 'found 1024 chips, a v5e slice has 1 to 256'),
    ('gpu:2x4', 'write gpu:8'),
  ],
)
def test_impossible_topologies(text, sentence):
  with pytest.raises(UserError, match=sentence):
    topology.parse(text)


def test_numbers_are_per_device_and_unknown_stays_unknown():
  assert topology.peak_flops('TPU v5 lite') == 197e12
  assert topology.peak_flops('TPU7x') == 2307e12 / 2
  assert topology.chip_of('TPU7x').hbm_bytes == 96 << 30
  assert topology.peak_flops('cpu') is None and topology.chip_of('TPU v99') is None
  kinds = [kind for chip in topology.chips().values() for kind in chip.device_kinds]
  assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize(
  'config, devices, expected',
  [
    ({}, 8, (8, 1, 1, 1)),
    ({'data': -1, 'tensor': 4}, 8, (2, 1, 1, 4)),
    ({'data': 1, 'fsdp': -1, 'sequence': 2}, 8, (1, 4, 2, 1)),
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, 8, (2, 2, 1, 2)),
    ({'dcn_data': 2, 'data': 1, 'fsdp': -1}, 8, (2, 4, 1, 1)),
    ({'dcn_data': 2}, 8, (8, 1, 1, 1)),
  ],
)
def test_resolve(config, devices, expected):
  resolved = meshes.mesh_config(config).resolve(devices)
  assert tuple(resolved.shape[axis] for axis in meshes.AXES) == expected


@pytest.mark.parametrize(
  'config, sentence',
  [
    ({'fdsp': 2}, r'unknown key mesh.fdsp \(nearest known: fsdp\)'),
    ({'data': 0}, 'data must be positive or -1, got 0'),
    ({'dcn_data': -1}, 'dcn_data must be positive, got -1'),
    ({'data': -1, 'fsdp': -1}, 'at most one'),
    ({'data': 3}, r'data=3 .* is 3, which is not the 8 device\(s\)'),
    ({'tensor': 3}, 'which does not divide the 8 device'),
  ],
)
def test_impossible_meshes(config, sentence):
  with pytest.raises(UserError, match=sentence):
    meshes.mesh_config(config).resolve(8)


def test_one_device():
  mesh = meshes.single_device_mesh()
  assert dict(mesh.shape) == dict.fromkeys(meshes.AXES, 1)
  assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
  meshes.check_batch({'a': np.zeros((3, 2))}, mesh)


PROGRAM = textwrap.dedent("""
  import json
  import jax, jax.numpy as jnp, numpy as np
  from hrvlm_jax.core import paths
  from hrvlm_jax.core.errors import UserError
  from hrvlm_jax.core.execution import Execution
  from hrvlm_jax.core.layers import Linear
  from hrvlm_jax.core.module import Functional, Module, scan_layers, stacked
  from hrvlm_jax.parallel import distributed, rules
  from hrvlm_jax.parallel.mesh import batch_sharding, check_batch, make_mesh
  import optax

  class Block(Module):
    def __init__(self, *, rngs):
      self.fc1, self.fc2 = Linear(16, 64, rngs=rngs), Linear(64, 16, rngs=rngs)
    def __call__(self, x):
      return x + self.fc2(jax.nn.gelu(self.fc1(x)))

  class Net(Module):
    def __init__(self, *, rngs):
      self.blocks = stacked(lambda r: Block(rngs=r), 3, rngs=rngs)
    def __call__(self, x, *, ex):
      return scan_layers(self.blocks, x, lambda layer, x, _: (layer(x), None), ex=ex)[0]

  net = Functional(lambda rngs: Net(rngs=rngs))
  x = np.random.default_rng(0).normal(size=(8, 4, 16)).astype(np.float32)
  tx = optax.adam(1e-2)

  def step(state, x, ex):
    loss = lambda p: (net.apply(p, x, ex=ex) ** 2).mean()
    value, grads = jax.value_and_grad(loss)(state['params'])
    updates, opt = tx.update(paths.flatten(grads), state['opt'])
    new = optax.apply_updates(paths.flatten(state['params']), updates)
    return {'params': paths.unflatten(new), 'opt': opt, 'step': state['step'] + 1}, value

  losses, problems = {}, []
  for name, config in {
    'one': None, 'fsdp': {'data': 1, 'fsdp': 8}, 'tensor': {'data': 1, 'tensor': 8},
    'sequence': {'data': 2, 'sequence': 4}, 'mixed': {'data': 2, 'fsdp': 2, 'tensor': 2},
    'slices': {'dcn_data': 2, 'data': 2, 'fsdp': 2}}.items():
    mesh = make_mesh(config) if config else make_mesh({'data': 1}, devices=jax.devices()[:1])
    params = net.init(jax.random.key(0))
    state = {'params': params, 'opt': tx.init(paths.flatten(params)),
             'step': jnp.zeros((), jnp.int32)}
    shardings = rules.state_shardings(jax.eval_shape(lambda: state), mesh, small=0)
    moment = shardings['opt'][0].mu['blocks/fc1/kernel'].spec
    assert moment == shardings['params']['blocks']['fc1']['kernel'].spec
    if name == 'fsdp':
      assert moment == jax.sharding.PartitionSpec(None, 'fsdp'), moment
    if name == 'mixed':
      assert moment == jax.sharding.PartitionSpec(None, 'fsdp', 'tensor'), moment
    state = jax.device_put(state, shardings)
    run = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), static_argnums=2)
    batch = distributed.global_batch(x, mesh)
    losses[name] = []
    for _ in range(3):
      state, value = run(state, batch, Execution(mesh=mesh, remat='layers', gradients=True))
      losses[name].append(float(value))
  mesh = make_mesh({'data': 4, 'fsdp': 2})
  try:
    views = {'pixels': np.zeros((12, 3)), 'n': np.zeros(())}
    check_batch({'tokens': np.zeros((8, 2)), 'views': views}, mesh)
  except UserError as error:
    problems.append(str(error))
  try:
    make_mesh({'data': 3})
  except UserError as error:
    problems.append(str(error))
  print(json.dumps({'losses': losses, 'problems': problems}))
""")


@pytest.fixture(scope='module')
def eight():
  """What a program on eight fake CPU devices found (a process of its own: the count is global)."""
  environment = dict(os.environ, JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES='8', PYTHONPATH=str(REPO))
  environment.pop('XLA_FLAGS', None)
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM], env=environment, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_every_mesh_gives_the_same_losses(eight):
  losses = eight['losses']
  for name, values in losses.items():
    np.testing.assert_allclose(values, losses['one'], rtol=1e-5, err_msg=name)
  assert losses['one'][-1] < losses['one'][0]


def test_a_batch_that_cannot_be_cut(eight):
  batch, mesh = eight['problems']
  assert (
    'over 8 shards' in batch
    and "['views']['pixels']: found 12 rows, expected a multiple of 8" in batch
  )
  assert "['views']['n']: found no example axis" in batch and 'tokens' not in batch
  assert 'data=3' in mesh
