"""Claims of the papers in miniature: what is asked beside the papers' numbers.

A claim is a row of points in the order in which the paper says a number rises or falls. Every point
is a model of the comparison, with other settings of its encoder or inference methods laid over it
at test time where the claim is about those. `lab.verdicts` says whether the order was found;
numbers of different tasks and sizes are not compared.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from hrvlm_jax.lab.needle.kinds import TASKS
from hrvlm_jax.lab.report import SIZES

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
