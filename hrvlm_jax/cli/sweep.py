"""`hrvlm sweep`: see `training.sweep`."""

import runpy

from hrvlm_jax.cli.arguments import Parser
from hrvlm_jax.core.errors import UserError, unknown


def main(argv: list[str]) -> int:
  """Trains a grid (--config.KEY=A,B,C, several span their product) or the ROWS of a sweep file."""
  parser = Parser('sweep', main.__doc__, config=True)
  parser.add_argument('--out', required=True, metavar='FOLDER',
                      help='one folder per run, table.txt, plot.png, results.json')
  parser.add_argument('--only', metavar='A,B', help='these rows of a sweep file alone')
  parser.add_argument('--list', action='store_true', help='say what would run, and end')
  parser.add_argument('--quiet', action='store_true', help='no progress bars')
  arguments = parser.parse(argv)

  from hrvlm_jax.lab import sweep

  entries = entries_of(arguments.config, arguments.overrides, only=arguments.only)
  if arguments.list:
    for entry in entries:
      print(entry.name)
    return 0
  done = sweep.run(entries, arguments.out, say=lambda text: print(text, flush=True),
                   progress=not arguments.quiet)
  if done:
    print(f'everything is in {arguments.out}')
  return 0


def entries_of(spec: str, overrides, *, only: str | None = None) -> list:
  """The runs of a grid or of a sweep file, which has `ROWS` and `get_config(row)`.

  A value of `ROWS` may be a pair whose second part holds the paper's numbers.

  Raises:
    UserError: an unknown row, no row and no list of values, or what a config refuses.
  """
  from hrvlm_jax.lab.sweep import Entry
  from hrvlm_jax.training import run_config
  from hrvlm_jax.training.config import RunConfig
  from hrvlm_jax.training.recipe import find

  path, argument = find(spec)
  rows = _rows(path) if argument is None else {}
  if only and not rows:
    raise UserError(f'--only: {spec} has no ROWS to choose from')
  chosen = list(rows) if only is None else only.split(',')
  if wrong := [name for name in chosen if name not in rows]:
    raise UserError(f'--only: {unknown(wrong[0], rows, what="row")}')
  found = []
  for row in chosen or [None]:
    for values, config in run_config.grid(RunConfig, spec if row is None else f'{path}:{row}',
                                          overrides):
      parts = [*([] if row is None else [row]),
               *(f'{key.rpartition(".")[2]}={_short(text)}' for key, text in values)]
      found.append(Entry('_'.join(parts) or 'run', config, dict(values),
                         None if row is None else rows[row]))
  if len(found) == 1 and not rows:
    raise UserError(f'{spec} with these options is one run: use `hrvlm train`, or give a key '
                    'several values (--config.seed=0,1,2)')
  return found


def _rows(path: str) -> dict:
  """Row -> the paper's numbers, where the file has `ROWS`."""
  rows = runpy.run_path(path).get('ROWS', {})
  return {name: value[1] if isinstance(value, tuple) and len(value) == 2 else None
          for name, value in rows.items()}


def _short(text: str) -> str:
  """A value as part of a folder's name."""
  return ''.join(c if c.isalnum() or c in '.-+' else '_' for c in text)[:40]
