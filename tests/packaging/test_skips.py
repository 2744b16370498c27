"""The list of marks under which tests may be skipped is fixed, and nothing else can skip."""

import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
MARKS = ('gpu', 'tpu', 'peers', 'gcloud', 'libtpu')

SAMPLE = """
import pytest

@pytest.mark.tpu
def test_marked(): assert False, 'not reached without a TPU'

def test_plain(): pass

def test_skip(): pytest.skip('no reason')

@pytest.mark.xfail
def test_xfail(): assert False

@pytest.mark.skipif(True, reason='because')
def test_skipif(): pass
"""


def test_marks_are_those_of_pyproject():
  options = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['pytest']['ini_options']
  assert tuple(mark.split(':')[0] for mark in options['markers']) == (*MARKS, 'fast', 'full(part)')
  assert '--strict-markers' in options['addopts']
  source = (ROOT / 'tests' / 'conftest.py').read_text()
  assert f'SKIP_MARKS = {MARKS}' in source


def test_no_test_file_skips_by_itself():
  pattern = re.compile(r'pytest\.(skip|xfail|importorskip)\b|mark\.(skip|skipif|xfail)\b|SkipTest')
  allowed = {'tests/conftest.py', 'tests/packaging/test_skips.py'}
  found = [
      f'{path.relative_to(ROOT)}:{number}'
      for path in sorted((ROOT / 'tests').rglob('*.py'))
      if str(path.relative_to(ROOT)) not in allowed
      for number, line in enumerate(path.read_text().splitlines(), 1)
      if pattern.search(line)
  ]
  assert not found, f'tests that skip without one of the marks {MARKS}: {found}'


def test_other_skips_become_failures(tmp_path):
  shutil.copy(ROOT / 'pyproject.toml', tmp_path)
  (tmp_path / 'tests').mkdir()
  shutil.copy(ROOT / 'tests' / 'conftest.py', tmp_path / 'tests')
  (tmp_path / 'tests' / 'test_sample.py').write_text(SAMPLE)
  (tmp_path / 'tests' / 'test_module.py').write_text(
      "import pytest\npytest.importorskip('no_such_module_at_all')\n")
  arguments = ['-p', 'no:cacheprovider', '-q', '--continue-on-collection-errors']
  run = subprocess.run([sys.executable, '-m', 'pytest', *arguments], cwd=tmp_path,
                       capture_output=True, text=True)
  assert '2 failed, 1 passed, 1 skipped, 2 errors' in run.stdout, run.stdout
  assert run.returncode == 1
