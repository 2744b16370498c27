"""The built-in high-resolution tasks: LLaVA JSON written by `hrvlm_jax.lab.needle`.

Each turn of a record is one sample. Beside the accuracy stands the accuracy in each third of the
samples by relative area of the text asked for; of the tasks `relate` and `page` (and `needle` with
a cue) that of every kind of question.
"""

from collections.abc import Sequence
import math
from pathlib import Path

from hrvlm_jax.evaluation.analysis.sizes import accuracy_by_tertile
from hrvlm_jax.evaluation.benchmarks.base import (
    Benchmark,
    Collector,
    Sample,
    Samples,
    Scores,
    file_image,
    read_json,
)
from hrvlm_jax.evaluation.benchmarks.scoring import percent
from hrvlm_jax.vlm.answer import is_correct


def _needle(folder: Path, split: str) -> Samples:
  c = Collector('needle', folder)
  path = c.find('needle.json')
  for where, row in c.rows(read_json(path), path.name):
    number, image = c.get(row, 'id', where), c.get(row, 'image', where)
    turns = c.get(row, 'conversations', where, list)
    if None in (number, image, turns):
      continue
    said = [(place, c.get(turn, 'from', place), c.get(turn, 'value', place))
            for place, turn in c.rows(turns, f'{where}.conversations')]
    if len(said) % 2 or [who for _, who, _ in said] != ['human', 'gpt'] * (len(said) // 2):
      c.problems.append(f'{where}: turns do not alternate between human and gpt')
      continue
    for turn in range(len(said) // 2):
      (place, _, question), (_, _, answer) = said[2 * turn], said[2 * turn + 1]
      if question is None or answer is None:
        continue
      found, area = _target(row, turn)
      boxes = c.boxes(found, f'{place}: box')
      if boxes is None:
        continue
      if area is None:
        c.problems.append(f'{place}: no relative area of the text asked for')
        continue
      c.add(Sample(number if turn == 0 else f'{number}#{turn}', (file_image(folder / image),),
                   question.replace('<image>', '').strip(), (answer,),
                   meta={'relative_area': area, 'boxes': boxes, **_kind(row, turn)}), place)
  return c.finish()


def _target(row: dict, turn: int) -> tuple[list, float | None]:
  """(boxes, relative area) of what a turn asks for."""
  finite = lambda value: value if math.isfinite(value) else None
  details = row.get('needle') or {}
  try:
    sign = details['signs'][details['turns'][turn]]
    box, area = sign.get('box'), finite(float(sign['relative_area']))
    return [] if box is None else [box], area
  except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
    pass
  # Of the other tasks, and of records that have no more than LLaVA's keys.
  box, area = _turn_of(row, 'boxes', turn), _turn_of(row, 'relative_areas', turn)
  evidence = _turn_of(row, 'evidence', turn)
  if area is None and turn == 0:
    area = row.get('relative_area')
  plain = isinstance(area, (int, float)) and not isinstance(area, bool)
  boxes = evidence if isinstance(evidence, list) else [] if box is None else [box]
  return boxes, finite(area) if plain else None


def _kind(row: dict, turn: int) -> dict[str, str]:
  """The kind of a turn's question, where the record names it."""
  task = row.get('task')
  kind = _turn_of(task, 'kinds', turn) if isinstance(task, dict) else None
  return {'kind': kind} if isinstance(kind, str) else {}


def _turn_of(row: dict, key: str, turn: int):
  values = row.get(key)
  return values[turn] if isinstance(values, list) and turn < len(values) else None


def _score(samples: Sequence[Sample], texts: Sequence[str]) -> Scores:
  right = [float(is_correct(text, s.answers[0])) for text, s in zip(texts, samples)]
  areas = [s.meta['relative_area'] for s in samples]
  values = {'needle_accuracy': percent(right)}
  tertiles = accuracy_by_tertile(areas, right) if len(samples) >= 3 else {}
  by_kind: dict[str, list[float]] = {}
  for score, sample in zip(right, samples):
    if 'kind' in sample.meta:
      by_kind.setdefault(sample.meta['kind'], []).append(score)
  return Scores('needle_accuracy', values, per_sample=right, units=right,
                by_category={f'{name} text': 100 * value for name, value in tertiles.items()}
                | {kind: percent(by_kind[kind]) for kind in sorted(by_kind)})


BENCHMARKS = (
    Benchmark(
        'needle', 'built-in needle task, exact text of one sign', 'needle.json and images/',
        {'all': None}, _needle, _score),
)
