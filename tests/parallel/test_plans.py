"""The cases of docs/plans.md: their state is cut over the mesh, their reports are what is shown."""

import importlib.util
import math
import pathlib
import re
import shlex

import jax
import pytest

from hrvlm_jax.parallel import rules
from hrvlm_jax.parallel.mesh import AXES, batch_shards
from hrvlm_jax.parallel.topology import parse
from hrvlm_jax.systems.contract import sharding_rules
from hrvlm_jax.training import run_config
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.optimizer import groups_of
from hrvlm_jax.training.program import run_dtypes
from hrvlm_jax.training.step import init_state
from hrvlm_jax.vlm import model as vlm

REPO = pathlib.Path(__file__).resolve().parents[2]


def load_script():
  spec = importlib.util.spec_from_file_location('plans', REPO / 'scripts' / 'plans.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


PLANS = load_script()


def parts(arguments):
  """(run config, abstract mesh) of a case."""
  words = shlex.split(arguments)
  option = lambda name: words[words.index(name) + 1]
  overrides = [word[len('--config.'):].split('=', 1) for word in words
               if word.startswith('--config.')]  # fmt: skip
  config = run_config.load(RunConfig, str(REPO / option('--config')),
                           [tuple(pair) for pair in overrides])  # fmt: skip
  assert option('--config').endswith(option('--topology'))  # the recipe's own mesh for these chips
  slices = int(option('--slices')) if '--slices' in words else 1
  mesh = config.mesh.resolve(parse(option('--topology'), slices=slices).devices)
  return config, jax.sharding.AbstractMesh(tuple(mesh.shape.values()), AXES)


@pytest.mark.parametrize('name', PLANS.CASES)
def test_no_large_leaf_stays_whole_without_a_reason(name):
  """Parameters and optimizer state of the real train step."""
  config, mesh = parts(PLANS.CASES[name])
  t = config.training
  assert t.batch_size // t.accumulate % batch_shards(mesh) == 0
  abstract = vlm.build(config.model).abstract
  groups = groups_of(t, abstract)
  state = jax.eval_shape(lambda p: init_state(t, groups, p), run_dtypes(t, groups, abstract))
  table = sharding_rules(config.model)
  shardings = rules.state_shardings(state, mesh, rules=table)  # refuses what nobody excuses
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  cut = kept = 0  # bytes on one device
  for (path, leaf), place in zip(leaves, jax.tree.leaves(shardings), strict=True):
    size = leaf.dtype.itemsize * math.prod(place.shard_shape(leaf.shape))
    if any(place.spec):
      cut += size
      continue
    kept += size
    if size >= rules.SMALL_BYTES:
      names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
      rule = next(r for r in table if re.fullmatch(r.pattern, '/'.join(names[1:])))
      assert rule.why, names
  assert cut and kept < 64e6


def test_the_page_shows_the_reports():
  """docs/plans.md is made of docs/plans, and every plan in it fits and compiled in time."""
  reports, before = PLANS.kept()
  assert reports and set(PLANS.MARKS) <= set(PLANS.CASES) and set(before) == set(PLANS.MARKS)
  assert (REPO / 'docs' / 'plans.md').read_text() == PLANS.page(reports, before)
  for name, report in reports.items():
    assert report['memory']['fits'] and report['memory']['kind'] == 'scheduled', name
    assert f'hrvlm plan {PLANS.CASES[name]}' == report['command'] or PLANS.is_missing(name)
    step, account = report['step'], report['account']
    assert step['seconds'] < step['likely_seconds'] and len(account['places']) == 10
    groups = sum(row['seconds'] for row in account['groups'].values())
    assert groups == pytest.approx(step['seconds'])


def test_a_missed_mark_has_its_account():
  reports, _ = PLANS.kept()
  lines = PLANS._missed(reports)
  missed = [name for name, mark in PLANS.MARKS.items()
            if name in reports and reports[name]['step']['seconds'] > mark]
  assert len(lines) == len(missed)
  for name, line in zip(missed, lines, strict=True):
    assert name in line and 'products' in line
    assert reports[name]['account']['beyond_products'] < 0.25 or PLANS.TRIED[name]
