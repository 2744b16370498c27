"""LLaVA-HR on the device: adapters and their switches, mixed batches, every ablation's shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core import paths
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.core.module import Functional
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.llava_hr import views as host
from hrvlm_jax.systems.llava_hr.adapter import MRAdapter, align
from hrvlm_jax.systems.llava_hr.config import PAPER_ADAPTERS, RELEASED_ADAPTERS, AdapterConfig, tiny
from hrvlm_jax.systems.llava_hr.encoder import Encoder
from hrvlm_jax.vision.convnext import ConvNeXtConfig
from tests import levels

SYSTEM = registry.get('llava_hr')

TINY = tiny(image_size=64).encoder


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def adapter(config, slow=6, fast=4):
  return Functional(lambda rngs: MRAdapter(slow, fast, config, rngs=rngs))


def picture(width, height):
  pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
  return Image.fromarray(pixels)


def moved(fn, by=0.3):
  """Initial parameters with the zeros drawn too, so that nothing is an identity by accident."""
  params = fn.init(jax.random.key(0))
  flat = {path: leaf + by * jax.random.normal(jax.random.key(index), leaf.shape)
          for index, (path, leaf) in enumerate(paths.flatten(params).items())}
  return paths.unflatten(flat)


def test_new_adapter_is_the_identity_and_wakes_up_in_order():
  """Both projections are zero: they get gradients at once, what stands before them later."""
  fn, y, s = adapter(RELEASED_ADAPTERS), draw(2, 4, 4, 4), draw(2, 4, 4, 6, seed=1)
  params = fn.init(jax.random.key(0))
  np.testing.assert_array_equal(fn.apply(params, y, s)[0], y)
  loss = lambda p, y, s: (fn.apply(p, y, s)[0] ** 2).sum()
  grads = jax.jit(jax.grad(loss))(params, y, s)
  reached = {path for path, leaf in paths.flatten(grads).items() if np.any(leaf)}
  assert reached == {'slow_proj/kernel', 'slow_proj/bias', 'fast_proj/kernel', 'fast_proj/bias'}


@pytest.mark.parametrize('gate', ['tanh', 'sigmoid', 'hsigmoid'])
@pytest.mark.parametrize('base', [RELEASED_ADAPTERS, PAPER_ADAPTERS])
def test_gates(gate, base):
  """out = f + gate * u with a scalar gate (released) or one per channel (paper)."""
  config = dataclasses.replace(base, gate=gate)
  fn, y, s = adapter(config), draw(2, 4, 4, 4), draw(2, 4, 4, 6, seed=1)
  params = moved(fn)
  module = fn.bind(params)
  out, value, strength = module(y, s)
  paper = base is PAPER_ADAPTERS
  assert value.shape == (2, 4 if paper else 1) and strength.shape == (2, 4, 4)
  mapped, u = module.map_fast(y), module.map_slow(s)
  logit = np.asarray(module.gate(module.pool(mapped if paper else y + mapped, u)), np.float64)
  expected = {'tanh': np.tanh, 'sigmoid': lambda x: 1 / (1 + np.exp(-x)),
              'hsigmoid': lambda x: np.clip(x + 3, 0, 6) / 6}[gate](logit)
  np.testing.assert_allclose(value, expected, atol=1e-6)
  np.testing.assert_allclose(out, y + mapped + expected[:, None, None] * u, atol=1e-5)


@pytest.mark.parametrize('slow_map,fast_map', [('mlp', 'conv'), ('conv', 'conv'), ('conv', 'mlp')])
def test_maps(slow_map, fast_map):
  """'mlp' sees one cell, 'conv' its 7 x 7 surroundings."""
  fn = adapter(AdapterConfig(slow_map=slow_map, fast_map=fast_map))
  module = fn.bind(moved(fn))
  for kind, run, channels in ((slow_map, module.map_slow, 6), (fast_map, module.map_fast, 4)):
    x = draw(1, 9, 9, channels)
    nudged = x.at[0, 4, 4].add(1)
    changed = np.abs(np.asarray(run(nudged)) - np.asarray(run(x))).max(axis=(0, 3)) > 1e-7
    rows, cols = np.nonzero(changed)
    assert np.ptp(rows) + 1 == np.ptp(cols) + 1 == (1 if kind == 'mlp' else 7)


def test_align_refuses_grids_that_do_not_divide():
  with pytest.raises(ValueError, match='grids of 4 and 6 cells'):
    align(draw(1, 4, 4, 2), 6)


ABLATIONS = {
  'released': ({}, 4, 96),
  'stage1': (dict(adapters=None), 4, 96),
  'paper': (dict(adapters=PAPER_ADAPTERS), 4, 96),
  'low_to_high': (dict(adapters=AdapterConfig(direction='low_to_high')), 4, 96),
  'concat': (dict(fusion='concat'), 4, 192),
  'convnext': (dict(fast=None, adapters=None), 4, 96),
  'clip': (dict(slow=None, adapters=None), 64, 96),
  'average': (dict(slow=None, adapters=None, reduce='average'), 16, 96),
  'queries': (dict(slow=None, adapters=None, reduce='queries', queries=9), 9, 96),
}


@pytest.mark.parametrize('name', ABLATIONS)
def test_every_form_gives_the_tokens_it_counts(name):
  changes, tokens, width = ABLATIONS[name]
  config = dataclasses.replace(TINY, **changes)
  fn = Functional(lambda rngs: Encoder(config, rngs=rngs))
  views = jax.eval_shape(lambda: SYSTEM.batch([host.views([Image.new('RGB', (9, 9))], config)],
                                            config))

  def run(params, views):
    out = fn.apply(params, views, ex=Execution(dtype='bfloat16'))
    return out.values, out.info

  values, info = jax.eval_shape(run, fn.abstract, views)
  assert values.shape == (1, tokens, width) and values.dtype == jnp.bfloat16
  assert (config.tokens, config.width) == (tokens, width)
  assert ('gates' in info) == (config.adapters is not None)


@pytest.mark.parametrize('name', levels.rows(
  'systems', ['low_to_high', 'queries'], first=['queries']))
def test_forms_of_our_own_run_and_train(name):
  """Forms no golden case holds: finite, and a gradient reaches all but the known unused leaves."""
  small = dict(fast=dataclasses.replace(TINY.fast, depth=2, width=8, mlp_width=8),
               slow=ConvNeXtConfig(depths=(1, 1), widths=(6, 8), classes=2), image_size=32)
  config = dataclasses.replace(TINY, **(small | ABLATIONS[name][0]))
  fn = Functional(lambda rngs: Encoder(config, rngs=rngs))
  params = moved(fn, 0.05)
  views = SYSTEM.batch([host.views([picture(40, 30)], config)], config)
  weight = draw(config.tokens, config.width, seed=2)
  loss = lambda p, v, w: (fn.apply(p, v).values * w).mean()
  value, grads = jax.jit(jax.value_and_grad(loss))(params, jax.device_put(views), weight)
  assert np.isfinite(value)
  unreached = {path for path, leaf in paths.flatten(grads).items() if not np.any(leaf)}
  unused = {'fast/post_norm/scale', 'fast/post_norm/bias'}
  if config.dual:
    unused |= {'fast/class_token'} | {p for p in paths.flatten(grads) if 'slow/head/' in p}
  # The mean over keys cancels the bias of the keys; rounding decides whether it is exactly zero.
  assert unused <= unreached <= unused | {
    'fast/blocks/attn/k/bias', 'resampler/attn/k/bias', 'fast/blocks/norm1/bias'}


@pytest.mark.full('systems')
def test_mixed_batch_gives_what_single_images_give():
  """Sizes and aspect ratios mix, rows hold none, one or two images; bfloat16 stays near."""
  fn = Functional(lambda rngs: Encoder(TINY, rngs=rngs))
  params, each = moved(fn, 0.1), TINY.tokens
  images = [picture(100, 40), picture(33, 80), picture(64, 64)]
  run = jax.jit(lambda p, v: fn.apply(p, v))
  alone = [run(params, SYSTEM.batch([host.views([image], TINY)], TINY)) for image in images]
  rows = [[images[0]], [], [images[1], images[2]]]
  views = SYSTEM.batch([host.views(row, TINY) for row in rows], TINY, slots=4)
  mixed = run(params, views)
  np.testing.assert_array_equal(mixed.valid.sum(axis=1), [each, 0, 2 * each])
  gates = np.asarray(mixed.info['gates'])
  assert gates.shape == (4, 3, 1) and mixed.info['injected'].shape == (4, 3, 2, 2)
  for slot, (row, start) in enumerate(((0, 0), (2, 0), (2, each))):
    single = alone[slot]
    limit = 1e-5 * np.abs(single.values).max()
    np.testing.assert_allclose(
      mixed.values[row, start:start + each], single.values[0], rtol=0, atol=limit)
    np.testing.assert_allclose(gates[slot], single.info['gates'][0], rtol=0, atol=1e-5)
  half = jax.jit(lambda p, v: fn.apply(p, v, ex=Execution(dtype='bfloat16')).values)(params, views)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(jnp.float32), mixed.values, rtol=0,
                             atol=0.1 * np.abs(mixed.values).max())
