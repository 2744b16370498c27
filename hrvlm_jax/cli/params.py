"""`hrvlm params`: the parameters of a config or a checkpoint, without reading or making them."""

from collections.abc import Mapping
import math
from typing import Any

from hrvlm_jax.cli.arguments import Parser
from hrvlm_jax.core.errors import UserError


def main(argv: list[str]) -> int:
  """Lists parameters by path with shape, type, count and, for a config, how they are trained."""
  parser = Parser('params', main.__doc__, config=True, config_required=False)
  parser.add_argument('--checkpoint', help='checkpoint or work directory of a run')
  parser.add_argument('--depth', type=int, help='sum up paths below so many names')
  arguments = parser.parse(argv)
  if (arguments.config is None) == (arguments.checkpoint is None):
    raise UserError('give either --config FILE.py or --checkpoint DIR')

  if arguments.checkpoint is not None:
    from hrvlm_jax.checkpoint import store

    leaves, notes = store.describe(arguments.checkpoint), {}
  else:
    leaves, notes = _of_config(arguments)
  print('\n'.join(table(leaves, notes, depth=arguments.depth)))
  return 0


def _of_config(arguments) -> tuple[dict[str, Any], dict[str, str]]:
  from hrvlm_jax.core import paths
  from hrvlm_jax.training import optimizer, run_config
  from hrvlm_jax.training.config import RunConfig
  from hrvlm_jax.vlm import model

  config = run_config.load(RunConfig, arguments.config, arguments.overrides)
  abstract = model.build(config.model).abstract
  groups = optimizer.groups_of(config.training, abstract)
  return paths.flatten(abstract), {p: optimizer.describe(g) for p, g in groups.items()}


def table(
    leaves: Mapping[str, Any], notes: Mapping[str, str], *, depth: int | None = None
) -> list[str]:
  """Lines of the table: path, shape, type, count, note; then the totals.

  Args:
    leaves: by path, with `shape` and `dtype`.
    notes: a word per path.
    depth: paths are cut after so many names and their counts summed.
  """
  rows: dict[tuple[str, ...], int] = {}
  for path, leaf in leaves.items():
    names = path.split('/')
    note = notes.get(path, '')
    if depth is not None and len(names) > depth:
      row = ('/'.join(names[:depth]) + '/...', '', str(leaf.dtype), note)
    else:
      shape = ', '.join(map(str, leaf.shape))
      row = (path, f'({shape})', str(leaf.dtype), note)
    rows[row] = rows.get(row, 0) + math.prod(leaf.shape)
  wide = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
  lines = []
  for (*texts, note), count in rows.items():
    cells = '  '.join(f'{text:<{width}}' for text, width in zip(texts, wide))
    lines.append(f'{cells}  {count:>15,}  {note}'.rstrip())
  count = sum(rows.values())
  size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())
  return [*lines, f'{len(leaves)} arrays, {count:,} parameters, {size / 2**20:,.1f} MiB']
