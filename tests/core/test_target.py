"""Layers choose their form for the machine that a program is compiled for."""

import jax
import jax.numpy as jnp

from hrvlm_jax.core import attention as attentions
from hrvlm_jax.core.target import compiling_for, target


def test_the_machine_here_unless_told():
  assert target() == (jax.default_backend(), jax.device_count())
  with compiling_for('tpu', 64):
    assert target() == ('tpu', 64)
  assert target() == (jax.default_backend(), jax.device_count())


def primitives(t):
  shape = jax.ShapeDtypeStruct((1, t, 2, 64), jnp.float32)
  jaxpr = jax.make_jaxpr(lambda q, k, v: attentions.attention(q, k, v))(shape, shape, shape)
  return {equation.primitive.name for equation in jaxpr.jaxpr.eqns}


def test_attention_for_a_slice_is_one_product(monkeypatch):
  monkeypatch.setattr(attentions, '_HEADS_FROM', 0)
  with compiling_for('cpu', 1):
    assert 'scan' in primitives(128)  # one head after the other
  for platform, devices in (('cpu', 8), ('tpu', 64), ('tpu', 1)):
    with compiling_for(platform, devices):
      assert 'scan' not in primitives(128)


def test_fused_kernels_that_cannot_be_partitioned_are_for_one_device():
  q = jnp.zeros((1, 128, 2, 64), jnp.bfloat16)
  for devices, expected in ((1, 'splash'), (64, 'xla')):
    with compiling_for('tpu', devices):
      assert attentions._choose(q, None) == expected
