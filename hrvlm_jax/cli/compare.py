"""`hrvlm compare`: see `lab.compare` and, for a config that names seeds, `lab.study`."""

import argparse
import pathlib

from hrvlm_jax.cli.arguments import Parser


def main(argv: list[str]) -> int:
  """Trains and evaluates several systems on the same terms; run again, it goes on.

  A config with `seeds` is a study: claims of papers on several tasks, in parts that several
  processes and machines may share.
  """
  parser = Parser('compare', main.__doc__, config=True)
  parser.add_argument('--out', required=True, help='folder of data, runs, table and plot')
  parser.add_argument('--only', default='', metavar='NAMES',
                      help='work on these systems only, names with commas between')
  parser.add_argument('--quiet', action='store_true', help='no progress bars')
  parser.add_argument('--keep', action='store_true',
                      help='copy results and plots to results/ beside the config')
  parser.add_argument('--document', metavar='FILE', help='also put the table between the marks '
                      '<!-- compare:begin --> and <!-- compare:end --> of a Markdown file, a '
                      'study between those called study')
  study = parser.add_argument_group('studies (a config with seeds)')
  study.add_argument('--task', default='', metavar='NAMES', help='work on these tasks only')
  study.add_argument('--seed', default='', metavar='NUMBERS', help='work with these seeds only')
  study.add_argument('--parts', metavar='N/M', help='this machine is the Nth of M: work on its '
                     'share of the (task, seed) pairs')
  study.add_argument('--list', action='store_true',
                     help='say which parts there are, their state and expected seconds; no work')
  study.add_argument('--merge', nargs='+', metavar='DIR',
                     help='take over what these folders of the same study have done; no work')
  study.add_argument('--forget', default='', metavar='NAMES',
                     help='remove what DIR has of these systems, whose settings changed; no work')
  study.add_argument('--report', action='store_true',
                     help='only --keep and --document, from what is there; no work')
  study.add_argument('--search', action='store_true',
                     help='instead: 3 learning rates x 2 lengths for the systems and baselines on '
                     'needle (or --task), kept in results/ beside the config')
  study.add_argument('--against', metavar='RESULTS', help='compare the claims row by row with '
                     "another machine's kept results; no work")
  arguments = parser.parse(argv)

  from hrvlm_jax.lab import compare_report
  from hrvlm_jax.lab.compare import Comparison
  from hrvlm_jax.lab.compare_config import CompareConfig
  from hrvlm_jax.training import run_config

  config = run_config.load(CompareConfig, arguments.config, arguments.overrides)
  if config.seeds:
    return _study(arguments)
  _no_study(arguments, bool(config.claims))
  results = Comparison(config, arguments.out, progress=not arguments.quiet).run(
    _names(arguments.only))
  if arguments.keep:
    print(f'kept: {compare_report.keep(results, pathlib.Path(arguments.out), arguments.config)}')
  if arguments.document:
    compare_report.fill(results, pathlib.Path(arguments.document))
  print(f'table, plot and results are in {arguments.out}')
  return 0


def _names(text: str) -> list[str]:
  return [name for name in text.split(',') if name]


def _no_study(arguments: argparse.Namespace, claims: bool) -> None:
  from hrvlm_jax.core.errors import UserError

  if claims:
    raise UserError(f'{arguments.config}: has claims, which a study tells, and names no seeds; '
                    'set config.seeds, such as (0,)')
  for name in ('task', 'seed', 'parts', 'list', 'merge', 'forget', 'report', 'search', 'against'):
    if getattr(arguments, name):
      raise UserError(f'--{name}: {arguments.config} is one comparison; expected a config that '
                      'names seeds (config.seeds)')


def _study(arguments: argparse.Namespace) -> int:
  from hrvlm_jax.lab import study, study_kept, study_run

  if arguments.forget:
    gone = study_kept.forget(arguments.out, _names(arguments.forget))
    print(f'forgotten: {len(gone)} parts' + (f' ({", ".join(gone)})' if gone else ''))
    return 0
  asked = study_run.Asked(
    spec=arguments.config, folder=pathlib.Path(arguments.out), only=_names(arguments.only),
    tasks=_names(arguments.task), seeds=_names(arguments.seed), share=arguments.parts,
    progress=not arguments.quiet)
  made = study_run.StudyRun(study.load(arguments.config, arguments.overrides), asked)
  if arguments.list:
    print(made.listed())
    return 0
  if arguments.against:
    text, agree = made.against(arguments.against)
    print(text)
    return 0 if agree else 1
  if arguments.search:
    return made.search()
  if arguments.merge:
    made.merge(arguments.merge)
    return 0
  failed = {} if arguments.report else made.work()
  made.report(keep=arguments.keep, document=arguments.document)
  for title, reason in failed.items():
    print(f'FAILED {title}: {reason}')
  return 1 if failed else 0
