"""`hrvlm sweep`: see `lab.sweep`."""

from hrvlm_jax.cli.arguments import Parser


def main(argv: list[str]) -> int:
  """Trains a grid (--config.KEY=A,B,C, several span their product) or the ROWS of a sweep file."""
  parser = Parser('sweep', main.__doc__, config=True)
  parser.add_argument('--out', required=True, metavar='FOLDER',
                      help='one folder per run, table.txt, plot.png, results.json')
  parser.add_argument('--only', metavar='A,B', help='these rows of a sweep file alone')
  parser.add_argument('--list', action='store_true', help='say what would run, and end')
  parser.add_argument('--quiet', action='store_true', help='no progress bars')
  arguments = parser.parse(argv)

  from hrvlm_jax.core import cpu
  from hrvlm_jax.lab import experiment, sweep

  entries = sweep.entries_of(arguments.config, arguments.overrides, only=arguments.only)
  if arguments.list:
    for entry in entries:
      print(entry.name)
    return 0
  cpu.keep_freed_on_cpu()  # before anything asks for devices
  try:
    sweep.run(entries, arguments.out, progress=not arguments.quiet)
    print(f'everything is in {arguments.out}')
  except experiment.Interrupted as interrupted:
    print(interrupted)
  return 0
