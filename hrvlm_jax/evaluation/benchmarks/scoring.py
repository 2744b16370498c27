"""From per-sample scores to `Scores`, shared by the benchmarks."""

from collections.abc import Callable, Mapping, Sequence

from hrvlm_jax.evaluation.benchmarks.base import Sample, Score, Scores
from hrvlm_jax.evaluation.metrics import choice


def percent(values: Sequence[float]) -> float:
  """100 times the mean; 0 for nothing."""
  return 100 * sum(values) / len(values) if values else 0.0


def mean_score(**variants: Callable[[str, Sample], float]) -> Score:
  """A scorer that reports 100 times the mean of each named function of (answer, sample).

  The first name is the headline, and is also given by category.
  """
  headline = next(iter(variants))

  def score(samples: Sequence[Sample], texts: Sequence[str]) -> Scores:
    per = {name: [function(text, sample) for text, sample in zip(texts, samples)]
           for name, function in variants.items()}
    return Scores(
        headline, {name: percent(values) for name, values in per.items()},
        by_category=by_category(samples, per[headline]), per_sample=per[headline],
        units=per[headline])
  return score


def references(function: Callable[[str, Sequence[str]], float]) -> Callable[[str, Sample], float]:
  """A metric of (answer, references) as a function of (answer, sample)."""
  return lambda text, sample: function(text, sample.answers)


def reference(function: Callable[[str, str], float]) -> Callable[[str, Sample], float]:
  """A metric of (answer, one reference) as a function of (answer, sample)."""
  return lambda text, sample: function(text, sample.answers[0])


def by_category(samples: Sequence[Sample], values: Sequence[float]) -> dict[str, float]:
  """Percentage in each category; empty when samples have none."""
  if not any(sample.category for sample in samples):
    return {}
  return dict(choice.shares(values, [sample.category for sample in samples]))


def letter_score(
    parsers: Mapping[str, Callable[[str, Sample], str | None]],
    *,
    extra: Callable[[Sequence[Sample], dict[str, list[float]]], dict[str, float]] | None = None,
) -> Score:
  """A scorer of multiple choice: each parser's letter against the right one.

  Args:
    parsers: metric name -> parser; the first one's letters are shown by category.
    extra: further values from the per-sample scores of every parser.
  """
  first = next(iter(parsers))

  def score(samples: Sequence[Sample], texts: Sequence[str]) -> Scores:
    read = {name: [parser(text, sample) for text, sample in zip(texts, samples)]
            for name, parser in parsers.items()}
    per = {name: [float(letter == sample.answers[0]) for letter, sample in zip(found, samples)]
           for name, found in read.items()}
    values = {name: percent(column) for name, column in per.items()}
    if extra:
      values |= extra(samples, per)
    return Scores(
        first, values, by_category=by_category(samples, per[first]),
        per_sample=per[first], unparsed=sum(letter is None for letter in read[first]),
        units=per[first])
  return score


def own_letter(text: str, sample: Sample) -> str | None:
  """This library's parser on a sample's choices."""
  return choice.mcq_letter(text, sample.choices)
