"""Several runs of a config: one folder each, one table and plot at the end, resumable.

A finished run is not repeated, an interrupted one resumes, a run that fails leaves its sentence in
the table and the others go on. A sweep file with a `TABLE` is a table of a paper: its rows have
stages and answer benchmarks (`lab.tables`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import runpy
import sys
from typing import Any

import jax
import numpy as np

from hrvlm_jax.checkpoint.files import whole_file
from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError, unknown
from hrvlm_jax.lab import planned, tables
from hrvlm_jax.lab.experiment import Experiment, Interrupted, say
from hrvlm_jax.lab.report import figure, text_table
from hrvlm_jax.lab.tables import Table, is_finished
from hrvlm_jax.training import run_config
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.metrics import read_metrics
from hrvlm_jax.training.recipe import find

RESULTS, TABLE, PLOT = 'results.json', 'table.txt', 'plot.png'
_FAILED = 'FAILED'  # in the folder of a run that failed: why
_SCORES = 'scores.json'  # in the folder of a row: what it answered
_PLANNED = 'planned.json'  # in the folder of a row: what the planner said


@dataclasses.dataclass(frozen=True)
class Entry:
  """One run of a sweep.

  Attributes:
    name: of its folder.
    config: of its last stage.
    values: what makes it different, for the table.
    published: numbers of the paper for this row, or None.
    row: its name in `ROWS`, '' for a grid.
    stages: (name, config) of every stage, the last one's among them; () for one without a name.
    table: of its file, or None. path: of its file.
    asked: of the planner, where its table does; in full size, in a smoke run too.
  """

  name: str
  config: RunConfig
  values: Mapping[str, str] = dataclasses.field(default_factory=dict)
  published: Sequence[float] | None = None
  row: str = ''
  stages: Sequence[tuple[str, RunConfig]] = ()
  table: Table | None = None
  path: str = ''
  asked: planned.Question | None = None

  @property
  def all_stages(self) -> list[tuple[str, RunConfig]]:
    """(name, config) of every stage; one without a name where the file has none."""
    return list(self.stages) or [('', self.config)]

  @property
  def start_command(self) -> str:
    """See `lab.tables.Table.start_command`."""
    first = self.all_stages[0][1]
    return self.table.start_command(self.path, self.row, first) if self.table else ''

  @property
  def trains(self) -> bool:
    """It trains a model of its own."""
    return self.table is None or (self.table.of(self.row).model is None
                                  and self.row not in self.table.left_out)


def entries_of(spec: str, overrides: run_config.Overrides, *, only: str | None = None
               ) -> list[Entry]:
  """The runs of a grid or of a sweep file, which has `ROWS` and `get_config(row)`.

  A value of `ROWS` may be a pair whose second part holds the paper's numbers.

  Raises:
    UserError: an unknown row, no row and no list of values, or what a config refuses.
  """
  path, argument = find(spec)
  rows, table = _rows(path) if argument is None else ({}, None)
  if only and not rows:
    raise UserError(f'--only: {spec} has no ROWS to choose from')
  chosen = list(rows) if only is None else only.split(',')
  if wrong := [name for name in chosen if name not in rows]:
    raise UserError(f'--only: {unknown(wrong[0], rows, what="row")}')
  if table is not None:
    table.check(list(rows), path)
  found = []
  for row in chosen or [None]:
    own = (None,) if table is None or not table.stages else table.stages_of(row)
    specs = [spec if row is None else ','.join(filter(None, (f'{path}:{row}', stage)))
             for stage in own]
    grids = [run_config.grid(RunConfig, one, overrides) for one in specs]
    for number, (values, config) in enumerate(grids[-1]):
      parts = [*([] if row is None else [row]),
               *(f'{key.rpartition(".")[2]}={_short(text)}' for key, text in values)]
      stages = [] if own == (None,) else [
        (stage, grid[number][1]) for stage, grid in zip(own, grids, strict=True)]
      found.append(Entry('_'.join(parts) or 'run', config, dict(values),
                         None if row is None else rows[row], row or '', stages, table, path,
                         _asked(table, row, specs[-1], config, dict(overrides) | dict(values))))
  if len(found) == 1 and not rows:
    raise UserError(f'{spec} with these options is one run: use `hrvlm train`, or give a key '
                    'several values (--config.seed=0,1,2)')
  return found


def _asked(table: Table | None, row: str | None, spec: str, config: RunConfig,
           changed: Mapping[str, str]) -> planned.Question | None:
  """What the planner is asked about a row, where its table asks."""
  if table is None or row not in table.planned:
    return None
  return planned.Question(table.planned[row], spec, config, changed,
                          table.of(row).knobs.get('encoder', {}))


def _rows(path: str) -> tuple[dict, Table | None]:
  """Row -> the paper's numbers, where the file has `ROWS`; its `TABLE`."""
  sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # neighbours, as for get_config
  try:
    names = runpy.run_path(path)
  finally:
    sys.path.pop(0)
  return {name: value[1] if isinstance(value, tuple) and len(value) == 2 else None
          for name, value in names.get('ROWS', {}).items()}, names.get('TABLE')


def _short(text: str) -> str:
  """A value as part of a folder's name."""
  return ''.join(c if c.isalnum() or c in '.-+' else '_' for c in text)[:40]


def run(entries: Sequence[Entry], folder: str | os.PathLike, *, data: str | None = None,
        limit: int | None = None, progress: bool = True) -> None:
  """Runs all one after the other and writes results.json, table.txt and plot.png.

  Args:
    data: the folder with the files of every benchmark of a table, by name; None: none is answered.
    limit: only the first samples of each.

  Raises:
    UserError: two runs of one name, the folder holds another sweep, or some runs failed (after the
      others were done).
    Interrupted: by a signal.
  """
  names = [entry.name for entry in entries]
  if len(set(names)) != len(names):
    twice = sorted({name for name in names if names.count(name) > 1})
    raise UserError(f'sweep: several runs of the same name: {", ".join(twice)}')
  experiment = Experiment(folder, progress=progress)
  failed = []
  for entry in entries:
    workdir = experiment.folder / entry.name
    workdir.mkdir(exist_ok=True)
    try:
      (workdir / _FAILED).unlink(missing_ok=True)
      if entry.trains:
        _train(experiment, entry, workdir)
      if entry.asked is not None:
        say(f'[{entry.name}/plan]')
        with whole_file(workdir / _PLANNED) as part:
          part.write_text(json.dumps(entry.asked.answer(), indent=1) + '\n')
      if data is not None and entry.table is not None and entry.table.benchmarks:
        _answer(experiment, entry, data, limit)
    except Interrupted:
      raise
    except UserError as error:
      (workdir / _FAILED).write_text(str(error))
      say(f'{entry.name} failed: {error}')
      failed.append(entry.name)
  write_report(entries, experiment.folder)
  say((experiment.folder / TABLE).read_text())
  if failed:
    raise UserError(f'{len(failed)} of {len(entries)} runs failed: {", ".join(failed)} (see FAILED '
                    f'in their folders below {folder})')


def _train(experiment: Experiment, entry: Entry, workdir: pathlib.Path) -> None:
  """All stages of a run."""
  stages = tables.chained(entry.all_stages, workdir)
  names = [name for name, _ in entry.all_stages]
  if entry.table is not None and not is_finished(*stages[0]):
    tables.check_start(stages[0][1], f'row {entry.row}', entry.start_command)
  for number, (name, (place, config)) in enumerate(zip(names, stages, strict=True)):
    moved = entry.table.joins.get(name) if entry.table else None
    if moved and not is_finished(place, config):
      rest = entry.all_stages[number][1].training.init_from
      config = tables.join(stages[number - 1][0], moved, rest, config, workdir / f'start_{name}')
    title = f'{entry.name}/{name}' if len(stages) > 1 else entry.name
    try:
      experiment.part(title, experiment.train, config, place,
                      done=lambda p=place, c=config: is_finished(p, c))
    finally:
      jax.clear_caches()  # programs of one run are of no use to the next


def _answer(experiment: Experiment, entry: Entry, data: str, limit: int | None) -> None:
  """The benchmarks of a table, by the trained model of the row."""
  table, tested = entry.table, entry.table.of(entry.row)
  if entry.row in table.left_out:
    return
  model = entry.name if tested.model is None else tested.model + entry.name.removeprefix(entry.row)
  workdir = tables.chained(entry.all_stages, experiment.folder / model)[-1][0]
  if not workdir.exists():
    raise UserError(f'row {entry.row} tests the model of row {model}, which is not trained in '
                    f'{experiment.folder}; run that row too')
  say(f'[{entry.name}/eval]')
  folder = experiment.folder / entry.name
  scores = tables.answer(table, tested.knobs, workdir, folder / 'eval', data, limit=limit,
                         progress=experiment.progress)
  (folder / _SCORES).write_text(json.dumps(scores, indent=1) + '\n')
  jax.clear_caches()


def summary(entry: Entry, folder: pathlib.Path) -> dict[str, Any]:
  """What the table says about a run."""
  workdir = folder / entry.name
  row: dict[str, Any] = {'name': entry.name, 'values': dict(entry.values)}
  if entry.published is not None:
    row['published'] = list(entry.published)
  if (workdir / _FAILED).exists():
    return row | {'failed': (workdir / _FAILED).read_text()}
  if (workdir / _PLANNED).exists():
    row['planned'] = json_text.loads((workdir / _PLANNED).read_text())
  if (workdir / _SCORES).exists():
    row['scores'] = json_text.loads((workdir / _SCORES).read_text())
  if not entry.trains:
    return row | {'note': entry.table.left_out.get(
      entry.row, f'the model of {entry.table.of(entry.row).model}')}
  metrics = read_metrics(tables.chained(entry.all_stages, workdir)[-1][0])
  trained = [m for m in metrics if 'loss' in m]
  scored = [m['eval_accuracy'] for m in metrics if 'eval_accuracy' in m]
  last = trained[-max(1, len(trained) // 10):]
  row |= {'steps': trained[-1]['step'], 'loss': float(np.mean([m['loss'] for m in last])),
          'tokens_per_second': float(np.median([m['tokens_per_second'] for m in trained])),
          'curve': [[m['step'], m['loss']] for m in trained]}
  return row | ({'accuracy': scored[-1]} if scored else {})


def write_report(entries: Sequence[Entry], folder: pathlib.Path) -> None:
  """results.json, table.txt and plot.png of what the runs' folders hold."""
  rows = [summary(entry, folder) for entry in entries]
  paper = entries[0].table
  text = table(rows) if paper is None else tables.text(paper, rows)
  for name, value in ((RESULTS, json.dumps(rows, indent=1) + '\n'), (TABLE, text)):
    with whole_file(folder / name) as part:
      part.write_text(value)
  plot([row for row in rows if 'curve' in row], folder / PLOT)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows as text; the loss is the mean of the last tenth of what was logged."""
  keys = list(dict.fromkeys(key for row in rows for key in row['values']))
  scored, known = (any(name in row for row in rows) for name in ('accuracy', 'published'))
  head = ['run', *keys, 'steps', 'loss', *(['accuracy'] if scored else []), 'tokens/s',
          *(['published'] if known else [])]
  lines = []
  for row in rows:
    values = [row['values'].get(key, '') for key in keys]
    if 'failed' in row:
      lines.append([row['name'], *values, 'failed', *[''] * (len(head) - len(values) - 2)])
      continue
    accuracy = [f'{row["accuracy"]:.1%}' if 'accuracy' in row else ''] if scored else []
    published = [' / '.join(f'{x:g}' for x in row.get('published', ()))] if known else []
    lines.append([row['name'], *values, str(row['steps']), f'{row["loss"]:.4f}', *accuracy,
                  f'{row["tokens_per_second"]:.0f}', *published])
  return text_table(head, lines)


def plot(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Loss curves of all runs in one picture."""
  with figure(path) as (axes,):
    for number, row in enumerate(rows):
      label = row['name'] + (f' ({row["accuracy"]:.1%})' if 'accuracy' in row else '')
      axes.plot(*zip(*row['curve'], strict=True), label=label, color=f'C{number % 10}',
                linestyle='-' if number < 10 else '--')
    axes.set(xlabel='step', ylabel='loss')
    if rows:
      axes.legend(fontsize=8)
