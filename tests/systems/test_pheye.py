"""Pheye on the host and its released layout: views, names, configs, overlay."""

import json
import pathlib

import jax
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint import store
from hrvlm_jax.checkpoint.rows import check_names, entries, export_tensors, import_tensors
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.layers import LoRA
from hrvlm_jax.language.config import config_from_hf
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.pheye import views as host, weights
from hrvlm_jax.systems.pheye.config import RELEASED, PheyeConfig, model, tiny
from hrvlm_jax.vlm import model as vlm

KEYS = pathlib.Path(__file__).parent.parent / 'goldens' / 'release_keys'
SYSTEM = registry.get('pheye')


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
  return Image.fromarray(pixels)


def random_checkpoint(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
  """Random tensors under every name of the original, aliases equal."""
  rng, found = np.random.default_rng(seed), {}
  for entry in entries(weights.table(config), vlm.build(config).abstract):
    value = rng.normal(size=entry.shape).astype(np.float32)
    found |= dict.fromkeys(entry.names, value)
  return found


def test_tiles_run_down_the_first_column_first():
  assert host.tile_boxes(224, 2) == [
    (0, 0, 224, 224), (0, 224, 224, 448), (224, 0, 448, 224), (224, 224, 448, 448)]
  assert [box[:2] for box in host.tile_boxes(224, 3)] == [
    (0, 0), (0, 224), (0, 448), (224, 0), (224, 224), (224, 448), (448, 0), (448, 224), (448, 448)]


def test_views_of_any_image_have_one_shape():
  config = tiny(level=3).encoder
  shapes = {SYSTEM.views([image], config)['pixels'].shape for image in (
    picture(97, 31), picture(1, 300), picture(40, 40),
    Image.new('RGBA', (20, 30)), Image.new('L', (5, 7)))}
  assert shapes == {(10, 40, 40, 3)}
  assert SYSTEM.count(97, 31, config) == SYSTEM.count(1, 300, config)
  assert SYSTEM.count(5, 7, config).tokens == 10 * 26
  assert SYSTEM.views([picture(9, 9)], config)['tokens'].tolist() == [260]


def test_a_tile_is_its_part_of_the_enlarged_image():
  """A picture of the enlarged size is cut without resizing."""
  config = tiny().encoder
  image = picture(80, 80)
  views = SYSTEM.views([image], config)['pixels']
  whole = np.asarray(image)
  np.testing.assert_array_equal(views[2], whole[40:, :40])  # below the first, not beside it
  np.testing.assert_array_equal(views[3], whole[:40, 40:])


def test_batch_and_its_refusals():
  config = tiny().encoder
  examples = [SYSTEM.views([picture(30, 50, i)], config) for i in range(3)]
  batch = SYSTEM.batch(examples, config)
  assert batch['pixels'].shape == (3, 5, 40, 40, 3) and batch['pixels'].dtype == np.uint8
  assert SYSTEM.batch([], config)['pixels'].shape == (0, 5, 40, 40, 3)
  with pytest.raises(UserError, match='3 rows of pheye: 15 views do not fit 14 view slots'):
    SYSTEM.batch(examples, config, slots=14)
  for images in ([], [picture(9, 9)] * 2):
    with pytest.raises(UserError, match=f'exactly one image per prompt, got {len(images)}'):
      SYSTEM.views(images, config)
  with pytest.raises(UserError, match='both sides must be at least 1'):
    SYSTEM.count(0, 4, config)


@pytest.mark.parametrize('name', sorted(RELEASED))
def test_released_names_map_one_to_one(name):
  """Every tensor of the release has a place, every parameter a tensor, shapes included."""
  config = RELEASED[name]
  release = json.loads((KEYS / f'{name}.json').read_text())
  sizes = release['config']
  assert config == model(
    PheyeConfig(vision=weights.vision_from_hf(sizes['vision']), level=sizes['level']),
    config_from_hf({'model_type': 'phi', **sizes['text']}), interval=sizes['cross_interval'],
    from_layer=sizes['from_layer'], reduce=sizes['reduce'])
  abstract = vlm.build(config).abstract
  shapes = {key: tuple(shape) for key, shape in release['tensors'].items()}
  table = weights.table(config)
  check_names(table, abstract, shapes, what=name)
  ours = {n: entry.shape for entry in entries(table, abstract) for n in entry.names}
  assert ours == {key: shape for key, shape in shapes.items() if not table.is_ignored(key)}
  assert len(ours) == {4: 2143, 2: 2311}[sizes['cross_interval']]


def test_parameter_counts_of_the_paper():
  """2.35 and 2.63 billion; 295M and 578M trained without the first set."""
  totals = {}
  for name in ('pheye_x4_448', 'pheye_x2_448'):
    flat = paths.flatten(vlm.build(RELEASED[name]).abstract)
    size = lambda keep: sum(leaf.size for path, leaf in flat.items() if keep(path))  # noqa: B023
    trained = size(lambda p: p.startswith(('fusion/', 'vision/norm', 'vision/sub_image'))
                   or p.endswith('_second'))
    totals[name] = size(lambda p: True), trained, size(lambda p: p.endswith('_first'))
  assert totals == {'pheye_x4_448': (2_350_086_176, 295_136_192, 5_913_184),
                    'pheye_x2_448': (2_633_361_440, 578_411_456, 5_913_184)}


@pytest.mark.parametrize('first', [True, False])
def test_round_trip_is_bit_exact(first, tmp_path):
  """Original layout -> ours -> checkpoint store -> original layout, aliases and unused rows too."""
  config = tiny()
  if not first:
    config = model(PheyeConfig(vision=config.encoder.vision, level=3, first=None), config.text,
                   interval=4)
  abstract, table = vlm.build(config).abstract, weights.table(config)
  original = random_checkpoint(config)
  assert any('.first.' in name for name in original) == first
  for alias in ('lang_encoder.old_decoder_blocks.0.', 'lang_encoder.cross_attn_layers.3.',
                'vision_encoder.norm_lvl_3.', 'vision_encoder.connector.',
                'vision_encoder.vision_model.base_model.model.post_layernorm.'):
    assert any(name.startswith(alias) for name in original), alias
  params = import_tensors(original, table, abstract)
  store.save_params(tmp_path / 'ours', params, config={})
  restored = store.load_params(tmp_path / 'ours', abstract)
  exported = dict(export_tensors(restored, table))
  assert set(exported) == set(original)
  for name, value in original.items():
    assert exported[name].dtype == value.dtype
    np.testing.assert_array_equal(exported[name], value, err_msg=name)


def test_aliases_either_one_or_equal():
  config = tiny()
  abstract, table = vlm.build(config).abstract, weights.table(config)
  original = random_checkpoint(config)
  canonical = import_tensors(original, table, abstract)
  for dropped in (('old_decoder_blocks.', 'cross_attn_layers.'),
                  ('.decoder_layer.', '.cross_attn_layer.')):
    half = {n: v for n, v in original.items() if not any(d in n for d in dropped)}
    assert len(half) < len(original)
    jax.tree.map(np.testing.assert_array_equal, import_tensors(half, table, abstract), canonical)
  name = 'lang_encoder.cross_attn_layers.1.attn.to_q.bias'
  with pytest.raises(UserError, match='differs from .*cross_attn_layer.attn.to_q.bias'):
    import_tensors(original | {name: original[name] + 1}, table, abstract)
  del original[name], original['lang_encoder.model.layers.1.cross_attn_layer.attn.to_q.bias']
  original['vision_encoder.norm_lvl_4.bias'] = np.zeros(3)
  with pytest.raises(UserError) as error:
    import_tensors(original, table, abstract)
  assert 'missing tensor lang_encoder.model.layers.1.cross_attn_layer.attn.to_q.bias' in str(error)
  assert 'unexpected tensor vision_encoder.norm_lvl_4.bias' in str(error)


def test_config_of_a_release_and_back():
  released = {
    'encoder': 'apple/DFN5B-CLIP-ViT-H-14', 'decoder': 'miguelcarv/phi-1_5-slimorca',
    'tokenizer': 'miguelcarv/phi-1_5-slimorca', 'first_level': True, 'level': 3,
    'cross_interval': 2, 'from_layer': 0, 'reduce': 1, 'encoder_dtype': 'torch.float32',
    'decoder_dtype': 'torch.float32', 'other_params_dtype': 'torch.float32'}
  config = weights.from_release(released)
  assert config == RELEASED['pheye_x2_672']
  written = json.loads(json.dumps(weights.to_release(config)['config.json']))
  assert {key: written[key] for key in released} == released
  assert weights.from_release(written) == config
  custom = model(PheyeConfig(vision=tiny().encoder.vision, first=None, train_first_adapter=False,
                             second=LoRA(rank=2, alpha=3.0, name='second')),
                 tiny().text, interval=1, from_layer=2, reduce=2)
  again = weights.from_release(json.loads(json.dumps(weights.to_release(custom)['config.json'])))
  assert again == custom
  assert from_dict(ModelConfig, to_dict(custom)) == custom
  assert weights.from_release({'model_type': 'llava'}) is None
  with pytest.raises(UserError) as error:
    weights.from_release(released | {'encoder': 'x', 'encoder_dtype': 'torch.bfloat16'})
  assert "encoder 'x' is of unknown size" in str(error) and 'dtypes must be equal' in str(error)
  with pytest.raises(UserError, match='level is 2, hrvlm.encoder says 3'):
    weights.from_release(written | {'level': 2})


@pytest.mark.parametrize('options, message', [
  (dict(level=1), 'level must be at least 2'),
  (dict(level=5), 'level 5 needs 26 rows of positions, sub_image_rows is 21'),
  (dict(second=LoRA(rank=4, alpha=8.0)), "named 'first' and 'second'"),
  (dict(first=LoRA(rank=4, alpha=8.0, name='first', frozen=True)),
   'first.frozen: set train_first_adapter=False'),
])
def test_config_refuses(options, message):
  with pytest.raises(ValueError, match=message):
    PheyeConfig(**options)


def test_a_decoder_without_blocks_is_refused():
  with pytest.raises(ValueError, match='no decoder layer gets a cross-attention block'):
    model(tiny().encoder, tiny().text, interval=5)


def test_overlay_shows_where_attention_went():
  config = tiny().encoder
  image = Image.new('RGB', (120, 90), (100, 100, 100))
  grid = SYSTEM.overlay(image, config, {})
  share = np.array([[0.2, 0.1, 0.1, 0.1, 0.5]], np.float32)
  drawn = np.asarray(SYSTEM.overlay(image, config, {'attention_share': share})).astype(int)
  assert grid.size == image.size and np.asarray(image).max() == 100
  # The last tile is the right lower one: the reddest.
  red = lambda y, x: drawn[y, x, 0] - drawn[y, x, 1]
  assert red(80, 110) > red(80, 10) > 0 and red(80, 110) > red(10, 110) > 0
  with pytest.raises(ValueError, match='3 values, expected 5'):
    SYSTEM.overlay(image, config, {'attention_share': np.ones(3)})
