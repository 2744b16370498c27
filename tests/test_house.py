"""How large the house may be: lines and files of the package, as git knows them.

A limit is raised by the commit of the issue that needs the room, on its own, with the reason in its
message. Nothing else may raise one: joining unrelated things, shorter docstrings and denser lines
are no way round it.
"""

import collections
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Lines and files of hrvlm_jax/ altogether, data files included.
TOTAL = (42_600, 280)
LONGEST = 500


def lines() -> dict[str, int]:
  """File of the package -> number of its lines."""
  command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard', 'hrvlm_jax']
  listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
  names = listed.decode().split('\0')
  # A file that is removed but not yet committed is gone.
  return {name: (ROOT / name).read_bytes().count(b'\n')
          for name in names if name and (ROOT / name).is_file()}


def rooms(found: dict[str, int]) -> dict[str, tuple[int, int]]:
  """Room -> (lines, files)."""
  summed = collections.defaultdict(lambda: (0, 0))
  for name, count in found.items():
    parts = pathlib.PurePath(name).parts
    room = parts[1] if len(parts) > 2 else ''
    summed[room] = (summed[room][0] + count, summed[room][1] + 1)
  return dict(summed)


@pytest.fixture(scope='module')
def house():
  found = lines()
  assert 'hrvlm_jax/core/module.py' in found
  return found


def test_no_file_is_long(house):
  long = {name: count for name, count in house.items() if count > LONGEST}
  assert not long, f'above {LONGEST} lines: {long}; cut them along what they do'


def test_the_house_keeps_its_size(house):
  total = sum(house.values()), len(house)
  assert total[0] <= TOTAL[0] and total[1] <= TOTAL[1], (
    f'{total[0]} lines in {total[1]} files, at most {TOTAL[0]} in {TOTAL[1]}; by room: '
    f'{rooms(house)}')
