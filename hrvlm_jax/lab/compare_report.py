"""What a comparison found, as text table, Markdown and picture."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from typing import Any

from hrvlm_jax.core import json_text
from hrvlm_jax.lab import report

# Title and form of the columns behind the accuracies.
_COLUMNS = {'tokens': ('tokens', '{:.0f}'), 'views': ('views', '{:.0f}'),
            'encoder_gflops': ('encoder GFLOP', '{:.3f}'), 'latency_ms': ('latency ms', '{:.0f}'),
            'peak_memory_mb': ('memory MB', '{:.0f}')}


def _cells(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Header and one row of cells per system."""
  rows = results['systems']
  sizes = list(next(iter(rows.values()))['accuracy_by_size'])
  header = ['system', 'all', *sizes, *(title for title, _ in _COLUMNS.values())]
  cells = [[name.replace('_', ' '), f'{row["accuracy"]:.1%}',
            *(f'{row["accuracy_by_size"][size]:.1%}' for size in sizes),
            *(form.format(row[key]) for key, (_, form) in _COLUMNS.items())]
           for name, row in rows.items()]
  return [title.replace('_', ' ') for title in header], cells


def _notes(results: dict[str, Any]) -> list[str]:
  """What has to be said with the numbers, one sentence each."""
  rows, images = results['systems'], results['images']
  notes = ['Right answers, in all and by size of the text asked for; chance '
           f'{results["chance"]:.1%}; {images["eval"]} questions, {results["steps"]} training '
           'steps each.']
  notes += [f'{name.replace("_", " ")}: {row["times"]} times as many training steps.'
            for name, row in rows.items() if row.get('times', 1) > 1]
  for name, row in rows.items():
    if 'adapted' in row:
      notes.append(
        f'{name.replace("_", " ")}: {row["adapted"]["steps"]} steps '
        f'({row["adapted"]["seconds"]:.0f} s) of pre-training on scenes before, beside the shared '
        f'encoder ({results["encoder_steps"]} steps).')
  if {row['family'] for row in rows.values()} - {'prefix'}:
    notes.append('Tokens can be compared between systems that put them into the prompt only.')
  where = results['machine']
  cores = where.get('kind', f'{where["cores"]} cores')  # earlier results do not say the kind
  notes.append(f'Machine: {where["device"]} x {where["devices"]}, {cores}; '
               f'{results["seconds"] / 60:.0f} minutes in all.')
  return notes


def table(results: dict[str, Any]) -> str:
  """The table as text."""
  return report.text_table(*_cells(results)) + '\n'.join(_notes(results)) + '\n'


def markdown(results: dict[str, Any]) -> str:
  """The table with its notes in Markdown."""
  return '\n'.join([*report.markdown_table(*_cells(results)), '', ' '.join(_notes(results))]) + '\n'


def fill(results: dict[str, Any], document: pathlib.Path) -> None:
  """Puts the table between its marks in a Markdown file.

  Raises:
    UserError: see `report.insert`.
  """
  report.insert(markdown(results), document, name='compare')


def plot(results: dict[str, Any], path: pathlib.Path) -> None:
  """Accuracy by target size, and accuracy against the encoder's work, as PNG."""
  from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

  rows = results['systems']
  by_work = sorted(rows, key=lambda name: rows[name]['encoder_gflops'])
  with report.figure(path, 1, 2, size=(11, 4.4)) as (left, right):
    colours = report.bars(
      left, {name: {**row['accuracy_by_size'], 'all': row['accuracy']}
             for name, row in rows.items()}, chance=results['chance'])
    for name, row in rows.items():
      right.scatter(row['encoder_gflops'], 100 * row['accuracy'], color=colours[name],
                    s=20 + row['tokens'] / 2)
      # Neighbours are written above and below by turns.
      below = by_work.index(name) % 2
      right.annotate(name.replace('_', ' '), (row['encoder_gflops'], 100 * row['accuracy']),
                     textcoords='offset points', xytext=(0, -18 if below else 11), ha='center',
                     fontsize=8)
    left.set_title('By size of the text asked for')
    left.figure.legend(*left.get_legend_handles_labels(), loc='outside lower center', ncols=8,
                       frameon=False, fontsize=8)
    right.set(xlabel='encoder GFLOP per image', ylabel='answers right (%)', xscale='log',
              ylim=(0, 105), title='Against work (area: tokens)')
    right.margins(x=0.15)
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
    right.xaxis.set_minor_formatter(NullFormatter())


NOT_RUN = 'Not run yet.'


def section(kept: pathlib.Path) -> str:
  """What a document says about a comparison: its table and plot, or that it was not run.

  Args:
    kept: result of `keep`; the plot lies beside it.
  """
  if not kept.exists():
    return NOT_RUN
  return markdown(json_text.loads(kept.read_text()))


def keep(results: dict[str, Any], folder: pathlib.Path, config_file: str | os.PathLike
         ) -> pathlib.Path:
  """Copies results and pictures of a finished comparison to `results/` beside its config.

  Args:
    results: of `compare`. folder: of the comparison.

  Returns:
    `results/<name of the config>.json`.
  """
  config = pathlib.Path(os.fspath(config_file).partition(':')[0])
  place = config.parent / 'results'
  place.mkdir(exist_ok=True)
  kept = place / f'{config.stem}.json'
  kept.write_text(json.dumps(results, indent=2) + '\n')
  if (folder / 'plot.png').exists():
    shutil.copyfile(folder / 'plot.png', place / f'{config.stem}_plot.png')
  return kept
