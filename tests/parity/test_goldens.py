"""Every golden case below $HRVLM_GOLDENS (default tests/goldens), by its config.json alone."""

import os
import pathlib

import pytest

from tests.parity.cases import runner

ROOT = pathlib.Path(os.environ.get('HRVLM_GOLDENS', pathlib.Path(__file__).parents[1] / 'goldens'))
CASES = runner.find_cases(ROOT)


@pytest.mark.parametrize('folder', CASES, ids=lambda p: str(p.relative_to(ROOT)))
def test_case(folder):
  report = runner.run_case(folder)
  assert report.passed, '\n'.join(report.failures())


def test_a_case_that_nothing_checks_fails(tmp_path):
  (tmp_path / 'config.json').write_text('{"system": "nowhere", "kind": "none"}')
  with pytest.raises(runner.UserError, match="no check for system 'nowhere'"):
    runner.run_case(tmp_path)
