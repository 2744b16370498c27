"""What a comparison found, as text table, Markdown and picture."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import shutil
from typing import Any

import jax
import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.lab import claims

# Title and form of the columns behind the accuracies.
_COLUMNS = {'tokens': ('tokens', '{:.0f}'), 'views': ('views', '{:.0f}'),
            'encoder_gflops': ('encoder GFLOP', '{:.3f}'), 'latency_ms': ('latency ms', '{:.0f}'),
            'peak_memory_mb': ('memory MB', '{:.0f}')}


def machine() -> dict[str, Any]:
  """What the numbers were measured on."""
  device = jax.devices()[0]
  return {'device': device.device_kind, 'devices': jax.device_count(),
          'processor': platform.processor() or platform.machine(), 'cores': os.cpu_count()}


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
  for name, row in rows.items():
    if 'adapted' in row:
      notes.append(
        f'{name.replace("_", " ")}: {row["adapted"]["steps"]} steps '
        f'({row["adapted"]["seconds"]:.0f} s) of pre-training on scenes before, beside the shared '
        f'encoder ({results["encoder_steps"]} steps).')
  if {row['family'] for row in rows.values()} - {'prefix'}:
    notes.append('Tokens can be compared between systems that put them into the prompt only.')
  where = results['machine']
  notes.append(f'Machine: {where["device"]} x {where["devices"]}, {where["cores"]} cores; '
               f'{results["seconds"] / 60:.0f} minutes in all.')
  return notes


def table(results: dict[str, Any]) -> str:
  """The table as text."""
  header, rows = _cells(results)
  line = lambda cells: f'{cells[0]:<14}' + ''.join(f'{cell:>15}' for cell in cells[1:])
  return '\n'.join([line(header), *map(line, rows), *_notes(results)]) + '\n'


def markdown(results: dict[str, Any]) -> str:
  """The table with its notes in Markdown."""
  header, rows = _cells(results)
  line = lambda cells: '| ' + ' | '.join(cells) + ' |'
  rule = '| --- |' + ' ---: |' * (len(header) - 1)
  return '\n'.join([line(header), rule, *map(line, rows), '', ' '.join(_notes(results))]) + '\n'


def insert(text: str, document: pathlib.Path, *, name: str = 'compare') -> None:
  """Puts text between `<!-- name:begin -->` and `<!-- name:end -->` of a Markdown file.

  Raises:
    UserError: the document does not have both marks, once each and in this order.
  """
  begin, end = f'<!-- {name}:begin -->', f'<!-- {name}:end -->'
  old = document.read_text()
  if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
    raise UserError(f'{document}: expected one line "{begin}" and one line "{end}" after it; add '
                    'them where the table belongs')
  before, rest = old.split(begin)
  document.write_text(f'{before}{begin}\n{text.rstrip()}\n{end}{rest.split(end)[1]}')


def fill(results: dict[str, Any], document: pathlib.Path) -> None:
  """Puts the table, and the claims where there are any, between their marks in a Markdown file.

  Raises:
    UserError: see `insert`; the file has none of the marks that these results could fill.
  """
  texts = {'compare': markdown(results)}
  if results.get('claims'):
    texts['claims'] = claims.markdown(results['claims'])
  text = document.read_text()
  marked = [name for name in texts if f'<!-- {name}:begin -->' in text] or ['compare']
  for name in marked:
    insert(texts[name], document, name=name)


def plot(results: dict[str, Any], path: pathlib.Path) -> None:
  """Accuracy by target size, and accuracy against the encoder's work, as PNG."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

  rows = results['systems']
  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout='constrained')
  by_work = sorted(rows, key=lambda name: rows[name]['encoder_gflops'])
  sizes = [*next(iter(rows.values()))['accuracy_by_size'], 'all']
  width = 0.8 / len(rows)
  for number, (name, row) in enumerate(rows.items()):
    values = [100 * v for v in (*row['accuracy_by_size'].values(), row['accuracy'])]
    places = np.arange(len(sizes)) + (number - (len(rows) - 1) / 2) * width
    bars = left.bar(places, values, width=0.9 * width, label=name.replace('_', ' '))
    right.scatter(row['encoder_gflops'], 100 * row['accuracy'], color=bars[0].get_facecolor(),
                  s=20 + row['tokens'] / 2)
    # Neighbours are written above and below by turns.
    below = by_work.index(name) % 2
    right.annotate(name.replace('_', ' '), (row['encoder_gflops'], 100 * row['accuracy']),
                   textcoords='offset points', xytext=(0, -18 if below else 11), ha='center',
                   fontsize=8)
  left.axhline(100 * results['chance'], color='grey', linestyle=':', label='chance')
  left.set_xticks(np.arange(len(sizes)), [size.replace('_', ' ') for size in sizes])
  left.set(ylabel='answers right (%)', ylim=(0, 105), title='By size of the text asked for')
  figure.legend(*left.get_legend_handles_labels(), loc='outside lower center', ncols=8,
                frameon=False, fontsize=8)
  right.set(xlabel='encoder GFLOP per image', ylabel='answers right (%)', xscale='log',
            ylim=(0, 105), title='Against work (area: tokens)')
  right.margins(x=0.15)
  right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  right.xaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
  right.xaxis.set_minor_formatter(NullFormatter())
  for axes in (left, right):
    axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(path, dpi=150)
  plt.close(figure)


NOT_RUN = 'Not run yet.'


def section(kept: pathlib.Path) -> str:
  """What a document says about a comparison: its table and plot, or that it was not run.

  Args:
    kept: result of `keep`; the plot lies beside it.
  """
  if not kept.exists():
    return NOT_RUN
  return markdown(json.loads(kept.read_text()))


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
  for name in ('plot', *(['claims'] if results.get('claims') else [])):
    if (folder / f'{name}.png').exists():
      shutil.copyfile(folder / f'{name}.png', place / f'{config.stem}_{name}.png')
  return kept
