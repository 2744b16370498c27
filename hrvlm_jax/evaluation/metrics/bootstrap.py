"""Confidence intervals of a score by resampling its units."""

from collections.abc import Callable

from jaxtyping import Float
import numpy as np


def interval(
    values: Float[np.ndarray, 'n'],
    *,
    statistic: Callable[[np.ndarray], float] | None = None,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
  """Percentile interval of the mean (or of `statistic`) over bootstrap samples.

  Args:
    values: one value for each independent unit (question, image, group of rotations).
    statistic: called with the positions [n] of one resample; default: the mean of their values.
    draws: number of resamples. seed: of the generator; the same input gives the same interval.

  Returns:
    (low, high); both nan when there are no units.
  """
  count = len(values)
  if not count:
    return float('nan'), float('nan')
  rng = np.random.default_rng(seed)
  results = np.empty(draws)
  for draw in range(draws):
    chosen = rng.integers(0, count, count)
    results[draw] = values[chosen].mean() if statistic is None else statistic(chosen)
  tail = 50 * (1 - level)
  low, high = np.percentile(results, [tail, 100 - tail])
  return float(low), float(high)
