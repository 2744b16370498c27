"""`hrvlm verify`: see `verify.runner`."""

import dataclasses
import json
import pathlib

from hrvlm_jax.cli.arguments import Parser


def main(argv: list[str]) -> int:
  """Runs recorded cases and prints the largest difference of every value; 1 when one fails."""
  parser = Parser('verify', main.__doc__)
  parser.add_argument('folder', help='a case folder, or a folder of case folders')
  parser.add_argument('--json', metavar='FILE', help='also write all results as JSON')
  parser.add_argument('--failures', action='store_true', help='print failed values only')
  arguments = parser.parse(argv)

  import jax

  from tests.parity.cases.runner import find_cases, run_case

  jax.config.update('jax_default_matmul_precision', 'highest')
  reports = []
  for folder in find_cases(arguments.folder):
    report = run_case(folder)
    reports.append(report)
    counts = {'ok': 0, 'waived': 0}
    for result in report.results:
      counts[result.status] = counts.get(result.status, 0) + 1
    verdict = 'passed' if report.passed else 'FAILED'
    numbers = ', '.join(f'{n} {status}' for status, n in counts.items() if n)
    print(f'{verdict}  {report.name}  ({report.system}/{report.kind}: {numbers})', flush=True)
    for r in report.results:
      if r.status in ('ok', 'waived') and arguments.failures:
        continue
      detail = f'  {r.detail}' if r.detail else ''
      print(f'  {r.status:<9} {r.difference:9.3g} of {r.limit:9.3g}  {r.key}{detail}')
  if arguments.json:
    values = [dataclasses.asdict(report) | {'passed': report.passed} for report in reports]
    pathlib.Path(arguments.json).write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')
  failed = sum(not report.passed for report in reports)
  print(f'{len(reports) - failed} of {len(reports)} cases passed')
  return 1 if failed else 0
