"""Any encoder x fusion x language model is exported and comes back, weights and settings."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest

from hrvlm_jax.checkpoint import store
from hrvlm_jax.cli import main as cli
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.interop import layouts
from hrvlm_jax.interop.convert import convert, recognise
from hrvlm_jax.language import config as language
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.systems.fusion import CrossAttentionFusion, PrefixFusion, TwoPassFusion
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import model_config
from tests.levels import rows
from tests.systems.test_combinations import width_of

TEXT = dict(vocab_size=264, depth=2, heads=4, mlp_width=96, max_positions=512)


def changed(system, *, encoder=None, projector=None, **fields):
  model = registry.get(system).tiny()
  if encoder:
    fields['encoder'] = dataclasses.replace(model.encoder, **encoder)
  if projector:
    fields['projector'] = dataclasses.replace(model.projector, **projector)
  return dataclasses.replace(model, **fields)


def text(system, family, **more):
  return getattr(language, family)(width=registry.get(system).tiny().text.width, **TEXT, **more)


# Model -> what the original's layout would lose of it.
MODELS = {
  'llava_hr with qwen2': (
    changed('llava_hr', text=text('llava_hr', 'qwen2', kv_heads=2)), "text.family = 'qwen2'"),
  'mc_llava by cross-attention': (
    changed('mc_llava', image_token=None, projector=None,
            fusion=CrossAttentionFusion(width=96, interval=1)), "fusion.kind = 'cross_attention'"),
  'mc_llava normalised otherwise': (
    changed('mc_llava', encoder=dict(mean=(0.1, 0.2, 0.3))), 'encoder.mean = [0.1, 0.2, 0.3]'),
  'mc_llava with three layers': (
    changed('mc_llava', projector=dict(depth=3)), 'projector.depth = 3'),
  'single_view with one layer': (
    changed('single_view', projector=dict(kind='linear', depth=1)), 'projector.depth = 1'),
  'vila_hd in another chat': (changed('vila_hd', chat='vicuna_v1'), "chat = 'vicuna_v1'"),
}
FIRST = ('llava_hr with qwen2', 'mc_llava by cross-attention')


@pytest.mark.parametrize('name', rows('interop', MODELS, first=FIRST))
def test_a_combination_comes_back(name, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  config, field = MODELS[name]
  fn = vlm.build(config)
  params = jax.device_get(jax.jit(fn.init)(jax.random.key(3)))
  files = {f'tokenizer/{n}': data for n, data in tokenizer_of('byte').files.items()}
  store.save_params('ours', params, {'model': to_dict(config)}, extra_files=files)
  assert cli.main(['export', '--checkpoint', 'ours', '--to', 'out']) == 0
  assert field in capsys.readouterr().out
  values = json.loads((tmp_path / 'out/config.json').read_text())
  assert (values['model_type'], values['format']) == (f'hrvlm_{config.system}', 'hrvlm-1')
  assert recognise('out') == config
  convert('out', 'back')
  assert model_config('back') == config
  back = paths.flatten(store.load_params('back', fn.abstract))
  for path, leaf in paths.flatten(params).items():
    np.testing.assert_array_equal(back[path], leaf, err_msg=path)


# Every encoder, joined in every way with every language model.
TEXTS = [getattr(language, family)(width=128, **TEXT)
         for family in ('phi', 'llama', 'qwen2', 'gpt2')]


def combinations(system):
  """{words: model} of an encoder."""
  tiny, found = registry.get(system).tiny(), {}
  width = width_of(system)
  cross = lambda inside: dict(image_token=None, fusion=CrossAttentionFusion(
    width=width, interval=1, inside=inside))
  own = getattr(tiny.encoder, 'projector', None) is not None  # of the language model's width
  ways = {'prefix': dict(projector=None if own else ProjectorConfig(n_in=width, n_out=128)),
          'cross-attention': cross(False), 'cross-attention inside': cross(True)}
  if system == 'vila_hd':
    ways['two passes'] = dict(fusion=TwoPassFusion())
  for (way, fields), text in itertools.product(ways.items(), TEXTS):
    if way == 'cross-attention inside' and text.parallel_block:  # nothing lies inside its layers
      continue
    found[f'{way}, {text.family}'] = ModelConfig(
      system=system, encoder=tiny.encoder, text=text, **fields)
  return found


@pytest.mark.full('interop')
@pytest.mark.parametrize('system', registry.names())
def test_every_combination_comes_back(system, tmp_path, monkeypatch):
  """By the commands, in whichever layout `export` chooses: the same model, bit for bit."""
  monkeypatch.chdir(tmp_path)
  rng, models = np.random.default_rng(0), combinations(system)
  files = {f'tokenizer/{n}': data for n, data in tokenizer_of('byte').files.items()}
  for name, config in models.items():
    fn = vlm.build(config)
    params = {path: rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)
              for path, leaf in paths.flatten(fn.abstract).items()}
    for folder in ('ours', 'out', 'back'):
      shutil.rmtree(folder, ignore_errors=True)
    store.save_params('ours', paths.unflatten(params), {'model': to_dict(config)},
                      extra_files=files)
    assert cli.main(['export', '--checkpoint', 'ours', '--to', 'out']) == 0, name
    assert cli.main(['convert', '--from', 'out', '--to', 'back']) == 0, name
    assert model_config('back') == config, name
    back = paths.flatten(store.load_params('back', fn.abstract))
    assert back.keys() == params.keys(), name
    for path, leaf in params.items():
      np.testing.assert_array_equal(back[path], leaf, err_msg=f'{name}: {path}')


def test_what_an_original_holds_stays_in_its_layout():
  for name in registry.names():
    system = registry.get(name)
    for config in (system.tiny(), *system.released.values()):
      assert layouts.lost(config) == [], (name, config)


def test_pheye_by_prefix_is_no_traceback():
  tiny = registry.get('pheye').tiny()
  model = dataclasses.replace(tiny, fusion=PrefixFusion())
  assert layouts.lost(model) == ["fusion.kind = 'prefix'"]


@pytest.mark.parametrize('name', ['anyres', 's2'])
def test_tensors_without_a_name_are_lost_too(name):
  """The whole config comes back, but the original's table knows no cross-attention."""
  tiny = registry.get(name).tiny()
  model = dataclasses.replace(tiny, image_token=None, fusion=CrossAttentionFusion(
    width=width_of(name), interval=1))
  assert layouts.lost(tiny, vlm.build(tiny).abstract) == []
  assert layouts.lost(model, vlm.build(model).abstract) == ["fusion.kind = 'cross_attention'"]
