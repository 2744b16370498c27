"""The steps of docs/plans.md: their stored programs, bounds of what they take, and the compiler.

The layers of a step are scanned, so that its program holds each kind of layer once.
"""

import json
import pathlib

import pytest

from hrvlm_jax.parallel.compiler import compiler_options
from hrvlm_jax.parallel.topology import chips
from hrvlm_jax.planning import explain, schedule
from tests.parallel.test_plans import PLANS, REPO

FOLDER = REPO / 'docs' / 'plans'
BOUNDS = json.loads((FOLDER / 'bounds.json').read_text())
REPORTS, _ = PLANS.kept()
BEFORE = json.loads((FOLDER / 'before' / 'steps.json').read_text())


def read(path: pathlib.Path, chip: str) -> dict:
  assert path.stat().st_size < 2 << 20
  text = explain.load(path)
  assert '"/' not in text[:text.index('ENTRY')]  # no folders of the machine that compiled it
  return explain.summary(schedule.read(text, chip))


def share(account: dict, group: str) -> float:
  return account['groups'].get(group, {'share': 0.0})['share']


@pytest.mark.parametrize('name', REPORTS)
def test_a_stored_step_is_the_reported_one_and_within_its_bounds(name):
  report = json.loads((FOLDER / f'{name}.json').read_text())
  found = read(FOLDER / 'programs' / f'{name}.txt.xz', report['topology'].split(':')[0])
  assert found['seconds'] == pytest.approx(report['step']['seconds'])
  for group, row in report['account']['groups'].items():
    assert found['groups'][group]['seconds'] == pytest.approx(row['seconds'])
  bound = BOUNDS[name]
  assert found['seconds'] <= bound['seconds']
  assert found['synchronous_bytes'] <= bound['synchronous_bytes']
  assert share(found, 'attention') <= bound['attention_share']


@pytest.mark.parametrize('name', ['llava_hr_7b_stage2_v5p_4x4x4', 'ps3_4k_v5e_16x16'])
def test_what_a_step_took_before_is_read_from_its_program(name):
  row = BEFORE[name]
  found = read(FOLDER / 'before' / f'{name}.txt.xz', 'v5p' if 'v5p' in name else 'v5e')
  assert found['seconds'] == pytest.approx(row['seconds'], rel=1e-3)
  assert found['synchronous_bytes'] == row['synchronous_bytes']


def test_options_of_the_compiler_say_why():
  table = json.loads((REPO / 'hrvlm_jax' / 'parallel' / 'compiler.json').read_text())['options']
  assert set(table) <= set(chips()) | {'gpu', 'tpu'}
  for options in table.values():
    for name, row in options.items():
      assert set(row) == {'value', 'why', 'effect'} and row['why'] and row['effect'], name
  assert compiler_options('v5p')['xla_enable_async_all_gather'] is True
