"""Tables, pictures and kept files: how every experiment says what it found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import os
import pathlib
import platform
from typing import Any

import jax
import numpy as np

from hrvlm_jax.checkpoint.files import whole_file
from hrvlm_jax.core import machine as kinds
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation.analysis.sizes import TERTILES, tertiles

SIZES = ('small', 'medium', 'large')


def machine() -> dict[str, Any]:
  """What the numbers were measured on."""
  device = jax.devices()[0]
  return {'device': device.device_kind, 'devices': jax.device_count(),
          'processor': platform.processor() or platform.machine(), 'cores': os.cpu_count(),
          'kind': kinds.here().title}


def accuracy(rows: Sequence[Mapping[str, Any]]) -> float:
  """Share of right answers (0 to 1)."""
  return float(np.mean([bool(row['correct']) for row in rows]))


def accuracy_by_size(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Accuracy in each third of the answers by relative area of the text asked for (`SIZES`).

  Sizes without an answer (fewer than three given) are left out.

  Args:
    rows: of `Experiment.answers`.
  """
  groups: dict[str, list] = {}
  for row, size in zip(rows, tertiles([row['area'] for row in rows]), strict=True):
    groups.setdefault(size, []).append(row)
  return {name: accuracy(groups[size]) for name, size in zip(SIZES, TERTILES) if size in groups}


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table for the eye: names on the left, the rest in columns that end together."""
  lines = [list(header), *map(list, rows)]
  widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
  return ''.join('   '.join([line[0].ljust(widths[0]),
                             *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
                 .rstrip() + '\n' for line in lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, rest: str = '---:'
                   ) -> list[str]:
  """The lines of a table in Markdown; `rest`: the rule below all columns but the first."""
  rule = ['---', *[rest] * (len(header) - 1)]
  return ['| ' + ' | '.join(line) + ' |' for line in (header, rule, *rows)]


@contextlib.contextmanager
def figure(path: str | os.PathLike, rows: int = 1, columns: int = 1, *,
           size: tuple[float, float] = (7, 4)) -> Iterator[list]:
  """Axes of a picture, row by row; saved as PNG at the end. Axes without data stay away."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  made, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout='constrained')
  try:
    yield list(panels.flat)
    for axes in panels.flat:
      axes.spines['top'].set_visible(False)
      if not axes.has_data():
        axes.set_axis_off()
    with whole_file(path) as part:
      made.savefig(part, dpi=150)
  finally:
    plt.close(made)


def bars(axes: Any, series: Mapping[str, Mapping[str, float]], *, chance: float,
         numbers: bool = False) -> dict[str, Any]:
  """Shares (0 to 1) in percent, a group of bars per label and one bar per name; returns colours.

  Args:
    series: name -> label -> share, the same labels for all. numbers: written above the bars.
  """
  labels, width, colours = list(next(iter(series.values()))), 0.8 / len(series), {}
  for number, (name, values) in enumerate(series.items()):
    positions = np.arange(len(labels)) + (number - (len(series) - 1) / 2) * width
    drawn = axes.bar(positions, [100 * v for v in values.values()], width=0.9 * width,
                     label=name.replace('_', ' '))
    colours[name] = drawn[0].get_facecolor()
    if numbers:
      axes.bar_label(drawn, fmt='%.0f', fontsize=8)
  axes.axhline(100 * chance, color='grey', linestyle=':', label='chance')
  axes.set_xticks(np.arange(len(labels)), [label.replace('_', ' ') for label in labels])
  axes.set(ylabel='answers right (%)', ylim=(0, 122 if numbers else 105), yticks=range(0, 101, 20))
  return colours


def insert(text: str, document: pathlib.Path, *, name: str) -> None:
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
