"""Rows of a paper's table that ran out of memory there, or whose memory is a column of it: what the
planner says of them here.

Of the row's full size, in smoke runs too; by arithmetic, as `hrvlm plan` without a compiler: no
chip is needed and nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import shlex
from typing import Any, Literal

from hrvlm_jax.parallel import fitting
from hrvlm_jax.parallel.mesh import batch_shards
from hrvlm_jax.parallel.topology import parse
from hrvlm_jax.planning import answering, training as plans
from hrvlm_jax.training import fitting as needs
from hrvlm_jax.training.batches import batch_shapes
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.program import micro_rows, outline_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
  """How the planner is asked about a row.

  Attributes:
    topology: the devices, such as 'a100:64'.
    step: 'train', the last stage's step with the longest bucket; or 'answer', one question about
      one image with the settings of the test.
  """

  topology: str
  step: Literal['train', 'answer'] = 'train'


@dataclasses.dataclass(frozen=True)
class Question:
  """What the planner is asked about a row of a sweep; a smoke run asks the same.

  Attributes:
    planned: of its table. spec: of its last stage. config: the same, in full size.
    changed: keys of the config that the command line changes, with their text.
    knobs: of its encoder at test, for 'answer'.
  """

  planned: Planned
  spec: str
  config: RunConfig
  changed: Mapping[str, str]
  knobs: Mapping[str, Any]

  @property
  def command(self) -> str:
    """The command that says the same."""
    train = self.planned.step == 'train'
    keys = dict(self.changed)
    if not train:
      keys |= {f'model.encoder.{name}': str(value) for name, value in self.knobs.items()}
    return shlex.join([
      'hrvlm', 'plan', '--config', self.spec, '--topology', self.planned.topology,
      *(('--effort', 'arithmetic') if train else ('--step', 'answer')),
      *(f'--config.{key}={text}' for key, text in keys.items())])

  def answer(self) -> dict[str, Any]:
    """What the row needs of a device, as JSON values.

    Returns:
      `planning.training.report`, with step, command, words, need_bytes, out_of_memory, and for
      'train' rows (a device has at a time), length and most_rows (that a device holds; 0: none).

    Raises:
      UserError: a batch that cannot be cut over the devices.
    """
    topology = parse(self.planned.topology)
    if self.planned.step == 'answer':
      model = dataclasses.replace(self.config.model, encoder=dataclasses.replace(
        self.config.model.encoder, **self.knobs))
      choice, further, most = answering.answers_on(model, topology), {}, ''
      what = f'one answer on {topology.name}'
    else:
      choice = plans.trains_on(self.config, topology)
      rows = micro_rows(self.config) // batch_shards(choice.mesh.shape)
      further = {'rows': rows, 'length': max(self.config.data.lengths),
                 'most_rows': _most_rows(self.config, choice)}
      what = (f'a train step on {topology.name}, mesh {fitting.axes_of(choice.mesh)}, {rows} '
              f'row(s) of {further["length"]} places a device,')
      most = f'; a device has room for {further["most_rows"]} row(s)'
    out = choice.need.total > choice.limit
    words = (f'planned here by arithmetic, nothing compiled: {what} needs '
             f'{fitting.size(choice.need.total)} of {fitting.size(choice.limit)}: '
             f'{"OUT OF MEMORY" if out else choice.verdict}{most}')
    return plans.report(topology, choice) | further | {
      'step': self.planned.step, 'command': self.command, 'need_bytes': choice.need.total,
      'out_of_memory': out, 'words': words}


def _most_rows(config: RunConfig, choice: fitting.Choice) -> int:
  """The most rows, of the parts of the batch by powers of two, that a device of the mesh holds."""
  shards, outline, most, rows = batch_shards(choice.mesh.shape), outline_of(config), 0, 1
  total = config.data.packing.rows or config.training.batch_size
  while total % (rows * shards) == 0:
    tried = dataclasses.replace(config, training=dataclasses.replace(
      config.training, accumulate=total // (rows * shards)))
    need = needs.step_need(tried, outline, choice.mesh, batch_shapes(tried, micro_rows(tried)))
    if need.total > choice.limit:
      break
    most, rows = rows, 2 * rows
  return most
