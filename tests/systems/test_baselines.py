"""Baselines: tile arithmetic, resamplers, pruning by hand-computed examples, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.module import Functional
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.baselines import (
  anyres,
  pruning,
  reduced,
  resamplers,
  s2,
  scaling,
  single_view,
  tiles,
)
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.grid import TokenMap
from hrvlm_jax.vision.vit import ViT
from tests import levels

KEYS = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 1], [1, 0.2], [-1, 0.1]], np.float32)[None]
VALUES = np.arange(1, 7, dtype=np.float32)[None, :, None]


def noise(width, height, seed=0):
  return Image.fromarray(np.random.default_rng(seed).integers(
    0, 256, (height, width, 3), np.uint8))


def test_examples_of_the_published_grid():
  config = anyres.AnyResConfig()
  count = registry.get('anyres').count
  assert [count(*size, config).tokens for size in ((640, 480), (1000, 300), (17, 900))] == [
    2340, 2182, 792]
  assert config.max_tokens == 2928 and config.max_views == 5


@pytest.mark.parametrize('size', [(1, 1), (640, 80), (81, 79), (17, 900)])
@pytest.mark.parametrize('merge', ['flat', 'spatial', 'spatial_unpad'])
def test_every_size_fits_the_static_places(size, merge):
  config = dataclasses.replace(anyres.tiny().encoder, merge=merge)
  found = registry.get('anyres').count(*size, config)
  assert 0 < found.tokens <= config.max_tokens and found.views <= config.max_views


def test_a_tile_shows_its_part_of_the_map():
  # Tile (row 1, column 0) of a 2 x 3 grid with 2 x 2 tokens: lower left of the map.
  index = tiles.map_index(2, 3, 2)
  np.testing.assert_array_equal(index[2:, :2], 3 * 4 + np.array([[0, 1], [2, 3]]))


def test_an_image_without_pixels_is_refused():
  with pytest.raises(UserError, match='0x5 pixels'):
    registry.get('tiling').count(0, 5, registry.get('tiling').tiny().encoder)


def test_settings_that_do_not_fit_name_every_problem():
  with pytest.raises(ValueError, match=r'layer must lie.*multiples of vision.image_size 40'):
    dataclasses.replace(anyres.tiny().encoder, layer=-9, pinpoints=((41, 40),))
  with pytest.raises(ValueError, match='85 is not divisible into 3 squares'):
    dataclasses.replace(s2.tiny().encoder, sizes=(40, 85))


def test_squares_and_blocks_are_inverse():
  x = jnp.arange(2 * 6 * 6 * 3.0).reshape(2, 6, 6, 3)
  np.testing.assert_array_equal(scaling.merge_squares(scaling.split_squares(x, 3), 3), x)
  np.testing.assert_array_equal(scaling.merge_blocks(scaling.split_blocks(x[0], 2, 3), 2, 3), x[0])


def test_tome_worked_example():
  run = jax.jit(pruning.tome_merge, static_argnames=('r',))
  values, sizes = run(KEYS, VALUES, np.ones((1, 6), np.float32), r=1)
  np.testing.assert_allclose(values[0, :, 0], [3, 1, 3.5, 4, 6], atol=1e-6)
  np.testing.assert_array_equal(sizes[0], [1, 1, 2, 1, 1])
  values, _ = run(KEYS, VALUES, np.ones((1, 6), np.float32), r=2)
  np.testing.assert_allclose(values[0, :, 0], [1, 3.5, 3.5, 6], atol=1e-6)


def test_tome_schedules():
  assert pruning.tome_schedule(8, 3) == [8, 8, 8]
  assert pruning.tome_schedule((4, -1.0), 5) == [8, 6, 4, 2, 0]


def test_visionzip_adds_the_mean_of_what_it_gathers():
  x = jnp.asarray([[[10.0], [1], [2], [3], [4], [5]]])  # class token, five patches
  score = jnp.asarray([[0.1, 0.9, 0.2, 0.1, 0.1]])
  keys = jnp.asarray([[[0, 1], [1, 0], [5, 5], [1, 0.1], [0, 1], [0.1, 1]]], jnp.float32)
  out = pruning.visionzip(x, score, keys, dominant=2, contextual=2, class_token=True)
  # Kept: class, 2. Rest 1 3 4 5; targets at 0 and 2: 1 and 4; 3 is like 1, 5 like 4.
  np.testing.assert_allclose(out[0, :, 0], [10, 2, 1 + 3, 4 + 5])


def test_perceiver_equals_the_description():
  fn = Functional(lambda rngs: resamplers.PerceiverResampler(
    8, queries=3, depth=1, heads=2, head_dim=4, rngs=rngs))
  params = jax.jit(fn.init)(jax.random.key(0))
  x = np.random.default_rng(0).normal(size=(1, 1, 5, 8)).astype(np.float32)
  valid = np.array([[True, True, True, True, False]])
  found = jax.jit(fn.apply)(params, x, valid=valid)
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  layer = jax.tree.map(lambda leaf: leaf[0], p['layers'])

  def norm(y):
    return (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)

  media, own = norm(x[0, 0, :4] + p['time'][0]), norm(p['latents'])
  both = np.concatenate([media, own])
  heads = lambda y: y.reshape(len(y), 2, 4).transpose(1, 0, 2)
  q, k, v = (heads(a @ layer[n]['kernel']) for a, n in ((own, 'q'), (both, 'k'), (both, 'v')))
  scores = q @ k.transpose(0, 2, 1) / 2
  probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
  latents = p['latents'] + (probs @ v).transpose(1, 0, 2).reshape(3, 8) @ layer['out']['kernel']
  hidden = norm(latents) @ layer['fc1']['kernel']
  hidden = np.asarray(jax.nn.gelu(hidden, approximate=False), np.float64)
  latents = latents + hidden @ layer['fc2']['kernel']
  np.testing.assert_allclose(found[0], norm(latents), atol=2e-5)


def test_single_layer_positions_and_shape():
  table = resamplers.sincos_positions(3, 8).reshape(3, 3, 8)
  np.testing.assert_allclose(table[:, 2, :4], np.tile(  # the column is in the first half
    [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)], (3, 1)), atol=1e-6)
  np.testing.assert_array_equal(table[1, :, 4:], np.tile(table[1, :1, 4:], (3, 1)))
  fn = Functional(lambda rngs: resamplers.SingleLayerResampler(
    6, 8, queries=4, maps=[TokenMap(3, 3)], rngs=rngs))
  assert jax.eval_shape(fn.apply, fn.abstract, jax.ShapeDtypeStruct((2, 9, 6), jnp.float32)
                        ).shape == (2, 4, 8)


def test_single_layer_reads_a_global_view_and_tiles():
  """Pheye's 257 queries (appendix B.2): one without a position and a square; tiles lie in it."""
  quarters = [(x / 2, y / 2, (x + 1) / 2, (y + 1) / 2) for x in (0, 1) for y in (0, 1)]
  maps = [TokenMap(4, 4, 1), *(TokenMap(2, 2, 18 + 5 * i, box) for i, box in enumerate(quarters))]
  table = resamplers.sincos_positions(4, 8)
  found = resamplers.key_positions(maps, 37, 4, 8)
  np.testing.assert_array_equal(found[1:17], table)
  grid = table.reshape(4, 4, 8)  # the second tile is the lower left one
  np.testing.assert_array_equal(found[23:27], grid[2:, :2].reshape(4, 8))
  np.testing.assert_array_equal(found[[0, 17, 22, 27, 32]], 0)  # class tokens
  config = reduced.ReducedConfig(inner='pheye', encoder=registry.get('pheye').tiny().encoder,
                                 step=reduced.SingleLayer(queries=17))
  assert config.tokens == 17 and len(config.key_maps) == 5
  fn = Functional(lambda rngs: reduced.Encoder(config, rngs=rngs))
  batch = registry.get('reduced').batch([registry.get('reduced').views(
    [Image.new('RGB', (30, 20))], config)], config)
  assert jax.eval_shape(fn.apply, fn.abstract, batch).values.shape == (1, 17, 96)


def test_pooling_takes_means_of_neighbours():
  x = jnp.arange(16.0).reshape(1, 16, 1)
  np.testing.assert_allclose(resamplers.pool_maps(x, [(4, 4)], 2)[0, :, 0], [2.5, 4.5, 10.5, 12.5])


STEPS = [reduced.Pool(factor=2), reduced.SingleLayer(queries=9, heads=4), reduced.ToMe(keep=10),
         reduced.VisionZip(dominant=6, contextual=3)]


@pytest.mark.parametrize('step', STEPS, ids=lambda step: step.kind)
def test_steps_give_the_tokens_they_count(step):
  config = reduced.tiny(step=step)
  assert from_dict(ModelConfig, to_dict(config)) == config
  system = registry.get('reduced')
  one = system.views([noise(90, 50)], config.encoder)
  two = system.views([noise(90, 50), noise(30, 60, 1)], config.encoder)
  batch = system.batch([one, two], config.encoder)
  fn = Functional(lambda rngs: system.encoder(config.encoder, rngs=rngs))
  abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
  out = jax.eval_shape(fn.apply, fn.abstract, abstract)
  n = system.count(90, 50, config.encoder).tokens
  assert one['tokens'].tolist() == [n] and out.values.shape[:2] == (2, 2 * n)


def test_combinations_that_cannot_work_are_refused_with_the_reason():
  tiled = anyres.tiny().encoder
  with pytest.raises(ValueError, match='number of anyres depends on the image'):
    reduced.ReducedConfig(inner='anyres', encoder=tiled, step=reduced.Pool())
  with pytest.raises(ValueError, match='needs the attention of one tower over one whole view'):
    reduced.ReducedConfig(inner='s2', encoder=s2.tiny().encoder,
                          step=reduced.VisionZip(dominant=3, contextual=1))
  with pytest.raises(ValueError, match=r'keep must lie in 1\.\.64'):
    reduced.ReducedConfig(inner='single_view', encoder=single_view.tiny().encoder,
                          step=reduced.ToMe(keep=65))
  reduced.ReducedConfig(inner='anyres', encoder=tiled, step=reduced.Perceiver(queries=4))


@pytest.mark.parametrize('name', levels.rows(
  'systems', ['anyres', 'tiling', 's2', 's2_dynamic'], first=['anyres']))
def test_a_row_does_not_depend_on_the_others_of_its_batch(name):
  system = registry.get(name)
  config = system.tiny().encoder
  first, second = (system.views([noise(*size)], config) for size in ((120, 40), (50, 90)))
  fn = Functional(lambda rngs: system.encoder(config, rngs=rngs))
  params = jax.jit(fn.init)(jax.random.key(0))
  run = jax.jit(fn.apply)
  together = run(params, system.batch([second, first], config))
  alone = run(params, system.batch([first, first], config))
  n = int(first['tokens'][0])
  assert together.valid[1].sum() == n
  np.testing.assert_allclose(together.values[1, :n], alone.values[0, :n], atol=2e-5)
  assert np.isfinite(together.values).all()


@pytest.mark.full('systems')
@pytest.mark.parametrize('class_token', [False, True])
def test_tome_inside_the_tower(class_token):
  """Nothing merged: the plain tower. Identical patches: merging them changes no result."""
  config = dataclasses.replace(single_view.tiny().encoder.vision, class_token=class_token)
  fn = Functional(lambda rngs: ViT(config, rngs=rngs))
  params = jax.jit(fn.init)(jax.random.key(0))
  images = jax.random.normal(jax.random.key(1), (2, 40, 40, 3))

  def run(params, images, schedule, proportional=True):
    return pruning.tome_tower(fn.bind(params), images, schedule, proportional=proportional)

  run = jax.jit(run, static_argnums=(2, 3))
  plain = jax.jit(fn.apply)(params, images)
  tokens, size = run(params, images, (0, 0, 0))
  np.testing.assert_allclose(tokens, plain, atol=1e-5)
  assert (size == 1).all()

  tokens, size = run(params, images, (10, 8, 5))
  assert tokens.shape == (2, config.tokens - 23, config.width)
  np.testing.assert_allclose(size.sum(axis=1), config.tokens)  # nobody is lost
  if class_token:
    assert (size[:, 0] == 1).all()  # never merged, stays first

  # Equal patches without positions are equal tokens: with proportional attention a merged token
  # counts as often as its parts, so that every token keeps the value it has in the plain tower.
  flat = jnp.ones((1, 40, 40, 3))
  table = params['pos_embed'].at[int(class_token):].set(0.5)
  same = params | {'pos_embed': table}
  plain = jax.jit(fn.apply)(same, flat)
  tokens, _ = run(same, flat, (10, 8, 5))
  np.testing.assert_allclose(tokens[0, -1], plain[0, -1], atol=1e-4)
  if class_token:
    np.testing.assert_allclose(tokens[0, 0], plain[0, 0], atol=1e-4)
    unweighted, _ = run(same, flat, (10, 8, 5), False)
    assert np.abs(unweighted[0, 0] - plain[0, 0]).max() > 1e-4
