"""What a program is traced for is an argument, and so a part of its key in every cache."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.core import attention as attentions, cpu
from hrvlm_jax.core.execution import AXES, HERE, Execution
from hrvlm_jax.core.layers import Linear, Mlp
from hrvlm_jax.core.module import Functional, Module, scan_layers, stacked
from hrvlm_jax.core.resample import bicubic

REPO = pathlib.Path(__file__).parents[2]


def devices(count, platform='tpu', **options):
  """An execution on so many devices that need not be there."""
  mesh = jax.sharding.AbstractMesh((count, 1, 1, 1), AXES)
  return Execution(mesh=mesh, platform=platform, **options)


class Tower(Module):
  def __init__(self, *, rngs):
    self.blocks = stacked(lambda r: Linear(8, 8, rngs=r), 3, rngs=rngs)

  def __call__(self, x, *, ex=HERE):
    body = lambda layer, x, _: (jnp.tanh(layer(x, ex=ex)), None)
    return scan_layers(self.blocks, x.astype(ex.dtype), body, ex=ex)[0]


def tower(x, ex):
  fn = Functional(lambda rngs: Tower(rngs=rngs))
  params = fn.init(jax.random.key(0))
  return jax.grad(lambda x: fn.apply(params, x, ex=ex).astype(jnp.float32).sum())(x)


def read(x, ex):
  heads = x.reshape(1, x.shape[0], 2, -1)
  return attentions.attention(heads, heads, heads, ex=ex)


def shrink(x, ex):
  return bicubic(x[..., None], 3, 3, ex=ex)


@pytest.mark.parametrize('fn, other', [
  (tower, Execution(remat='layers')),
  (tower, Execution(remat='attention')),
  (tower, Execution(gradients=True, layers='unrolled')),
  (tower, Execution(dtype='bfloat16')),
  (read, Execution(attention='heads')),
  (read, Execution(attention='queries')),
  (shrink, Execution(platform='tpu')),
  (shrink, devices(8)),
])  # fmt: skip
def test_one_function_under_two_executions_is_two_programs(fn, other):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
  here = HERE.replace(platform='cpu')
  run = jax.jit(lambda x, ex: fn(x, ex), static_argnums=1)
  for _ in range(2):  # the second round compiles nothing
    one, two = run(x, here), run(x, other)
    assert run._cache_size() == 2
  programs = [str(jax.make_jaxpr(fn, static_argnums=1)(x, ex)) for ex in (here, other)]
  assert programs[0] != programs[1]
  np.testing.assert_allclose(one, np.asarray(two, np.float32), atol=0.05)


def test_equal_executions_share_a_program():
  run = jax.jit(lambda x, ex: tower(x, ex), static_argnums=1)
  x = jnp.ones((2, 8))
  run(x, Execution(remat='dots')), run(x, Execution(remat='dots', dtype=jnp.float32))
  assert run._cache_size() == 1


def test_the_machine_here_unless_told():
  assert (HERE.on, HERE.devices) == (jax.default_backend(), 1)
  assert (devices(64).on, devices(64).devices) == ('tpu', 64)
  assert HERE.one_cpu == (jax.default_backend() == 'cpu')
  assert not devices(8, 'cpu').one_cpu and not Execution(platform='gpu').one_cpu


@pytest.mark.parametrize('circumstances, sides', [
  (dict(platform='cpu'), 1), (dict(platform='tpu'), 2),
  (dict(platform='cpu', remat='layers'), 2),  # a layer's own policy comes before it
  (dict(platform='cpu', gradients=False), 2),
])  # fmt: skip
def test_a_cpu_keeps_one_side_of_an_activation(circumstances, sides):
  ex = HERE.replace(**dict(gradients=True) | circumstances)
  rows, width, hidden = 5, 8, 24
  fn = Functional(lambda rngs: Mlp(width, hidden, activation='gelu', rngs=rngs))
  params = fn.init(jax.random.key(0))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, width)), jnp.float32)
  out, backward = jax.vjp(lambda params, x: fn.apply(params, x, ex=ex), params, x)
  kept = [leaf.shape for leaf in jax.tree.leaves(backward)]
  assert kept.count((rows, hidden)) == sides
  plain = lambda params, x: fn.apply(params, x, ex=HERE.replace(platform='gpu'))
  for mine, expected in zip(jax.tree.leaves(backward(out)),
                            jax.tree.leaves(jax.vjp(plain, params, x)[1](out)), strict=True):
    np.testing.assert_allclose(mine, expected, rtol=1e-6, atol=1e-6)


def test_a_mesh_of_one_device_is_like_none():
  x = jnp.ones((2, 3, 8))
  one = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES)
  for place in ('hidden', 'logits', 'small'):
    assert Execution(mesh=one).constrain(place, x) is x and HERE.constrain(place, x) is x
  assert Execution(mesh=one).one_cpu == HERE.one_cpu


def test_what_cannot_be_is_refused():
  for options, message in (
    (dict(layers='spiral'), "'loop' or 'unrolled', got 'spiral'"),
    (dict(remat='all'), "'attention', 'dots', 'layers', 'none'], got 'all'"),
    (dict(platform='abacus'), "'cpu', 'gpu' or 'tpu', got 'abacus'"),
  ):
    with pytest.raises(ValueError, match=message):
      Execution(**options)
  with pytest.raises(ValueError, match="unknown place 'attic'"):
    HERE.constrain('attic', jnp.ones(3))


def primitives(t, ex):
  shape = jax.ShapeDtypeStruct((1, t, 2, 64), jnp.float32)
  run = lambda q, k, v: attentions.attention(q, k, v, ex=ex)
  return {e.primitive.name for e in jax.make_jaxpr(run)(shape, shape, shape).jaxpr.eqns}


def test_attention_for_a_slice_is_one_product(monkeypatch):
  monkeypatch.setattr(cpu, 'HEADS_FROM', 0)
  assert 'scan' in primitives(128, devices(1, 'cpu'))  # one head after the other
  for ex in (devices(8, 'cpu'), devices(64, attention='xla'), devices(1, attention='xla')):
    assert 'scan' not in primitives(128, ex)


def test_attention_is_the_platforms_own():
  q, few = jnp.zeros((1, 130, 2, 64), jnp.bfloat16), jnp.zeros((1, 1, 2, 64), jnp.bfloat16)
  choose = lambda q, ex, slot=0: attentions._choose('auto', q, jnp.zeros((1, 130, 2, 64)), True,
                                                    slot, ex)
  for count in (1, 64):
    for platform, form in (('tpu', 'splash'), ('gpu', 'cudnn'), ('cpu', 'xla')):
      assert choose(q, devices(count, platform)) == form
      assert choose(few, devices(count, platform)) == 'xla'
  # A place that only the running program knows; a gradient whose sums must have an order.
  assert choose(q, devices(64), jnp.int32(3)) == 'xla'
  assert choose(q, devices(64, 'gpu', deterministic=True)) == 'xla'
  assert choose(q.astype(jnp.float32), devices(64, 'gpu')) == 'xla'


PROGRAM = textwrap.dedent("""
  import json
  import jax, jax.numpy as jnp, numpy as np
  from hrvlm_jax.core.execution import HERE, Execution
  from hrvlm_jax.parallel.mesh import make_mesh

  meshes = {'data': {'data': 4}, 'sequence': {'data': 2, 'sequence': 2}, 'tensor': {'tensor': 2}}
  run = jax.jit(lambda x, ex, place: ex.constrain(place, 2 * x), static_argnums=(1, 2))
  x, found = np.ones((4, 6, 8), np.float32), {}
  run(x, HERE, 'hidden')
  for name, sizes in meshes.items():
    ex = Execution(mesh=make_mesh(sizes))
    for place in ('hidden', 'logits', 'small'):
      y = run(x, ex, place)
      assert (np.asarray(y) == 2).all()
      found[f'{name} {place}'] = list(y.addressable_shards[0].data.shape)
    odd = run(np.ones((3, 5, 7), np.float32), ex, 'logits')  # nothing divides: all stays whole
    found[f'{name} odd'] = list(odd.addressable_shards[0].data.shape)
  print(json.dumps({'shapes': found, 'programs': run._cache_size()}))
""")


def test_places_lie_over_a_mesh_and_each_mesh_is_a_program():
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '4', 'PYTHONPATH': str(REPO)}
  env.pop('XLA_FLAGS', None)
  done = subprocess.run([sys.executable, '-c', PROGRAM], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  whole, odd = [4, 6, 8], [3, 5, 7]
  assert found['shapes'] == {
    'data hidden': [1, 6, 8], 'data logits': [1, 6, 8], 'data small': whole, 'data odd': odd,
    'sequence hidden': [2, 3, 8], 'sequence logits': [2, 3, 8], 'sequence small': whole,
    'sequence odd': odd,
    'tensor hidden': [2, 6, 8], 'tensor logits': [2, 6, 4], 'tensor small': whole,
    'tensor odd': odd,
  }
  assert found['programs'] == 1 + 3 * 4


def test_the_package_has_no_context_variables():
  for path in (REPO / 'hrvlm_jax').rglob('*.py'):
    assert 'contextvars' not in path.read_text(), path
