"""MC-LLaVA on the host and in its encoder, beyond the golden cases."""

import dataclasses
import json
import pathlib
import re

from hypothesis import given, settings, strategies as st
import jax
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint.rows import check_names, export_tensors, import_tensors
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.module import Functional
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.mc_llava import SYSTEM, encoder as host
from hrvlm_jax.systems.mc_llava.encoder import RELEASED, Encoder, MCLlavaConfig, tiny
from hrvlm_jax.systems.mc_llava.weights import table
from hrvlm_jax.vlm import model as vlm

KEYS = pathlib.Path(__file__).parents[1] / 'goldens' / 'release_keys'
BASE = MCLlavaConfig()


def image(width, height, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
  return Image.fromarray(pixels)


def test_the_worked_example_of_the_specification():
  config = dataclasses.replace(BASE, max_crops=9)
  boxes = host.crop_boxes(1600, 1100, config)
  assert boxes[:3] == [(0, 0, 1600, 1100), (0, 0, 554, 554), (0, 277, 554, 1100)]
  assert boxes[-1] == (831, 277, 1600, 1100) and len(boxes) == 9
  assert host.kept_tokens(9, config) == [80] * 8 + [88]
  np.testing.assert_allclose(host.centres(boxes, 1600, 1100)[2], [0.173125, 0.6259091], atol=1e-6)


@pytest.mark.parametrize('size, crops, tokens, views, last', [
  ((640, 416), 4, 728, 3, 244), ((1600, 1100), 100, 728, 29, 28), ((4240, 2832), 100, 728, 97, 56),
  ((3213, 3024), 200, 728, 183, 182), ((3213, 3024), 200, 1456, 183, 182)])
def test_the_table_of_the_specification(size, crops, tokens, views, last):
  config = dataclasses.replace(BASE, max_crops=crops, num_tokens=tokens)
  assert len(host.crop_boxes(*size, config)) == views
  assert host.kept_tokens(views, config)[-1] == last
  assert host.count(*size, config) == host.Count(views, tokens)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 200))
def test_any_size_gives_boxes_inside_the_image_or_the_one_refusal(width, height, max_crops):
  config = dataclasses.replace(BASE, max_crops=max_crops, crop_cap=200)
  try:
    boxes = host.crop_boxes(width, height, config)
  except UserError as error:
    assert 'more than crop_cap=200' in str(error)
    return
  assert boxes[0] == (0, 0, width, height) and len(boxes) <= 201
  assert all(0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height for x0, y0, x1, y1 in boxes)
  counts = host.kept_tokens(len(boxes), dataclasses.replace(config, num_tokens=728))
  assert sum(counts) == 728 and min(counts) > 0
  covered = boxes[1:] or boxes
  assert max(b[2] for b in covered) == width and max(b[3] for b in covered) == height


def test_token_budgets_that_cannot_be_met_are_refused_or_follow_the_reference():
  low = dataclasses.replace(BASE, num_tokens=5)
  with pytest.raises(UserError, match='num_tokens=5 is below the number of views 9'):
    host.kept_tokens(9, low)
  reference = dataclasses.replace(low, quirks='reference')
  assert host.kept_tokens(9, reference) == [728] * 8 + [5]


def test_view_buckets_follow_the_knobs():
  """400 crops of the article's own image: more views than the last bucket that is listed."""
  config = dataclasses.replace(BASE, max_crops=400, num_tokens=1456)
  views = len(host.crop_boxes(4240, 2832, config))
  assert views > BASE.view_buckets[-1] and host.count(4240, 2832, config) == host.Count(views, 1456)
  assert [host.packing(config).bucket(n) for n in (209, 210, views, 418)] == [209, 417, 417, 833]
  small = dataclasses.replace(tiny().encoder, max_crops=40, num_tokens=60)
  views = host.views([image(300, 260)], small)
  batch = SYSTEM.batch([views], small)
  assert small.view_buckets[-1] == 17 < len(views['pixels']) <= len(batch['pixels']) == 33
  assert batch['valid'].sum() == 60


@pytest.mark.parametrize('size', [(5000, 7), (7, 5000), (3000, 40)])
def test_the_advice_for_elongated_images_helps(size):
  """Either change that the refusal names is enough."""
  config = dataclasses.replace(BASE, num_tokens=10)
  with pytest.raises(UserError, match='or set max_crops=0') as refused:
    host.count(*size, config)
  needed = int(re.search(r'raise num_tokens to (\d+)', str(refused.value))[1])
  for change in ({'num_tokens': needed}, {'max_crops': 0}):
    assert host.count(*size, dataclasses.replace(config, **change)).views in (1, needed)
  with pytest.raises(UserError, match='below the number of views'):
    host.count(*size, dataclasses.replace(config, num_tokens=needed - 1))


def test_a_view_gives_at_most_all_of_its_tokens():
  large = dataclasses.replace(BASE, num_tokens=1457)
  assert host.kept_tokens(1, large) == [728] and host.kept_tokens(2, large) == [728, 728]
  config = tiny(max_crops=6, num_tokens=100).encoder
  small = SYSTEM.batch([host.views([image(30, 30)], config)], config)
  assert small['index'].shape == (1, 100) and small['valid'].sum() == 63


@pytest.mark.parametrize('options, message', [
  ({'max_crops': -1}, 'max_crops must be at least 0'),
  ({'window': 383}, 'window and growth must be even'),
  ({'quirks': 'none'}, "quirks must be 'refuse' or 'reference'"),
  ({'view_buckets': (5, 1)}, 'view_buckets must rise')])
def test_settings_that_make_no_sense(options, message):
  with pytest.raises(ValueError, match=message):
    MCLlavaConfig(**options)


def test_views_use_the_vertical_pass_last():
  """A tall image: one call of Pillow may run the passes the other way round."""
  tall = image(230, 900)
  config = tiny().encoder
  pixels = host.view_pixels(tall, [(0, 0, 230, 900)], 40)[0]
  two = tall.resize((40, 900), Image.Resampling.BICUBIC).resize((40, 40), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(pixels, np.asarray(two))
  assert host.views([tall], config)['pixels'].dtype == np.uint8


@pytest.fixture(scope='module')
def encoder():
  config = dataclasses.replace(tiny(max_crops=6, num_tokens=20).encoder)
  fn = Functional(lambda rngs: Encoder(config, rngs=rngs))
  return config, jax.jit(fn.apply), fn.init(jax.random.key(0))


def test_a_mixed_batch_gives_what_single_runs_give(encoder):
  config, apply, params = encoder
  images = [[image(50, 40)], [image(200, 90, 1)], [], [image(90, 150, 2), image(40, 40, 3)]]
  examples = [host.views(row, config) for row in images]
  mixed = apply(params, SYSTEM.batch(examples, config))
  for row, example in enumerate(examples):
    if not len(example['pixels']):
      assert not np.asarray(mixed.valid[row]).any()
      continue
    alone = apply(params, SYSTEM.batch([example], config))
    n = int(example['tokens'].sum())
    np.testing.assert_allclose(mixed.values[row, :n], alone.values[0, :n], atol=1e-5)
    assert np.asarray(mixed.valid[row]).sum() == n


def test_crop_slots_are_shared_and_refused_when_too_few(encoder):
  config, apply, params = encoder
  examples = [host.views([image(200, 90, i)], config) for i in range(2)]
  total = sum(len(e['pixels']) for e in examples)
  tight = SYSTEM.batch(examples, config, slots=total)
  assert len(tight['pixels']) == total
  np.testing.assert_allclose(apply(params, tight).values,
                             apply(params, SYSTEM.batch(examples, config)).values, atol=1e-5)
  with pytest.raises(UserError, match=f'{total} views'):
    SYSTEM.batch(examples, config, slots=total - 1)


def test_the_number_of_crops_inside_a_bucket_compiles_nothing_new(encoder):
  config, _, params = encoder
  fn = Functional(lambda rngs: Encoder(config, rngs=rngs))
  apply = jax.jit(fn.apply)
  counts = set()
  for width, height in ((60, 90), (200, 90), (120, 120), (90, 150)):
    example = host.views([image(width, height)], config)
    counts.add(len(example['pixels']))
    apply(params, SYSTEM.batch([example], config, slots=10))
  assert len(counts) > 1 and apply._cache_size() == 1


def test_released_names_map_one_to_one_at_full_size():
  recorded = json.loads((KEYS / 'mc_llava_3b.json').read_text())['tensors']
  config = RELEASED['mc_llava_3b']
  present = check_names(table(config), vlm.build(config).abstract,
                        {name: tuple(shape) for name, shape in recorded.items()})
  assert {name for entry in present for name in entry.names} == set(recorded)


def test_weights_and_configs_survive_the_round_trip():
  config = tiny()
  fn = vlm.build(config)
  params = fn.init(jax.random.key(1))
  tensors = dict(export_tensors(params, table(config)))
  again = import_tensors(tensors, table(config), fn.abstract)
  jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, params))
  system = registry.get('mc_llava')
  release = json.loads(json.dumps(system.to_release(config)))
  assert system.from_release(release['config.json']) == config
  assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_overlay_draws_every_crop():
  picture = host.overlay(image(200, 90), tiny(max_crops=6, num_tokens=20).encoder, {})
  assert picture.size == (200, 90)
  assert (np.asarray(picture) != np.asarray(image(200, 90))).any()
