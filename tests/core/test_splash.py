"""The TPU's kernel, interpreted: what the plain formula gives, on one device and on eight.

A few shapes that stand for the kinds there are: causal and full, padding on either side, packed
rows, grouped heads, head widths that are padded, other lengths of queries than of keys.
"""

import collections
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
from jax.interpreters.partial_eval import dce_jaxpr
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.core import attention as lib, splash
from hrvlm_jax.core.execution import AXES, HERE, Execution
from hrvlm_jax.core.module import Functional, Module, scan_layers, stacked
from hrvlm_jax.vision import vit

REPO = pathlib.Path(__file__).parents[2]


def arrays(b, t, s, h, k, d):
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = ((b, t, h, d), (b, s, k, d), (b, s, k, d), (b, t, h, d))
  return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def told(kind, b, t, s):
  """(what attention is told, bool [b t] queries whose results count)."""
  every = np.ones((b, t), bool)
  short = np.arange(s) < np.array([s - 37, s - 5, s, 60])[:b, None]
  number = np.cumsum(np.arange(s) % 61 == 60)[None].repeat(b, 0)
  return {
    'full': ({}, every),
    'keys': ({'valid': short}, every),
    'no keys': ({'valid': short & (np.arange(b) > 0)[:, None]}, every),
    'causal': ({'causal': True}, every),
    'right': ({'valid': short, 'causal': True}, short[:, :t]),
    'left': ({'valid': short[:, ::-1], 'causal': True}, short[:, ::-1][:, :t]),
    'packed': ({'valid': short, 'segments': number, 'causal': True}, short[:, :t]),
    'behind': ({'valid': short | (np.arange(s) >= s - t), 'causal': True, 'slot': s - t}, every),
  }[kind]


def both(q, k, v, weight, options, counts, ex):
  """Counted results and gradients, of the plain form and of `ex`."""
  options = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x
             for name, x in options.items()}
  weight = weight * counts[:, :, None, None]

  def run(ex):
    def total(q, k, v):
      y = lib.attention(q, k, v, **options, ex=ex)
      return (y * weight).sum(), y * counts[:, :, None, None]
    return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)

  return run(HERE.replace(attention='xla')), run(ex)


def assert_close(found):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), *found)


@pytest.mark.parametrize('kind, shape', [
  ('full', (1, 145, 145, 2, 2, 72)),
  ('keys', (2, 130, 300, 4, 2, 128)),
  ('no keys', (2, 9, 40, 2, 2, 64)),
  ('causal', (1, 256, 256, 2, 2, 64)),
  ('right', (2, 200, 200, 2, 1, 80)),
  ('left', (2, 200, 200, 4, 2, 16)),
  ('packed', (2, 200, 200, 2, 2, 64)),
  ('behind', (2, 70, 200, 2, 1, 64)),
])  # fmt: skip
def test_interpreted_kernel_and_its_gradients(kind, shape):
  b, t, s = shape[:3]
  found = both(*arrays(*shape), *told(kind, b, t, s), Execution(attention='interpret'))
  assert_close(found)


PROGRAM = """
import json, sys
import jax
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.parallel.mesh import make_mesh
from tests.core.test_splash import arrays, assert_close, both, told
MESHES = {'mixed': dict(data=1, fsdp=2, sequence=2, tensor=2), 'heads': dict(data=2, tensor=4)}
for mesh, kind, shape in json.loads(sys.argv[1]):
  ex = Execution(mesh=make_mesh(MESHES[mesh]), attention='interpret')
  assert_close(both(*arrays(*shape), *told(kind, *shape[:3]), ex))
  print(mesh, kind)
"""


def test_meshes_of_eight_devices():
  cases = [
    ('mixed', 'packed', (4, 200, 200, 4, 2, 16)),  # each device has its part of the triangle
    ('mixed', 'behind', (2, 130, 260, 2, 2, 16)),
    ('mixed', 'keys', (2, 30, 200, 2, 2, 16)),  # fewer queries than a block, over two devices
    ('mixed', 'full', (3, 145, 145, 3, 3, 72)),  # rows and heads that do not divide
    ('heads', 'right', (2, 130, 130, 8, 2, 16)),  # fewer key heads than devices
  ]
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '8', 'PYTHONPATH': str(REPO)}
  env.pop('XLA_FLAGS', None)
  done = subprocess.run([sys.executable, '-c', PROGRAM, json.dumps(cases)], env=env, cwd=REPO,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  assert len(done.stdout.splitlines()) == len(cases)


def test_blocks_follow_the_measured_cycles():
  assert splash.blocks(729, 729) == (768, 768, 768, 768)
  assert splash.blocks(8192, 8192, causal=True) == (8192, 8192, 1024, 1024)
  # Half a block of padding costs less than blocks of 128.
  assert splash.blocks(1100, 1100).q > 256
  # Of several parts each holds whole blocks; jax wants the length divisible by their square.
  for parts in (2, 3, 8):
    plan = splash.blocks(1000, 1000, True, parts)
    assert plan.t % (plan.q * parts) == 0 and plan.t % parts**2 == 0 and plan.t >= 1000
  assert np.isclose(splash.step_cycles(512, 512), 1.1 * (2029 + 2946))
  assert splash.step_cycles(128, 128) * 64 > 5.5 * splash.step_cycles(1024, 1024)


def devices(sizes, **options):
  mesh = jax.sharding.AbstractMesh(sizes, AXES)
  return Execution(mesh=mesh, platform='tpu', dtype='bfloat16', **options)


def test_a_pod_holds_no_scores():
  """The default of a TPU, traced for a mesh: a kernel, and no array of queries times keys."""
  tower = Functional(lambda rngs: vit.ViT(vit.ViTConfig(
    image_size=208, patch_size=16, width=128, depth=2, heads=2, mlp_width=128), rngs=rngs))
  images = jax.ShapeDtypeStruct((8, 208, 208, 3), jnp.bfloat16)
  for sizes in ((2, 2, 1, 1), (1, 2, 1, 2), (1, 2, 2, 1)):
    run = functools.partial(tower.apply, ex=devices(sizes))
    text = str(jax.make_jaxpr(run)(tower.abstract, images))
    assert 'splash' in text and 'shard_map' in text
    assert '169,169]' not in text and 'bool[8,1' not in text


@pytest.mark.parametrize('kind, shape', [
  ('full', (1, 729, 729, 2, 2, 72)), ('packed', (2, 1100, 1100, 4, 2, 128)),
  ('behind', (1, 300, 1500, 2, 1, 80))])
def test_blocks_that_are_chosen_are_lowered_for_a_tpu(kind, shape):
  b, t, s, h, k, d = shape
  options, _ = told(kind, b, t, s)
  ex = Execution(platform='tpu')
  loss = lambda q, k, v: lib.attention(q, k, v, **{
    name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()},
    ex=ex).astype(jnp.float32).sum()
  shapes = ((b, t, h, d), (b, s, k, d), (b, s, k, d))
  inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
  module = jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=['tpu'])(*inputs)
  assert module.mlir_module().count('@tpu_custom_call') == 2  # forward, and one for all gradients


class Towers(Module):
  def __init__(self, *, rngs):
    make = lambda r: vit.Attention(32, 2, rngs=r)
    self.blocks = stacked(make, 2, rngs=rngs)

  def __call__(self, x, *, ex):
    return scan_layers(self.blocks, x, lambda layer, x, _: (layer(x, ex=ex)[0], None), ex=ex)[0]


def kernels(jaxpr):
  """Numbers of kernels forward and backward, in all that an equation calls."""
  found = collections.Counter()
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'pallas_call':
      found['fwd' if 'fwd' in str(equation.params) else 'dkv'] += 1
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      found += kernels(inner) if hasattr(inner, 'eqns') else collections.Counter()
  return found


def test_policies_that_keep_the_attention_run_its_kernel_once():
  fn = Functional(lambda rngs: Towers(rngs=rngs))
  for remat, times in (('none', 1), ('attention', 1), ('dots', 1), ('layers', 2)):
    ex = Execution(attention='interpret', remat=remat)
    loss = lambda p, ex=ex: fn.apply(p, jnp.ones((1, 140, 32)), ex=ex).sum()
    jaxpr = jax.make_jaxpr(jax.grad(loss))(fn.abstract).jaxpr
    # What is recomputed in vain is part of the trace, not of the program.
    program, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    assert kernels(program) == {'fwd': times, 'dkv': 1}, remat
