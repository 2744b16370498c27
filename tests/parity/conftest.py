"""`--parity-report FILE`: the largest difference of every recorded value, as a table and as JSON.

The results travel as properties of the tests, so that the workers of pytest-xdist hand them on.
"""

import dataclasses
import json
import pathlib

import pytest

PROPERTY = 'parity'


def pytest_addoption(parser):
  parser.addoption('--parity-report', metavar='FILE', type=pathlib.Path,
                   help='write all results of the recorded cases as JSON and print their table')


@pytest.fixture
def run_case(record_property):
  """Runs the case of a folder and records its report for the table."""
  from tests.parity.cases import runner

  def run(folder):
    report = runner.run_case(folder)
    record_property(PROPERTY, json.dumps(
      dataclasses.asdict(report) | {'passed': report.passed}))
    return report

  return run


def table(reports):
  """The lines of the table: per case a verdict, per value its difference, limit and name."""
  lines = []
  for report in reports:
    counts = {}
    for result in report['results']:
      counts[result['status']] = counts.get(result['status'], 0) + 1
    numbers = ', '.join(f'{n} {status}' for status, n in counts.items())
    verdict = 'passed' if report['passed'] else 'FAILED'
    lines.append(f'{verdict}  {report["name"]}  ({report["system"]}/{report["kind"]}: {numbers})')
    lines += [f'  {r["status"]:<9} {r["difference"]:9.3g} of {r["limit"]:9.3g}  {r["key"]}'
              + (f'  {r["detail"]}' if r['detail'] else '') for r in report['results']]
  passed = sum(report['passed'] for report in reports)
  return [*lines, f'{passed} of {len(reports)} cases passed']


def pytest_terminal_summary(terminalreporter, config):
  target = config.getoption('--parity-report')
  if target is None:
    return
  reports = [json.loads(value) for kind in ('passed', 'failed')
             for test in terminalreporter.getreports(kind) if test.when == 'call'
             for name, value in test.user_properties if name == PROPERTY]
  reports.sort(key=lambda report: report['name'])
  target.write_text(json.dumps(reports, indent=2) + '\n', encoding='utf-8')
  terminalreporter.section(f'parity report ({target})')
  for line in table(reports):
    terminalreporter.write_line(line)
