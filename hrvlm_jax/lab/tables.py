"""A table of a paper as a sweep file: rows that train stage by stage, then answer its benchmarks.

A sweep file that has, beside `ROWS` and `get_config`, a `TABLE = Table(...)`, is run row by row:

    its stages            FOLDER/ROW/STAGE, each from the one before it
    its benchmarks        FOLDER/ROW/eval/NAME, where --data gives their files
    its place in a table  what was measured, and the paper's number beside it

`get_config` takes the row and the stage ('ROW,STAGE'; without a stage the last one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
import shutil
from typing import Any

from hrvlm_jax.checkpoint import layout, store
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation import benchmarks, provenance
from hrvlm_jax.evaluation.model import EvaluatedModel
from hrvlm_jax.evaluation.result import Result
from hrvlm_jax.evaluation.runner import Options, evaluate
from hrvlm_jax.lab.planned import Planned
from hrvlm_jax.lab.report import text_table
from hrvlm_jax.parallel.topology import GIB
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.start import stored_params
from hrvlm_jax.vlm.answer import Answerer

Knobs = Mapping[str, Mapping[str, Any]]
MEMORY = 'GiB'  # of a device: the column of `Table.further` that the planner fills


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tested:
  """How a row answers where that differs from how it trained.

  Attributes:
    model: the row whose trained model answers; None: its own.
    knobs: as `hrvlm eval` takes them, such as {'encoder': {'looks': 'all'}, 'fastv': {}}.
  """

  model: str | None = None
  knobs: Knobs = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """What a table of a paper has beside its rows.

  Attributes:
    stages: words of `get_config`, in the order in which they train.
    own_stages: row -> its stages, where they are others.
    benchmarks: names of `hrvlm eval`, of the first numbers of a row, in their order.
    further: names of the numbers behind those -> the command that measures each here; `MEMORY` is
      filled in for rows that are planned.
    tested: row -> `Tested`.
    left_out: row -> why it is not trained (the paper's own ran out of memory, ...).
    planned: row -> the devices for which the planner says what it needs.
    parts: what `hrvlm convert` gives the start of a row, 'PATH=RELEASE' each, see `start_command`;
      () for rows that start from nothing, or from what their `init_from` says.
    own_parts: row -> its parts, where they are others.
    max_new_tokens: of every answer at most; None: those of the benchmarks.
    examples: right and wrong answers that the report of a benchmark shows, of each so many.
    joins: stage -> {path in the stage before: path in this one}: it starts from an encoder that the
      stage before trained, and for the rest from its own `init_from`.
  """

  stages: tuple[str, ...] = ()
  own_stages: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  benchmarks: tuple[str, ...] = ()
  further: Mapping[str, str] = dataclasses.field(default_factory=dict)
  tested: Mapping[str, Tested] = dataclasses.field(default_factory=dict)
  left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
  planned: Mapping[str, Planned] = dataclasses.field(default_factory=dict)
  max_new_tokens: int | None = None
  examples: int = 12
  parts: tuple[str, ...] = ()
  own_parts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  joins: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)

  def check(self, rows: Sequence[str], where: str) -> None:
    """Raises:
      UserError: rows or benchmarks it names that do not exist.
    """
    named = {*self.tested, *self.left_out, *self.planned, *self.own_parts, *self.own_stages,
             *(t.model for t in self.tested.values() if t.model)}
    problems = [f'row {name!r} of TABLE is not in ROWS' for name in sorted(named - set(rows))]
    if problems:
      raise UserError(f'{where}: ' + '; '.join(problems))
    for name in self.benchmarks:
      benchmarks.get(name)

  def stages_of(self, row: str) -> tuple[str, ...]:
    """The stages of a row."""
    return self.own_stages.get(row, self.stages)

  def parts_of(self, row: str) -> tuple[str, ...]:
    """What the start of a row is made of."""
    return self.own_parts.get(row, self.parts)

  def start_command(self, path: str, row: str, config: RunConfig) -> str:
    """The command that makes what the first stage of a row starts from; '' where there is none.

    Args:
      path: of the sweep file. config: of the row's first stage.
    """
    parts, stages = self.parts_of(row), self.stages_of(row)
    if not parts or config.training.init_from is None:
      return ''
    word = ','.join([row, *stages[:1]])
    given = ' '.join(f'--part {part}' for part in parts)
    return f'hrvlm convert --config {path}:{word} {given} --to {config.training.init_from}'

  def of(self, row: str) -> Tested:
    """How the row answers."""
    return self.tested.get(row, Tested())


def chained(stages: Sequence[tuple[str, RunConfig]], folder: pathlib.Path
            ) -> list[tuple[pathlib.Path, RunConfig]]:
  """(work directory, config) of every stage; each starts where the one before it ended."""
  out: list[tuple[pathlib.Path, RunConfig]] = []
  for name, config in stages:
    place = folder / name if len(stages) > 1 else folder
    if out:
      training = dataclasses.replace(config.training, init_from=os.fspath(out[-1][0]))
      config = dataclasses.replace(config, training=training)
    out.append((place, config))
  return out


def join(previous: pathlib.Path, moved: Mapping[str, str], rest: str | None, config: RunConfig,
         target: pathlib.Path) -> RunConfig:
  """The config of a stage that starts from a part another run trained (`Table.joins`).

  Args:
    previous: work directory of that run. moved: path there -> path here.
    rest: checkpoint with the other parameters, or None.
    target: the start that is made, anew each time.

  Raises:
    UserError: no such checkpoint, or nothing under the paths.
  """
  flat = {} if rest is None else dict(store.load_leaves(rest))
  for there, here in moved.items():
    names = [path for path in stored_params(previous) if path.startswith(f'{there}/')]
    if not names:
      raise UserError(f'{previous}: has no parameters below {there}/')
    flat |= {here + name.removeprefix(there): leaf
             for name, leaf in store.load_leaves(previous, names)}
  if target.exists():
    shutil.rmtree(target)
  store.save_params(target, paths.unflatten(flat), {'model': to_dict(config.model)})
  training = dataclasses.replace(config.training, init_from=os.fspath(target))
  return dataclasses.replace(config, training=training)


def check_start(config: RunConfig, what: str, command: str) -> None:
  """A start that is not there is known before anything trains.

  Args:
    what: starts from it. command: makes it, '' where none does.

  Raises:
    UserError: no such checkpoint, with the command.
  """
  source = config.training.init_from
  if source is None:
    return
  try:
    stored_params(source)
  except UserError as error:
    made = f'; made by: {command}' if command else ''
    raise UserError(f'{what} starts from {source}, which is not there ({error}){made}') from error


def answer(table: Table, knobs: Knobs, workdir: pathlib.Path, out: pathlib.Path, data: str, *,
           batch_size: int = 8, limit: int | None = None, progress: bool = True
           ) -> dict[str, Any]:
  """Benchmark -> {metric, value, n} of a trained model; what is there is not asked again.

  Args:
    data: the folder that holds the files of every benchmark under its name.

  Raises:
    UserError: settings that the model refuses. A benchmark that fails is {'error': why}.
  """
  knobs = {name: dict(options) for name, options in knobs.items()}
  answerer = Answerer.load(workdir, exif='ignore', encoder_options=knobs.pop('encoder', None),
                           methods=knobs)
  found: dict[str, Any] = {}
  asked = EvaluatedModel(answerer, max_new_tokens=1)
  for name in table.benchmarks:
    benchmark = benchmarks.get(name)
    longest = min(filter(None, (benchmark.max_new_tokens, table.max_new_tokens)))
    model = asked.with_longest(longest).described(
      name=workdir.name, checkpoint=os.fspath(workdir),
      checkpoint_hash=provenance.folder_hash(os.fspath(layout.resolve(workdir))))
    try:
      result = evaluate(benchmark, model, data=os.path.join(data, name), out=out / name,
                        options=Options(batch_size=batch_size, limit=limit, progress=progress,
                                        examples=table.examples))
    except UserError as error:
      found[name] = {'error': str(error)}
      continue
    assert isinstance(result, Result)
    found[name] = {'metric': result.metric, 'value': result.value, 'n': result.n}
  return found


def text(table: Table, rows: Sequence[Mapping[str, Any]]) -> str:
  """The table: of every number what was measured here, then the paper's."""
  columns = [*table.benchmarks, *table.further]
  trained = any('loss' in row for row in rows)
  lines = []
  for row in rows:
    paper = [*(row.get('published') or ()), *[None] * len(columns)]
    scores = dict(row.get('scores', {}))
    if 'average' in table.further and (mean := average(scores, table.benchmarks)) is not None:
      scores['average'] = {'value': mean}
    if MEMORY in table.further and 'planned' in row:
      scores[MEMORY] = {'value': row['planned']['need_bytes'] / GIB}
    cells = [f'{_cell(scores.get(name))} / {_number(paper[i])}' for i, name in enumerate(columns)]
    state = row['failed'].splitlines()[0] if 'failed' in row else '; '.join(
      filter(None, (row.get('note'), row.get('planned', {}).get('words'))))
    loss = [f'{row["loss"]:.4f}' if 'loss' in row else ''] if trained else []
    lines.append([row['name'], *(str(v) for v in row['values'].values()), *loss, *cells, state])
  keys = list(rows[0]['values']) if rows else []
  head = ['run', *keys, *(['loss'] if trained else []), *columns, '']
  notes = ['every cell: measured here / the paper'] + [
    f'{name}: {command}' for name, command in table.further.items()]
  return text_table(head, lines) + '\n'.join(notes) + '\n'


def average(scores: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> float | None:
  """Mean over the benchmarks, OCRBench's points divided by 10 (PS3); None where one is missing."""
  values = [scores.get(name, {}).get('value') for name in names]
  if any(value is None for value in values):
    return None
  scaled = [value / 10 if name == 'ocrbench' else value
            for name, value in zip(names, values, strict=True)]
  return sum(scaled) / len(scaled)


def _cell(score: Mapping[str, Any] | None) -> str:
  if score is None:
    return '-'
  if 'error' in score:
    return 'failed'
  return 'no score here' if score['value'] is None else f'{score["value"]:.1f}'


def _number(value: Any) -> str:
  return '-' if value is None else f'{value:g}'


def is_finished(workdir: pathlib.Path, config: RunConfig) -> bool:
  """Whether a run has reached its last step."""
  steps = store.steps(workdir) if workdir.exists() else []
  return bool(steps) and steps[-1] >= config.training.steps
