"""LLaVA-HR on the host and its released layout: views, sizes, names, configs, overlay."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint import store
from hrvlm_jax.checkpoint.rows import check_names, entries, export_tensors, import_tensors
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.systems import pictures, registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.llava_hr import config as settings, views as host, weights
from hrvlm_jax.systems.llava_hr.config import (
  PAPER_ADAPTERS,
  RELEASED,
  AdapterConfig,
  LlavaHRConfig,
  tiny,
)
from hrvlm_jax.training import run_config
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.optimizer import groups_of
from hrvlm_jax.vision.vit import CLIP_L_336
from hrvlm_jax.vlm import model as vlm

KEYS = pathlib.Path(__file__).parent.parent / 'goldens' / 'release_keys'
SYSTEM = registry.get('llava_hr')


def picture(width, height, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
  return Image.fromarray(pixels)


def replaced(config: ModelConfig, **changes) -> ModelConfig:
  """A model with another encoder; its projector follows."""
  return settings.model(dataclasses.replace(config.encoder, **changes), config.text)


def count(tree):
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree)) / 1e6


@pytest.mark.parametrize('size,slow,low,fast,tokens', [
  (384, 12, 336, 24, 576), (768, 24, 336, 24, 576), (1024, 32, 448, 32, 1024),
  (1280, 40, 560, 40, 1600), (1536, 48, 672, 48, 2304)])
def test_resolutions(size, slow, low, fast, tokens):
  config = LlavaHRConfig(image_size=size)
  assert (config.slow_grid, config.fast_image_size, config.fast_grid) == (slow, low, fast)
  assert SYSTEM.count(7, 900, config).tokens == config.tokens == tokens


@pytest.mark.parametrize('size', [448, 512, 672])
def test_resolutions_the_original_cannot_join_are_refused(size):
  with pytest.raises(ValueError, match=f'image_size {size} gives a ViT grid of 24 and a ConvNeXt'):
    LlavaHRConfig(image_size=size)


def test_bad_settings_are_listed_together():
  with pytest.raises(ValueError, match="aspect must be one of .*'crop'"):
    LlavaHRConfig(aspect='crop')
  with pytest.raises(ValueError, match="gate must be one of .*'relu'"):
    AdapterConfig(gate='relu')
  with pytest.raises(ValueError, match='at least one backbone'):
    LlavaHRConfig(fast=None, slow=None)
  with pytest.raises(ValueError, match='neither adapters nor a fusion'):
    LlavaHRConfig(slow=None)
  with pytest.raises(ValueError, match='belongs to the ViT alone'):
    LlavaHRConfig(reduce='average')
  with pytest.raises(ValueError, match='depth 6 is not a multiple of 4'):
    LlavaHRConfig(fast=dataclasses.replace(CLIP_L_336, depth=6))
  with pytest.raises(ValueError, match=r'select_layer must be in -24\.\.-1, got -25'):
    LlavaHRConfig(slow=None, adapters=None, image_size=336, select_layer=-25)


@pytest.mark.parametrize('name,parts', [
  ('llava_hr_7b', (6738.4, 303.5, 200.1, 18.26, 2.62, 20.98)),
  ('llava_hr_13b', (13015.9, 303.5, 200.1, 18.26, 2.62, 31.47)),
  ('llava_hr_x_13b', (13015.9, 303.5, 846.5, 44.21, 4.20, 31.47)),
])
def test_published_sizes(name, parts):
  abstract = vlm.build(RELEASED[name]).abstract
  vision = abstract['vision']
  found = (abstract['language'], vision['fast'], vision['slow'], vision['adapters'],
           vision['align'], abstract['projector'])
  for part, millions in zip(found, parts, strict=True):
    assert count(part) == pytest.approx(millions, abs=0.051 if millions > 100 else 0.0051)


@pytest.mark.parametrize('name', ['llava_hr_7b', 'llava_hr_x_13b'])
def test_release_keys_map_one_to_one(name):
  """Names and shapes of the release, both ways, at full size without any array."""
  listed = json.loads((KEYS / f'{name}.json').read_text())['tensors']
  tensors = {n: tuple(shape) for n, shape in listed.items()}
  table, abstract = weights.table(RELEASED[name]), vlm.build(RELEASED[name]).abstract
  check_names(table, abstract, tensors)
  ours = {n: entry.shape for entry in entries(table, abstract) for n in entry.names}
  assert ours == {n: shape for n, shape in tensors.items() if not table.is_ignored(n)}
  ignored = [n for n in tensors if table.is_ignored(n)]
  assert all(n.endswith(('rotary_emb.inv_freq', 'position_ids')) for n in ignored)
  del tensors['model.vision_tower.slow_vision_tower.vision_tower.stages.2.blocks.26.weight']
  with pytest.raises(UserError, match=r'blocks\.26\.weight \(for vision/slow/stages/2'):
    check_names(table, abstract, tensors)


def test_stage_1_has_no_adapters_and_its_file_holds_the_trained_part():
  config = RELEASED['llava_hr_7b_stage1']
  abstract = vlm.build(config).abstract
  assert 'adapters' not in abstract['vision']
  part = {'projector': abstract['projector'], 'vision': {'align': abstract['vision']['align']}}
  names = {n for entry in entries(weights.stage1_table(), part) for n in entry.names}
  assert 'model.vision_tower.align_stages.0.fast_proj.weight' in names
  assert all('mm_projector' in n or 'align_stages.' in n for n in names) and len(names) == 8
  frozen = lambda stage, abstract: {path for path, group in groups_of(
    run_config.load(RunConfig, f'llava_hr:7b,{stage}').training, abstract).items() if group.frozen}
  everything = set(paths.flatten(abstract))
  assert everything - frozen('stage1', abstract) == set(paths.flatten(part))
  unread = frozen('stage2', vlm.build(RELEASED['llava_hr_7b']).abstract)
  assert unread and all(re.match('vision/(slow/head|fast/post_norm)/', path) for path in unread)


VARIANTS = {
  'released': {},
  'paper': dict(adapters=PAPER_ADAPTERS),
  'stage1': dict(adapters=None),
  'conv_mlp': dict(adapters=AdapterConfig(slow_map='conv', fast_map='mlp')),
  'low_to_high': dict(adapters=AdapterConfig(direction='low_to_high')),
  'concat': dict(fusion='concat'),
  'convnext': dict(fast=None, adapters=None),
  'clip': dict(slow=None, adapters=None),
  'queries': dict(slow=None, adapters=None, reduce='queries', queries=9),
}


@pytest.mark.parametrize('name', VARIANTS)
def test_round_trip_through_both_layouts(name, tmp_path):
  """Original layout -> ours (-> Orbax) -> original layout, bit for bit; so does the config."""
  config = replaced(tiny(), **VARIANTS[name])
  abstract, table = vlm.build(config).abstract, weights.table(config)
  rng = np.random.default_rng(0)
  theirs = {n: rng.normal(size=entry.shape).astype(np.float32)
            for entry in entries(table, abstract) for n in entry.names}
  params = import_tensors(theirs, table, abstract)
  if name == 'released':
    store.save_params(tmp_path / 'ours', params, to_dict(config))
    params = store.load_params(tmp_path / 'ours', abstract)
    assert from_dict(ModelConfig, store.load_config(tmp_path / 'ours')) == config
    assert any(n.endswith('stages.2.blocks.1.weight') for n in theirs)
    assert any('.head.pre_logits.' in n for n in theirs)  # unused, but not lost
  back = dict(export_tensors(params, table))
  assert back.keys() == theirs.keys()
  for key, value in theirs.items():
    np.testing.assert_array_equal(back[key], value)
  released = json.loads(json.dumps(weights.to_release(config)['config.json']))
  assert weights.from_release(released) == config


@pytest.mark.parametrize('name', RELEASED)
def test_released_config_goes_there_and_back(name):
  values = weights.to_release(RELEASED[name])['config.json']
  assert 'hrvlm' not in values  # the original's keys say everything
  assert weights.from_release(json.loads(json.dumps(values))) == RELEASED[name]


def test_released_config_as_published():
  """The keys section 12 of the key list names, and those of its language model."""
  values = {
    'model_type': 'llava', 'architectures': ['LlavaLlamaForCausalLM'], 'freeze_vision': False,
    'input_image_size': 1024, 'is_multipath_encoder': True,
    'vision_tower_slow': 'convnext_xxlarge.clip_laion2b_soup',
    'mm_vision_tower': 'openai/clip-vit-large-patch14-336', 'mm_projector_type': 'mlp2x_gelu',
    'mm_hidden_size': 1024, 'mm_vision_select_layer': -2, 'image_aspect_ratio': 'pad',
    'mm_use_im_start_end': False, 'mm_use_im_patch_token': False, 'delay_load': False,
    'rms_norm_eps': 1e-5, 'vocab_size': 32000, 'pad_token_id': 0, 'hidden_size': 5120,
    'intermediate_size': 13824, 'num_hidden_layers': 40, 'num_attention_heads': 40,
    'num_key_value_heads': 40, 'max_position_embeddings': 4096, 'hidden_act': 'silu'}
  assert weights.from_release(values) == RELEASED['llava_hr_x_13b']
  llava_15 = {k: v for k, v in values.items() if k not in (
    'is_multipath_encoder', 'vision_tower_slow', 'input_image_size', 'freeze_vision')}
  assert weights.from_release(llava_15) is None
  assert weights.from_release({'model_type': 'mc-llava'}) is None
  with pytest.raises(UserError, match="(?s)mm_vision_tower is 'x'.*vision_tower_slow is 'y'"):
    weights.from_release(values | {'mm_vision_tower': 'x', 'vision_tower_slow': 'y'})


def test_padding_and_cropping():
  """The worked example of the specification, and pixels that show what moved where."""
  assert pictures.pad_geometry(640, 480) == (640, (0, 80))
  assert host.square_geometry(640, 480, 1024) == ((1365, 1024), (170, 0))
  image = picture(64, 40)
  padded = np.asarray(host.to_square(image, 64))
  np.testing.assert_array_equal(padded[12:52], np.asarray(image))
  assert (padded[:12] == (122, 116, 104)).all() and (padded[52:] == (122, 116, 104)).all()
  tall = np.asarray(host.to_square(picture(40, 64), 64))
  assert (tall[:, :12] == (122, 116, 104)).all()
  cropped = np.asarray(host.to_square(image, 40, aspect='square'))
  np.testing.assert_array_equal(cropped, np.asarray(image)[:, 12:52])


@pytest.mark.parametrize('aspect', ['pad', 'square'])
def test_any_image_gives_the_same_shapes(aspect):
  config = dataclasses.replace(tiny(image_size=128).encoder, aspect=aspect)
  odd = [Image.new('L', (5, 7)), Image.new('P', (300, 2)), Image.new('RGBA', (1, 1)),
         Image.new('I;16', (9, 4)), picture(1, 200)]
  views = SYSTEM.views(odd, config)
  assert views['pixels'].shape == (5, 128, 128, 3) and views['pixels'].dtype == np.uint8
  assert views['tokens'].tolist() == [config.tokens] * 5
  none = SYSTEM.views([], config)
  assert none['pixels'].shape == (0, 128, 128, 3) and none['tokens'].shape == (0,)


def test_elongated_and_empty_images_are_refused():
  for aspect in ('pad', 'square'):
    with pytest.raises(UserError, match='40000x1 pixels is too elongated.*crop it first'):
      host.to_square(Image.new('RGB', (40000, 1)), 1024, aspect=aspect)
  with pytest.raises(UserError, match='image of 0x5'):
    SYSTEM.count(0, 5, tiny().encoder)


def test_batches_share_slots():
  config = tiny(image_size=128).encoder
  each = config.tokens
  rows = [SYSTEM.views([picture(30, 20, i) for i in range(n)], config) for n in (1, 0, 2)]
  batch = SYSTEM.batch(rows, config)
  assert batch['pixels'].shape == (6, 128, 128, 3) and batch['index'].shape == (3, 2 * each)
  assert batch['valid'].sum(axis=1).tolist() == [each, 0, 2 * each]
  np.testing.assert_array_equal(batch['index'][2], np.arange(each, 3 * each))
  np.testing.assert_array_equal(batch['pixels'][1:3], rows[2]['pixels'])
  text = SYSTEM.batch([rows[1]], config)
  assert text['pixels'].shape[0] == 1 and not text['valid'].any()
  with pytest.raises(UserError, match='3 views do not fit 2 view slots'):
    SYSTEM.batch(rows, config, slots=2)


def test_overlay_shows_gates():
  config, rng = tiny(image_size=64).encoder, np.random.default_rng(0)
  info = {'gates': np.array([[[0.5], [-0.5], [0.0]]]), 'injected': rng.random((1, 3, 2, 2))}
  image = SYSTEM.overlay(picture(50, 30), config, info)
  assert image.size[0] >= 192 and image.size[1] > image.size[0]
  colours = {colour for _, colour in image.getcolors(1 << 20)}
  assert (46, 139, 87) in colours and (178, 34, 34) in colours  # one gate opens, one inverts
  vector = {'gates': [rng.normal(size=(1, w)) for w in (4, 8)],
            'injected': [rng.random((1, g, g)) for g in (4, 2)]}
  assert SYSTEM.overlay(picture(50, 30), config, vector).size[0] >= 192
  assert SYSTEM.overlay(picture(50, 30), config, {}).size == (64, 64)
