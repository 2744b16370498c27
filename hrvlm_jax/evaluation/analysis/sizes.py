"""Accuracy by the size of what a question is about (Pheye, section 3.3).

The size of a question is the area of its target's box relative to the image. For TextVQA the target
is the OCR token most similar to the reference answers on average; for VQAv2 the annotated object
whose category name is. The paper leaves open letter case, ties and several objects of one name;
here: lower case, the first of equals, the largest object of a name. Boxes come from the official
files: Rosetta's OCR (TextVQA, TextCaps) and COCO's object annotations (VQAv2).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import json
from pathlib import Path
import random
import re

import numpy as np

from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.evaluation import benchmarks, records
from hrvlm_jax.evaluation.benchmarks.base import MAX_LISTED, Sample, read_json

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


def text_areas(samples: Sequence[Sample], ocr_file: str | Path) -> dict[str, float]:
  """Relative area of the OCR token each sample is about; samples without OCR tokens are left out.

  Args:
    samples: of TextVQA (the answers choose the token) or TextCaps (the captions do).
    ocr_file: `TextVQA_Rosetta_OCR_v0.2_val.json`; its boxes are fractions of the image.

  Raises:
    UserError: not such a file, malformed boxes (all named), no sample with OCR tokens.
  """
  value = read_json(Path(ocr_file))
  if not isinstance(value, Mapping) or not isinstance(value.get('data'), list):
    raise UserError(f"{ocr_file}: has no list 'data'; expected Rosetta's OCR file")
  words: dict[str, list[tuple[str, tuple[float, ...]]]] = {}
  problems = []
  for i, row in enumerate(value['data']):
    try:
      boxes = [(info['word'], info['bounding_box']) for info in row['ocr_info']]
      words[row['image_id']] = [
          (word, (box['top_left_x'], box['top_left_y'], float(box['width']), float(box['height'])))
          for word, box in boxes]
    except (KeyError, TypeError, ValueError) as error:
      problems.append(f'data[{i}]: expected image_id and ocr_info with word and bounding_box '
                      f'({type(error).__name__}: {error})')
  raise_all(str(ocr_file), problems, most=MAX_LISTED)
  areas = {}
  for sample in samples:
    if found := words.get(sample.meta['image_id']):
      tokens, boxes = zip(*found)
      areas[sample.id] = text_area(tokens, boxes, sample.answers)
  if not areas:
    raise UserError(f'{ocr_file}: has OCR tokens for none of the {len(samples)} samples')
  return areas


def object_areas(samples: Sequence[Sample], instances_file: str | Path) -> dict[str, float]:
  """Relative area of the COCO object each VQAv2 sample is about; images without objects are left
  out.

  Args:
    instances_file: `instances_val2014.json` (images, annotations with `area`, categories).

  Raises:
    UserError: not such a file, no sample with annotated objects.
  """
  value = read_json(Path(instances_file))
  try:
    names = {row['id']: row['name'] for row in value['categories']}
    sizes = {row['id']: row['width'] * row['height'] for row in value['images']}
    objects: dict[int, list[tuple[str, float]]] = {}
    for row in value['annotations']:
      objects.setdefault(row['image_id'], []).append((names[row['category_id']], row['area']))
  except (KeyError, TypeError) as error:
    raise UserError(f"{instances_file}: expected COCO's instances file ({type(error).__name__}: "
                    f'{error})') from error
  areas = {}
  for sample in samples:
    image = sample.meta['image_id']
    if image in objects and sizes.get(image):
      found, pixels = zip(*objects[image])
      areas[sample.id] = object_area(found, pixels, sizes[image], sample.question, sample.answers)
  if not areas:
    raise UserError(f'{instances_file}: has objects for none of the {len(samples)} samples')
  return areas


def draw(areas: Mapping[str, float], count: int, *, seed: int = 0) -> dict[str, float]:
  """A random part of the samples; the paper takes 10,000 of VQAv2 (its seed is not known)."""
  if count >= len(areas):
    return dict(areas)
  chosen = set(random.Random(seed).sample(sorted(areas), count))
  return {name: area for name, area in areas.items() if name in chosen}


def scores_of(folder: str | Path) -> dict[str, float]:
  """Sample id -> score, from a finished result folder.

  Raises:
    UserError: no finished run there, or one without labels.
  """
  path = Path(folder) / records.MERGED
  found = records.read(path)
  if any(record.get('score') is None for record in found.values()):
    raise UserError(f'{path}: has predictions without a score')
  return {name: float(record['score']) for name, record in found.items()}


def compare_runs(areas: Mapping[str, float], before: str | Path,
                 after: str | Path) -> list[Change]:
  """Pheye's table 2 from two result folders, for the samples that have an area.

  Raises:
    UserError: a sample with an area is missing in a run; fewer than three samples.
  """
  runs = [scores_of(folder) for folder in (before, after)]
  for folder, scores in zip((before, after), runs):
    if missing := [name for name in areas if name not in scores]:
      raise UserError(f'{folder}: lacks {len(missing)} of the {len(areas)} samples, such as '
                      f'{missing[0]}')
  if len(areas) < 3:
    raise UserError(f'tertiles need at least 3 samples, got {len(areas)}')
  return relative_change(areas, *({name: scores[name] for name in areas} for scores in runs))


def write_changes(changes: Sequence[Change], path: str | Path) -> None:
  """The comparison as JSON."""
  rows = [{'tertile': c.tertile, 'count': c.count, 'before': c.before, 'after': c.after,
           'relative_percent': c.relative_percent if c.before else None} for c in changes]
  records.write_whole(path, json.dumps(rows, indent=2) + '\n')


def run(*, data: str, boxes: str, before: str, after: str, out: str, benchmark: str = 'textvqa',
        split: str | None = None, count: int | None = None) -> list[str]:
  """How accuracy changes between two runs for fine, medium and broad targets (Pheye, table 2).

  Args:
    data: folder with the benchmark's official files.
    boxes: Rosetta's OCR file, for vqav2 COCO's instances file.
    before, after: result folders of the two runs.
    out: JSON file.
    benchmark: textvqa, textcaps or vqav2.
    count: so many samples, drawn at random.

  Raises:
    UserError: bad files, or samples that a run lacks.
  """
  samples = benchmarks.get(benchmark).load(data, split)
  areas = (object_areas if benchmark == 'vqav2' else text_areas)(samples, boxes)
  changes = compare_runs(areas if count is None else draw(areas, count), before, after)
  write_changes(changes, out)
  return [f'{c.tertile:<7} {c.count:>6} samples  {c.before:.4f} -> {c.after:.4f}  '
          f'{c.relative_percent:+.1f} %' for c in changes]
