"""Right inputs, from which hostile ones are made."""

import pytest

from tests.faults import verbs


@pytest.fixture(scope='session')
def world(tmp_path_factory):
  return verbs.made(tmp_path_factory.mktemp('faults'))
