"""DocVQA, InfoVQA (ANLS) and OCRBench (points)."""

from collections.abc import Sequence
from pathlib import Path

from hrvlm_jax.evaluation.benchmarks.base import (
    Benchmark,
    Collector,
    Sample,
    Samples,
    Scores,
    Submission,
    first_image,
)
from hrvlm_jax.evaluation.benchmarks.scoring import mean_score, references
from hrvlm_jax.evaluation.metrics import match


def _rrc(name: str, patterns: tuple[str, ...], picture: str, folders: tuple[str, ...]):
  """Reader of the Robust Reading Competition's JSON: questions and answers under `data`."""
  def read(folder: Path, split: str) -> Samples:
    c = Collector(name, folder)
    path = c.find(*(pattern.format(split=split) for pattern in patterns))
    for where, row, number, question, image, answers in c.each(
        c.listed(path, 'data'), questionId=int, question=str,
        **{picture: str, 'answers': None if split == 'test' else list}):
      source = first_image(*(folder / name / image for name in folders))
      kinds = row.get('question_types') or row.get('answer_type') or []
      kinds = kinds if isinstance(kinds, list) else [kinds]
      c.add(Sample(str(number), (source,), question, answers and tuple(map(str, answers)),
                   category=', '.join(map(str, kinds)), meta={'question_id': number}), where)
    return c.finish()
  return read


def _rrc_submission(samples: Sequence[Sample], texts: Sequence[str]) -> list[dict]:
  return [{'questionId': sample.meta['question_id'], 'answer': text}
          for sample, text in zip(samples, texts)]


_ANLS = mean_score(anls_lmms=references(match.anls_lmms), anls_strict=references(match.anls_strict))


def _ocrbench(folder: Path, split: str) -> Samples:
  c = Collector('ocrbench', folder)
  path = c.find('OCRBench.json', 'OCRBench/OCRBench.json')
  for where, row, image, question, answers, kind, source in c.each(
      c.listed(path), image_path=str, question=str, answers=(list, str, int), type=str,
      dataset_name=str):
    if kind not in match.PARTS:
      c.problems.append(f'{where}: unknown type {kind!r}; known: {", ".join(match.PARTS)}')
      continue
    answers = answers if isinstance(answers, list) else [answers]
    picture = first_image(path.parent / 'OCRBench_Images' / image, folder / image)
    number = row.get('id', where[len(path.name) + 1:-1])
    c.add(Sample(str(number), (picture,), question, tuple(map(str, answers)), category=kind,
                 meta={'source': source}), where)
  return c.finish()


def _score_ocrbench(samples: Sequence[Sample], texts: Sequence[str]) -> Scores:
  """Points: one for each answer that contains a reference (1000 in the whole benchmark)."""
  per = {
      name: [match.ocrbench_point(text, s.answers, source=s.meta['source'], fold=fold)
             for text, s in zip(texts, samples)]
      for name, fold in (('ocrbench_points', False), ('ocrbench_points_folded_width', True))
  }
  values = {name: sum(points) for name, points in per.items()}
  kinds: dict[str, float] = {}
  for sample, point in zip(samples, per['ocrbench_points']):
    part = f'points_{match.PARTS[sample.category]}'
    values[part] = values.get(part, 0.0) + point
    kinds[sample.category] = kinds.get(sample.category, 0.0) + point
  points = per['ocrbench_points']
  return Scores('ocrbench_points', values, by_category=kinds, per_sample=points, units=points,
                statistic=lambda chosen: float(sum(points[i] for i in chosen)))


BENCHMARKS = (
    Benchmark(
        'docvqa', 'DocVQA (single page), ANLS', 'val_v1.0.json or test_v1.0.json and documents/',
        {'val': 5349, 'test': 5188},
        _rrc('docvqa', ('{split}_v1.0.json', '{split}_v1.0_withQT.json'), 'image',
             ('.', 'documents')),
        _ANLS, max_new_tokens=32,
        submission=Submission('docvqa_submission.json', _rrc_submission)),
    Benchmark(
        'infovqa', 'InfographicVQA, ANLS',
        'infographicsVQA_val_v1.0.json or infographicsVQA_test_v1.0.json and images',
        {'val': 2801, 'test': 3288},
        _rrc('infovqa', ('infographicsVQA_{split}_v1.0.json', 'infographicsVQA_{split}_v1.0*.json'),
             'image_local_name',
             ('infographicsvqa_images', 'infographicsVQA_images', 'images', '.')),
        _ANLS, max_new_tokens=32,
        submission=Submission('infovqa_submission.json', _rrc_submission)),
    Benchmark(
        'ocrbench', 'OCRBench, points of 1000', 'OCRBench.json and OCRBench_Images/',
        {'test': 1000}, _ocrbench, _score_ocrbench, max_new_tokens=128),
)
