"""The original's order of operations where the last bit decides (README, "Order of operations")."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from hrvlm_jax.core import resample
from hrvlm_jax.core.module import Functional
from hrvlm_jax.systems.ps3.selection import NARROW, ChannelNorm, in_order
from tests.parity.cases.ps3.common import compiled


@pytest.mark.parametrize('size, target', [((32, 32), (120, 120)), ((100, 70), (37, 91)),
                                          ((50, 60), (61, 60))])
def test_the_bicubic_resize_is_pytorchs_bit_for_bit(size, target):
  x = np.random.default_rng(0).standard_normal((2, 3, *size)).astype(np.float32)
  theirs = torch.nn.functional.interpolate(torch.tensor(x), target, mode='bicubic').numpy()
  ours = compiled(lambda x: resample.bicubic(x, *target))(np.moveaxis(x, 1, -1))
  np.testing.assert_array_equal(np.moveaxis(np.asarray(ours), -1, 1), theirs)


def test_the_narrow_stem_is_a_chain_of_fused_multiply_adds():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 50, 147)).astype(np.float32)
  kernel = rng.standard_normal((147, 3)).astype(np.float32)
  chain = np.zeros((2, 50, 3), np.float32)
  for k in range(147):  # in float64 a product of float32 values is exact: one rounding per step
    product = x[..., k, None].astype(np.float64) * kernel[k].astype(np.float64)
    chain = (product + chain).astype(np.float32)
  found = compiled(in_order)(x, kernel)
  np.testing.assert_array_equal(found, chain)
  grad = jax.grad(lambda k: (in_order(jnp.asarray(x), k) ** 2).sum())(jnp.asarray(kernel))
  plain = jax.grad(lambda k: ((jnp.asarray(x) @ k) ** 2).sum())(jnp.asarray(kernel))
  np.testing.assert_allclose(grad, plain, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('channels', [1, 3, NARROW, NARROW + 1, 40])
def test_the_norm_of_channels_is_pytorchs(channels):
  rng = np.random.default_rng(channels)
  # Nearly equal channels: their spread is a thousandth of their mean.
  x = (0.4 + 1e-3 * rng.standard_normal((2, 5, 5, channels))).astype(np.float32)
  fn = Functional(lambda rngs: ChannelNorm(channels, eps=1e-6, rngs=rngs))
  ours = fn.apply(fn.init(jax.random.key(0)), jnp.asarray(x))
  theirs = torch.nn.functional.layer_norm(torch.tensor(x), (channels,), eps=1e-6).numpy()
  # Rounding a mean of 0.4 moves the result by some 1e-5 where moments are summed otherwise.
  np.testing.assert_allclose(ours, theirs, atol=3e-6 if channels <= 3 else 2e-4)
