"""Accuracy by the size of what a question is about (Pheye, section 3.3).

The size of a question is the area of its target's box relative to the image. For TextVQA the target
is the OCR token most similar to the reference answers on average; for VQAv2 the annotated object
whose category name is. The paper leaves open letter case, ties and several objects of one name;
here: lower case, the first of equals, the largest object of a name.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import re

import numpy as np

TERTILES = ('fine', 'medium', 'broad')


def similarity(token: str, answers: Sequence[str]) -> float:
  """Mean over the answers of difflib's ratio, 2 * matching characters / total, in lower case.

  Example: `stop` against seven times `stop` and three times `stop sign` gives 0.8846.
  """
  if not answers:
    raise ValueError('similarity needs at least one answer')
  token = token.lower()
  ratios = [difflib.SequenceMatcher(None, token, answer.lower()).ratio() for answer in answers]
  return sum(ratios) / len(ratios)


def best_token(tokens: Sequence[str], answers: Sequence[str]) -> int:
  """Position of the token most similar to the answers, the first of equals."""
  if not tokens:
    raise ValueError('best_token needs at least one token')
  scores = [similarity(token, answers) for token in tokens]
  return scores.index(max(scores))


def text_area(tokens: Sequence[str], boxes: Sequence[Sequence[float]],
              answers: Sequence[str]) -> float:
  """Relative area of the OCR token that a question is about.

  Args:
    tokens: OCR words. boxes: (x, y, width, height) of each, as fractions of the image's sides
      (Rosetta's `bounding_box`). answers: all reference answers.
  """
  if len(tokens) != len(boxes):
    raise ValueError(f'{len(tokens)} OCR tokens but {len(boxes)} boxes')
  _, _, width, height = boxes[best_token(tokens, answers)]
  return float(width * height)


_NUMBER_WORDS = frozenset(
    ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten', 'none'])


def object_area(names: Sequence[str], areas: Sequence[float], image_area: float, question: str,
                answers: Sequence[str]) -> float:
  """Relative area of the annotated object that a VQAv2 question is about.

  Yes/no and number answers say nothing of an object: the question is compared instead.

  Args:
    names, areas: category and segmentation area (pixels) of every object of the image.
    image_area: width * height in pixels.
  """
  if not names or len(names) != len(areas):
    raise ValueError(f'expected the same number (at least one) of names and areas, got '
                     f'{len(names)} and {len(areas)}')
  plain = [answer.strip().lower() for answer in answers]
  bare = all(a in ('yes', 'no') or a in _NUMBER_WORDS or re.fullmatch(r'\d+(\.\d+)?', a)
             for a in plain)
  texts = [question] if bare else answers
  scores = [similarity(name, texts) for name in names]
  best = max(scores)
  return max(area for area, score in zip(areas, scores) if score == best) / image_area


def tertiles(areas: Sequence[float]) -> list[str]:
  """'fine', 'medium' or 'broad' for each area: thirds by rank, equal areas in their order.

  The groups differ by at most one in size.
  """
  order = np.argsort(np.asarray(areas, np.float64), kind='stable')
  ranks = np.empty(len(areas), np.int64)
  ranks[order] = np.arange(len(areas))
  return [TERTILES[int(rank) * 3 // len(areas)] for rank in ranks]


def accuracy_by_tertile(areas: Sequence[float], scores: Sequence[float]) -> dict[str, float]:
  """Mean score in each tertile of area.

  Raises:
    ValueError: sequences of different length, or fewer than three questions.
  """
  if len(areas) != len(scores) or len(areas) < 3:
    raise ValueError(f'expected as many areas as scores and at least 3, got {len(areas)} and '
                     f'{len(scores)}')
  groups = tertiles(areas)
  return {name: float(np.mean([s for s, g in zip(scores, groups) if g == name]))
          for name in TERTILES}


@dataclasses.dataclass(frozen=True)
class Change:
  """Accuracy of two models in one tertile and the relative change in percent."""

  tertile: str
  count: int
  before: float
  after: float

  @property
  def relative_percent(self) -> float:
    """100 * (after - before) / before; nan when `before` is 0."""
    return 100 * (self.after - self.before) / self.before if self.before else float('nan')


def relative_change(areas: Mapping[str, float], before: Mapping[str, float],
                    after: Mapping[str, float]) -> list[Change]:
  """Pheye's table 2: per tertile, how accuracy changes from one model to another (448 to 672).

  Args:
    areas, before, after: by sample id; the ids must be the same. Scores are 0 to 1.

  Raises:
    ValueError: different sets of samples, or fewer than three.
  """
  if not set(areas) == set(before) == set(after):
    raise ValueError(f'the two models were not scored on the same samples: {len(areas)} areas, '
                     f'{len(before)} and {len(after)} scores')
  if len(areas) < 3:
    raise ValueError(f'expected at least 3 samples, got {len(areas)}')
  names = list(areas)
  groups = tertiles([areas[name] for name in names])
  changes = []
  for tertile in TERTILES:
    members = [name for name, group in zip(names, groups) if group == tertile]
    mean = lambda scores, members=members: float(np.mean([scores[name] for name in members]))
    changes.append(Change(tertile, len(members), mean(before), mean(after)))
  return changes
