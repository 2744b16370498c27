"""Whether a claim holds: differences over the same questions, over seeds, with their errors.

The rule, stated before anything was run. d is the difference of a claim's two ends, in the
direction that the paper claims: with each seed on the same questions, then the mean over seeds. Its
standard error joins what seeds and what questions bring:

    SE^2 = var(d of the seeds) / seeds  +  sum over seeds of var(d of the questions) / questions
                                           / seeds^2

Every seed has questions of its own, so that the first term holds the second one already, but three
seeds say little about a variance; the sum errs on the careful side. A claim holds when d > 2 SE and
no step between neighbours goes against it by more than 2 SE of that step; it does not hold when
d < -2 SE or a step goes against it so; else it cannot be told. 'first': the first point against
each other one, all of which must be told. 'constant': every mean within 10 % of the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from hrvlm_jax.evaluation.analysis.sizes import TERTILES, tertiles
from hrvlm_jax.lab.claims import COSTS, Claim, Point
from hrvlm_jax.lab.report import SIZES

HOLDS, FAILS, UNTOLD = 'holds', 'does not hold', 'cannot be told'
WITHIN = 0.1  # of the first point, for what is claimed to be constant
CLEAR = 2.0  # standard errors


@dataclasses.dataclass(frozen=True)
class Observed:
  """What the systems of one (task, seed) did.

  Attributes:
    areas: relative area of the text asked for, by question.
    values: measure -> key of a point -> one number per question (0 or 1 for accuracy).
    costs: key of a point -> what `measure.cost` says.
  """

  areas: Sequence[float]
  values: Mapping[str, Mapping[str, Sequence[float]]]
  costs: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)

  def has(self, claim: Claim) -> bool:
    """Whether all that the claim needs is here."""
    if claim.measure in COSTS:
      return all(p.key in self.costs for p in claim.points)
    have = self.values.get(claim.measure, {})
    minus = {claim.minus} - {None}
    return {p.key for p in claim.points} | minus <= have.keys()


@dataclasses.dataclass(frozen=True)
class Number:
  """A mean with its standard error."""

  value: float
  error: float


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What was found of a claim.

  Attributes:
    seeds: with which it was run.
    points: the mean of every point; shares in 0..1, costs in their units.
    difference: d in the claimed direction; 'first': the least clear one; 'constant': the largest
      deviation from the first point as a share of it.
    steps: between neighbours, in the claimed direction; 'first': to each other point.
    verdict: HOLDS, FAILS or UNTOLD.
  """

  seeds: tuple[int, ...]
  points: tuple[Number, ...]
  difference: Number
  steps: tuple[Number, ...]
  verdict: str


# Of one seed: a number per question with the questions' places, or one number (a cost).
Sample = tuple[np.ndarray, np.ndarray] | float


def sample(claim: Claim, point: Point, seen: Observed) -> Sample:
  """The numbers of a point with one seed; gains where the claim subtracts a model."""
  if claim.measure in COSTS:
    return float(seen.costs[point.key][claim.measure])
  values = np.asarray(seen.values[claim.measure][point.key], np.float64)
  if claim.minus is not None:
    values = values - np.asarray(seen.values[claim.measure][claim.minus], np.float64)
  places = np.arange(len(values))
  if point.size != 'all':
    wanted = TERTILES[SIZES.index(point.size)]
    places = np.flatnonzero(np.array(tertiles(seen.areas)) == wanted)
  return values[places], places


def _mean(one: Sample) -> float:
  return one if isinstance(one, float) else float(one[0].mean())


def _spread(one: Sample) -> float:
  """Variance of the mean over questions."""
  if isinstance(one, float) or len(one[0]) < 2:
    return 0.0
  return float(one[0].var(ddof=1)) / len(one[0])


def _between(one: Sample, other: Sample) -> tuple[float, float]:
  """(other - one, its variance over questions): paired where both are of the same questions."""
  if not isinstance(one, float) and np.array_equal(one[1], other[1]):
    paired = (other[0] - one[0], one[1])
    return _mean(paired), _spread(paired)
  return _mean(other) - _mean(one), _spread(one) + _spread(other)


def joined(means: Sequence[float], spreads: Sequence[float]) -> Number:
  """Mean over seeds; its error from the seeds' spread and the questions' variances."""
  count = len(means)
  seeds = float(np.var(means, ddof=1)) / count if count > 1 else 0.0
  return Number(float(np.mean(means)), math.sqrt(seeds + sum(spreads) / count**2))


def judge(claim: Claim, seen: Mapping[int, Observed]) -> Verdict | None:
  """The verdict over all seeds that have what the claim needs; None: none has."""
  seeds = tuple(sorted(seed for seed, one in seen.items() if one.has(claim)))
  if not seeds:
    return None
  rows = [[sample(claim, point, seen[seed]) for seed in seeds] for point in claim.points]
  points = tuple(joined([_mean(one) for one in row], [_spread(one) for one in row])
                 for row in rows)
  # 'first' is better than each other one: from each of them to the first it rises.
  sign = 1 if claim.order in ('rises', 'constant') else -1

  def step(start: int, end: int) -> Number:
    found = [_between(one, other) for one, other in zip(rows[start], rows[end], strict=True)]
    return joined([sign * mean for mean, _ in found], [spread for _, spread in found])

  others = range(1, len(rows))
  if claim.order == 'constant':
    first = points[0].value
    away = [abs(p.value - first) / abs(first) if first else math.inf * bool(p.value)
            for p in points[1:]]
    largest, steps = max(away), tuple(step(0, i) for i in others)
    error = steps[away.index(largest)].error / abs(first) if first else 0.0
    return Verdict(seeds, points, Number(largest, error), steps,
                   HOLDS if largest <= WITHIN else FAILS)
  if claim.order == 'first':
    steps = tuple(step(0, i) for i in others)
    least = min(steps, key=_clearness)
    if any(_against(s) for s in steps):
      verdict = FAILS
    else:
      verdict = HOLDS if all(_for(s) for s in steps) else UNTOLD
    return Verdict(seeds, points, least, steps, verdict)
  steps = tuple(step(i - 1, i) for i in others)
  whole = step(0, len(rows) - 1)
  if _against(whole) or any(_against(s) for s in steps):
    verdict = FAILS
  else:
    verdict = HOLDS if _for(whole) else UNTOLD
  return Verdict(seeds, points, whole, steps, verdict)


def _clearness(number: Number) -> float:
  """In standard errors."""
  if number.value == 0:
    return 0.0
  return number.value / number.error if number.error else math.copysign(math.inf, number.value)


def _for(number: Number) -> bool:
  return number.value > CLEAR * number.error


def _against(number: Number) -> bool:
  return number.value < -CLEAR * number.error


def apart(one: Verdict, other: Verdict) -> float:
  """How far the differences of two machines are apart, in joint standard errors."""
  gap = abs(one.difference.value - other.difference.value)
  error = math.hypot(one.difference.error, other.difference.error)
  return 0.0 if gap == 0 else gap / error if error else math.inf


def compare(ours: Mapping[str, Verdict], theirs: Mapping[str, Verdict]) -> dict[str, Any]:
  """Two machines' verdicts row by row: `apart` by claim, and whether they agree.

  They do when no row is apart by more than 3 joint standard errors and nine of ten are by at most
  2. Rows that only one of them has do not count and are named.
  """
  both = [name for name in ours if name in theirs]
  gaps = {name: apart(ours[name], theirs[name]) for name in both}
  near = sum(gap <= 2 for gap in gaps.values())
  return {'apart': gaps, 'near': near, 'rows': len(gaps),
          'missing': sorted(ours.keys() ^ theirs.keys()),
          'agree': bool(gaps) and max(gaps.values()) <= 3 and near >= 0.9 * len(gaps)}
