"""Cross-attention fusion: the block against plain NumPy, grouping, rows per image, refusals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.module import Functional, Module, unstack
from hrvlm_jax.language import config as language
from hrvlm_jax.language.decoder import Decoder
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import VisualTokens
from hrvlm_jax.systems.fusion import CrossAttentionFusion
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.cross_attention import CrossAttention, CrossBlock


class Reader(Module):
  """A decoder and its blocks."""

  def __init__(self, fusion, text, *, unrolled=False, rngs):
    self.language = Decoder(text, unrolled=unrolled, rngs=rngs)
    self.fusion = CrossAttention(fusion, text, unrolled=unrolled, rngs=rngs)

  def __call__(self, x, visual, ex=HERE):
    context = self.language.context(jnp.ones(x.shape[:2], bool), ex=ex)
    return self.fusion.run(self.language, x, context, visual)

  def probabilities(self, x, visual, **options):
    context = self.language.context(jnp.ones(x.shape[:2], bool))
    return self.fusion.attention(self.language, x, context, visual, **options)


def small(depth: int, *, width: int = 32):
  return language.phi(vocab_size=16, width=width, depth=depth, heads=2, mlp_width=24)


def random_params(fn: Functional, seed: int = 1):
  """Every leaf random, so that zeros and ones of the initialisation hide nothing."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype), fn.abstract)


def normal(seed: int, *shape: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def media_of(seed: int, *shape: int) -> VisualTokens:
  return VisualTokens(normal(seed, *shape), jnp.ones(shape[:2], bool))


def apart(params):
  return {name: part | {'blocks': unstack(part['blocks'])} for name, part in params.items()}


def run(fn: Functional, params, *args, **options):
  return jax.jit(lambda p: fn.apply(p, *args, **options))(params)


def reference_block(p, x, media, reduce):
  """One block of one sample in float64, written from the formulas alone."""
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
  norm = lambda v, q: (v - v.mean(-1, keepdims=True)) / np.sqrt(
    v.var(-1, keepdims=True) + 1e-5) * q['scale'] + q['bias']
  dense = lambda v, q: v @ q['kernel'] + q['bias']
  largest = max(x.shape[-1], media.shape[-1])
  heads, width = largest // 64, largest // reduce // (largest // 64)
  q = dense(norm(x, p['norm1']), p['attn']['q'])
  k, v = dense(media, p['attn']['k']), dense(media, p['attn']['v'])
  parts = []
  for h in range(heads):
    own = slice(h * width, (h + 1) * width)
    scores = q[:, own] @ k[:, own].T / 8  # 64 ** -0.5 whatever `reduce` makes of the heads
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    parts.append(weights / weights.sum(-1, keepdims=True) @ v[:, own])
  x = x + dense(np.concatenate(parts, -1), p['attn']['out'])
  hidden = dense(norm(x, p['norm2']), p['mlp']['fc1'])
  erf = np.vectorize(math.erf)
  return x + dense(0.5 * hidden * (1 + erf(hidden / math.sqrt(2))), p['mlp']['fc2'])


@pytest.mark.parametrize('width, media_width, reduce', [(48, 128, 1), (128, 40, 2), (70, 96, 1)])
def test_block_equals_the_formulas(width, media_width, reduce):
  fusion = CrossAttentionFusion(width=media_width, interval=1, reduce=reduce)
  text = language.phi(vocab_size=8, width=width, depth=1, heads=1, mlp_width=8, rotary_dim=2)
  fn = Functional(lambda rngs: CrossBlock(text, fusion, rngs=rngs))
  params = random_params(fn)
  x, media = normal(1, 1, 5, width), normal(2, 1, 9, media_width)

  @jax.jit
  def apply(params):
    block = fn.bind(params)
    return block(x, *block.attn.keys_values(media), jnp.ones((1, 9), bool))

  out = apply(params)
  assert fn.abstract['mlp']['fc1']['kernel'].shape == (width, 4 * width // reduce)
  expected = reference_block(params, *(np.asarray(v[0], np.float64) for v in (x, media)), reduce)
  np.testing.assert_allclose(out[0], expected, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize('depth, interval, from_layer, at', [
  (4, 2, 0, (1, 3)), (6, 2, 2, (3, 5)), (5, 3, 0, (2,)), (3, 1, 1, (1, 2)),
])
def test_groups_are_the_plain_loop(depth, interval, from_layer, at):
  """Stacked layers scanned in groups equal layers unrolled, one after the other."""
  fusion = CrossAttentionFusion(width=64, interval=interval, from_layer=from_layer)
  assert fusion.layers(depth) == at
  text = small(depth)
  fn = Functional(lambda rngs: Reader(fusion, text, rngs=rngs))
  held = Functional(lambda rngs: Reader(fusion, text, unrolled=True, rngs=rngs))
  params = random_params(fn)
  x, visual = normal(2, 2, 4, 32), media_of(3, 2, 6, 64)
  out, expected = run(fn, params, x, visual), run(held, apart(params), x, visual)
  np.testing.assert_allclose(out, expected, atol=1e-4 * float(jnp.abs(expected).max()))


def test_remat_changes_no_gradient():
  fusion = CrossAttentionFusion(width=64, interval=2)
  fn = Functional(lambda rngs: Reader(fusion, small(4), rngs=rngs))
  params = random_params(fn)
  x, visual = normal(2, 1, 3, 32), media_of(3, 1, 5, 64)
  grad = lambda remat: jax.jit(jax.grad(
    lambda p: jnp.square(fn.apply(p, x, visual, ex=Execution(remat=remat))).mean()))(params)
  for a, b in zip(jax.tree.leaves(grad('none')), jax.tree.leaves(grad('layers')), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(a).max())))


def test_rows_of_one_image_share_its_keys():
  """k texts per image (and beams): equal to repeating the image, without repeating it."""
  fusion = CrossAttentionFusion(width=128, interval=2)
  fn = Functional(lambda rngs: Reader(fusion, small(2), rngs=rngs))
  params = random_params(fn)
  visual = media_of(3, 2, 7, 128)
  x = normal(2, 6, 4, 32)
  repeated = VisualTokens(*(jnp.repeat(v, 3, axis=0) for v in (visual.values, visual.valid)))
  out = run(fn, params, x, visual)
  np.testing.assert_allclose(out, run(fn, params, x, repeated), atol=1e-5)
  probs = run(fn, params, x, visual, method='probabilities')
  assert probs.shape == (1, 6, 2, 4, 7)
  np.testing.assert_allclose(
    probs, run(fn, params, x, repeated, method='probabilities'), atol=1e-6)
  with pytest.raises(ValueError, match='5 text rows are no multiple of 2 images'):
    jax.eval_shape(lambda p: fn.apply(p, x[:5], visual), params)


def test_padding_of_visual_tokens_is_not_read():
  fusion = CrossAttentionFusion(width=64, interval=1)
  fn = Functional(lambda rngs: Reader(fusion, small(1), rngs=rngs))
  params = random_params(fn)
  visual, x = media_of(3, 1, 5, 64), normal(2, 1, 4, 32)
  padded = VisualTokens(jnp.pad(visual.values, ((0, 0), (0, 3), (0, 0)), constant_values=50.0),
                        jnp.arange(8)[None] < 5)
  np.testing.assert_allclose(
    run(fn, params, x, visual), run(fn, params, x, padded), atol=1e-5)


def test_attention_sums_over_ranges():
  fusion = CrossAttentionFusion(width=128, interval=2)
  fn = Functional(lambda rngs: Reader(fusion, small(4), rngs=rngs))
  params = random_params(fn)
  visual, x = media_of(3, 2, 6, 128), normal(2, 2, 4, 32)
  whole = run(fn, params, x, visual, method='probabilities')
  parts = run(fn, params, x, visual, ranges=3, method='probabilities')
  assert whole.shape == (2, 2, 2, 4, 6) and parts.shape == (2, 2, 2, 4, 3)
  np.testing.assert_allclose(whole.reshape(2, 2, 2, 4, 3, 2).sum(-1), parts, atol=1e-6)
  np.testing.assert_allclose(parts.sum(-1), 1, atol=1e-5)


def test_output_matrices_start_near_zero():
  """0.01 for weights, 0.01 / sqrt(2 max(depth, 36)) for the two output matrices, zero biases."""
  fusion = CrossAttentionFusion(width=256, interval=1)
  fn = Functional(lambda rngs: CrossBlock(small(40, width=128), fusion, rngs=rngs))
  p = jax.jit(fn.init)(jax.random.key(0))
  std = lambda part: float(jnp.std(part['kernel']))
  for part in (p['attn']['q'], p['attn']['k'], p['attn']['v'], p['mlp']['fc1']):
    assert std(part) == pytest.approx(0.01, rel=0.05)
    assert not part['bias'].any()
  for part in (p['attn']['out'], p['mlp']['fc2']):
    assert std(part) == pytest.approx(0.01 / 80**0.5, rel=0.05)


def test_refusals():
  with pytest.raises(ValueError, match='gives 0 heads of 64'):
    Functional(lambda rngs: CrossBlock(
      small(1), CrossAttentionFusion(width=48, interval=1), rngs=rngs))
  with pytest.raises(ValueError, match='interval must be at least 1'):
    CrossAttentionFusion(width=64, interval=0)
  config = registry.get('pheye').tiny()
  fn = vlm.build(config)
  batch = {'tokens': jnp.zeros((1, 3), jnp.int32), 'valid': jnp.ones((1, 3), bool),
           'segments': jnp.zeros((1, 3), jnp.int32),
           'views': {'pixels': jnp.zeros((1, 5, 40, 40, 3), jnp.uint8)}}
  with pytest.raises(UserError, match='packed of several examples'):
    jax.eval_shape(fn.apply, fn.abstract, batch)
  del batch['segments']
  embeds, valid, extras = jax.eval_shape(
    lambda p: fn.apply(p, batch, method='prompt'), fn.abstract)
  with pytest.raises(ValueError, match='layers unrolled'):
    jax.eval_shape(lambda p, e, v, x: fn.apply(p, e, v, slots=8, method='prefill', **x),
                   fn.abstract, embeds, valid, extras)
