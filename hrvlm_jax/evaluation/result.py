"""From answers to a result: the score, what is missing from it, and how sure it is."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation import provenance
from hrvlm_jax.evaluation.benchmarks.base import Benchmark, Sample, Scores
from hrvlm_jax.evaluation.metrics.bootstrap import interval

# Raise it when a scorer changes any number.
SCORER_VERSION = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """Score of one run.

  Attributes:
    identity: task, split, data, prompt, model: everything that decided the answers.
    metric, value: the headline; both None where labels are hidden or a judge has to score.
    values: all variants by full name.
    n, n_missing, n_empty, n_truncated, n_unparsed: samples; without an answer; with an empty one;
      stopped by the length limit; not understood by the headline's parser. Missing, empty and
      unparsed answers count as wrong.
    n_bad_images: samples that were not asked because an image cannot be used; they are among the
      empty ones and count as wrong.
    ci95: bootstrap interval of the headline.
    notes: sentences to print beside the number.
    per_sample: score 0..1 of each sample in order; empty without labels.
  """

  identity: Mapping[str, Any]
  metric: str | None
  value: float | None
  values: Mapping[str, float]
  by_category: Mapping[str, float]
  n: int
  n_missing: int
  n_empty: int
  n_truncated: int
  n_unparsed: int
  ci95: tuple[float, float] | None
  notes: tuple[str, ...]
  n_bad_images: int = 0
  per_sample: tuple[float, ...] = dataclasses.field(repr=False, default=())

  def to_dict(self) -> dict[str, Any]:
    """Plain values for result.json, provenance included."""
    value = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    del value['per_sample'], value['identity']
    return {**self.identity, **value, 'scorer_version': SCORER_VERSION,
            'git': provenance.git_commit(), 'packages': provenance.versions()}

  def summary(self) -> str:
    """A few lines for a person: headline with interval, categories, what counts against it."""
    task, split = self.identity['task'], self.identity['split']
    head = f'{task} ({split}), {self.n} samples: '
    if self.value is None:
      head += 'no score here'
    else:
      low, high = self.ci95 or (float('nan'), float('nan'))
      head += f'{self.metric} = {self.value:.2f} (95 % interval {low:.2f} to {high:.2f})'
    rest = [f'  {name} = {value:.2f}' for name, value in self.values.items()
            if name != self.metric]
    rest += [f'  {name}: {value:.2f}' for name, value in self.by_category.items()]
    return '\n'.join([head, *rest, *(f'  note: {note}' for note in self.notes)])


def score_texts(
    benchmark: Benchmark,
    split: str,
    samples: Sequence[Sample],
    found: Mapping[str, Mapping[str, Any]],
    *,
    identity: Mapping[str, Any],
    published: int | None = None,
) -> Result:
  """Scores prediction records (by sample id) of a benchmark.

  Args:
    published: number of samples of the full split, to say when these are not all of it.

  Raises:
    UserError: some samples have labels and others have none.
  """
  texts = [found[s.id]['text'] if s.id in found else '' for s in samples]
  missing = sum(s.id not in found for s in samples)
  empty = sum(s.id in found and not text.strip() for s, text in zip(samples, texts))
  bad = [s.id for s in samples if 'bad_image' in found.get(s.id, {})]
  truncated = sum(found.get(s.id, {}).get('finish_reason') == 'length' for s in samples)
  hidden = sum(s.answers is None for s in samples)
  scores = None
  notes: list[str] = []
  if benchmark.score is None:
    notes.append(f'{benchmark.name} is scored by its official judge: use the submission file')
  elif hidden == len(samples):
    notes.append(f'the labels of {split} are hidden: use the submission file')
  elif hidden:
    raise UserError(f'{benchmark.name} {split}: {hidden} of {len(samples)} samples have no labels')
  else:
    scores = benchmark.score(samples, texts)
    notes.extend(scores.notes)
  if missing:
    notes.append(f'{missing} of {len(samples)} samples have no prediction; they count as wrong')
  if bad:
    shown = ', '.join(bad[:5]) + (', ...' if len(bad) > 5 else '')
    notes.append(f'{len(bad)} samples were not asked, an image of theirs cannot be used; they '
                 f'count as wrong: {shown} (first: {found[bad[0]]["bad_image"]})')
  if empty > len(bad):
    notes.append(f'{empty - len(bad)} answers are empty; they count as they are')
  if identity.get('limit'):
    notes.append(f'only the first {len(samples)} samples: not comparable with the full split')
  elif published is not None and published != len(samples):
    notes.append(f'{len(samples)} samples where the published split has {published}')
  return Result(
      identity=identity, n=len(samples), n_missing=missing, n_empty=empty, n_truncated=truncated,
      n_bad_images=len(bad), n_unparsed=scores.unparsed if scores else 0, notes=tuple(notes),
      metric=scores.metric if scores else None, value=scores.value if scores else None,
      values=scores.values if scores else {}, by_category=scores.by_category if scores else {},
      ci95=_interval(scores), per_sample=tuple(map(float, scores.per_sample)) if scores else ())


def _interval(scores: Scores | None) -> tuple[float, float] | None:
  if scores is None or not scores.units:
    return None
  values = np.asarray(scores.units, np.float64)
  if scores.statistic is not None:
    return interval(values, statistic=scores.statistic, strata=scores.strata)
  return interval(100 * values, strata=scores.strata)
