"""Confidence intervals of a score by resampling its units."""

from collections.abc import Callable, Sequence

from jaxtyping import Float
import numpy as np


def interval(
    values: Float[np.ndarray, 'n'],
    *,
    statistic: Callable[[np.ndarray], float] | None = None,
    strata: Sequence | None = None,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
  """Percentile interval of the mean (or of `statistic`) over bootstrap samples.

  Args:
    values: one value for each independent unit (question, image, group of rotations).
    statistic: called with the positions [n] of one resample; default: the mean of their values.
    strata: a label for each unit; units are then drawn within the units of their label only, so
      that a small group (a subtask of MME) keeps its size in every resample.
    draws: number of resamples. seed: of the generator; the same input gives the same interval.

  Returns:
    (low, high); both nan when there are no units.
  """
  count = len(values)
  if not count:
    return float('nan'), float('nan')
  rng = np.random.default_rng(seed)
  results = np.empty(draws)
  labels = np.unique(np.asarray(strata), return_inverse=True)[1] if strata is not None else \
      np.zeros(count, np.int64)
  order = np.argsort(labels, kind='stable')
  sizes = np.bincount(labels)
  starts, size_of = np.repeat(np.cumsum(sizes) - sizes, sizes), np.repeat(sizes, sizes)
  for draw in range(draws):
    chosen = order[starts + rng.integers(0, size_of)]
    results[draw] = values[chosen].mean() if statistic is None else statistic(chosen)
  tail = 50 * (1 - level)
  low, high = np.percentile(results, [tail, 100 - tail])
  return float(low), float(high)
