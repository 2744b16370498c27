"""Minimum resolution at which a question can be answered (PS3, Figure 10).

The paper plots, per benchmark, the image resolution against the minimum resolution required (MRR).
Its procedure is not published; this one: every question is asked with its image shrunk to each of
several sides, and its MRR is the smallest side from which on all answers are right (`stable`) or at
which the answer is right for the first time (`first`, lower, counts lucky guesses).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np

from hrvlm_jax.evaluation import benchmarks, records
from hrvlm_jax.evaluation.analysis import curves
from hrvlm_jax.evaluation.analysis.sizes import scores_of

Rule = Literal['stable', 'first']


def minimum_side(right: Mapping[int, bool], *, rule: Rule = 'stable') -> int | None:
  """MRR of one question.

  Args:
    right: tested side -> whether the answer was right there.

  Returns:
    The side, or None when no tested side is enough.
  """
  if rule not in ('stable', 'first'):
    raise ValueError(f"rule: expected 'stable' or 'first', got {rule!r}")
  sides = sorted(right)
  if rule == 'first':
    return next((side for side in sides if right[side]), None)
  enough = None
  for side in reversed(sides):
    if not right[side]:
      break
    enough = side
  return enough


@dataclasses.dataclass(frozen=True)
class Requirement:
  """MRR over a benchmark.

  Attributes:
    sides: MRR of every question, None where no tested side was enough.
    median: over the questions that were solved, nan without any. solved: their share.
    image_median: median longer side of the images.
    share: side -> share of all questions for which it is enough.
  """

  sides: tuple[int | None, ...]
  median: float
  solved: float
  image_median: float
  share: Mapping[int, float]


def requirement(
    scores: Mapping[int, Sequence[float]],
    image_sides: Sequence[int],
    *,
    rule: Rule = 'stable',
    threshold: float = 0.5,
) -> Requirement:
  """MRR of all questions of a benchmark.

  Args:
    scores: tested side -> score (0 to 1) of each question, in one order.
    image_sides: longer side of each question's original image; a test at a larger side shows the
      original, so the requirement is never above it.
    threshold: from which score on an answer counts as right.

  Raises:
    ValueError: no side tested, or different numbers of questions.
  """
  lengths = {len(values) for values in scores.values()} | {len(image_sides)}
  if not scores or len(lengths) != 1:
    raise ValueError(f'expected scores of the same questions at every side, got {sorted(lengths)}')
  sides = []
  for i, original in enumerate(image_sides):
    found = minimum_side({s: values[i] >= threshold for s, values in scores.items()}, rule=rule)
    sides.append(None if found is None else min(found, original))
  solved = [side for side in sides if side is not None]
  total = len(sides)
  return Requirement(
      sides=tuple(sides), median=float(np.median(solved)) if solved else float('nan'),
      solved=len(solved) / total if total else 0.0,
      image_median=float(np.median(image_sides)) if total else float('nan'),
      share={s: sum(side <= s for side in solved) / total for s in sorted(scores)} if total else {})


def run(
  *, checkpoint: str, data: str, out: str, benchmark: str, sides: Sequence[int],
  rule: str = 'stable', split: str | None = None, limit: int | None = None, batch_size: int = 8,
  max_new_tokens: int | None = None,
) -> list[str]:
  """Minimum resolution at which each question can be answered.

  Args:
    sides: longest sides in pixels that the images are shrunk to.
    rule: 'stable' or 'first'.

  Raises:
    UserError: as `sweep`.
  """
  curves.run(checkpoint=checkpoint, data=data, out=out, benchmark=benchmark, x=curves.IMAGE_SIDE,
             knobs=(f'{curves.IMAGE_SIDE}={",".join(map(str, sides))}',), split=split, limit=limit,
             batch_size=batch_size, max_new_tokens=max_new_tokens)
  scores = {side: scores_of(Path(out, curves.folder_name({curves.IMAGE_SIDE: side})))
            for side in sides}
  samples = benchmarks.get(benchmark).load(data, split)[:limit]
  longest = [max((max(image.open().size) for image in s.images), default=0) for s in samples]
  found = requirement({side: [by_id[s.id] for s in samples] for side, by_id in scores.items()},
                      longest, rule=rule)
  value = {'rule': rule, 'sides': dict(zip((s.id for s in samples), found.sides)),
           'median': found.median if found.solved else None, 'solved': found.solved,
           'image_median': found.image_median, 'share': dict(found.share)}
  records.write_whole(Path(out, 'resolution.json'), json.dumps(value, indent=2) + '\n')
  return [f'{found.solved:.1%} of {len(samples)} questions are solved at some side',
          f'median side needed: {found.median:g} pixels, of the images: {found.image_median:g}',
          *(f'side {side}: enough for {share:.1%}' for side, share in found.share.items())]
