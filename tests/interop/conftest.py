"""Models of ours beside their folders for transformers, each made once by a worker."""

import functools

import pytest


@pytest.fixture(scope='session')
def pair_of(tmp_path_factory):
  """Name of a tiny model -> our model and its folder."""
  from tests.interop.pytorch import Pair
  from tests.interop.tiny_models import MODELS, PS3_ALONE

  @functools.cache
  def make(name):
    config = PS3_ALONE if name == 'ps3_alone' else MODELS[name]
    return Pair.make(config, tmp_path_factory.mktemp('pair'))

  return make


@pytest.fixture
def pair(name, pair_of):
  """The pair of the test's parameter `name`."""
  return pair_of(name)
