"""Token maps: what systems say of themselves, and what pooling makes of several maps."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.systems import registry
from hrvlm_jax.systems.baselines import reduced, resamplers
from hrvlm_jax.systems.contract import Count, System
from hrvlm_jax.systems.grid import Grid, TokenMap


def of(name, **options):
  encoder = registry.get(name).tiny().encoder
  return registry.get(name).grid(dataclasses.replace(encoder, **options))


def test_what_systems_say():
  assert of('single_view').maps == (TokenMap(8, 8),)
  assert of('single_view', last_tokens=9) is None
  assert of('mc_llava') is None and of('tiling') is None and of('s2_dynamic') is None
  assert of('anyres').whole == TokenMap(5, 5)  # the thumbnail
  assert of('llava_hr').background == (122, 116, 104)
  assert of('llava_hr', aspect='square').whole is None  # a crop does not show the whole image
  assert of('s2', fit='crop').whole is None and of('s2', fit='crop').maps[0].rows == 5
  assert of('reduced') is None  # resampled
  assert of('vila_hd').whole.start == of('ps3').whole.start == 0


def test_pheye_places_its_tiles_down_the_columns():
  maps = of('pheye').maps
  assert [m.start for m in maps] == [1 + 26 * i for i in range(5)]  # a class token before each
  assert [m.box for m in maps[1:]] == [(0, 0, .5, .5), (0, .5, .5, 1), (.5, 0, 1, .5),
                                       (.5, .5, 1, 1)]


@pytest.mark.parametrize('name', registry.names())
def test_maps_lie_inside_the_tokens(name):
  system = registry.get(name)
  encoder = system.tiny().encoder
  grid, tokens = system.grid(encoder), system.tokens(encoder)
  for one in (grid.maps if grid else ()):
    assert one.tokens.stop <= system.count(64, 64, encoder).tokens
  assert tokens is None or tokens == system.count(7, 300, encoder).tokens


def test_a_padded_picture_is_what_the_map_shows():
  grid = of('single_view', fit='pad')
  picture = grid.picture(Image.new('RGB', (40, 20), 'red'))
  assert picture.size == (40, 40) and picture.getpixel((0, 0)) == (127,) * 3
  assert picture.getpixel((0, 10)) == (255, 0, 0)


@dataclasses.dataclass(frozen=True)
class RingsConfig:
  """Four rings of 5 x 5 tokens around the middle of an image: 100, a square number."""

  width: int = 8
  told: bool = True


class Rings(System):
  """A system of several views whose tokens could be taken for one map."""

  config, encoder = RingsConfig, object

  def count(self, width, height, config):
    return Count(4, 100)

  def views(self, images, config):
    return {'pixels': np.zeros((4 * len(images), 5, 5, 3), np.uint8),
            'tokens': np.full(len(images), 100, np.int32)}

  def grid(self, config):
    if not config.told:
      return None
    return Grid(view=5, maps=tuple(
      TokenMap(5, 5, 25 * i, (i / 8, i / 8, 1 - i / 8, 1 - i / 8)) for i in range(4)))


@pytest.fixture
def rings(monkeypatch):
  monkeypatch.setattr(registry, '_MODULES', dict(registry._MODULES))
  registry.register('rings', Rings())


def test_pooling_stays_within_each_map(rings):
  config = reduced.ReducedConfig(inner='rings', encoder=RingsConfig(), step=reduced.Pool(factor=5))
  assert config.tokens == 4 and [m.start for m in config.grid.maps] == [0, 1, 2, 3]
  x = jnp.repeat(jnp.arange(4.0), 25)[None, :, None]
  pooled = resamplers.pool_maps(x, [(5, 5)] * 4, 5)
  np.testing.assert_allclose(pooled[0, :, 0], [0, 1, 2, 3], atol=1e-6)  # no border is crossed


def test_tokens_without_a_map_are_not_pooled(rings):
  with pytest.raises(ValueError, match='needs to know how the tokens lie.*100 of rings'):
    reduced.ReducedConfig(inner='rings', encoder=RingsConfig(told=False), step=reduced.Pool())
  step = reduced.SingleLayer(queries=4, width=8, heads=2)
  with pytest.raises(ValueError, match='step single_layer needs to know how the tokens lie'):
    reduced.ReducedConfig(inner='rings', encoder=RingsConfig(told=False), step=step)
  assert len(reduced.ReducedConfig(inner='rings', encoder=RingsConfig(), step=step).key_maps) == 4
  pheye = registry.get('pheye').tiny().encoder
  with pytest.raises(ValueError, match='form no map'):  # class tokens stand between its maps
    reduced.ReducedConfig(inner='pheye', encoder=pheye, step=reduced.Pool())


def test_the_picture_shows_the_maps(rings):
  drawn = registry.get('rings').overlay(Image.new('RGB', (80, 80)), RingsConfig(), {})
  assert drawn.getpixel((10, 40)) == drawn.getpixel((0, 40)) == (255, 80, 80)
  assert drawn.getpixel((5, 40)) == (0, 0, 0)
