"""Benchmarks from Python, and several evaluations as one table and one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
import numbers
import os
import pathlib
from typing import Any

import jax

from hrvlm_jax.checkpoint import layout
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation import benchmarks, provenance, records, runner
from hrvlm_jax.evaluation.benchmarks.own import own
from hrvlm_jax.evaluation.model import EvaluatedModel
from hrvlm_jax.evaluation.result import Result
from hrvlm_jax.front.loading import load
from hrvlm_jax.front.model import Model
from hrvlm_jax.lab.report import figure, text_table

RESULTS, TABLE, PLOT = 'results.json', 'table.txt', 'plot.png'


def evaluate(model: Any, benchmark: str, *, data: str | os.PathLike, out: str | os.PathLike,
             split: str | None, batch_size: int, limit: int | None, max_new_tokens: int | None,
             metric: str | None, progress: bool) -> Result:
  """See `hrvlm_jax.api.evaluate`."""
  if metric is not None and benchmark != 'own':
    raise UserError(f'metric: {benchmark} has its own; a metric belongs to the benchmark own')
  chosen = own(metric) if benchmark == 'own' else benchmarks.get(benchmark)
  loaded = model if isinstance(model, Model) else load(model, exif='ignore')
  if loaded.answerer is None:
    raise UserError(f'{loaded.name}: is an encoder alone; benchmarks ask questions')
  name = loaded.name or loaded.config.system
  folder = None
  if loaded.name and layout.to_path(loaded.name).is_dir():
    try:
      folder = os.fspath(layout.resolve(loaded.name))
    except UserError:  # a folder in an original's layout
      folder = loaded.name
  asked = EvaluatedModel(
    loaded.answerer, max_new_tokens=max_new_tokens or chosen.max_new_tokens).described(
      name=os.path.basename(os.path.abspath(name)), checkpoint=name,
      checkpoint_hash='' if folder is None else provenance.folder_hash(folder))
  return runner.evaluate(chosen, asked, data=data, out=out, options=runner.Options(
    split=split, batch_size=batch_size, limit=limit, progress=progress))


@dataclasses.dataclass(frozen=True)
class Cell:
  """One evaluation of several.

  Attributes:
    values: swept key -> its value here.
    result: None where it failed, and on processes other than the first.
    error: why it failed.
  """

  values: Mapping[str, Any]
  benchmark: str
  result: Result | None
  error: str = ''

  @property
  def first(self) -> bool:
    """Whether this process writes."""
    return jax.process_index() == 0


def folder_of(values: Mapping[str, Any]) -> str:
  """Name of the folder of a combination; '' without one."""
  parts = (f'{key.rpartition(".")[2]}={value}' for key, value in values.items())
  return '_'.join(''.join(c if c.isalnum() or c in '.-+=_' else '_' for c in part)[:60]
                  for part in parts)


def write(cells: Sequence[Cell], names: Sequence[str], out: str | os.PathLike) -> str:
  """results.json, table.txt and plot.png of several evaluations; returns the table."""
  folder = pathlib.Path(out)
  folder.mkdir(parents=True, exist_ok=True)
  rows = [{'values': dict(cell.values), 'benchmark': cell.benchmark} | (
    {'error': cell.error} if cell.result is None else
    {'metric': cell.result.metric, 'value': cell.result.value, 'ci95': cell.result.ci95,
     'n': cell.result.n}) for cell in cells]
  records.write_whole(folder / RESULTS, json.dumps(rows, indent=1, default=str) + '\n')
  keys = list(cells[0].values)
  combinations = list(dict.fromkeys(tuple(cell.values.items()) for cell in cells))
  found = {(tuple(cell.values.items()), cell.benchmark): cell for cell in cells}
  table = text_table(
    [*(key.rpartition('.')[2] for key in keys), *names] if keys else ['benchmark', 'score'],
    [[*(str(value) for _, value in values), *(_shown(found.get((values, name))) for name in names)]
     for values in combinations] if keys else
    [[name, _shown(found.get(((), name)))] for name in names])
  records.write_whole(folder / TABLE, table)
  _plot(cells, names, keys, folder / PLOT)
  return f'{table}written: {folder}'


def _shown(cell: Cell | None) -> str:
  if cell is None or cell.result is None:
    return 'failed'
  if cell.result.value is None:
    return 'no score here'
  low, high = cell.result.ci95 or (cell.result.value,) * 2
  return f'{cell.result.value:.2f} ({low:.2f} to {high:.2f})'


def _plot(cells: Sequence[Cell], names: Sequence[str], keys: Sequence[str], path: pathlib.Path
          ) -> None:
  """A panel per benchmark: the score over the first swept key, a line per value of the others;
  bars where nothing is swept."""
  scored = [cell for cell in cells if cell.result is not None and cell.result.value is not None]
  panels = list(names) if keys else ['']
  with figure(path, 1, len(panels), size=(max(5, 4.5 * len(panels)), 4)) as axes:
    for panel, name in zip(axes, panels):
      mine = [cell for cell in scored if not keys or cell.benchmark == name]
      if not keys:
        panel.bar([cell.benchmark for cell in mine], [cell.result.value for cell in mine],
                  yerr=_errors(mine), capsize=4)
        panel.set_ylabel('score')
        continue
      points = list(dict.fromkeys(cell.values[keys[0]] for cell in mine))
      plain = all(isinstance(x, numbers.Real) for x in points)
      lines: dict[tuple, list[Cell]] = {}
      for cell in mine:
        lines.setdefault(tuple(cell.values[key] for key in keys[1:]), []).append(cell)
      for rest, line in lines.items():
        where = [cell.values[keys[0]] if plain else points.index(cell.values[keys[0]])
                 for cell in line]
        label = ', '.join(f'{key.rpartition(".")[2]} {value}' for key, value in zip(keys[1:], rest))
        panel.errorbar(where, [cell.result.value for cell in line], yerr=_errors(line), marker='o',
                       capsize=3, label=label or None)
      if mine:
        panel.set_xticks(points if plain else range(len(points)), [str(x) for x in points])
        panel.set(title=name, xlabel=keys[0].rpartition('.')[2],
                  ylabel=mine[0].result.metric.replace('_', ' '))
        if keys[1:]:
          panel.legend(fontsize=8)


def _errors(cells: Sequence[Cell]) -> list[list[float]]:
  """Lengths of the 95 % interval below and above each value."""
  ends = [(cell.result.value, *(cell.result.ci95 or (cell.result.value,) * 2)) for cell in cells]
  return [[max(value - low, 0) for value, low, _ in ends],
          [max(high - value, 0) for value, _, high in ends]]
