"""Tables of the VLMEvalKit family: MMBench (circular), HR-Bench 4K and 8K; 4KPro-style files."""

from collections.abc import Sequence
from pathlib import Path

from hrvlm_jax.evaluation.benchmarks.base import (
    Benchmark,
    Collector,
    ImageSource,
    Sample,
    Samples,
    Scores,
    Submission,
    file_image,
    read_json_lines,
)
from hrvlm_jax.evaluation.benchmarks.scoring import by_category, own_letter, percent
from hrvlm_jax.evaluation.benchmarks.tables import read_tsv
from hrvlm_jax.evaluation.metrics import choice

FOUR_K_PRO_CATEGORIES = ('av', 'household', 'gaming', 'ui')


def _choice_rows(c: Collector, path: Path, *, hidden: bool):
  """(place, row, index, question, options, answer, image) of a TSV of multiple choice questions."""
  pictures: dict[str, ImageSource] = {}
  for where, row, index, question, answer in c.each(
      read_tsv(path, c.problems), index=str, question=str, answer=None if hidden else str):
    options = c.options([row.get(letter) for letter in choice.LETTERS], where, answer=answer)
    image = row.get('image')
    source = pictures.get(image) if isinstance(image, str) else image
    if not index.isdigit():
      c.problems.append(f'{where}: index is {index!r}, expected a whole number')
      continue
    if source is None:
      named = f' (refers to row {image})' if isinstance(image, str) else ''
      c.problems.append(f'{where}: has no image{named}')
      continue
    if options is None:
      continue
    pictures[index] = source
    yield where, row, index, question, options, answer, source


def _mmbench(folder: Path, split: str) -> Samples:
  c = Collector('mmbench', folder)
  path = c.find(*{'dev': ('mmbench_dev_en_20231003.tsv', 'MMBench_DEV_EN.tsv', 'mmbench_dev*.tsv'),
                  'test': ('mmbench_test_en_20231003.tsv', 'MMBench_TEST_EN.tsv',
                           'mmbench_test*.tsv')}[split])
  rows = _choice_rows(c, path, hidden=split == 'test')
  for where, row, index, question, options, answer, source in rows:
    hint = str(row.get('hint', '')).strip()
    c.add(Sample(index, (source,), question, None if answer is None else (answer,),
                 choices=options, category=row.get('category', ''),
                 fields={'hint': f'{hint} ' if hint and hint != 'nan' else ''},
                 meta={'index': int(index), 'row': {k: v for k, v in row.items() if k != 'image'}}),
          where)
  return c.finish()


def _prefetch(text: str, sample: Sample) -> str | None:
  return choice.mmbench_prefetch(text, sample.choices)


def _score_mmbench(samples: Sequence[Sample], texts: Sequence[str]) -> Scores:
  """Headline: circular accuracy, a question counts only when all its rotations are right."""
  values, headline = {}, {}
  groups = choice.circular_groups([s.meta['index'] for s in samples])
  for name, parser in (('mmbench_prefetch', _prefetch), ('mcq_letter', own_letter)):
    letters = [parser(text, s) for text, s in zip(texts, samples)]
    right = [float(letter == s.answers[0]) for letter, s in zip(letters, samples)]
    circular = [float(all(right[i] for i in members)) for members in groups.values()]
    first = [right[min(members, key=lambda i: samples[i].meta['index'])]
             for members in groups.values()]
    values[f'circular_accuracy_{name}'] = percent(circular)
    values[f'first_rotation_accuracy_{name}'] = percent(first)
    headline[name] = (right, circular, letters.count(None))
  right, circular, unparsed = headline['mmbench_prefetch']
  heads = [samples[members[0]] for members in groups.values()]
  return Scores('circular_accuracy_mmbench_prefetch', values,
                by_category=by_category(heads, circular), per_sample=right, unparsed=unparsed,
                units=circular)


def _mmbench_submission(samples: Sequence[Sample], texts: Sequence[str]) -> list[dict]:
  """Rows of the server's table (upload as xlsx): the TSV's columns and `prediction`."""
  return [sample.meta['row'] | {'prediction': text} for sample, text in zip(samples, texts)]


def _hrbench(folder: Path, split: str) -> Samples:
  c = Collector('hrbench', folder)
  path = c.find(f'hr_bench_{split}.tsv', f'HRBench{split.upper()}.tsv')
  for where, row, index, question, options, answer, source in _choice_rows(c, path, hidden=False):
    category, cycle = c.get(row, 'category', where), c.get(row, 'cycle_category', where)
    if None not in (category, cycle):
      c.add(Sample(index, (source,), question, (answer,), choices=options, category=category,
                   meta={'cycle': cycle, 'index': int(index)}), where)
  return c.finish()


def _score_hrbench(samples: Sequence[Sample], texts: Sequence[str]) -> Scores:
  """Headline: mean over the four rotations of the accuracy in each, answers read by letter."""
  letters = [own_letter(text, s) for text, s in zip(texts, samples)]
  right = [float(letter == s.answers[0]) for letter, s in zip(letters, samples)]
  cycles = [s.meta['cycle'] for s in samples]
  categories = list(dict.fromkeys(s.category for s in samples))
  shares = {}
  for category in categories:
    chosen = [i for i, s in enumerate(samples) if s.category == category]
    shares[category] = 100 * choice.mean_of_means([right[i] for i in chosen],
                                                  [cycles[i] for i in chosen])
  name = 'hrbench_cycle_mean_mcq_letter'
  values = {name: 100 * choice.mean_of_means(right, cycles)}
  values['circular_accuracy_mcq_letter'] = percent(
      [float(all(right[i] for i in members)) for members in _question_groups(samples).values()])
  return Scores(name, values, by_category=shares, per_sample=right, unparsed=letters.count(None),
                units=right)


def _question_groups(samples: Sequence[Sample]) -> dict:
  """Rotations of one question: same question and same set of options."""
  groups: dict = {}
  for i, sample in enumerate(samples):
    groups.setdefault((sample.question, frozenset(sample.choices)), []).append(i)
  return groups


def _four_k_pro(folder: Path, split: str) -> Samples:
  """Local files with 4KPro's columns: the benchmark itself is not public.

  `4kpro.jsonl`: id, image (path), question, options (list) or A, B, ..., answer (letter), category
  (av, household, gaming or ui), optionally width and height of the original. Or `4kpro.tsv` with
  the columns index, image (base64), question, A, B, ..., answer, category.
  """
  c = Collector('4kpro', folder)
  path = c.find('4kpro.jsonl', '4kpro.tsv')
  rows = _four_k_tsv(c, path) if path.suffix == '.tsv' else _four_k_lines(c, path, folder)
  for where, row, number, question, options, answer, source in rows:
    category = c.get(row, 'category', where)
    if category is not None and category not in FOUR_K_PRO_CATEGORIES:
      c.problems.append(f'{where}: category {category!r} is not one of '
                        f'{", ".join(FOUR_K_PRO_CATEGORIES)}')
    elif category is not None:
      c.add(Sample(number, (source,), question, (answer,), choices=options, category=category,
                   meta={'size': (row.get('width'), row.get('height'))}), where)
  return c.finish()


def _four_k_tsv(c: Collector, path: Path):
  return _choice_rows(c, path, hidden=False)


def _four_k_lines(c: Collector, path: Path, folder: Path):
  for where, row, number, image, question, answer in c.each(
      read_json_lines(path, c.problems), id=str, image=str, question=str, answer=str):
    options = c.options(row.get('options') or [row.get(letter) for letter in choice.LETTERS], where,
                        answer=answer)
    if options is not None:
      yield where, row, number, question, options, answer, file_image(folder / image)


def _score_four_k_pro(samples: Sequence[Sample], texts: Sequence[str]) -> Scores:
  """Headline: the mean over all questions; beside it the mean over categories."""
  letters = [own_letter(text, s) for text, s in zip(texts, samples)]
  right = [float(letter == s.answers[0]) for letter, s in zip(letters, samples)]
  shares = by_category(samples, right)
  values = {'accuracy_mcq_letter': percent(right),
            'accuracy_mcq_letter_mean_of_categories': sum(shares.values()) / len(shares)}
  note = ('4KPro is not public: this is the accuracy on a local file of its form, not a number to '
          'compare with published ones')
  return Scores('accuracy_mcq_letter', values, by_category=shares, per_sample=right,
                unparsed=letters.count(None), units=right, notes=(note,))


BENCHMARKS = (
    Benchmark(
        'mmbench', 'MMBench (English), circular accuracy', 'mmbench_dev_en_20231003.tsv',
        {'dev': 4329, 'test': 6666}, _mmbench, _score_mmbench,
        submission=Submission('mmbench_submission.tsv', _mmbench_submission)),
    Benchmark(
        'hrbench', 'HR-Bench, mean over rotations', 'hr_bench_4k.tsv or hr_bench_8k.tsv',
        {'4k': 800, '8k': 800}, _hrbench, _score_hrbench),
    Benchmark(
        '4kpro', 'local questions in the form of 4KPro (the benchmark itself is not public)',
        '4kpro.jsonl (with image paths) or 4kpro.tsv', {'local': None}, _four_k_pro,
        _score_four_k_pro),
)
