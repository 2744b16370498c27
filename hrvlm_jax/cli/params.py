"""`hrvlm params`: the parameters of a config or a checkpoint, without reading or making them."""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import TYPE_CHECKING, Any

from hrvlm_jax.cli.arguments import Parser
from hrvlm_jax.core.errors import UserError

if TYPE_CHECKING:
  from hrvlm_jax.training.config import RunConfig


def main(argv: list[str]) -> int:
  """Lists parameters by path with shape, type, count and, for a config, how they are trained."""
  parser = Parser('params', main.__doc__, config=True, config_required=False)
  parser.add_argument('--checkpoint', help='checkpoint or work directory of a run')
  parser.add_argument('--depth', type=int, help='sum up paths below so many names')
  parser.add_argument('--devices', type=int, metavar='N',
                      help="with --config: how the config's mesh cuts them over N devices")
  arguments = parser.parse(argv)
  if (arguments.config is None) == (arguments.checkpoint is None):
    raise UserError('give either --config FILE.py or --checkpoint DIR')

  if arguments.devices is not None and arguments.config is None:
    raise UserError('--devices belongs to --config: a checkpoint has no mesh')

  if arguments.checkpoint is not None:
    from hrvlm_jax.checkpoint import store

    leaves, notes = store.describe(arguments.checkpoint), {}
  else:
    from hrvlm_jax.training import run_config
    from hrvlm_jax.training.config import RunConfig

    config = run_config.load(RunConfig, arguments.config, arguments.overrides)
    leaves, notes = of_config(config, devices=arguments.devices)
  print('\n'.join(table(leaves, notes, depth=arguments.depth)))
  return 0


def of_config(config: RunConfig, *, devices: int | None = None) -> tuple[
    dict[str, Any], dict[str, str]]:
  """Shapes and types of a run's parameters by path, and how each is trained and cut.

  Args:
    devices: that the run's mesh is made of; None: nothing is said of the cuts.

  Raises:
    UserError: the groups do not cover the model, or the mesh does not fit the devices or the model.
  """
  from jax.sharding import AbstractMesh

  from hrvlm_jax.core import paths
  from hrvlm_jax.parallel import mesh, rules
  from hrvlm_jax.systems.contract import sharding_rules
  from hrvlm_jax.training import optimizer
  from hrvlm_jax.training.program import run_dtypes
  from hrvlm_jax.vlm import model

  abstract = model.build(config.model).abstract
  groups = optimizer.groups_of(config.training, abstract)
  wanted = run_dtypes(config.training, groups, abstract)
  notes = {path: optimizer.describe(group) for path, group in groups.items()}
  if devices is not None:
    sizes = config.mesh.resolve(devices).shape
    cut = rules.param_shardings(wanted, AbstractMesh(tuple(sizes.values()), mesh.AXES),
                                rules=sharding_rules(config.model))
    for path, sharding in paths.flatten(cut).items():
      axes = ', '.join('-' if axis is None else axis if isinstance(axis, str) else '*'.join(axis)
                       for axis in sharding.spec)
      notes[path] += f'  ({axes})' if axes else '  whole'
  return paths.flatten(wanted), notes


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
