"""`hrvlm sweep`: see `lab.sweep`."""

from hrvlm_jax.cli.arguments import Parser
from hrvlm_jax.core.errors import UserError


def main(argv: list[str]) -> int:
  """Trains a grid (--config.KEY=A,B,C, several span their product) or the ROWS of a sweep file.

  A sweep file with a TABLE (configs/ablations) trains every stage of every row, answers the table's
  benchmarks with --data, and writes what was measured beside the paper's numbers.
  """
  parser = Parser('sweep', main.__doc__, config=True)
  parser.add_argument('--out', metavar='FOLDER',
                      help='one folder per run, table.txt, plot.png, results.json')
  parser.add_argument('--only', metavar='A,B', help='these rows of a sweep file alone')
  parser.add_argument('--data', metavar='FOLDER', help='of a table: the official files of its '
                      'benchmarks, in folders of their names; without it none is answered')
  parser.add_argument('--limit', type=int, help='only the first samples of every benchmark')
  parser.add_argument('--smoke', action='store_true', help='of a table: the same rows with tiny '
                      'models on made-up samples, two steps a stage')
  parser.add_argument('--list', action='store_true', help='say what would run, and end')
  parser.add_argument('--quiet', action='store_true', help='no progress bars')
  arguments = parser.parse(argv)

  from hrvlm_jax.lab import experiment, smoke, sweep

  entries = sweep.entries_of(arguments.config, arguments.overrides, only=arguments.only)
  if arguments.list:
    for entry in entries:
      print(entry.name)
      for stage, config in entry.all_stages if entry.table and entry.trains else ():
        print(f'  {stage or "train"}, from {config.training.init_from}')
      if entry.trains and entry.start_command:
        print(f'  {entry.start_command}')
      if entry.asked is not None:
        print(f'  {entry.asked.command}')
    return 0
  if arguments.out is None:
    raise UserError('--out: missing; name the folder of the runs (or --list what would run)')
  if arguments.smoke:
    entries = smoke.made(entries, arguments.out)
  try:
    sweep.run(entries, arguments.out, data=arguments.data, limit=arguments.limit,
              progress=not arguments.quiet)
    print(f'everything is in {arguments.out}')
  except experiment.Interrupted as interrupted:
    print(interrupted)
  return 0
