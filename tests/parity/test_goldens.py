"""Every recorded case and list below $HRVLM_GOLDENS (default tests/goldens), by content alone."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from hrvlm_jax.core.errors import UserError
from tests.parity.cases import runner

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens'
ROOT = pathlib.Path(os.environ.get('HRVLM_GOLDENS') or GOLDENS)
# Of a family the case that compiles longest is of the second level, where a smaller one is here.
# A folder that is named is compared whole.
SECOND = () if ROOT != GOLDENS else (
  'language_models/llama_rope_linear', 'language_models/qwen2', 'llava_hr/full',
  'llava_hr/tower_hr', 'ps3/b_topdown_3looks', 'ps3/c_nonsquare', 'ps3/d_gt_smooth_nscale',
  'ps3/e_pretrain_pool', 'ps3/g_pretrain_loss', 'ps3/i_radio', 'vila_hd/full')
CASES = {str(path.relative_to(ROOT)): path for path in runner.find_cases(ROOT)}


@pytest.mark.parametrize('path', [
  pytest.param(path, id=name, marks=[pytest.mark.full('parity')] if name in SECOND else [])
  for name, path in CASES.items()])
def test_case(path, run_case):
  report = run_case(path)
  assert report.passed, '\n'.join(report.failures())


def test_the_cases_of_the_second_level_are_there():
  assert set(SECOND) <= set(CASES)


def test_a_case_that_nothing_checks_fails(tmp_path):
  (tmp_path / 'config.json').write_text('{"system": "nowhere", "kind": "none"}')
  with pytest.raises(UserError, match="no check for system 'nowhere'"):
    runner.run_case(tmp_path)


@pytest.mark.parametrize('case, each', [
  ('ps3/a_bottomup_1look', [8, 32]),
  pytest.param('vila_hd/full', [12, 48], marks=pytest.mark.full('parity'))])
def test_a_run_may_carry_the_budgets_of_its_scales(case, each, tmp_path):
  """`select_each` of a run, in a case whose own budgets are others: what was recorded comes out."""
  shutil.copytree(GOLDENS / case, tmp_path / 'case')
  path = tmp_path / 'case' / 'config.json'
  config = json.loads(path.read_text())
  for settings, key in ((config.get('vision_config', config), 'max_select_num_each_scale'),
                        (config, 'resolved_max_select_num_each_scale')):
    if settings is not config or key in config:
      settings[key] = [sum(each) // 2] * 2
  for run in config['runs'].values():
    if run.get('num_look_close') != 0:
      run['select_each'] = each
  path.write_text(json.dumps(config))
  report = runner.run_case(path.parent)
  assert report.passed, '\n'.join(report.failures())


def test_the_report_is_a_table_and_a_file_and_any_layout_is_found(tmp_path):
  """In a process of its own: a case and a list in folders of other names, one of them wrong."""
  shutil.copytree(GOLDENS / 'vila_hd' / 'text', tmp_path / 'a' / 'b')
  listed = json.loads((GOLDENS / 'release_keys' / 'phi_1_5.json').read_text())
  del listed['tensors']['lm_head.bias']
  (tmp_path / 'lists').mkdir()
  (tmp_path / 'lists' / 'phi_1_5.json').write_text(json.dumps(listed))
  run = subprocess.run(
    [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(pathlib.Path(__file__)),
     '-k', 'test_case', '--parity-report', str(tmp_path / 'report.json')],
    env={**os.environ, 'HRVLM_GOLDENS': str(tmp_path)}, capture_output=True, text=True,
    cwd=pathlib.Path(__file__).parents[2], timeout=300)
  assert run.returncode == 1, run.stdout + run.stderr
  case, keys = json.loads((tmp_path / 'report.json').read_text())
  assert case['passed'] and case['system'] == 'vila_hd'
  assert not keys['passed'] and {r['key']: r['status'] for r in keys['results']} == {
    'lm_head.bias': 'different', 'tensors': 'ok'}
  assert f'passed  {tmp_path}/a/b  (vila_hd/text: ' in run.stdout
  assert re.search(r'^  different +inf of +0  lm_head\.bias  \(51200,\) by our table, absent',
                   run.stdout, re.MULTILINE), run.stdout
  assert '1 of 2 cases passed' in run.stdout
