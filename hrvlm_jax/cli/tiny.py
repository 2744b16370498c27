"""`hrvlm tiny`: see `lab.tiny`."""

import os

from hrvlm_jax.cli.arguments import Parser


def main(argv: list[str]) -> int:
  """Writes the task, pre-trains the towers, trains and scores a config of configs/tiny."""
  parser = Parser('tiny', main.__doc__, config=True)
  parser.add_argument('--workdir', help='default: runs/tiny/<name of the config>')
  parser.add_argument('--keep', action='store_true',
                      help="write results/<name>.json and the config's header")
  parser.add_argument('--machine', default=f'{os.cpu_count()} CPU cores',
                      help='words for the result file')
  parser.add_argument('--quiet', action='store_true', help='no progress bars')
  arguments = parser.parse(argv)


  from hrvlm_jax.lab import experiment, tiny

  try:
    tiny.run(arguments.config, arguments.overrides, workdir=arguments.workdir,
             keep_result=arguments.keep, machine=arguments.machine, progress=not arguments.quiet)
  except experiment.Interrupted as interrupted:
    print(interrupted)
  return 0
