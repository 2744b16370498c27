"""What goes wrong on one host is said on all, and ends all of them in seconds."""

import pytest

from tests.launch import mistakes


def check(case, processes, folder):
  ends = mistakes.run(case, processes, folder)
  assert not mistakes.problems(case, ends), '\n'.join(end.output for end in ends)
  return ends


def test_a_file_that_one_of_two_hosts_lacks(tmp_path):
  ends = check('missing', 2, tmp_path)
  assert 'hrvlm train: train.json: no such file' in ends[1].output
  # Nothing had begun: the work directory is as it was.
  assert not (tmp_path / 'run').exists()


@pytest.mark.full('training')
@pytest.mark.parametrize('processes', [2, 4])
@pytest.mark.parametrize('case', sorted(mistakes.CASES))
def test_every_mistake(case, processes, tmp_path):
  check(case, processes, tmp_path)
