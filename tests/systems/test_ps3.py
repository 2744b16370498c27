"""PS3 on the host: plans, sizes, data pieces, release names; no transformer runs here."""

import dataclasses
import json
import math
import pathlib

import jax
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint.rows import check_names, export_tensors, import_tensors
from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language.tokenizer import ByteTokenizer
from hrvlm_jax.systems.ps3 import data, model, views, weights
from hrvlm_jax.systems.ps3.config import RELEASED, PS3Config, tiny_encoder
from hrvlm_jax.systems.ps3.plan import make_plan, scale_sizes
from hrvlm_jax.systems.ps3.records import Regions, from_published
from hrvlm_jax.systems.ps3.text import tokenizer

KEYS = pathlib.Path(__file__).parents[1] / 'goldens' / 'release_keys'
K4 = RELEASED['ps3_4k_siglip'].encoder
K15 = RELEASED['ps3_1_5k_siglip'].encoder


@pytest.mark.parametrize('size, sizes, grids', [
  ((1512, 1512), [(756, 756), (1512, 1512), (3780, 3780)], [(54, 54), (108, 108), (270, 270)]),
  ((2000, 3000), [(504, 756), (1008, 1512), (2520, 3780)], [(36, 54), (72, 108), (180, 270)]),
  ((1080, 1920), [(420, 756), (840, 1512), (2100, 3780)], [(30, 54), (60, 108), (150, 270)]),
  ((100, 4000), [(28, 756), (56, 1512), (140, 3780)], [(2, 54), (4, 108), (10, 270)]),
  ((1059, 1059), None, [(54, 52), (108, 104), (270, 260)]),
])
def test_sizes_of_the_specification(size, sizes, grids):
  found = scale_sizes(*size, K4)
  assert found[0] == (378, 378)
  if sizes:
    assert list(found[1:]) == sizes
  plan = make_plan(*size, K4, num_looks=1)
  assert list(plan.grids[1:]) == grids


def test_how_many_square_sizes_lose_a_column():
  lost = [n for n in range(100, 9000) if scale_sizes(n, n, K4)[1][1] != 756]
  assert len(lost) == 375 and lost[:4] == [155, 309, 310, 321]
  assert not {756, 1512, 3780} & set(lost)


def test_budgets():
  assert K4.resolved_budgets == (85, 341, 2134) and sum(K4.resolved_budgets) == 2560
  assert K15.resolved_budgets == (512, 2048)
  radio = RELEASED['ps3_4k_cradio_v2_l'].encoder
  assert radio.resolved_budgets == (85, 341, 2134) and radio.grid == 24
  assert dataclasses.replace(K4, budgets=(84, 336, 2100)).resolved_budgets == (84, 336, 2100)


def plan(config, **options):
  side = config.scales[-1]
  return make_plan(side, side, config, **options)


def test_worked_plans_of_the_specification():
  found = plan(K4, num_tokens=3000)
  assert found.counts == (((85, 341, 2134), (14, 58, 368)),) and found.tokens == 3729
  assert found.deepest == (99, 399, 2502)
  found = plan(K15, num_looks='all')
  assert found.counts[0] == ((512, 2048),) * 5 + ((356, 1424),)
  found = plan(K4, num_looks='all')
  assert found.looks == 35 and found.counts[0][-1] == (26, 70, 344) and found.tokens == 88209
  assert plan(K4, num_looks=2).tokens == 5849
  assert plan(K4, num_looks=1, first_scales=2).counts[0] == ((510, 2049, 1),)
  found = plan(K15, num_looks='all', first_scales=1)
  assert found.counts[0] == ((2560, 0), (356, 2204))
  assert plan(K4, num_looks=0).tokens == 729 and plan(K4, num_tokens=0).looks == 0
  # The original restores the full length of a shortened look when scales are restricted.
  assert plan(K15, num_tokens=30, first_scales=1).look_tokens == (2560,)
  strict = dataclasses.replace(K4, quirks='strict')
  assert plan(strict, num_tokens=30, first_scales=1).counts[0] == ((30, 0, 0),)
  assert plan(strict, num_looks='all', first_scales=1).deepest == (2916, 0, 0)


@pytest.mark.parametrize('options, words', [
  ({}, 'give num_looks'), ({'num_looks': 2, 'num_tokens': 30}, 'exclude each other'),
  ({'num_tokens': 'all'}, "num_looks='all'"), ({'num_looks': -1}, 'from 0, got -1'),
  ({'num_tokens': -3}, 'must not be negative'), ({'num_looks': 1, 'first_scales': 4}, '1..3'),
  ({'num_looks': 1, 'first_scales': 1}, 'budget of -1 tokens')])
def test_what_the_original_crashes_on_is_one_sentence(options, words):
  with pytest.raises(UserError, match=words):
    plan(K4, **options)


def test_instances_need_looks_of_equal_length():
  config = tiny_encoder(max_select=40)
  found = make_plan(160, 160, config, num_looks=1, first_scales=[1, 2])
  assert found.counts == (((40, 0),), ((8, 32),)) and found.look_tokens == (40,)
  with pytest.raises(UserError, match='encode them one by one'):
    make_plan(160, 160, dataclasses.replace(config, quirks='strict'), num_looks='all',
              first_scales=[1, 2])


def test_parameter_counts_of_the_released_variants():
  vision = {'ps3_1_5k_siglip': 485_919_168, 'ps3_4k_siglip': 575_799_872,
            'ps3_1_5k_siglip2': 485_919_168, 'ps3_4k_siglip2': 575_799_872,
            'ps3_1_5k_cradio_v2_l': 441_578_384, 'ps3_4k_cradio_v2_l': 505_280_912}
  text = {'siglip': 452_393_712, 'siglip2': 710_441_712, 'cradio_v2_l': 451_967_216}
  for name, config in RELEASED.items():
    abstract = model.build(config.encoder).abstract
    size = lambda tree: sum(math.prod(x.shape) for x in paths.flatten(tree).values())
    assert size(abstract['vision']) == vision[name]
    assert size(abstract['text']) == text[name.split('k_', 1)[1]]


@pytest.mark.parametrize('name', ['ps3_4k_siglip', 'ps3_1_5k_siglip2', 'ps3_1_5k_cradio_v2_l'])
def test_release_names_and_shapes_one_to_one(name):
  lists = [json.loads((KEYS / f'{name}.{part}.json').read_text()) for part in ('vision', 'text')]
  text = weights.text_from_hf(lists[1]['config'])
  config = weights.vision_from_hf(lists[0]['config'], text=text)
  shapes = lists[0]['tensors'] | lists[1]['tensors']
  fn = model.build(config)
  found = check_names(weights.model_table(config), fn.abstract, shapes)
  assert sorted(n for entry in found for n in entry.names) == sorted(shapes)
  assert {n: list(e.shape) for e in found for n in e.names} == {k: list(v) for k, v in
                                                                shapes.items()}
  again = weights.vision_from_hf(
    json.loads(json.dumps(weights.vision_to_hf(config))), text=weights.text_from_hf(
      json.loads(json.dumps(weights.text_to_hf(text)))))
  assert again == config
  released = dataclasses.replace(RELEASED[name].encoder, text=text)
  assert config == released


def test_round_trip_is_bit_exact_in_both_layouts():
  config = tiny_encoder()
  fn = model.build(config)
  params = jax.tree.map(np.asarray, fn.init(jax.random.key(0)))
  for layout in ('release', 'training'):
    table = weights.model_table(config, layout=layout)
    tensors = dict(export_tensors(params, table))
    back = import_tensors(tensors, table, fn.abstract)
    jax.tree.map(np.testing.assert_array_equal, params, back)
  with pytest.raises(UserError, match='missing tensor prompt_proj.fc1.weight'):
    import_tensors({k: v for k, v in tensors.items() if k != 'prompt_proj.fc1.weight'}, table,
                   fn.abstract)


def test_unknown_settings_are_refused():
  with pytest.raises(UserError, match='unknown key ps3_scale '):
    weights.vision_from_hf({'model_name': 'vit_so400m_patch14_siglip_384', 'ps3_scale': []})
  with pytest.raises(UserError, match='no_causal_mask: expected True'):
    weights.text_from_hf({'no_causal_mask': False})
  with pytest.raises(ValueError, match='scales must rise'):
    dataclasses.replace(K4, scales=(378, 378))


def test_portraits_are_squashed_in_the_order_of_the_release():
  pixels = np.random.default_rng(0).integers(0, 256, (90, 31, 4), np.uint8)
  image = Image.fromarray(pixels, 'RGBA')
  wide = image.convert('RGBa').resize((48, 90), Image.Resampling.BICUBIC)
  expected = wide.resize((48, 48), Image.Resampling.BICUBIC).convert('RGBA').convert('RGB')
  np.testing.assert_array_equal(views.squash(image, 48), np.asarray(expected))


def test_boxes_follow_the_crop():
  window = data.Crop(top=2, left=4, height=46, width=63)
  assert data.crop_boxes([[12, 9, 30, 25]], window, 48).tolist() == [[6, 7, 19, 24]]
  right = data.crop_boxes([[68, 10, 70, 20]], window, 48)
  assert not data.target_map(right, 48, 48).any()
  left = data.target_map(data.crop_boxes([[0, 10, 3, 20]], window, 48), 48, 48)
  assert left[:, 0].any() and not left[:, 1:].any()


def test_samples_are_drawn_from_one_generator():
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
  record = from_published(
    {'text': ['A sign. It says STOP. It is red.', 'A dog.'],
     'box': [[10, 10, 30, 40], [50, 5, 80, 30]], 'global_text': 'A street.'})
  config = data.SampleConfig()
  draws = [data.sample(image, record, config, np.random.default_rng(seed), side=32)
           for seed in range(40)]
  assert 2 <= sum(bool(d['is_global'][0]) for d in draws) <= 20
  for d in draws:
    assert d['pixels'].shape == (32, 32, 3) and d['target'].shape == (1, 32, 32)
    assert not d['is_global'][0] or d['target'].all()
  same = data.sample(image, record, config, np.random.default_rng(3), side=32)
  assert same['captions'] == draws[3]['captions']
  tokenize = tokenizer(ByteTokenizer({}), tiny_encoder().text)
  batch = data.collate(draws[:4], tokenize)
  assert batch['tokens'].shape == (4, 32) and batch['target'].dtype == np.uint8
  with pytest.raises(UserError, match='2 boxes and 1 captions'):
    Regions(boxes=((0, 0, 1, 1),) * 2, captions=('a',))


def test_several_rows_of_an_image_and_the_target_of_all_boxes():
  image = Image.fromarray(np.full((60, 90, 3), 7, np.uint8))
  record = Regions(boxes=((10, 10, 30, 40), (50, 5, 80, 30)), captions=('a', 'b'))
  config = data.SampleConfig(rows_per_image=3, prior_target='all', clean=False)
  drawn = [data.sample(image, record, config, np.random.default_rng(seed), side=32)
           for seed in range(8)]
  assert {text for d in drawn for text in d['captions']} == {'a', 'b'}
  for d in drawn:
    assert d['target'].shape == d['prior_target'].shape == (3, 32, 32) and len(d['captions']) == 3
    assert (d['prior_target'] >= d['target']).all() and (d['prior_target'] > d['target']).any()
    # Rows share their crop: equal captions have equal targets.
    for i, text in enumerate(d['captions']):
      np.testing.assert_array_equal(d['target'][i], d['target'][d['captions'].index(text)])
  batch = data.collate(drawn[:2], tokenizer(ByteTokenizer({}), tiny_encoder().text))
  assert batch['image'][:, 0].tolist() == [0, 0, 0, 1, 1, 1]
  assert batch['pixels'].shape == (6, 32, 32, 3) and batch['is_global'].shape == (6, 1)


def test_random_crops_stay_inside_and_panoramas_lose_their_sides():
  rng = np.random.default_rng(0)
  for _ in range(50):
    c = data.sample_crop(90, 60, rng)
    assert 0 <= c.top <= 60 - c.height and 0 <= c.left <= 90 - c.width
  c = data.sample_crop(900, 60, rng)
  assert (c.height, c.width) == (60, 80) and c.left == 410


def test_overlay_has_a_panel_per_scale():
  config: PS3Config = tiny_encoder()
  maps = [np.ones((1, 10, 10)), np.zeros((1, 20, 20))]
  picture = views.overlay(Image.new('RGB', (80, 40), 'white'), config,
                          {'maps': maps, 'probs': maps}, side=100)
  assert picture.size == (200, 50)
  left, right = np.asarray(picture)[:, :100], np.asarray(picture)[:, 100:]
  assert left.mean() > right.mean()
