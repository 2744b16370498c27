"""Several runs of a config: one folder each, one table and plot at the end, resumable.

A finished run is not repeated, an interrupted one resumes, a run that fails leaves its sentence in
the table and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.loop import train
from hrvlm_jax.training.metrics import read_metrics

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


def run(entries: Sequence[Entry], folder: str | os.PathLike, *,
        say: Callable[[str], None] = print, progress: bool = True) -> bool:
  """Trains all runs one after the other and writes results.json, table.txt and plot.png.

  Returns:
    Whether all runs are finished; False after a signal.

  Raises:
    UserError: two runs of one name, the folder holds another sweep, or some runs failed (after the
      others were done).
  """
  folder = pathlib.Path(folder)
  names = [entry.name for entry in entries]
  if len(set(names)) != len(names):
    twice = sorted({name for name in names if names.count(name) > 1})
    raise UserError(f'sweep: several runs of the same name: {", ".join(twice)}')
  folder.mkdir(parents=True, exist_ok=True)
  failed = []
  for number, entry in enumerate(entries, 1):
    workdir = folder / entry.name
    if is_finished(workdir, entry.config):
      say(f'[{number}/{len(entries)}] {entry.name}: done before')
      continue
    say(f'[{number}/{len(entries)}] {entry.name}')
    (workdir / _FAILED).unlink(missing_ok=True)
    try:
      ended = train(entry.config, workdir, progress=progress)
    except UserError as error:
      workdir.mkdir(exist_ok=True)
      (workdir / _FAILED).write_text(str(error))
      say(f'{entry.name} failed: {error}')
      failed.append(entry.name)
      continue
    finally:
      jax.clear_caches()  # programs of one run are of no use to the next
    if ended.interrupted:
      say(f'interrupted at step {ended.step} of {entry.name}; the same command goes on')
      return False
  write_report(entries, folder)
  say((folder / TABLE).read_text())
  if failed:
    raise UserError(f'{len(failed)} of {len(entries)} runs failed: {", ".join(failed)} (see FAILED '
                    f'in their folders below {folder})')
  return True


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
  (folder / RESULTS).write_text(json.dumps(rows, indent=1) + '\n')
  (folder / TABLE).write_text(table(rows))
  plot([row for row in rows if 'curve' in row], folder / PLOT)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows as text; the loss is the mean of the last tenth of what was logged."""
  keys = list(dict.fromkeys(key for row in rows for key in row['values']))
  scored, known = (any(name in row for row in rows) for name in ('accuracy', 'published'))
  head = ['run', *keys, 'steps', 'loss', *(['accuracy'] if scored else []), 'tokens/s',
          *(['published'] if known else [])]
  lines = [head]
  for row in rows:
    values = [row['values'].get(key, '') for key in keys]
    if 'failed' in row:
      lines.append([row['name'], *values, 'failed', *[''] * (len(head) - len(values) - 2)])
      continue
    accuracy = [f'{row["accuracy"]:.1%}' if 'accuracy' in row else ''] if scored else []
    published = [' / '.join(f'{x:g}' for x in row.get('published', ()))] if known else []
    lines.append([row['name'], *values, str(row['steps']), f'{row["loss"]:.4f}', *accuracy,
                  f'{row["tokens_per_second"]:.0f}', *published])
  widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
  return ''.join('  '.join(f'{cell:<{width}}' for cell, width in zip(line, widths)).rstrip() + '\n'
                 for line in lines)


def plot(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Loss curves of all runs in one picture."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
  for number, row in enumerate(rows):
    label = row['name'] + (f' ({row["accuracy"]:.1%})' if 'accuracy' in row else '')
    axes.plot(*zip(*row['curve'], strict=True), label=label, color=f'C{number % 10}',
              linestyle='-' if number < 10 else '--')
  axes.set_xlabel('step')
  axes.set_ylabel('loss')
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(fontsize=8)
  figure.savefig(path, dpi=120)
  plt.close(figure)
