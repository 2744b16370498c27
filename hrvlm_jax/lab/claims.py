"""Claims of the papers in miniature: data and a plot beside the papers' numbers.

A claim is a row of points in the order in which the paper says a number rises or falls. Every point
is a model of the comparison, with other settings of its encoder or inference methods laid over it
at test time where the claim is about those. Nothing is said but whether the order was found;
numbers of different tasks and sizes are not compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
import pathlib
from typing import Any, Literal

import numpy as np

from hrvlm_jax.lab.needle.kinds import TASKS
from hrvlm_jax.lab.report import SIZES, accuracy, accuracy_by_size, figure, markdown_table

PAPERS = ('MC-LLaVA', 'Pheye', 'LLaVA-HR', 'PS3')
COSTS = ('tokens', 'views', 'encoder_gflops', 'peak_memory_mb', 'latency_ms')  # of `measure.cost`
ANALYSES = ('attention_global', 'recall')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
  """One number of a claim.

  Attributes:
    label: what it is called in table and plot.
    system: model of the comparison.
    encoder: settings of its encoder at test time.
    methods: inference methods laid over it at test time, with their settings
      (`vlm.answer.METHODS`).
    size: which questions count: 'all', or a third by size of the text asked for (`SIZES`).
    paper: the paper's number; None where it prints none.
    measure: 'accuracy'; a cost of `lab.measure.cost` (`COSTS`), which has no size; or an analysis
      (`ANALYSES`): the share of cross-attention on the global view (Pheye, appendix C), the share
      of the target's box that PS3's selection covers.
  """

  label: str
  system: str
  encoder: dict[str, Any] = dataclasses.field(default_factory=dict)
  methods: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  size: str = 'all'
  paper: float | None = None
  measure: str = 'accuracy'

  @property
  def key(self) -> str:
    """Name of its answers: the system, and what is set otherwise."""
    options = [f'{name}={self.encoder[name]}' for name in sorted(self.encoder)]
    for method in sorted(self.methods):
      settings = self.methods[method]
      options += [f'{method}.{name}={settings[name]}' for name in sorted(settings)] or [method]
    return f'{self.system}[{",".join(options)}]' if options else self.system


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
  """What a paper says, and the points that show it or do not.

  Attributes:
    says: the claim in a sentence.
    source: where the paper says it, and what its numbers are.
    order: how the numbers go along the points: they rise, they fall, the first one is better than
      each other one, or all are within 10 % of the first (costs).
    minus: a model whose accuracy on the same questions is subtracted (a gain); None: none is.
    paper: whose claim it is (`PAPERS`); '' where the page has one table for all.
    task: the task that can tell it ('needle', 'relate', 'page').
    note: what was learnt where it does not hold, in Markdown.
    follows: name of the claim that this one looks into: a follow-up, told with that claim's note
      and not among the paper's claims.
  """

  says: str
  source: str
  points: tuple[Point, ...]
  order: Literal['rises', 'falls', 'first', 'constant']
  minus: str | None = None
  paper: str = ''
  task: str = 'needle'
  note: str = ''
  follows: str = ''

  def __post_init__(self):
    sizes = sorted({p.size for p in self.points} - {'all', *SIZES})
    measures = sorted({p.measure for p in self.points})
    problems = []
    if len(self.points) < 2 or sizes:
      problems.append(f'expected two points or more, of sizes all, {", ".join(SIZES)}; found '
                      f'{len(self.points)} points, sizes {sizes}')
    if len(measures) > 1 or set(measures) - {'accuracy', *COSTS, *ANALYSES}:
      problems.append(f'expected one measure of accuracy, {", ".join(COSTS + ANALYSES)} for all '
                      f'points; found {", ".join(measures)}')
    if set(measures) & set(COSTS) and any(p.size != 'all' or p.methods for p in self.points):
      problems.append('a cost is that of all questions and of a model without methods')
    if self.minus is not None and measures != ['accuracy']:
      problems.append(f'minus: accuracies can be subtracted, found {", ".join(measures)}')
    if self.paper not in ('', *PAPERS):
      problems.append(f'paper: expected one of {", ".join(PAPERS)}, found {self.paper!r}')
    if self.task not in TASKS:
      problems.append(f'task: expected one of {", ".join(TASKS)}, found {self.task!r}')
    if problems:
      raise ValueError(f'Claim {self.says!r}: ' + '; '.join(problems))

  @property
  def measure(self) -> str:
    """What its points are."""
    return self.points[0].measure


def share(rows: Sequence[Mapping[str, Any]], size: str) -> float:
  """Right answers among those of a size."""
  return accuracy(rows) if size == 'all' else accuracy_by_size(rows)[size]


def judge(claim: Claim, answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
  """Numbers, their spread and whether the order holds.

  Args:
    answers: rows of `compare.answer_records` by `Point.key` and by the name of `minus`.

  Returns:
    values (shares, or gains in shares), errors (their standard errors, questions being drawn
    independently), `holds`: every step goes the way the claim says; `clear`: the whole way from
    the first point to the last is longer than two standard errors.
  """
  values, errors = [], []
  for point in claim.points:
    rows = answers[point.key]
    value = share(rows, point.size)
    count = len(rows) / (1 if point.size == 'all' else len(SIZES))
    spread = value * (1 - value) / count
    if claim.minus is not None:
      other = share(answers[claim.minus], point.size)
      value, spread = value - other, spread + other * (1 - other) / count
    values.append(value)
    errors.append(math.sqrt(spread))
  sign = 1 if claim.order == 'rises' else -1
  steps = [sign * (b - a) for a, b in zip(values, values[1:])]
  whole = sign * (values[-1] - values[0])
  return {
    'says': claim.says, 'source': claim.source, 'order': claim.order,
    'labels': [p.label for p in claim.points], 'paper': [p.paper for p in claim.points],
    'values': values, 'errors': errors, 'holds': bool(min(steps) >= 0 and whole > 0),
    'clear': bool(abs(whole) > 2 * math.hypot(errors[0], errors[-1]))}


def markdown(found: Mapping[str, Mapping[str, Any]]) -> str:
  """All claims side by side with the papers' numbers."""
  rows = []
  for claim in found.values():
    here = ', '.join(f'{label} {100 * v:.1f} ± {100 * e:.1f}' for label, v, e in zip(
      claim['labels'], claim['values'], claim['errors'], strict=True))
    paper = ', '.join(f'{label} {v:g}' for label, v in zip(
      claim['labels'], claim['paper'], strict=True) if v is not None) or 'no numbers printed'
    verdict = 'as claimed' if claim['holds'] else 'not as claimed'
    if not claim['clear']:
      verdict += ', within two standard errors'
    rows.append([claim['says'], here, f'{paper} ({claim["source"]})', verdict])
  return '\n'.join(markdown_table(['claim', 'here', 'paper', 'order'], rows, rest='---')) + '\n'


def plot(found: Mapping[str, Mapping[str, Any]], path: pathlib.Path) -> None:
  """One panel per claim: here on the left axis, the paper's numbers on the right one."""
  columns = min(3, len(found))
  rows = -(-len(found) // columns)
  with figure(path, rows, columns, size=(4.6 * columns, 3.4 * rows)) as panels:
    for axes, claim in zip(panels, found.values()):
      positions = np.arange(len(claim['labels']))
      axes.errorbar(positions, [100 * v for v in claim['values']],
                    [100 * e for e in claim['errors']], marker='o', capsize=3, color='#1b6ca8')
      axes.set_xticks(positions, claim['labels'], fontsize=7)
      axes.set_ylabel('here (%)', color='#1b6ca8', fontsize=8)
      if any(v is not None for v in claim['paper']):
        other = axes.twinx()
        other.plot(positions, [np.nan if v is None else v for v in claim['paper']], marker='s',
                   linestyle='--', color='#c8553d')
        other.set_ylabel('paper', color='#c8553d', fontsize=8)
        other.tick_params(labelsize=7)
      axes.tick_params(axis='y', labelsize=7)
      axes.margins(x=0.15)
      mark = 'as claimed' if claim['holds'] else 'NOT as claimed'
      axes.set_title(f'{claim["says"]}\n({mark})', fontsize=8, wrap=True)
