"""The parity runner must notice wrong values, untouched values and broken cases."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from hrvlm_jax.core.errors import UserError
from tests.parity.cases import runner


@pytest.fixture
def folder(tmp_path):
  config = {'system': 'toy', 'kind': 'sum', 'size': 3, 'expected': {'total': 6.0}}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  save_file({'x': np.array([1, 2, 3], np.float32), 'double': np.array([2, 4, 6], np.float32)},
            tmp_path / 'io.safetensors')
  return tmp_path


def run(monkeypatch, folder, fn):
  monkeypatch.setitem(runner._CHECKS, ('toy', 'sum'), fn)
  return runner.run_case(folder)


def statuses(report):
  return {r.key: r.status for r in report.results}


def good(case):
  x = case.input('x')
  assert case.config['size'] == len(x)
  case.expect('double', 2 * x)
  case.expect_json(('expected', 'total'), float(x.sum()))


def test_equal_values_pass(monkeypatch, folder):
  report = run(monkeypatch, folder, good)
  assert report.passed, report.failures()
  assert report.system == 'toy' and report.kind == 'sum'


@pytest.mark.parametrize('value', [
  lambda x: 2 * x + 1e-2, lambda x: (2 * x)[:2], lambda x: x * np.nan])
def test_wrong_values_fail(monkeypatch, folder, value):
  def check(case):
    good(case)
    case.results.clear()
    case.expect('double', value(case.input('x')))

  assert statuses(run(monkeypatch, folder, check))['double'] == 'different'


def test_untouched_tensors_and_json_leaves_fail(monkeypatch, folder):
  report = run(monkeypatch, folder, lambda case: case.input('x'))
  found = statuses(report)
  assert not report.passed
  assert found['double'] == 'untouched'
  assert found['config.json:size'] == found['config.json:expected/total'] == 'untouched'


def test_a_json_file_that_nothing_opened_fails(monkeypatch, folder):
  (folder / 'more.json').write_text('{"a": [1, 2]}')
  report = run(monkeypatch, folder, good)
  assert statuses(report)['more.json:a/1'] == 'untouched'


def test_waivers_need_no_value_and_keep_their_reason(monkeypatch, folder):
  def check(case):
    case.input('x')
    case.waive('double', 'because')
    case.waive('config.json:*', 'settings')

  report = run(monkeypatch, folder, check)
  assert report.passed
  assert {r.detail for r in report.results} == {'because', 'settings'}


def test_an_exception_is_a_failure_of_that_case(monkeypatch, folder):
  def check(case):
    raise KeyError('boom')

  report = run(monkeypatch, folder, check)
  assert not report.passed and 'boom' in report.failures()[0]


def test_folders_without_cases_are_refused(tmp_path):
  with pytest.raises(UserError, match='no golden case below it'):
    runner.find_cases(tmp_path)
  with pytest.raises(UserError, match='no such folder'):
    runner.find_cases(tmp_path / 'missing')
