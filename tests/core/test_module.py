"""The facade: pure init and apply, stacked and unrolled layers, refusal of hidden state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import Linear
from hrvlm_jax.core.module import (
  Functional,
  List,
  Module,
  layer_at,
  restack,
  scan_layers,
  stacked,
  unstack,
)


class Tower(Module):
  def __init__(self, depth, *, apart=False, rngs):
    self.blocks = stacked(lambda r: Linear(4, 4, rngs=r), depth, unrolled=apart, rngs=rngs)

  def __call__(self, x, start=0, stop=None, ex=HERE):
    return scan_layers(self.blocks, x, lambda layer, x, _: (x + jnp.tanh(layer(x)), x.sum()),
                       start=start, stop=stop, ex=ex)

  def first(self, x):
    return layer_at(self.blocks, 0)(x)


@pytest.fixture
def tower():
  fn = Functional(lambda rngs: Tower(3, rngs=rngs))
  return fn, fn.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 4))


def test_abstract_is_what_init_gives(tower):
  fn, params, _ = tower
  assert jax.tree.map(lambda x: (x.shape, x.dtype), fn.abstract) == jax.tree.map(
    lambda x: (x.shape, x.dtype), params)
  assert params['blocks']['kernel'].shape == (3, 4, 4)
  assert not np.allclose(params['blocks']['kernel'][0], params['blocks']['kernel'][1])


def test_init_is_a_function_of_the_key(tower):
  fn, params, _ = tower
  again = jax.jit(fn.init)(jax.random.key(0))
  # Fused and separate arithmetic may differ in the last bit.
  np.testing.assert_allclose(params['blocks']['kernel'], again['blocks']['kernel'], rtol=1e-6)


def test_unrolled_layers_compute_the_same(tower):
  fn, params, x = tower
  apart = Functional(lambda rngs: Tower(3, apart=True, rngs=rngs))
  held = {'blocks': unstack(params['blocks'])}
  assert jax.tree.structure(held) == jax.tree.structure(apart.abstract)
  (y, sums), (z, list_sums) = fn.apply(params, x), apart.apply(held, x)
  np.testing.assert_allclose(y, z, rtol=1e-6)
  np.testing.assert_allclose(sums, np.array(list_sums), rtol=1e-6)
  np.testing.assert_array_equal(restack(held['blocks'])['kernel'], params['blocks']['kernel'])


def test_segments_add_up_to_the_whole(tower):
  fn, params, x = tower
  whole, _ = fn.apply(params, x)
  half, _ = fn.apply(params, x, stop=2)
  rest, sums = fn.apply(params, half, start=2)
  np.testing.assert_allclose(rest, whole, rtol=1e-6)
  assert sums.shape == (1,)


def test_remat_changes_no_gradient(tower):
  fn, params, x = tower
  loss = lambda p, remat: fn.apply(p, x, ex=Execution(remat=remat))[0].sum()
  plain, *others = (jax.grad(loss)(params, r)['blocks']['kernel']
                    for r in ('none', 'layers', 'dots'))
  for again in others:
    np.testing.assert_allclose(plain, again, rtol=1e-6)


@pytest.mark.parametrize('form', ['loop', 'unrolled'])
@pytest.mark.parametrize('start, stop', [(0, None), (1, 3)])
def test_form_of_the_layers_changes_no_gradient(tower, form, start, stop):
  fn, params, x = tower
  loss = lambda p, ex: fn.apply(p, x, start=start, stop=stop, ex=ex)[0].sum()
  run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  value, expected = run(params, HERE)
  found, again = run(params, Execution(gradients=True, layers=form))
  np.testing.assert_allclose(found, value, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), again, expected)


def test_form_of_the_layers_is_in_the_program(tower):
  """In line: no loop. Part of a stack without gradients: none of it is copied."""
  fn, params, x = tower
  trace = lambda ex: str(jax.make_jaxpr(lambda p: fn.apply(p, x, start=1, ex=ex)[0])(params))
  assert 'slice[' not in trace(HERE).replace('dynamic_slice[', '')
  assert 'slice[' in trace(Execution(gradients=True)).replace('dynamic_slice[', '')
  lowered = lambda ex: jax.jit(lambda p: fn.apply(p, x, ex=ex)[0]).lower(params).as_text()
  assert 'stablehlo.while' not in lowered(Execution(gradients=True, layers='unrolled'))
  assert 'stablehlo.while' in lowered(HERE)


def test_methods_can_be_named(tower):
  fn, params, x = tower
  expected = x @ params['blocks']['kernel'][0] + params['blocks']['bias'][0]
  np.testing.assert_allclose(fn.apply(params, x, method='first'), expected, rtol=1e-6)


def test_hidden_state_is_refused():
  from flax import nnx

  class Counter(Module):
    def __init__(self, rngs):
      self.count = nnx.BatchStat(jnp.zeros(()))

  with pytest.raises(TypeError, match='parameters only.*count'):
    Functional(Counter)


def test_lists_have_string_keys_in_parameters():
  class Pair(Module):
    def __init__(self, rngs):
      self.parts = List([Linear(2, 2, rngs=rngs), Linear(2, 2, rngs=rngs)])

    def __call__(self, x):
      return self.parts[1](self.parts[0](x))

  fn = Functional(lambda rngs: Pair(rngs))
  params = fn.init(jax.random.key(0))
  assert set(params['parts']) == {'0', '1'}
  assert fn.apply(params, jnp.ones((1, 2))).shape == (1, 2)
