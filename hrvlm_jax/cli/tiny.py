"""`hrvlm tiny`: see `training.tiny`."""

import os
import runpy

from hrvlm_jax.cli.arguments import Parser
from hrvlm_jax.core.errors import UserError


class _Interrupted(Exception):
  """The run was asked to stop, and saved what it had."""


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

  from hrvlm_jax.lab import tiny
  from hrvlm_jax.lab.journal import Journal
  from hrvlm_jax.training import run_config
  from hrvlm_jax.training.config import RunConfig
  from hrvlm_jax.training.loop import train
  from hrvlm_jax.training.recipe import find

  run = run_config.load(RunConfig, arguments.config, arguments.overrides)
  if arguments.keep and arguments.overrides:
    raise UserError('--keep: a kept result is that of the config as it is; leave out the '
                    '--config.KEY options')
  path, _ = find(arguments.config)
  space = runpy.run_path(path)
  if 'preparation' not in space:
    raise UserError(f'{path}: has no function preparation(); use `hrvlm train`')
  preparation = space['preparation']()
  name = os.path.splitext(os.path.basename(path))[0]
  workdir = arguments.workdir or f'{tiny.FOLDER}/{name}'
  options = dict(say=lambda text: print(text, flush=True), progress=not arguments.quiet)
  own = not isinstance(preparation, tiny.Preparation)  # a system with a task of its own (PS3)
  journal = Journal(workdir)

  def prepare() -> None:
    if own:
      preparation.prepare(run, **options)
    else:
      tiny.prepare(preparation, run, **options)

  def learn() -> None:
    ended = train(run, workdir, progress=not arguments.quiet)
    if ended.interrupted:
      raise _Interrupted(f'interrupted at step {ended.step}; run the same command again to go on')

  try:
    journal.part('preparation', prepare)
    journal.part('training', learn)
  except _Interrupted as interrupted:
    print(interrupted)
    return 0
  took = dict(seconds=sum(journal.times.values()), machine=arguments.machine)
  values = (preparation.result(workdir, run, **took) if own
            else tiny.result(workdir, run, chance=preparation.task.chance, **took))
  # Beside other work the seconds of the clock say little.
  values |= {'cpu_seconds': round(sum(journal.cpu_times.values()))}
  print(tiny.result_line(values))
  if arguments.keep:
    kept = tiny.keep(values, path)
    print(f'kept: {kept}')
    if own:
      preparation.plot(values, kept.with_suffix('.png'))
  return 0
