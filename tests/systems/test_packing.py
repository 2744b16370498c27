"""One packer: what every system declares, it makes; a part of a batch can be made alone."""

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.systems import packing, registry
from hrvlm_jax.systems.contract import Count, System

DECLARED = [name for name in registry.names() if registry.get(name).shift is not None]


def noise(width, height, seed=0):
  return Image.fromarray(np.random.default_rng(seed).integers(
    0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize('name', DECLARED)
def test_views_and_batches_are_as_declared(name):
  system = registry.get(name)
  encoder = system.tiny().encoder
  declared = system.packing(encoder)
  example = system.views([noise(90, 130)], encoder)
  packing.check(example, declared.example, what=name)
  packing.check(system.batch([example, example], encoder), declared.batch, what=name)


@pytest.mark.parametrize('name', DECLARED)
def test_parts_behind_each_other_are_the_whole(name):
  system = registry.get(name)
  encoder = system.tiny().encoder
  rows = [system.views([noise(*size)], encoder) for size in ((90, 130), (41, 40), (300, 70))]
  used = sum(system.packing(encoder).views_of(row) for row in rows[:2])
  most = used + 20
  whole = system.batch(rows, encoder, slots=most)
  first = system.batch(rows[:2], encoder, slots=used)
  second = system.shift(system.batch(rows[2:], encoder, slots=most - used), encoder, used)
  for key, value in whole.items():
    parts = np.concatenate([first[key], second[key]])
    if key == 'index':  # what is not valid is never read
      value, parts = (np.where(whole['valid'], x, 0) for x in (value, parts))
    np.testing.assert_array_equal(parts, value)


def test_views_that_are_not_as_declared_are_named():
  system = registry.get('vila_hd')
  encoder = system.tiny().encoder
  example = system.views([noise(9, 9)] * 2, encoder)
  del example['first']
  example |= {'boxes': example['boxes'][:1], 'more': np.zeros(3),
              'pixels': example['pixels'].astype(np.float32)}
  with pytest.raises(UserError) as caught:
    system.batch([example], encoder)
  assert str(caught.value).splitlines() == [
    'views of system vila_hd: 4 problems',
    '  first: missing, expected int32[views]',
    '  pixels: found float32[2 160 160 3], expected uint8[views 160 160 3] (views = 2)',
    '  boxes: found int32[1 4], expected int32[views 4] (views = 2)',
    '  more: found float64[3], expected no array of this name',
  ]


class Rings(System):
  """Four views of an image, without a declaration."""

  config, encoder = int, int

  def count(self, width, height, config):
    return Count(4, 4 * config)

  def views(self, images, config):
    return {'pixels': np.zeros((4 * len(images), 5, 5, 3), np.uint8),
            'sizes': np.array([image.size for image in images], np.float32).reshape(-1, 2),
            'tokens': np.full(len(images), 4 * config, np.int32)}


def test_a_system_with_equal_views_need_not_declare_them():
  system = Rings().complete('rings')
  assert system.tokens(25) == 100
  images = [noise(7, 3), noise(4, 4)]
  batch = system.batch([system.views(images, 25), system.views(images[:1], 25)], 25)
  assert {key: value.shape for key, value in batch.items()} == {
    'pixels': (16, 5, 5, 3), 'sizes': (2, 2, 2), 'index': (2, 200), 'valid': (2, 200)}
  assert batch['index'][1, :100].tolist() == list(range(200, 300))
  assert batch['valid'].sum(axis=1).tolist() == [200, 100]
  assert batch['sizes'][0].tolist() == [[7, 3], [4, 4]]


def test_a_system_that_must_declare_its_views_is_told():
  class Odd(Rings):
    def count(self, width, height, config):
      return Count(4, 4 * config + 1)

  with pytest.raises(UserError, match=r"'odd': its views do not declare themselves.*`packing`"):
    Odd().complete('odd').batch([], 25)
