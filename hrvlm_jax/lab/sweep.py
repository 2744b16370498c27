"""Several runs of a config: one folder each, one table and plot at the end, resumable.

A finished run is not repeated, an interrupted one resumes, a run that fails leaves its sentence in
the table and the others go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import runpy
from typing import Any

import jax
import numpy as np

from hrvlm_jax.checkpoint import store
from hrvlm_jax.checkpoint.files import whole_file
from hrvlm_jax.core.errors import UserError, unknown
from hrvlm_jax.lab.experiment import Experiment, Interrupted, say
from hrvlm_jax.lab.report import figure, text_table
from hrvlm_jax.training import run_config
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.metrics import read_metrics
from hrvlm_jax.training.recipe import find

RESULTS, TABLE, PLOT = 'results.json', 'table.txt', 'plot.png'
_FAILED = 'FAILED'  # in the folder of a run that failed: why


@dataclasses.dataclass(frozen=True)
class Entry:
  """One run of a sweep.

  Attributes:
    name: of its folder.
    values: what makes it different, for the table.
    published: numbers of the paper for this row, or None.
  """

  name: str
  config: RunConfig
  values: Mapping[str, str] = dataclasses.field(default_factory=dict)
  published: Sequence[float] | None = None


def entries_of(spec: str, overrides: run_config.Overrides, *, only: str | None = None
               ) -> list[Entry]:
  """The runs of a grid or of a sweep file, which has `ROWS` and `get_config(row)`.

  A value of `ROWS` may be a pair whose second part holds the paper's numbers.

  Raises:
    UserError: an unknown row, no row and no list of values, or what a config refuses.
  """
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


def run(entries: Sequence[Entry], folder: str | os.PathLike, *, progress: bool = True) -> None:
  """Trains all runs one after the other and writes results.json, table.txt and plot.png.

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
    try:
      experiment.part(entry.name, _train, experiment, entry, workdir,
                      done=lambda e=entry, w=workdir: is_finished(w, e.config))
    except Interrupted:
      raise
    except UserError as error:
      workdir.mkdir(exist_ok=True)
      (workdir / _FAILED).write_text(str(error))
      say(f'{entry.name} failed: {error}')
      failed.append(entry.name)
  write_report(entries, experiment.folder)
  say((experiment.folder / TABLE).read_text())
  if failed:
    raise UserError(f'{len(failed)} of {len(entries)} runs failed: {", ".join(failed)} (see FAILED '
                    f'in their folders below {folder})')


def _train(experiment: Experiment, entry: Entry, workdir: pathlib.Path) -> None:
  (workdir / _FAILED).unlink(missing_ok=True)
  try:
    experiment.train(entry.config, workdir)
  finally:
    jax.clear_caches()  # programs of one run are of no use to the next


def is_finished(workdir: pathlib.Path, config: RunConfig) -> bool:
  """Whether a run has reached its last step."""
  steps = store.steps(workdir) if workdir.exists() else []
  return bool(steps) and steps[-1] >= config.training.steps


def summary(entry: Entry, folder: pathlib.Path) -> dict[str, Any]:
  """What the table says about a run."""
  workdir = folder / entry.name
  row: dict[str, Any] = {'name': entry.name, 'values': dict(entry.values)}
  if entry.published is not None:
    row['published'] = list(entry.published)
  if (workdir / _FAILED).exists():
    return row | {'failed': (workdir / _FAILED).read_text()}
  metrics = read_metrics(workdir)
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
  for name, text in ((RESULTS, json.dumps(rows, indent=1) + '\n'), (TABLE, table(rows))):
    with whole_file(folder / name) as part:
      part.write_text(text)
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
    axes.legend(fontsize=8)
