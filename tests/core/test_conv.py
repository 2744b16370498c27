"""Convolutions: both forms of the depthwise one agree, gradients included; PyTorch as reference."""

import pathlib
import runpy
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from hrvlm_jax.core.conv import DepthwiseConv, PatchConv, average_pool, depthwise
from hrvlm_jax.core.module import Functional


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tensor(x):
  return torch.from_numpy(np.array(x))


def depthwise_with_gradients(x, kernel, impl):
  def loss(x, kernel, weight):  # constant weights would be folded 49 times by XLA
    y = depthwise(x, kernel, impl=impl)
    return (y * weight).mean(), y

  grad = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
  (dx, dkernel), y = grad(x, kernel, draw(*x.shape, seed=3))
  return y, dx, dkernel


@pytest.mark.parametrize('size,shape', [(7, (2, 9, 12, 5)), (7, (1, 3, 2, 4)), (3, (1, 5, 5, 2))])
def test_forms_agree(size, shape):
  x, kernel = draw(*shape), draw(size, size, 1, shape[-1], seed=1) / size
  reference = depthwise_with_gradients(x, kernel, 'grouped')
  for impl in ('shifted', 'reduced', 'auto'):
    for ours, theirs in zip(depthwise_with_gradients(x, kernel, impl), reference, strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_depthwise_is_torch_depthwise():
  x, fn = draw(2, 8, 7, 6), Functional(lambda rngs: DepthwiseConv(7, 6, rngs=rngs))
  params = {'kernel': draw(7, 7, 1, 6, seed=1) / 7, 'bias': draw(6, seed=2)}
  theirs = torch.nn.functional.conv2d(
    tensor(x).permute(0, 3, 1, 2), tensor(params['kernel']).permute(3, 2, 0, 1),
    tensor(params['bias']), padding=3, groups=6)
  np.testing.assert_allclose(fn.apply(params, x), theirs.permute(0, 2, 3, 1), rtol=0, atol=1e-5)


def test_a_large_image_is_spread_over_threads():
  x, kernel = draw(1, 63, 65, 257), draw(7, 7, 1, 257, seed=1) / 7
  compiled = jax.jit(lambda *a: depthwise(*a, impl='shifted')).lower(x, kernel).compile()
  assert ' while(' not in compiled.as_text()  # a loop writes its result with one thread
  np.testing.assert_allclose(compiled(x, kernel), depthwise(x, kernel, impl='grouped'),
                             rtol=0, atol=1e-5)


def test_half_precision_sums_in_float32():
  x, kernel = draw(1, 8, 8, 4), jnp.abs(draw(7, 7, 1, 4, seed=1))
  half = lambda a: jnp.asarray(a, jnp.bfloat16)
  exact = depthwise(half(x).astype(jnp.float32), half(kernel).astype(jnp.float32), impl='shifted')
  ours = depthwise(half(x), half(kernel), impl='shifted')
  assert ours.dtype == jnp.bfloat16
  # One rounding of the sum, not 49 of its parts.
  np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_auto_is_chosen_for_the_target_not_for_this_machine():
  lowered = lambda platform: jax.jit(depthwise).trace(
    jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32),
    jax.ShapeDtypeStruct((7, 7, 1, 4), jnp.float32)).lower(lowering_platforms=(platform,)).as_text()
  assert 'stablehlo.convolution' not in lowered('cpu')
  assert 'stablehlo.convolution' in lowered('tpu')
  assert 'stablehlo.convolution' in lowered('cuda')


def test_unknown_form_and_even_size_are_refused():
  with pytest.raises(ValueError, match="'fft'"):
    depthwise(draw(1, 4, 4, 2), draw(3, 3, 1, 2), impl='fft')
  with pytest.raises(ValueError, match='odd, got 4'):
    Functional(lambda rngs: DepthwiseConv(4, 2, rngs=rngs))


def test_benchmark_runs():
  bench = runpy.run_path(str(pathlib.Path(__file__).parents[2] / 'benchmarks' / 'depthwise.py'))
  row = bench['measure']((1, 4, 4, 8), jnp.float32, rounds=1, seconds=0.0, clock=time.perf_counter)
  assert row['difference'] < 1e-5
  assert all(row[form]['both_ms'] > 0 for form in ('grouped', 'shifted', 'torch'))


@pytest.mark.parametrize('patch', [2, 4])
def test_patch_convolution_is_torch_strided(patch):
  x = draw(2, 11, 9, 3)  # remainders are dropped
  fn = Functional(lambda rngs: PatchConv(patch, 3, 5, rngs=rngs))
  params = {'kernel': draw(patch, patch, 3, 5, seed=1), 'bias': draw(5, seed=2)}
  theirs = torch.nn.functional.conv2d(
    tensor(x).permute(0, 3, 1, 2), tensor(params['kernel']).permute(3, 2, 0, 1),
    tensor(params['bias']), stride=patch)
  np.testing.assert_allclose(fn.apply(params, x), theirs.permute(0, 2, 3, 1), rtol=0, atol=1e-5)


def test_average_pool():
  x = draw(2, 7, 6, 3)
  theirs = torch.nn.functional.avg_pool2d(tensor(x).permute(0, 3, 1, 2), 3)
  np.testing.assert_allclose(average_pool(x, 3), theirs.permute(0, 2, 3, 1), rtol=0, atol=1e-6)


def test_a_tpu_sums_the_gradient_of_the_kernel():
  x, kernel = jnp.zeros((1, 8, 8, 16)), jnp.zeros((7, 7, 1, 16))
  run = jax.jit(lambda x, k: jax.grad(lambda k: depthwise(x, k).sum())(k))
  count = lambda platform: jax.export.export(run, platforms=[platform])(
    x, kernel).mlir_module().count('stablehlo.convolution')
  # The gradient of the kernel alone: a convolution of the grouped form, none as sums.
  assert count('cuda') == 1 and count('tpu') == 0
