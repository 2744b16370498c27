"""VILA-HD on the host, its projector and its block formatting, beyond the golden cases."""

import dataclasses
import json
import pathlib
import runpy

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint.rows import check_names, entries
from hrvlm_jax.core.config import from_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.module import Functional
from hrvlm_jax.core.resample import area
from hrvlm_jax.data.background import BACKGROUNDS, PasteOnBackground
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.ps3 import config as ps3
from hrvlm_jax.systems.ps3.data import box_range, target_map
from hrvlm_jax.systems.vila_hd import SYSTEM, format as form, views as host, weights
from hrvlm_jax.systems.vila_hd.config import RELEASED, VilaHDConfig, tiny
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.vision.blocks import PROJECTORS, BlockProjector, block_slots
from hrvlm_jax.vlm import model as vlm
from tests import levels

KEYS = pathlib.Path(__file__).parents[1] / 'goldens' / 'release_keys'


def image(width, height, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
  return Image.fromarray(pixels)


@pytest.mark.parametrize('name, low, options, high', [
  ('vila_hd_8b_1_5k_siglip', 196, {'looks': 2}, 2 * 640),
  ('vila_hd_8b_1_5k_siglip', 196, {'looks': 'all'}, 3645),
  ('vila_hd_8b_4k_siglip', 196, {'looks': 'all'}, 21870),
  ('vila_hd_8b_4k_siglip', 196, {'looks': 6, 'budgets': (85, 340, 2135)}, 3839),
  ('vila_hd_8b_1_5k_cradio_v2', 144, {'looks': 'all'}, 2880),
  ('vila_hd_8b_1_5k_siglip', 196, {'tokens': 4860}, 1215),
  ('vila_hd_8b_1_5k_siglip', 196, {'looks': 0}, 1)])
def test_tokens_of_the_released_models(name, low, options, high):
  """The table of the paper; of 3840 nominal tokens at most 3839 blocks can be complete."""
  config = dataclasses.replace(RELEASED[name].encoder, **options)
  assert config.low_tokens == low
  assert host.count(3000, 2000, config) == host.Count(1, low + high)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32 - 1), st.floats(0.2, 1.0))
def test_slots_hold_every_selection(grid, side, seed, density):
  """No selection of n cells completes more blocks than there are slots for n cells."""
  chosen = np.random.default_rng(seed).random((1, grid, grid)) < density
  blocks = -(-grid // side)
  whole = np.isclose(np.asarray(area(jnp.asarray(chosen, jnp.float32), blocks, blocks)), 1.0)
  assert whole.sum() <= block_slots(grid, int(chosen.sum()), side)


def test_slots_are_exact_where_blocks_fit():
  assert block_slots(54, 512, 2) == 128 and block_slots(54, 515, 2) == 128
  assert block_slots(5, 25, 2) == 9 and block_slots(27, 729, 1) == 729


@pytest.mark.parametrize('options, message', [
  ({'projector': 'mlp_downsampel'}, 'unknown projector mlp_downsampel'),
  ({'prompt_head': None}, "mode 'after_prompt' needs a prompt_head"),
  ({'select_layer': 0}, 'select_layer must be at most -1'),
  ({'select_layer': -9}, 'select_layer must lie in'),
  ({'looks': -1}, 'looks must be'), ({'tokens': -1}, 'tokens must be at least 0'),
  ({'budgets': (1,)}, 'budgets needs one number per high scale')])
def test_settings_that_make_no_sense(options, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(tiny().encoder, **options)


def test_two_passes_need_an_encoder_that_can_look_twice():
  from hrvlm_jax.systems.mc_llava.encoder import tiny as other

  config = dataclasses.replace(other(), fusion=tiny().fusion, projector=None)
  with pytest.raises(ValueError, match='cannot be joined this way, use PrefixFusion'):
    vlm.build(config)


def test_dynamic_aspect_drops_the_top_scale_of_small_images():
  """Thresholds between scales; only the last counts, and not where the top scale is small."""
  big = dataclasses.replace(RELEASED['vila_hd_8b_4k_siglip'].encoder, dynamic_aspect='on')
  assert [host.first_scales(w, h, big) for w, h in ((2646, 100), (100, 2647), (640, 480))] == [
    2, 3, 2]
  small = dataclasses.replace(RELEASED['vila_hd_8b_1_5k_siglip'].encoder, dynamic_aspect='on')
  assert host.first_scales(64, 48, small) == 2
  assert host.first_scales(640, 480, dataclasses.replace(big, dynamic_aspect='stored')) == 3


def test_boxes_follow_the_image():
  """Whole numbers stay whole and are cut off, floats are scaled; maps include both ends."""
  assert host.resize_box([3, 60, 20, 90], 33, 120, 56).tolist() == [5, 28, 33, 42]
  np.testing.assert_allclose(host.resize_box([3.0, 60, 20, 90], 33, 120, 56)[2], 33.94, atol=0.01)
  ends = box_range(np.array([5.2, 28, 33, 41.5]), 56, 56)
  assert ends.tolist() == [28, 43, 5, 34]
  np.testing.assert_array_equal(form.target_maps(jnp.asarray(ends)[None], 56)[0],
                                target_map([[5.2, 28, 33, 41.5]], 56, 56))
  config = tiny().encoder
  views = host.views([image(64, 48), image(50, 50, 1)], config, boxes=[[1, 2, 30, 40], None])
  assert views['boxes'][0].any() and not views['boxes'][1].any()
  with pytest.raises(UserError, match='expected four numbers'):
    host.views([image(64, 48)], config, boxes=[[1, 2, 3]])
  with pytest.raises(UserError, match='1 boxes for 2 images'):
    host.views([image(64, 48), image(50, 50)], config, boxes=[None])


def test_batches_share_slots_and_refuse_what_does_not_fit():
  config = tiny().encoder
  examples = [host.views([image(64, 48, i) for i in range(n)], config) for n in (2, 0, 1)]
  batch = SYSTEM.batch(examples, config, slots=3)
  each = config.low_tokens + config.high_tokens
  assert batch['valid'].sum(axis=1).tolist() == [2 * each, 0, each]
  assert batch['index'][2, 0] == 2 * each
  with pytest.raises(UserError, match='3 views do not fit 2'):
    SYSTEM.batch(examples, config, slots=2)


def scattered(projector, features, maps, thumbnail):
  """The original's way: whole canvases, projected, complete blocks kept; one image."""
  kept, start = [], thumbnail
  for scale, m in enumerate(maps, 1):
    grid = m.shape[0]
    canvas = np.zeros((grid * grid, features.shape[-1]), np.float32)
    cells = np.flatnonzero(m)
    canvas[cells] = features[start:start + len(cells)]
    start += len(cells)
    blocks = -(-grid // projector.side)
    out = np.asarray(projector(jnp.asarray(canvas)[None])[0])
    if projector.pos_embed is not None:
      out = out + np.asarray(projector.position_table(blocks)
                             + projector.scale_embedding[...][scale])
    share = np.asarray(area(jnp.asarray(m), blocks, blocks)).reshape(-1)
    kept.append(out[np.isclose(share, 1)])
  return np.concatenate(kept)


@pytest.mark.parametrize('kind, grids', levels.rows('systems', [
  ('mlp_downsample', (6, 9)), ('mlp_downsample_3x3_fix', (7, 10)), ('linear', (3, 6)),
  ('mlp2x_gelu', (3, 4))], first=[('mlp_downsample', (6, 9)), ('linear', (3, 6))]))
def test_gathered_blocks_equal_projected_canvases(kind, grids):
  """Odd and even grids, side 1 to 3, selections of different sizes in one batch."""
  rng = np.random.default_rng(0)
  fn = Functional(lambda rngs: BlockProjector(kind, 5, 7, grid=3, scales=3, rngs=rngs))
  projector = fn.bind(fn.init(jax.random.key(0)))
  maps, counts = [], []
  for grid in grids:
    flat = np.zeros((2, grid * grid), np.float32)
    for row, share in enumerate((0.9, 0.8)):
      # Whole rows from the top, so that some blocks are complete, and some cells more.
      flat[row, :int(share * grid * grid)] = 1
    maps.append(flat.reshape(2, grid, grid))
    counts.append(int(flat.sum(axis=1).max()))
  slots = [block_slots(g, n, projector.side) for g, n in zip(grids, counts, strict=True)]
  features = rng.normal(size=(2, 9 + sum(counts), 5)).astype(np.float32)
  low = jnp.asarray(rng.normal(size=(2, 4, 7)), jnp.float32)
  run = jax.jit(lambda f, m: form.high_tokens(projector, f, low, m, slots, thumbnail=9))
  tokens, valid = run(jnp.asarray(features), [jnp.asarray(m) for m in maps])
  for row in range(2):
    expected = scattered(projector, features[row], [m[row] for m in maps], 9)
    got = np.asarray(tokens[row])[np.asarray(valid[row])]
    assert len(got) == len(expected) > 0
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_the_fallback_is_the_first_low_token():
  fn = Functional(lambda rngs: BlockProjector('mlp_downsample', 5, 7, grid=3, scales=2, rngs=rngs))
  projector = fn.bind(fn.init(jax.random.key(0)))
  m = jnp.zeros((1, 6, 6)).at[0, :, ::2].set(1)  # every other column: no block is complete
  low = jnp.ones((1, 4, 7)) * 3
  tokens, valid = form.high_tokens(projector, jnp.ones((1, 9 + 18, 5)), low, [m], [4], thumbnail=9)
  assert valid[0].tolist() == [True, False, False, False]
  np.testing.assert_array_equal(tokens[0, 0], low[0, 0])


def test_selection_loss_counts_images_with_a_box_only():
  probs = [jnp.full((2, 4, 4), 0.3), jnp.full((2, 8, 8), 0.6)]
  target = jnp.zeros((2, 16, 16)).at[1, 2:9, 2:9].set(1)
  loss, number = form.selection_loss(probs, target)
  alone, _ = form.selection_loss([p[1:] for p in probs], target[1:])
  assert int(number) == 1
  np.testing.assert_allclose(loss, alone, rtol=1e-6)
  assert float(form.selection_loss(probs, jnp.zeros_like(target))[0]) == 0


def test_names_of_the_released_checkpoint():
  """All 737 recorded tensors, and those of the prompt head, which the list leaves out."""
  recorded = json.loads((KEYS / 'vila_hd_8b_4k_siglip.json').read_text())['tensors']
  config = RELEASED['vila_hd_8b_4k_siglip']
  abstract = vlm.build(config).abstract
  found = {name: entry.shape for entry in entries(weights.table(config), abstract)
           for name in entry.names}
  head = {name: shape for name, shape in found.items() if 'top_down_prompt_head' in name}
  assert head == {
    f'mm_projector/top_down_prompt_head.{name}': shape for name, shape in {
      'fc1.weight': (2304, 3584), 'fc1.bias': (2304,), 'norm.weight': (2304,),
      'norm.bias': (2304,), 'fc2.weight': (1152, 2304), 'fc2.bias': (1152,)}.items()}
  assert {n: list(s) for n, s in found.items() if n not in head} == recorded
  shapes = {name: tuple(shape) for name, shape in recorded.items()} | head
  assert len(check_names(weights.table(config), abstract, shapes)) == len(recorded) + len(head)


@pytest.mark.parametrize('kind', [*PROJECTORS, 'mlp3x_gelu'])
@pytest.mark.parametrize('head', ['linear', 'mlp', None])
def test_every_projector_has_names_of_its_own(kind, head):
  fn = Functional(lambda rngs: BlockProjector(kind, 6, 8, rngs=rngs))
  table = weights.projector_table(kind, positions=False, prompt_head=head)
  rows = [row for row in table.rows if row.our_paths[0].startswith('projector/')]
  names = [name for row in table.rows for name in row.names]
  assert len(set(names)) == len(names)
  leaves = {f'projector/{layer}/{leaf}' for layer, part in fn.abstract.items() for leaf in part}
  assert {path for row in rows for path in row.our_paths} == leaves


def test_configs_of_the_release_both_ways():
  """With our own key and, for published trunks, from the original's keys alone."""
  system = registry.get('vila_hd')
  for name in ('vila_hd_8b_4k_siglip', 'vila_hd_8b_1_5k_cradio_v2'):
    config = RELEASED[name]
    files = json.loads(json.dumps(system.to_release(config)))
    values = files['config.json']
    assert system.from_release(values) == config
    pixels = files['vision_tower/preprocessor_config.json']  # names of PS3's own processor
    assert pixels['mean'] == list(config.encoder.tower.mean) == pixels['image_mean']
    assert pixels['std'] == list(config.encoder.tower.std) == pixels['image_std']
    assert values['chat_template'] == 'qwen2'  # VILA's code refuses a tokenizer without one
    own = values.pop('hrvlm')
    again = system.from_release(values)
    assert isinstance(again, ModelConfig) and again == config
    assert set(files) == {'config.json', 'llm/config.json', 'vision_tower/config.json',
                          'vision_tower/preprocessor_config.json', 'mm_projector/config.json'}
  values['hrvlm'] = {'encoder': own['encoder'] | {'projector': 'linear'}}
  with pytest.raises(UserError, match="remove the key 'hrvlm'"):
    system.from_release(values)
  wrong = values | {'mm_vision_select_feature': 'patch', 's2': True, 'llm_cfg': 'llm'}
  with pytest.raises(UserError) as error:
    system.from_release(wrong)
  for word in ('mm_vision_select_feature', 's2', 'llm_cfg'):
    assert word in str(error.value)


def test_the_tiny_recipe_is_a_run_config():
  """Boxes and backgrounds are settings of the data."""
  path = pathlib.Path(__file__).parents[2] / 'configs' / 'tiny' / 'vila_hd.py'
  space = runpy.run_path(str(path))
  values = space['get_config']().to_dict()
  values['data'] |= {'background': {'side': [160, 320], 'share': 0.5}}
  config = from_dict(RunConfig, values)
  assert config.model == space['MODEL'] and config.training.objective.name == 'two_pass'
  assert config.data.boxes and config.model.fusion.selection_weight == 1
  assert config.data.background == PasteOnBackground(side=(160, 320), share=0.5)


def test_sides_whose_grids_are_not_square_are_refused():
  tower = dataclasses.replace(ps3.siglip((378, 756, 1500), None), saliency=None)
  assert isinstance(VilaHDConfig(tower=tower).side, int)
  odd = dataclasses.replace(tower, scales=(378, 756, 1059))
  with pytest.raises(ValueError, match='does not give square grids'):
    VilaHDConfig(tower=odd)


@pytest.mark.parametrize('kind', BACKGROUNDS)
def test_pasting_keeps_the_picture_and_moves_its_box(kind):
  paste = PasteOnBackground(side=(100, 200), kinds=(kind,))
  small = image(40, 30)
  element = {'images': [small, small], 'boxes': [(4, 3, 20, 15), None], 'question': 'What?'}
  out = paste.random_map(element, np.random.default_rng(0))
  again = paste.random_map(element, np.random.default_rng(0))
  assert out['question'] == 'What?' and 100 <= out['images'][0].width <= 200
  for page, other in zip(out['images'], again['images'], strict=True):
    np.testing.assert_array_equal(np.asarray(page), np.asarray(other))
  x0, y0, x1, y1 = out['boxes'][1]
  np.testing.assert_array_equal(np.asarray(out['images'][1])[y0:y1, x0:x1], np.asarray(small))
  x0, y0, x1, y1 = (int(v) for v in out['boxes'][0])
  np.testing.assert_array_equal(np.asarray(out['images'][0])[y0:y1, x0:x1],
                                np.asarray(small)[3:15, 4:20])


def test_large_pictures_are_made_smaller_and_share_decides():
  paste = PasteOnBackground(side=(100, 100), largest_share=0.25)
  out = paste.random_map({'images': [image(400, 200)]}, np.random.default_rng(1))
  x0, y0, x1, y1 = out['boxes'][0]
  assert (x1 - x0, y1 - y0) == (25, 12)
  never = PasteOnBackground(share=0.0)
  picture = image(10, 10)
  assert never.random_map({'images': [picture]}, np.random.default_rng(1))['images'] == [picture]
  with pytest.raises(ValueError, match='share must lie'):
    PasteOnBackground(share=2.0)


@pytest.mark.parametrize('name', sorted(RELEASED))
def test_looks_of_a_released_model_are_2560_patches_each(name):
  """Any number of looks, up to the one that covers the image."""
  encoder = RELEASED[name].encoder
  total = sum(encoder.plan().cells)
  cover = -(-total // 2560)
  for looks in (0, 1, 2, cover - 1, cover, cover + 3, 'all'):
    plan = dataclasses.replace(encoder, looks=looks).plan()
    wanted = total if looks == 'all' else min(looks * 2560, total)
    assert sum(plan.look_tokens) == wanted
