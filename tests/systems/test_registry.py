"""Every system honours the contract: one body over all of them."""

import json
import sys

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint.rows import entries
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import Count, ModelConfig, System
from hrvlm_jax.vision.vit import CLIP_L_336
from hrvlm_jax.vlm import model as vlm


@pytest.fixture(params=registry.names())
def system(request):
  return registry.get(request.param)


def test_configs_survive_json(system):
  for config in (system.tiny(), *system.released.values()):
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_released_sizes_build_abstractly_and_every_parameter_has_a_name(system):
  for config in (system.tiny(), *system.released.values()):
    assert list(entries(system.table(config), vlm.build(config).abstract))


def test_views_agree_with_the_count(system):
  config = system.tiny().encoder
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), np.uint8))
  views = system.views([image], config)
  expected = system.count(*image.size, config)
  assert isinstance(expected, Count)
  assert views['tokens'].tolist() == [expected.tokens]
  batch = system.batch([views, views], config)
  assert {len(value) for value in batch.values()}  # arrays with a leading axis


def test_release_configs_round_trip(system):
  config = system.tiny()
  files = json.loads(json.dumps(system.to_release(config)))
  found = {name: registry.get(name).from_release(files['config.json'])
           for name in registry.names()}
  assert found.pop(system.name) == config
  assert all(other is None for other in found.values()), 'another system takes it for its own'


@pytest.mark.parametrize('name', ['single_view', 'anyres', 's2'])
def test_a_baseline_names_the_tower_that_llavas_code_builds(name):
  """Without `mm_vision_tower` that code makes a model that sees nothing."""
  system = registry.get(name)
  release = next(config for config in system.released.values()
                 if config.encoder.vision == CLIP_L_336)
  found = system.to_release(release)['config.json']
  assert found['mm_vision_tower'] == 'openai/clip-vit-large-patch14-336'
  assert found['unfreeze_mm_vision_tower'] is (name != 's2')
  assert 'mm_vision_tower' not in system.to_release(system.tiny())['config.json']


def test_unknown_systems_are_refused_with_the_nearest_name():
  with pytest.raises(UserError, match='nearest known: mc_llava'):
    registry.get('mcllava')


def test_a_system_of_ones_own_by_a_call_and_by_the_environment(monkeypatch, tmp_path):
  monkeypatch.setattr(registry, '_MODULES', dict(registry._MODULES))
  own = System(config=int, encoder=int, count=len, views=len)
  registry.register('mine', own)
  assert registry.get('mine') is own and own.name == 'mine' and 'mine' in registry.names()
  with pytest.raises(UserError, match="'yours': its object is named 'mine'"):
    registry.register('yours', own)
    registry.get('yours')

  (tmp_path / 'a_system_elsewhere.py').write_text(
    'from hrvlm_jax.systems.contract import System\n'
    'SYSTEM = System(config=int, encoder=int, count=len)\n')
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setenv('HRVLM_SYSTEMS', 'elsewhere=a_system_elsewhere,lost=no_such_module')
  with pytest.raises(UserError, match="'elsewhere': views: missing, every system must define it"):
    registry.get('elsewhere')
  sys.modules['a_system_elsewhere'].SYSTEM.views = len
  assert registry.get('elsewhere').name == 'elsewhere'
  with pytest.raises(UserError, match="'lost': found No module named 'no_such_module'"):
    registry.get('lost')
  monkeypatch.setenv('HRVLM_SYSTEMS', 'elsewhere')
  with pytest.raises(UserError, match="found 'elsewhere', expected name=package.module"):
    registry.names()


def test_a_part_that_no_system_has_is_refused():
  with pytest.raises(TypeError, match="no part 'vews'"):
    System(vews=len)
