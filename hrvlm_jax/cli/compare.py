"""`hrvlm compare`: see `lab.compare`."""

import pathlib

from hrvlm_jax.cli.arguments import Parser


def main(argv: list[str]) -> int:
  """Trains and evaluates several systems on the same terms; run again, it goes on."""
  parser = Parser('compare', main.__doc__, config=True)
  parser.add_argument('--out', required=True, help='folder of data, runs, table and plot')
  parser.add_argument('--only', default='', metavar='NAMES',
                      help='work on these systems only, names with commas between')
  parser.add_argument('--quiet', action='store_true', help='no progress bars')
  parser.add_argument('--keep', action='store_true',
                      help='copy results and plots to results/ beside the config')
  parser.add_argument('--document', metavar='FILE', help='also put the table between the marks '
                      '<!-- compare:begin --> and <!-- compare:end --> of a Markdown file, and '
                      'claims between those called claims')
  arguments = parser.parse(argv)

  from hrvlm_jax.core import cpu
  from hrvlm_jax.lab import compare_report
  from hrvlm_jax.lab.compare import Comparison
  from hrvlm_jax.lab.compare_config import CompareConfig
  from hrvlm_jax.training import run_config

  cpu.keep_freed_on_cpu()  # before anything asks for devices
  config = run_config.load(CompareConfig, arguments.config, arguments.overrides)
  only = [name for name in arguments.only.split(',') if name]
  results = Comparison(config, arguments.out, progress=not arguments.quiet).run(only)
  if arguments.keep:
    print(f'kept: {compare_report.keep(results, pathlib.Path(arguments.out), arguments.config)}')
  if arguments.document:
    compare_report.fill(results, pathlib.Path(arguments.document))
  print(f'table, plot and results are in {arguments.out}')
  return 0
