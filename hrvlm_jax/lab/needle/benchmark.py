"""The built-in high-resolution task: LLaVA JSON written by `hrvlm_jax.lab.needle`.

Each turn of a record is one sample. Beside the accuracy stands the accuracy in each third of the
samples by relative area of the text asked for.
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
      target, area = _target(row, turn)
      boxes = c.boxes([] if target is None else [target], f'{place}: box')
      if boxes is None:
        continue
      if area is None:
        c.problems.append(f'{place}: no relative area of the text asked for')
        continue
      c.add(Sample(number if turn == 0 else f'{number}#{turn}', (file_image(folder / image),),
                   question.replace('<image>', '').strip(), (answer,),
                   meta={'relative_area': area, 'boxes': boxes}), place)
  return c.finish()


def _target(row: dict, turn: int) -> tuple[list | None, float | None]:
  """(box, relative area) of what a turn asks for."""
  details = row.get('needle') or {}
  finite = lambda value: value if math.isfinite(value) else None
  try:
    sign = details['signs'][details['turns'][turn]]
    return sign.get('box'), finite(float(sign['relative_area']))
  except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
    boxes = row.get('boxes')
    boxes = boxes if isinstance(boxes, list) else []
    box = boxes[turn] if turn < len(boxes) else None
    area = row.get('relative_area') if turn == 0 else None
    return box, finite(area) if isinstance(area, (int, float)) else None


def _score(samples: Sequence[Sample], texts: Sequence[str]) -> Scores:
  right = [float(is_correct(text, s.answers[0])) for text, s in zip(texts, samples)]
  areas = [s.meta['relative_area'] for s in samples]
  values = {'needle_accuracy': percent(right)}
  tertiles = accuracy_by_tertile(areas, right) if len(samples) >= 3 else {}
  return Scores('needle_accuracy', values, per_sample=right, units=right,
                by_category={f'{name} text': 100 * value for name, value in tertiles.items()})


BENCHMARKS = (
    Benchmark(
        'needle', 'built-in needle task, exact text of one sign', 'needle.json and images/',
        {'all': None}, _needle, _score),
)
