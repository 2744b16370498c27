"""ScienceQA, SEED-Bench, V*Bench, RealWorldQA, MMMU-Pro."""

import ast
from collections.abc import Sequence
from pathlib import Path
import random
import re

import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation.benchmarks.base import (
  Benchmark,
  Collector,
  Sample,
  Samples,
  Scores,
  file_image,
  first_image,
  read_json,
  read_json_lines,
)
from hrvlm_jax.evaluation.benchmarks.scoring import (
  by_category,
  letter_score,
  mean_score,
  own_letter,
  percent,
  reference,
)
from hrvlm_jax.evaluation.benchmarks.tables import read_parquet
from hrvlm_jax.evaluation.metrics import choice, match


def _scienceqa(folder: Path, split: str) -> Samples:
  c = Collector('scienceqa', folder)
  path = c.find('problems.json', 'data/scienceqa/problems.json')
  problems = {where[len(path.name) + 1:-1]: row for where, row in c.listed(path)}
  splits = c.find('pid_splits.json', 'data/scienceqa/pid_splits.json')
  part, images_only = split.removesuffix('_img'), split.endswith('_img')
  wanted = []
  listed = c.section(splits, part)
  if not isinstance(listed, list):
    c.problems.append(f'{splits.name}:{part}: found {type(listed).__name__}, expected a list')
    listed = []
  for number in listed:
    where = f'problems.json[{number}]'
    row = problems.get(str(number))
    if row is None:
      c.problems.append(f'{splits.name}: problem {number} is not in problems.json')
      continue
    if not images_only or row.get('image'):
      wanted.append((where, row))
  for where, row, question, options, answer in c.each(
      wanted, question=str, choices=list, answer=int):
    number = where[len('problems.json['):-1]
    if (options := c.options(options, where)) is None:
      continue
    if not 0 <= answer < len(options) or not options[answer]:
      c.problems.append(f'{where}: answer {answer} is not one of {len(options)} choices')
      continue
    pictures = ()
    if name := str(row.get('image') or ''):
      roots = (folder / 'images' / part, folder / part)
      pictures = (first_image(*(root / number / name for root in roots)),)
    hint = str(row.get('hint') or '').strip()
    c.add(Sample(number, pictures, question, (choice.letters(len(options))[answer],),
                 choices=options, category=str(row.get('subject', '')),
                 fields={'hint': f'Context: {hint}\n' if hint else ''}), where)
  return c.finish()


def _sqa(text: str, sample: Sample) -> str | None:
  letter = choice.sqa_llava(text.strip())
  index = choice.sqa_index(letter, len(sample.choices))
  return choice.SCIENCEQA_LETTERS[index] if index >= 0 else None


def _score_scienceqa(samples: Sequence[Sample], texts: Sequence[str]) -> Scores:
  """Headline: accuracy over the questions with an image, as LLaVA-HR reports."""
  scores = letter_score({'accuracy_sqa_llava': _sqa, 'accuracy_mcq_letter': own_letter})(
      samples, texts)
  with_image = [value for value, s in zip(scores.per_sample, samples) if s.images]
  if with_image:
    scores.values['accuracy_sqa_llava_img'] = percent(with_image)
    scores.metric, scores.units = 'accuracy_sqa_llava_img', with_image
  return scores


def _seed(folder: Path, split: str) -> Samples:
  c = Collector('seed', folder)
  path = c.find('SEED-Bench.json')
  kinds = {str(number): name for _, name, number in _pairs(c, path, 'question_type')}
  rows = [(where, row) for where, row in c.listed(path, 'questions')
          if split in ('all', row.get('data_type', split))]
  for where, row, kind, number, question, data, answer, *options in c.each(
      rows, data_type=str, question_id=str, question=str, data_id=str, answer=str,
      choice_a=str, choice_b=str, choice_c=str, choice_d=str):
    if answer not in 'ABCD':
      c.problems.append(f'{where}: answer is {answer!r}, expected A, B, C or D')
      continue
    if kind == 'image':
      picture = file_image(folder / 'SEED-Bench-image' / data)
    else:  # the middle frame, extracted beforehand
      root = folder / 'SEED-Bench-video-image'
      picture = first_image(root / f'{number}.png', root / f'{number}.jpg', root / f'{data}.png')
    c.add(Sample(number, (picture,), question, (answer,), choices=tuple(options),
                 category=kinds.get(str(row.get('question_type_id')), ''),
                 meta={'data_type': kind}), where)
  return c.finish()


def _pairs(c: Collector, path: Path, key: str):
  """(place, name, value) of an object inside a JSON file."""
  found = c.section(path, key)
  if not isinstance(found, dict):
    c.problems.append(f'{path.name}:{key}: found {type(found).__name__}, expected an object')
    found = {}
  return [(f'{path.name}:{key}', name, value) for name, value in found.items()]


def _seed_parts(samples: Sequence[Sample], per: dict) -> dict[str, float]:
  """Accuracy over image and over video questions, beside the one over all."""
  result = {}
  for kind in ('image', 'video'):
    part = [v for v, s in zip(per['accuracy_seed_first_char'], samples)
            if s.meta['data_type'] == kind]
    if part:
      result[f'accuracy_seed_first_char_{kind}'] = percent(part)
  return result


VSTAR_PARTS = ('direct_attributes', 'relative_position')
VSTAR_EXTRA = {'gpt4v_hard': 'GPT4V-hard', 'ocr': 'OCR'}
_VSTAR_SEED = 0


def _vstar(shuffled: bool):
  """V*Bench folders: image and JSON of the same stem; option 0 of the file is the right one."""
  def read(folder: Path, split: str) -> Samples:
    c = Collector('vstar' if shuffled else 'vstar_likelihood', folder)
    parts = VSTAR_PARTS if split == 'all' else (VSTAR_EXTRA.get(split, split),)
    for part in parts:
      c.find(part)
      for path in sorted((folder / part).glob('*.json')):
        where = f'{part}/{path.name}'
        c.sources.append(path)
        try:
          row = read_json(path)
        except UserError as error:
          c.problems.append(str(error))
          continue
        if not isinstance(row, dict):
          c.problems.append(f'{where}: found {type(row).__name__}, expected an object')
          continue
        question, options = c.get(row, 'question', where), c.get(row, 'options', where, list)
        options = None if options is None else c.options(options, where, gaps=False)
        boxes = _corners(c, row, where)
        if question is None or options is None or boxes is None:
          continue
        order = list(range(len(options)))
        if shuffled:
          random.Random(f'{_VSTAR_SEED} {where}').shuffle(order)
        letters = choice.letters(len(options))
        pictures = [path.with_suffix(e) for e in ('.jpg', '.jpeg', '.png', '.JPG', '.webp')]
        c.add(Sample(where.removesuffix('.json'), (first_image(*pictures),), question,
                     (letters[order.index(0)],), choices=tuple(options[i] for i in order),
                     category=part, meta={'boxes': boxes, 'options': list(options),
                                          'targets': row.get('target_object') or []}), where)
    return c.finish()
  return read


def _corners(c: Collector, row: dict, where: str) -> list[list[float]] | None:
  """The (x, y, width, height) boxes of a row as (x0, y0, x1, y1); None after a problem."""
  boxes = c.boxes(row.get('bbox'), f'{where}: bbox')
  return None if boxes is None else [[x, y, x + w, y + h] for x, y, w, h in boxes]


def _realworldqa(folder: Path, split: str) -> Samples:
  c = Collector('realworldqa', folder)
  if path := c.find('annotations.jsonl', optional=True):
    rows = read_json_lines(path, c.problems)
  else:
    c.find('test-*.parquet', 'data/test-*.parquet')
    files = sorted(folder.glob('test-*.parquet')) or sorted(folder.glob('data/test-*.parquet'))
    rows = read_parquet(files)
  for number, (where, row, question, answer) in enumerate(
      c.each(rows, question=str, answer=str)):
    image = row.get('image')
    if image is None:
      c.problems.append(f'{where}: has no image')
      continue
    source = first_image(folder / str(image), folder / 'images' / str(image)) \
        if isinstance(image, str) else image
    options = re.findall(r'^([A-Z])[.)] *(.+)$', question, re.MULTILINE)
    c.add(Sample(str(number), (source,), question, (answer,),
                 choices=tuple(text for _, text in options)), where)
  return c.finish()


def _realworldqa_hit(text: str, sample: Sample) -> float:
  """Letter for questions with options, equality of words for the others."""
  answer = sample.answers[0].strip()
  if sample.choices and answer in choice.letters(len(sample.choices)):
    return float(choice.mcq_letter(text, sample.choices) == answer)
  return match.em_realworldqa(text, answer)


_MMMU_FILES = {'standard': ('standard (10 options)/test-*.parquet', 'standard/test-*.parquet',
                            'standard*.parquet'),
               'vision': ('vision/test-*.parquet', 'vision*.parquet')}


def _mmmu_pro(folder: Path, split: str) -> Samples:
  """Images stand in front of the text, which goes on to call them `<image 1>`, `<image 2>`, ..."""
  c = Collector('mmmu_pro', folder)
  for part in ('standard', 'vision') if split == 'both' else (split,):
    first = c.find(*_MMMU_FILES[part])
    pattern = next(p for p in _MMMU_FILES[part] if first in set(folder.glob(p)))
    for where, row, number, answer in c.each(
        read_parquet(sorted(folder.glob(pattern))), id=str, answer=str):
      options = _options(c, row, where, answer)
      if options is None:
        continue
      question, pictures = '', [row.get('image')]
      if part == 'standard':
        question = c.get(row, 'question', where) or ''
        text = question + ' '.join(options)
        used = sorted({int(n) for n in re.findall(r'<image (\d+)>', text)})
        pictures = [row.get(f'image_{n}') for n in used] or [row.get('image_1')]
      if None in pictures:
        c.problems.append(f'{where}: an image of {number} is missing')
        continue
      prompt = None if part == 'standard' else VISION_PROMPT
      c.add(Sample(f'{part}/{number}', tuple(pictures), question, (answer,),
                   choices=options, category=str(row.get('subject', '')), prompt=prompt,
                   meta={'part': part}), where)
  return c.finish()


# In the vision part question and options are in the picture.
VISION_PROMPT = "Answer with the option's letter from the given choices directly."


def _options(c: Collector, row: dict, where: str, answer: str) -> tuple[str, ...] | None:
  """Options come as a list or as the text of a Python list."""
  value = row.get('options')
  if isinstance(value, str):
    try:
      value = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
      value = None
  return c.options(value, where, answer=answer)


def _score_mmmu_pro(samples: Sequence[Sample], texts: Sequence[str]) -> Scores:
  """Headline: mean of the accuracies of the two parts, MMMU's parser, unparsed counts as wrong."""
  rng = random.Random(42)
  letters = [choice.mmmu(text, s.choices) for text, s in zip(texts, samples)]
  guessed = [choice.random_letter(letter, len(s.choices), rng)
             for letter, s in zip(letters, samples)]
  right = [float(letter == s.answers[0]) for letter, s in zip(letters, samples)]
  values: dict[str, float] = {}
  parts = list(dict.fromkeys(s.meta['part'] for s in samples))
  for name, found in (('accuracy_mmmu', letters), ('accuracy_mmmu_random42', guessed)):
    for part in parts:
      values[f'{name}_{part}'] = percent(
          [float(f == s.answers[0]) for f, s in zip(found, samples) if s.meta['part'] == part])
    values[name] = sum(values[f'{name}_{part}'] for part in parts) / len(parts)
  place = [parts.index(s.meta['part']) for s in samples]

  def resampled(chosen) -> float:
    hits = np.bincount(np.take(place, chosen), np.take(right, chosen), len(parts))
    return 100 * float((hits / np.bincount(place)).mean())

  return Scores('accuracy_mmmu', values, by_category=by_category(samples, right), per_sample=right,
                unparsed=letters.count(None), units=right, strata=place, statistic=resampled)


BENCHMARKS = (
    Benchmark(
        'scienceqa', 'ScienceQA, accuracy of the questions with an image',
        'problems.json, pid_splits.json and images/test/',
        {'test_img': 2017, 'test': 4241, 'val': None}, _scienceqa, _score_scienceqa),
    Benchmark(
        'seed', 'SEED-Bench, accuracy',
        'SEED-Bench.json, SEED-Bench-image/ and SEED-Bench-video-image/ (middle frames)',
        {'image': 14233, 'all': 19242, 'video': None}, _seed,
        letter_score({'accuracy_seed_first_char': lambda text, s: choice.seed_first_char(text),
                      'accuracy_seed_exact': lambda text, s: choice.seed_exact(text),
                      'accuracy_mcq_letter': own_letter}, extra=_seed_parts)),
    Benchmark(
        'vstar', 'V*Bench, options shuffled, answer by letter',
        'direct_attributes/ and relative_position/ with images and JSON files',
        {'all': 191, 'direct_attributes': 115, 'relative_position': 76, 'gpt4v_hard': 17,
         'ocr': None}, _vstar(True), letter_score({'accuracy_letter': own_letter})),
    Benchmark(
        'vstar_likelihood', 'V*Bench as the authors score it: the likeliest option',
        'direct_attributes/ and relative_position/ with images and JSON files',
        {'all': 191, 'direct_attributes': 115, 'relative_position': 76, 'gpt4v_hard': 17,
         'ocr': None}, _vstar(False),
        mean_score(accuracy_likelihood=lambda text, s: float(text == s.choices[0])),
        template='vstar_likelihood', likelihood=True),
    Benchmark(
        'realworldqa', 'RealWorldQA, letter or word', 'annotations.jsonl or test-*.parquet',
        {'test': 765}, _realworldqa,
        mean_score(accuracy_letter_or_word=_realworldqa_hit,
                   em_realworldqa=reference(match.em_realworldqa))),
    Benchmark(
        'mmmu_pro', 'MMMU-Pro, mean of standard (10 options) and vision',
        'standard (10 options)/test-*.parquet and vision/test-*.parquet',
        {'both': 3460, 'standard': 1730, 'vision': 1730}, _mmmu_pro, _score_mmmu_pro),
)
