"""MM-Vet and MathVista: benchmarks whose official score needs a language model as judge."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation.benchmarks.base import (
    Benchmark,
    Collector,
    Sample,
    Samples,
    Scores,
    Submission,
    first_image,
)
from hrvlm_jax.evaluation.benchmarks.scoring import percent
from hrvlm_jax.evaluation.benchmarks.tables import read_parquet
from hrvlm_jax.evaluation.metrics import mathvista

MMVET_CAPABILITIES = ('rec', 'ocr', 'know', 'gen', 'spat', 'math')


def _mmvet(folder: Path, split: str) -> Samples:
  c = Collector('mmvet', folder)
  path = c.find('mm-vet.json')
  for where, row, image, question, skills in c.each(
      c.listed(path), imagename=str, question=str, capability=list):
    number = where[len(path.name) + 1:-1]
    c.add(Sample(number, (first_image(folder / 'images' / image),), question, None,
                 category=', '.join(sorted(map(str, skills))),
                 meta={'capability': skills, 'answer': row.get('answer', '')}), where)
  return c.finish()


def _mmvet_submission(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, str]:
  return {sample.id: text for sample, text in zip(samples, texts)}


def mmvet_total(grades: Mapping[str, Mapping], samples: Sequence[Sample], *, judge: str,
                date: str) -> dict[str, Any]:
  """MM-Vet's score from the grades of the official evaluator.

  Args:
    grades: its output: sample id -> {'score': [one or more values in 0..1]}; the last one counts.
    samples: of the benchmark.
    judge, date: of the language model that graded; scores drift with it, so they stay with them.

  Returns:
    {'mmvet_total': percent, 'by_capability': {...}, 'judge', 'date'}.

  Raises:
    UserError: grades missing or unknown.
  """
  missing = [s.id for s in samples if s.id not in grades]
  unknown = sorted(set(grades) - {s.id for s in samples})
  if missing or unknown:
    raise UserError(f'MM-Vet grades: {len(missing)} answers have none {missing[:5]}, '
                    f'{len(unknown)} are of unknown answers {unknown[:5]}')
  score = {number: float(row['score'][-1]) for number, row in grades.items()}
  skills = {}
  for skill in MMVET_CAPABILITIES:
    if part := [score[s.id] for s in samples if skill in s.meta['capability']]:
      skills[skill] = percent(part)
  return {'mmvet_total': percent(list(score.values())), 'by_capability': skills, 'judge': judge,
          'date': date}


def _mathvista(folder: Path, split: str) -> Samples:
  c = Collector('mathvista', folder)
  path = c.find(f'{split}.json', f'annot_{split}.json', f'{split}-*.parquet',
                f'data/{split}-*.parquet')
  rows = c.listed(path) if path.suffix == '.json' else read_parquet(
    sorted(path.parent.glob(f'{split}-*.parquet')))
  for where, row, number, question, kind, form, answer in c.each(
      rows, pid=str, question=str, question_type=str, answer_type=str,
      answer=None if split == 'test' else str):
    image = row.get('decoded_image') or row.get('image')
    if image is None:
      c.problems.append(f'{where}: has no image')
      continue
    picture = first_image(folder / image, folder / 'images' / Path(image).name) \
        if isinstance(image, str) else image
    prompt = row.get('query')
    if not isinstance(prompt, str) or not prompt.strip():
      c.problems.append(f"{where}: lacks 'query', the official prompt of the question")
      continue
    choices = row.get('choices')
    choices = c.options(choices, where) if isinstance(choices, list) and choices else ()
    precision = row.get('precision')
    if not (precision is None or (isinstance(precision, (int, float)) and abs(precision) < 99)):
      c.problems.append(f'{where}: precision is {precision!r}, expected a number of digits')
      continue
    tags = row.get('metadata') if isinstance(row.get('metadata'), dict) else {}
    c.add(Sample(number, (picture,), question, None if answer is None else (answer,),
                 choices=choices or (), category=str(tags.get('task', '')),
                 prompt=prompt, meta={'kind': kind, 'form': form, 'precision': precision,
                                      'row': {k: v for k, v in row.items()
                                              if not k.endswith('image') or isinstance(v, str)}}),
          where)
  return c.finish()


def _score_mathvista(samples: Sequence[Sample], texts: Sequence[str]) -> Scores:
  """Headline `mathvista_regex`: no language model extracts the answer, so it is not the official
  number; `mathvista_direct` counts only responses already in the asked form."""
  def hit(extraction: str | None, sample: Sample) -> float:
    if extraction is None:
      return 0.0
    form = dict(question_type=sample.meta['kind'], answer_type=sample.meta['form'],
                choices=sample.choices)
    found = mathvista.normalize(extraction, precision=sample.meta['precision'], **form)
    return float(mathvista.equal(found, sample.answers[0]))

  read: dict[str, list[float]] = {'mathvista_regex': [], 'mathvista_direct': []}
  for text, sample in zip(texts, samples):
    form = dict(question_type=sample.meta['kind'], answer_type=sample.meta['form'],
                choices=sample.choices)
    regex = mathvista.extract_regex(text, **form) if text.strip() else None
    read['mathvista_regex'].append(hit(regex, sample))
    read['mathvista_direct'].append(hit(mathvista.extract_direct(text, **form), sample))
  right = read['mathvista_regex']
  note = ('answers were extracted by regular expressions; the official MathVista accuracy uses a '
          'language model (see the submission file)')
  return Scores('mathvista_regex', {name: percent(v) for name, v in read.items()}, per_sample=right,
                units=right, notes=(note,))


def _mathvista_submission(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, dict]:
  """The official evaluator's input: every row by its pid with the key `response`."""
  return {sample.id: sample.meta['row'] | {'response': text}
          for sample, text in zip(samples, texts)}


BENCHMARKS = (
    Benchmark(
        'mmvet', 'MM-Vet, answers for the official judge', 'mm-vet.json and images/', {'test': 218},
        _mmvet, None, max_new_tokens=1024,
        submission=Submission('mmvet_answers.json', _mmvet_submission)),
    Benchmark(
        'mathvista', 'MathVista, answers extracted without a language model',
        'testmini.json with images/, or testmini-*.parquet', {'testmini': 1000, 'test': 5141},
        _mathvista, _score_mathvista, max_new_tokens=1024,
        submission=Submission('mathvista_responses.json', _mathvista_submission)),
)
