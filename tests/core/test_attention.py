"""One definition, several kernels: each must give what the plain formula gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.core import attention as lib, cpu
from hrvlm_jax.core.execution import AXES, Execution


def inputs(t=5, s=7, h=4, k=2, d=8, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = ((2, t, h, d), (2, s, k, d), (2, s, k, d))
  return [jax.random.normal(key, shape).astype(dtype)
          for key, shape in zip(keys, shapes, strict=True)]


def reference(q, k, v, mask=None):
  groups = q.shape[2] // k.shape[2]
  k, v = (np.repeat(np.asarray(x, np.float64), groups, axis=2) for x in (k, v))
  scores = np.einsum('bthd,bshd->bhts', np.asarray(q, np.float64), k) * q.shape[-1]**-0.5
  if mask is not None:
    scores = np.where(mask, scores, -1e30)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum('bhts,bshd->bthd', weights, v)


def test_grouped_heads_repeat_consecutively():
  q, k, v = inputs()
  np.testing.assert_allclose(lib.attention(q, k, v), reference(q, k, v), atol=1e-5)


VALID = np.random.default_rng(0).random((2, 7)) < 0.7
SEGMENTS = np.array([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2]])


def test_what_is_visible():
  q, k, v = inputs(t=7)
  triangle, own = np.tril(np.ones((7, 7), bool)), np.eye(7, dtype=bool)
  keys = np.broadcast_to(VALID[:, None, None], (2, 1, 7, 7))
  same = (SEGMENTS[:, :, None] == SEGMENTS[:, None])[:, None]
  for options, mask in (
    ({}, None),
    ({'valid': VALID}, keys),
    ({'causal': True}, triangle),
    ({'valid': VALID, 'causal': True}, keys & triangle | own),
    ({'valid': VALID, 'segments': SEGMENTS}, keys & same),
    ({'valid': VALID, 'segments': SEGMENTS, 'causal': True}, keys & same & triangle | own),
  ):
    options = {name: jnp.asarray(x) if name != 'causal' else x for name, x in options.items()}
    np.testing.assert_allclose(lib.attention(q, k, v, **options), reference(q, k, v, mask),
                               atol=1e-5)
  # Queries that stand at places 3 and 4 of the keys.
  options = dict(valid=jnp.asarray(VALID), causal=True)
  late = lib.attention(q[:, 3:5], k, v, **options, slot=jnp.int32(3))
  np.testing.assert_array_equal(late, lib.attention(q[:, 3:5], k, v, **options, slot=3))
  np.testing.assert_allclose(late, lib.attention(q, k, v, **options)[:, 3:5], atol=1e-6)


def test_a_row_without_keys_is_finite():
  q, k, v = inputs()
  out = lib.attention(q, k, v, valid=jnp.zeros((1, 7), bool))
  assert np.isfinite(out).all()


def test_half_precision_scores_are_float32():
  q, k, v = (x * 30 for x in inputs(dtype=jnp.bfloat16))
  weights = lib.attention_weights(q, k)
  assert weights.dtype == jnp.float32
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('told', ['all', 'right', 'left', 'packed'])
def test_cudnn_kernel(causal, told):
  q, k, v = inputs(t=64, s=64, h=4, k=2, d=64, dtype=jnp.bfloat16)
  valid = np.arange(64) < np.array([50, 64])[:, None]
  options = {'all': {}, 'right': {'valid': valid}, 'left': {'valid': valid[:, ::-1]},
             'packed': {'valid': valid, 'segments': np.arange(64)[None].repeat(2, 0) // 20}}[told]
  options = {name: jnp.asarray(x) for name, x in options.items()} | {'causal': causal}
  counts = (np.asarray(options.get('valid', np.ones((2, 64), bool))) if causal
            else np.ones((2, 64), bool))[..., None, None]

  def total(q, k, v, form):
    y = lib.attention(q, k, v, **options, ex=Execution(attention=form))
    return jnp.square(jnp.where(counts, y, 0).astype(jnp.float32)).sum()

  for ours, plain in zip(*(jax.grad(total, (0, 1, 2))(q, k, v, form) for form in ('cudnn', 'xla')),
                         strict=True):
    np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(plain, np.float32),
                               atol=6e-2)


@pytest.mark.parametrize('devices', [1, 4])
def test_cudnn_is_told_lengths(devices, monkeypatch):
  """Lowered for a GPU that is not here: its kernel, and no array of queries times keys."""
  from jax._src.cudnn import fused_attention_stablehlo as fused

  monkeypatch.setattr(fused, 'check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(fused, 'is_cuda_compute_capability_equal', lambda capability: False)
  mesh = None if devices == 1 else jax.sharding.AbstractMesh((1, 2, 1, 2), AXES)
  ex = Execution(mesh=mesh, platform='gpu')
  valid = jnp.asarray(np.random.default_rng(0).random((2, 200)) < 0.7)
  shapes = [jax.ShapeDtypeStruct((2, 200, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
  for options in ({}, {'causal': True}, {'valid': valid}, {'valid': valid, 'causal': True}):
    loss = lambda q, k, v, o=options: lib.attention(q, k, v, **o, ex=ex).astype(jnp.float32).sum()
    run = jax.jit(jax.grad(loss, (0, 1, 2)))
    if mesh is None:
      allowed = [jax.export.DisabledSafetyCheck.custom_call(f'__cudnn$fmhaSoftmax{way}')
                 for way in ('', 'Backward')]
      text = jax.export.export(run, platforms=['cuda'], disabled_checks=allowed)(
        *shapes).mlir_module()
      assert '__cudnn$fmhaSoftmaxBackward' in text and '200x200xi1' not in text
    else:
      text = str(jax.make_jaxpr(run)(*shapes))
      assert 'shard_map' in text and 'dot_product_attention_bwd' in text
      assert '200,200]' not in text


def test_choices_that_cannot_work_are_refused():
  q, k, v = inputs()
  with pytest.raises(ValueError, match='form must be one of'):
    lib.attention(q, k, v, ex=Execution(attention='flash'))
  if jax.default_backend() == 'cpu':
    for form in ('cudnn', 'splash'):
      with pytest.raises(ValueError, match=f"'{form}' needs"):
        lib.attention(q, k, v, ex=Execution(attention=form))
    auto = lib.attention(q, k, v, ex=Execution(attention='auto'))
    np.testing.assert_allclose(auto, reference(q, k, v), atol=1e-5)


def assert_same_as_xla(other, qkv, cases):
  """Values and gradients, for every set of options."""
  for options in cases:
    total = lambda q, k, v, form, o=options: jnp.square(
      lib.attention(q, k, v, ex=Execution(attention=form), **o)).sum()
    both = [jax.value_and_grad(total, argnums=(0, 1, 2))(*qkv, form) for form in ('xla', other)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), *both)


def test_head_by_head_is_the_same_function():
  assert_same_as_xla('heads', inputs(t=7),
                     ({}, {'causal': True}, {'valid': jnp.asarray(VALID), 'causal': True}))


@pytest.mark.parametrize('t', [7, 130])
def test_blocks_of_queries_are_the_same_function(t):
  keys = jnp.asarray(np.random.default_rng(1).random((2, t)) < 0.7)
  assert_same_as_xla('queries', inputs(t=t, s=t),
                     ({}, {'valid': keys}, {'valid': keys, 'causal': True}))


def test_scores_beyond_a_devices_share_go_by_queries(monkeypatch):
  q, k, v = inputs(t=64, s=64)
  monkeypatch.setattr(lib, '_AT_A_TIME', 64 * 64)  # of 2 x 4 x 64 x 64 scores

  def trace(devices):
    mesh = jax.sharding.AbstractMesh((devices, 1, 1, 1), AXES)
    ex = Execution(mesh=mesh, platform='tpu')
    return str(jax.make_jaxpr(lambda q, k, v: lib.attention(q, k, v, ex=ex))(q, k, v))

  assert 'scan' in trace(2) and 'f32[2,4,64,64]' not in trace(2)
  assert 'scan' not in trace(8) and 'f32[2,4,64,64]' in trace(8)


def test_large_inputs_on_a_cpu_keep_one_head_of_scores(monkeypatch):
  monkeypatch.setattr(cpu, 'HEADS_FROM', 10)
  q, k, v = inputs(dtype=jnp.bfloat16)
  out = lib.attention(q, k, v)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(out, np.float32), reference(q, k, v), atol=3e-2)
