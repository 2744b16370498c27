"""Layers against their definitions."""

import dataclasses
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from hrvlm_jax.core import layers
from hrvlm_jax.core.module import Functional


def make(build):
  fn = Functional(lambda rngs: build(rngs))
  return fn, fn.init(jax.random.key(0))


def random(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


SETS = (layers.LoRA(rank=2, alpha=4, name='first'), layers.LoRA(rank=3, alpha=6, name='second'))


def with_random_b(params):
  """LoRA's b starts at zero; random values make the test see it."""
  return {k: random(*v.shape, seed=crc32(k.encode()) % 97) if k.startswith('lora') else v
          for k, v in params.items()}


def test_lora_adds_leaves_and_renames_none():
  plain, _ = make(lambda r: layers.Linear(4, 5, rngs=r))
  lora, _ = make(lambda r: layers.Linear(4, 5, lora=SETS, rngs=r))
  assert set(plain.abstract) < set(lora.abstract)
  assert set(lora.abstract) - set(plain.abstract) == {
    'lora_a_first', 'lora_b_first', 'lora_a_second', 'lora_b_second'}


def test_adapter_segments_equal_separate_calls():
  fn, params = make(lambda r: layers.Linear(4, 5, lora=SETS, rngs=r))
  params = with_random_b(params)
  x = random(2, 4, 3, 4)
  with jax.enable_x64(True):  # sums that cancel leave nothing of float32's digits
    exact, y = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, x))
    mixed = fn.apply(exact, y, adapter=(('first', 1), ('second', 3)))
    for name, cut in (('first', slice(1)), ('second', slice(1, None))):
      np.testing.assert_allclose(mixed[:, cut], fn.apply(exact, y[:, cut], adapter=name), rtol=1e-5)
    off = fn.apply(exact, y, adapter=(('none', 1), ('second', 3)))
    np.testing.assert_allclose(off[:, :1], fn.apply(exact, y[:, :1]), rtol=1e-5)
  expected = x @ params['kernel'] + params['bias'] + 2.0 * (
    x @ params['lora_a_second'] @ params['lora_b_second'])
  np.testing.assert_allclose(fn.apply(params, x, adapter='second'), expected, rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match='do not cover axis 1'):
    fn.apply(params, x, adapter=(('first', 1), ('second', 2)))


def test_segments_have_gradients_and_dropout_of_their_own_set():
  sets = tuple(dataclasses.replace(one, dropout=rate)
               for one, rate in zip(SETS, (0.0, 0.5), strict=True))
  fn, params = make(lambda r: layers.Linear(4, 5, lora=sets, rngs=r))
  params, x = with_random_b(params), random(2, 4, 3, 4)
  weight = random(2, 4, 3, 5, seed=1)
  mixed = lambda p: (fn.apply(p, x, adapter=(('first', 1), ('second', 3))) * weight).sum()
  apart = lambda p: sum((fn.apply(p, x[:, cut], adapter=name) * weight[:, cut]).sum()
                        for name, cut in (('first', slice(1)), ('second', slice(1, None))))
  found, expected = jax.grad(mixed)(params), jax.grad(apart)(params)
  for name, grad in expected.items():
    np.testing.assert_allclose(found[name], grad, rtol=1e-4, atol=1e-5, err_msg=name)
  call = lambda key: fn.apply(params, x, adapter=(('first', 1), ('second', 3)), key=key)
  plain, dropped = call(None), call(jax.random.key(3))
  np.testing.assert_allclose(dropped[:, :1], plain[:, :1], rtol=1e-5, atol=1e-6)
  assert not np.allclose(dropped[:, 1:], plain[:, 1:])


FORMULAS = {
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x), 'silu': jax.nn.silu}


@pytest.mark.parametrize('name', FORMULAS)
def test_slopes_are_those_of_the_formulas(name):
  x = jnp.linspace(-12, 12, 201)
  value, slope = jax.vmap(jax.value_and_grad(layers.activation(name)))(x)
  expected, derived = jax.vmap(jax.value_and_grad(FORMULAS[name]))(x)
  np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(slope, derived, rtol=2e-5, atol=5e-6)
  rough = jax.vmap(jax.grad(layers.activation(name)))(x.astype(jnp.bfloat16))
  assert rough.dtype == jnp.bfloat16
  np.testing.assert_allclose(rough.astype(jnp.float32), derived, atol=0.02)


@pytest.mark.parametrize('kind', ['layer', 'layer without bias', 'rms'])
def test_gradients_of_norms_are_those_of_the_formulas(kind):
  build = {'layer': lambda r: layers.LayerNorm(6, eps=1e-3, rngs=r),
           'layer without bias': lambda r: layers.LayerNorm(6, eps=1e-3, bias=False, rngs=r),
           'rms': lambda r: layers.RMSNorm(6, eps=1e-3, rngs=r)}[kind]
  fn, params = make(build)
  params = {name: random(6, seed=crc32(name.encode()) % 97) for name in params}
  x, weight = 3 + random(2, 5, 6), random(2, 5, 6, seed=1)

  def formula(params, x):
    centred = x if kind == 'rms' else x - x.mean(-1, keepdims=True)
    y = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-3)
    return y * params['scale'] + params.get('bias', 0)

  grads = lambda call: jax.grad(lambda p, x: (call(p, x) * weight).sum(), (0, 1))(params, x)
  found, expected = grads(fn.apply), grads(formula)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
               found, expected)


def test_unnamed_lora_is_always_on_and_dropout_needs_a_key():
  fn, params = make(lambda r: layers.Linear(
    4, 5, lora=(layers.LoRA(rank=2, alpha=2, dropout=0.5),), rngs=r))
  params = with_random_b(params)
  x = random(8, 4)
  base = x @ params['kernel'] + params['bias']
  np.testing.assert_allclose(fn.apply(params, x) - base,
                             x @ params['lora_a'] @ params['lora_b'], rtol=1e-4, atol=1e-5)
  dropped = fn.apply(params, x, key=jax.random.key(3))
  assert not np.allclose(dropped, fn.apply(params, x))


def test_patch_embed_is_a_convolution_that_skips_the_remainder():
  fn, params = make(lambda r: layers.PatchEmbed(3, 2, 5, bias=True, lora=SETS, rngs=r))
  params = with_random_b(params) | {'bias': random(5, seed=9)}
  images = random(2, 7, 10, 2)
  conv = lambda kernel: torch.nn.functional.conv2d(
    torch.tensor(np.array(images)).permute(0, 3, 1, 2),
    torch.tensor(np.array(kernel)).permute(3, 2, 0, 1), stride=3)
  expected = conv(params['kernel']).flatten(2).transpose(1, 2).numpy() + params['bias']
  np.testing.assert_allclose(fn.apply(params, images), expected, rtol=1e-4, atol=1e-5)
  low = conv(params['lora_a_first']).flatten(2).transpose(1, 2).numpy()
  adapted = expected + 2.0 * low @ params['lora_b_first']
  np.testing.assert_allclose(fn.apply(params, images, adapter='first'), adapted, rtol=1e-4,
                             atol=1e-4)
  views = jnp.stack([images, images], axis=1)
  mixed = fn.apply(params, views, adapter=(('first', 1), ('second', 1)))
  np.testing.assert_allclose(mixed[:, 0], adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_norms_have_float32_statistics(dtype):
  x = (100 + random(4, 64)).astype(dtype)
  fn, params = make(lambda r: layers.LayerNorm(64, eps=1e-5, rngs=r))
  got = fn.apply(params, x)
  expected = torch.nn.functional.layer_norm(
    torch.tensor(np.asarray(x, np.float32)), (64,), eps=1e-5).numpy()
  assert got.dtype == dtype
  np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=1e-2, atol=2e-3)
  fn, params = make(lambda r: layers.RMSNorm(64, eps=1e-6, rngs=r))
  x32 = np.asarray(x, np.float32)
  expected = x32 / np.sqrt((x32**2).mean(-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(np.asarray(fn.apply(params, x), np.float32), expected, rtol=1e-2)


def test_float64_is_never_cast_down():
  with jax.enable_x64(True):
    fn = Functional(lambda r: layers.LayerNorm(8, eps=1e-6, param_dtype=jnp.float64, rngs=r))
    params = jax.tree.map(lambda s: jnp.ones(s.shape, jnp.float64), fn.abstract)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)) + 1e6)
    y = fn.apply(params, x)
    ref = np.asarray(x - x.mean(-1, keepdims=True))
    ref = ref / np.sqrt((ref**2).mean(-1, keepdims=True) + 1e-6)
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y - 1, ref, rtol=1e-9)


@pytest.mark.parametrize('name, reference', [
  ('gelu', torch.nn.functional.gelu),
  ('gelu_new', lambda x: torch.nn.functional.gelu(x, approximate='tanh')),
  ('quick_gelu', lambda x: x * torch.sigmoid(1.702 * x)),
  ('silu', torch.nn.functional.silu)])
def test_activations(name, reference):
  x = np.linspace(-6, 6, 101, dtype=np.float32)
  np.testing.assert_allclose(layers.activation(name)(x), reference(torch.tensor(x)).numpy(),
                             atol=2e-6)


def test_unknown_activation():
  with pytest.raises(ValueError, match="unknown activation 'gelo'"):
    layers.activation('gelo')


def test_dropout_is_fair_and_independent():
  """The four elements that share a draw are as good as four draws."""
  shape, rate = (40, 201, 64), 0.05  # 201: the last draws are not used up
  kept = np.asarray(layers.dropout(jnp.ones(shape), rate, jax.random.key(0)))
  share = 243 / 256  # the nearest to 0.95
  assert set(np.unique(kept)) == {0.0, np.float32(1 / share)}
  dropped = kept == 0
  deviation = lambda n: 4 * np.sqrt(share * (1 - share) / n)
  assert abs(dropped.mean() - (1 - share)) < deviation(dropped.size)
  assert abs(kept.mean() - 1) < deviation(kept.size) / share
  # Every row, place and feature has the rate; what shares a draw (51 places apart) is dropped
  # together as often as chance would have it, and so are neighbours.
  for axes in ((1, 2), (0, 2), (0, 1)):
    each = dropped.mean(axis=axes)
    assert abs(each - (1 - share)).max() < 1.3 * deviation(dropped.size // each.size)
  for places in (1, 51, 102, 153):
    both = (dropped[:, places:] & dropped[:, :-places]).mean()
    assert abs(both - (1 - share) ** 2) < deviation(dropped[:, places:].size)
  again = layers.dropout(jnp.ones(shape), rate, jax.random.key(0))
  np.testing.assert_array_equal(kept, again)


def test_rates_of_dropout_are_rounded_and_never_to_all_or_nothing():
  x = jnp.ones((64, 1024))
  for rate, kept in ((0.1, 230), (0.5, 128), (1e-4, 255), (0.9999, 1), (0.05, 243)):
    found = np.unique(layers.dropout(x, rate, jax.random.key(1)))
    np.testing.assert_allclose(found, [0, 256 / kept], rtol=1e-6)
  # A rate for each place: where it is 0, nothing is dropped.
  rates = np.repeat([0.0, 0.5], 32)[:, None]
  found = np.asarray(layers.dropout(x, rates, jax.random.key(1)))
  assert (found[:32] == 1).all() and set(np.unique(found[32:])) == {0, 2}
  one = layers.dropout(jnp.ones(4096), 0.25, jax.random.key(1))
  assert abs(one.mean() - 1) < 0.05 and jnp.ones((), jnp.bfloat16).dtype == layers.dropout(
    jnp.ones(8, jnp.bfloat16), rates[:8, 0] + 0.1, jax.random.key(0)).dtype
