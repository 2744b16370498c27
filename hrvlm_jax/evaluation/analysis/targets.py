"""Relative areas of what questions are about, from the official annotation files.

TextVQA and TextCaps: Rosetta's OCR boxes. VQAv2: COCO's object annotations. The result, areas by
sample id, goes into `compare_runs` together with the result folders of two runs.
"""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
import random

from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.evaluation import records
from hrvlm_jax.evaluation.analysis.sizes import Change, object_area, relative_change, text_area
from hrvlm_jax.evaluation.benchmarks.base import MAX_LISTED, Sample, read_json


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
  raise_all(str(ocr_file), problems[:MAX_LISTED])
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
