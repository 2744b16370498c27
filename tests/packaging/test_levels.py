"""Two levels of tests: what `test.sh` runs, and the parts of `test_full.sh`; all are listed."""

import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / 'scripts' / 'test_full.sh'
MARK = re.compile(r"(?:mark\.full|levels\.rows)\(\s*(?:'(\w+)')?")

SAMPLE = """
import pytest

def test_first(): pass

@pytest.mark.full('systems')
def test_second(): pass

@pytest.mark.parametrize('row', [1, pytest.param(2, marks=pytest.mark.full('training'))])
def test_rows(row): pass
"""


def parts() -> list[str]:
  """The parts that the script knows."""
  listed = re.search(r'^PARTS=\(([^)]*)\)', SCRIPT.read_text(), re.MULTILINE)
  return listed.group(1).split()


def test_every_part_is_listed_and_has_tests():
  found: dict[str | None, list[str]] = {}
  for path in sorted((ROOT / 'tests').rglob('*.py')):
    if path in (pathlib.Path(__file__), ROOT / 'tests' / 'levels.py'):
      continue
    for part in MARK.findall(path.read_text()):
      found.setdefault(part or None, []).append(path.relative_to(ROOT).as_posix())
  assert None not in found, f'full() without a part: {found[None]}'
  assert len(parts()) == len(set(parts()))
  unlisted = {part: files for part, files in found.items() if part not in parts()}
  assert not unlisted, f'scripts/test_full.sh does not list: {unlisted}'
  assert not set(parts()) - set(found), f'no test has the part {set(parts()) - set(found)}'


def test_an_unknown_part_is_refused():
  run = subprocess.run([SCRIPT, 'sistems'], capture_output=True, text=True)
  assert run.returncode == 2 and all(part in run.stderr for part in parts())


def test_a_part_runs_alone_and_never_with_the_first_level(tmp_path):
  shutil.copy(ROOT / 'pyproject.toml', tmp_path)
  (tmp_path / 'tests').mkdir()
  shutil.copy(ROOT / 'tests' / 'conftest.py', tmp_path / 'tests')
  (tmp_path / 'tests' / 'test_sample.py').write_text(SAMPLE)

  def passed(*arguments):
    run = subprocess.run([sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '-v',
                          *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode in (0, 5), run.stdout + run.stderr
    return re.findall(r'::(test_\w+(?:\[\w+\])?) PASSED', run.stdout)

  assert passed() == ['test_first', 'test_rows[1]']
  assert passed('--full', 'systems') == ['test_second']
  assert passed('--full', 'training') == ['test_rows[2]']
  assert passed('-m', 'fast') == []


def test_the_fast_subset_names_what_exists():
  text = (ROOT / 'tests' / 'conftest.py').read_text()
  names = re.findall(r"'([^']+)'", re.search(r'^FAST = \((.*?)^\)', text, re.S | re.M).group(1))
  assert len(names) > 4 and all((ROOT / 'tests' / name).exists() for name in names)
