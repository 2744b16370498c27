"""Evaluators by name: what is measured inside a run.

    training.evaluators = ({'name': 'answers', 'every': 500, 'data': 'held_out.json'},
                           {'name': 'benchmark', 'every': 2000, 'benchmark': 'textvqa',
                            'data': 'TEXTVQA', 'label': 'textvqa'})

One of your own is a subclass of `Evaluator` and one line: `register('mine', 'my_module:Mine')` in a
config file or a test, or `HRVLM_EVALUATORS=mine=my_module:Mine` in the environment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
from typing import Any, ClassVar

from hrvlm_jax.core import bounds
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.registry import Registry
from hrvlm_jax.parallel.layout import Layout

EVALUATORS = Registry('evaluator', {
  'answers': 'hrvlm_jax.training.answers:Answers',
  'needle': 'hrvlm_jax.lab.needle.evaluator:Needle',
  'benchmark': 'hrvlm_jax.evaluation.in_run:BenchmarkEvaluator',
}, variable='HRVLM_EVALUATORS')
register = EVALUATORS.register

FOLDER = 'evaluation'


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatorOptions:
  """What a run says of an evaluator; further fields in subclasses.

  Attributes:
    every: steps between evaluations, which also follow the last step; 0: only then.
    label: first word of its metrics, and its folder below `evaluation/` unless it is 'eval'.
  """

  name: str
  every: int = 0
  label: str = 'eval'

  BOUNDS: ClassVar = {
    'every': '[0, inf)', 'rows': '[1, inf)', 'samples': '[1, inf)', 'overlays': '[0, inf)',
    'max_new_tokens': '[1, inf)', 'batch_size': '[1, inf)'}  # of subclasses, too

  def __post_init__(self):
    bounds.check(self)


class Evaluator:
  """Something measured at some steps of a run, on all its processes.

  It is made, prepared and run on every process, at the same steps and with the same arguments, so
  that it can compute with the state where it lies; every process takes its share of the samples
  (`vlm.answer_mesh` does), and all return the same values.

  Attributes:
    notes: what is said when the run starts (rows that were left out).
    beat: to be called as the work goes on, so that a long evaluation is not taken for a run that
      stands still; set by the loop.
  """

  notes: tuple[str, ...] = ()
  beat: Callable[[], None] = staticmethod(lambda: None)

  Options: type[EvaluatorOptions] = EvaluatorOptions

  def __init__(self, options: EvaluatorOptions):
    self.options = options

  def prepare(self, run: Any, *, layout: Layout, workdir: pathlib.Path) -> None:
    """Called once, before the first step: what is missing is said now.

    Args:
      run: the `training.config.RunConfig`.
      layout: where the parameters lie.
      workdir: of the run; files are written by the first process, below `folder`.

    Raises:
      UserError: data that cannot be opened.
    """

  def run(self, params: Any, step: int) -> Mapping[str, float]:
    """The metrics, by names that begin with `options.label`.

    Args:
      params: of the model, as trained (with the moving average where one is kept).
    """
    raise NotImplementedError

  def folder(self, workdir: pathlib.Path, step: int) -> pathlib.Path:
    """Where the files of an evaluation go."""
    label = self.options.label
    return workdir / FOLDER / ('' if label == 'eval' else label) / str(step)


def evaluators_of(run: Any) -> list[Evaluator]:
  """The evaluators of a `RunConfig`: `training.evaluators`, and the one of `training.eval_every`.

  Raises:
    UserError: two with one label, or `eval_every` without data, or with an objective that has no
      evaluator of its own.
  """
  from hrvlm_jax.training.objectives import objective_of

  t = run.training
  chosen = list(t.evaluators)
  if t.eval_every:
    if run.data.eval is None:
      raise UserError('training.eval_every is set, but data.eval names no evaluation data')
    name = objective_of(t).evaluator
    if name is None:
      raise UserError(f'training.eval_every: no evaluation inside a run is known for the objective '
                      f'{t.objective.name!r}; set it to 0, or name one in training.evaluators')
    chosen.append(EVALUATORS.options(name)(
      name=name, every=t.eval_every, rows=t.eval_images, overlays=t.eval_overlays))
  labels = [options.label for options in chosen]
  if twice := sorted({label for label in labels if labels.count(label) > 1}):
    raise UserError(f'training.evaluators: {len(labels)} evaluators with the labels {labels}; give '
                    f'each its own `label` ({twice[0]!r} is there twice)')
  return [EVALUATORS.get(options.name)(options) for options in chosen]
