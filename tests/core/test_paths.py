"""Paths and ordered rules."""

import pytest

from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError

TREE = {'vision': {'q': {'kernel': 1, 'bias': 2}}, 'head': {'kernel': 3}}


def test_flatten_and_back():
  flat = paths.flatten(TREE)
  assert flat == {'vision/q/kernel': 1, 'vision/q/bias': 2, 'head/kernel': 3}
  assert paths.unflatten(flat) == TREE


def test_first_match_wins_and_must_match_the_whole_path():
  rules = [('vision/.*/bias', 'a'), ('.*/bias', 'b'), ('.*/kernel', 'c')]
  found = paths.match_rules(rules, paths.flatten(TREE), what='group')
  assert found == {'vision/q/kernel': 'c', 'vision/q/bias': 'a', 'head/kernel': 'c'}


def test_every_uncovered_path_is_listed():
  with pytest.raises(UserError) as error:
    paths.match_rules([('head', 0)], paths.flatten(TREE), what='decay rule')
  for path in paths.flatten(TREE):
    assert f'{path}: no decay rule' in str(error.value)


def test_map_with_path_keeps_the_structure():
  assert paths.map_with_path(lambda path, leaf: f'{path}={leaf}', TREE) == {
    'vision': {'q': {'kernel': 'vision/q/kernel=1', 'bias': 'vision/q/bias=2'}},
    'head': {'kernel': 'head/kernel=3'}}
