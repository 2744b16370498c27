"""TextVQA (with and without OCR tokens), VQAv2, OKVQA, VizWiz, GQA, OCRVQA, ChartQA."""

from collections.abc import Sequence
from pathlib import Path
import re

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation.benchmarks.base import (
  Benchmark,
  Collector,
  ImageSource,
  Sample,
  Samples,
  Scores,
  Submission,
  file_image,
  first_image,
  read_json_lines,
)
from hrvlm_jax.evaluation.benchmarks.scoring import mean_score, percent, reference, references
from hrvlm_jax.evaluation.benchmarks.tables import read_tsv
from hrvlm_jax.evaluation.metrics import match, vqa as metric

_M4C = dict(vqa_accuracy_m4c=references(metric.accuracy_m4c),
            vqa_accuracy_official=references(metric.accuracy_official))
_OFFICIAL = dict(vqa_accuracy_official=references(metric.accuracy_official),
                 vqa_accuracy_m4c=references(metric.accuracy_m4c))

OCR_LINE = 'Reference OCR token: '


def prompt_to_question(prompt: str) -> str:
  """The question inside one of LLaVA's TextVQA prompts, in lower case: the key of its annotation.

  Known forms: question, instruction; question, OCR line, instruction; OCR line first; and
  `OCR tokens: ... Question: ... Short answer:`.

  Raises:
    UserError: another form.
  """
  lines = prompt.split('\n')
  if prompt.startswith('OCR tokens: '):
    if match := re.search(r'Question: (.*?) Short answer:', prompt, re.DOTALL):
      return match.group(1).lower()
  elif OCR_LINE in prompt and len(lines) == 3:
    return (lines[1] if prompt.startswith(OCR_LINE.rstrip()) else lines[0]).lower()
  elif len(lines) == 2:
    return lines[0].lower()
  raise UserError(f'cannot find the question in the prompt {prompt[:80]!r}; expected a question, '
                  'optionally a line of OCR tokens, and an instruction')


def _textvqa(with_ocr: bool):
  def read(folder: Path, split: str) -> Samples:
    c = Collector('textvqa_ocr' if with_ocr else 'textvqa', folder)
    path = c.find(f'TextVQA_0.5.1_{split}.json')
    tokens = _ocr_tokens(c, split) if with_ocr else {}
    for where, _, image, question, number, answers in c.each(
        c.listed(path, 'data'), image_id=str, question=str, question_id=int,
        answers=None if split == 'test' else list):
      fields = {}
      if with_ocr:
        found = tokens.get((image, question.lower()), tokens.get(image))
        if found is None:
          c.problems.append(f'{where}: no OCR tokens for image {image}')
          continue
        fields = {'ocr': found}
      names = ('train_images', 'test_images', 'images')
      source = first_image(*(folder / name / f'{image}.jpg' for name in names))
      c.add(Sample(str(number), (source,), question, answers and tuple(map(str, answers)),
                   fields=fields, meta={'question_id': number, 'image_id': image}), where)
    return c.finish()
  return read


def _ocr_tokens(c: Collector, split: str) -> dict:
  """OCR tokens joined by `, `: by (image, question) from LLaVA's file, by image from Rosetta's."""
  path = c.find(f'llava_textvqa_{split}_v051_ocr.jsonl', f'TextVQA_Rosetta_OCR_v0.2_{split}.json')
  table: dict = {}
  if path.suffix == '.jsonl':
    for where, _, image, text in c.each(
        read_json_lines(path, c.problems), question_id=str, text=str):
      line = next((t for t in text.split('\n') if t.startswith(OCR_LINE.rstrip())), None)
      if line is None:
        c.problems.append(f'{where}: has no line that begins with {OCR_LINE!r}')
        continue
      table[image, prompt_to_question(text)] = line.removeprefix(OCR_LINE.rstrip()).strip()
    return table
  for *_, image, words in c.each(c.listed(path, 'data'), image_id=str, ocr_tokens=list):
    table[image] = ', '.join(map(str, words))
  return table


def _coco_vqa(name: str, files: dict[str, tuple[str, str | None, str]]):
  """Reader of the VQA toolkit's pairs: split -> (questions, annotations, COCO image folder)."""
  def read(folder: Path, split: str) -> Samples:
    c = Collector(name, folder)
    question_file, annotation_file, picture_folder = files[split]
    questions = c.find(question_file)
    labels = {}
    if annotation_file:
      path = c.find(annotation_file)
      for where, row in c.listed(path, 'annotations'):
        number = c.get(row, 'question_id', where, int)
        answers = [c.get(answer, 'answer', place) for place, answer in
                   c.rows(c.get(row, 'answers', where, list) or [], f'{where}.answers')]
        if number in labels:
          c.problems.append(f'{where}: question_id {number} is a duplicate')
        labels[number] = (tuple(a for a in answers if a is not None), row.get('answer_type', ''))
    for where, _, number, text, image in c.each(
        c.listed(questions, 'questions'), question_id=int, question=str, image_id=int):
      if annotation_file and number not in labels:
        c.problems.append(f'{where}: question_id {number} has no annotation')
        continue
      answers, kind = labels.get(number, (None, ''))
      source = file_image(folder / picture_folder / f'COCO_{picture_folder}_{image:012d}.jpg')
      c.add(Sample(str(number), (source,), text, answers, category=kind,
                   meta={'question_id': number, 'image_id': image}), where)
    return c.finish()
  return read


def _vqav2_submission(samples: Sequence[Sample], texts: Sequence[str]) -> list[dict]:
  """EvalAI's file; answers through the m4c normaliser, as LLaVA's submissions."""
  return [{'question_id': sample.meta['question_id'],
           'answer': metric.vqa_normalize(text, variant='m4c')}
          for sample, text in zip(samples, texts)]


def _vizwiz(folder: Path, split: str) -> Samples:
  c = Collector('vizwiz', folder)
  path = c.find(f'{split}.json', f'Annotations/{split}.json')
  for where, row, image, question in c.each(c.listed(path), image=str, question=str):
    answers = None
    if split != 'test':
      found = c.get(row, 'answers', where, list)
      answers = tuple(str(c.get(answer, 'answer', place)) for place, answer in
                      c.rows(found or [], f'{where}.answers'))
    c.add(Sample(Path(image).stem, (first_image(folder / split / image, folder / image),), question,
                 answers, category=row.get('answer_type', ''), meta={'image': image}), where)
  return c.finish()


def _vizwiz_submission(samples: Sequence[Sample], texts: Sequence[str]) -> list[dict]:
  return [{'image': sample.meta['image'], 'answer': metric.vqa_normalize(text, variant='m4c')}
          for sample, text in zip(samples, texts)]


def _gqa(folder: Path, split: str) -> Samples:
  c = Collector('gqa', folder)
  path = c.find(f'{split}_questions.json', f'questions1.2/{split}_questions.json')
  for where, row, image, question, answer in c.each(
      c.listed(path), imageId=str, question=str, answer=str):
    number = where[len(path.name) + 1:-1]
    kinds = row.get('types') if isinstance(row.get('types'), dict) else {}
    c.add(Sample(number, (file_image(folder / 'images' / f'{image}.jpg'),), question, (answer,),
                 category=str(kinds.get('structural', ''))), where)
  return c.finish()


def _gqa_submission(samples: Sequence[Sample], texts: Sequence[str]) -> list[dict]:
  return [{'questionId': sample.id, 'prediction': match.clean_gqa(text)}
          for sample, text in zip(samples, texts)]


_OCRVQA_SPLITS = {'train': 1, 'val': 2, 'test': 3}


def _ocrvqa(folder: Path, split: str) -> Samples:
  c = Collector('ocrvqa', folder)
  if split == 'core':
    return _ocrvqa_core(c, folder)
  path = c.find('dataset.json')
  for where, row, part, questions, answers in c.each(
      c.listed(path), split=int, questions=list, answers=list):
    book = where[len(path.name) + 1:-1]
    if part != _OCRVQA_SPLITS[split]:
      continue
    if len(questions) != len(answers):
      c.problems.append(f'{where}: {len(questions)} questions but {len(answers)} answers')
      continue
    suffix = Path(str(row.get('imageURL', ''))).suffix or '.jpg'
    source = first_image(folder / 'images' / f'{book}{suffix}', folder / 'images' / f'{book}.jpg')
    for i, (question, answer) in enumerate(zip(questions, answers)):
      c.add(Sample(f'{book}_{i}', (source,), str(question), (str(answer),),
                   category=str(row.get('genre', ''))), f'{where}.questions[{i}]')
  return c.finish()


def _ocrvqa_core(c: Collector, folder: Path) -> Samples:
  path = c.find('OCRVQA_TESTCORE.tsv')
  pictures: dict[str, ImageSource] = {}
  for where, row, index, question, answer in c.each(
      read_tsv(path, c.problems), index=str, question=str, answer=str):
    image = row.get('image')
    source = pictures.get(image) if isinstance(image, str) else image
    if source is None:
      c.problems.append(f'{where}: has no image')
      continue
    pictures[index] = source
    c.add(Sample(index, (source,), question, (answer,)), where)
  return c.finish()


def _chartqa(folder: Path, split: str) -> Samples:
  c = Collector('chartqa', folder)
  root = folder / split if (folder / split).is_dir() else folder
  for half in ('human', 'augmented'):
    path = c.find(f'{split}/{split}_{half}.json', f'{split}_{half}.json')
    for where, _, image, question, label in c.each(
        c.listed(path), imgname=str, query=str, label=str):
      number = where[len(path.name) + 1:-1]
      c.add(Sample(f'{half}_{number}', (file_image(root / 'png' / image),), question, (label,),
                   category=half), where)
  return c.finish()


def _score_chartqa(samples: Sequence[Sample], texts: Sequence[str]) -> Scores:
  """Overall is the mean over all questions, which for the full split is the mean of the halves."""
  scores = mean_score(em_relaxed=reference(match.em_relaxed),
                      em_relaxed_strict=reference(match.em_relaxed_strict))(samples, texts)
  halves = list(scores.by_category.values())
  scores.values['em_relaxed_mean_of_halves'] = percent([half / 100 for half in halves])
  return scores


_COCO = 'images in val2014/ or test2015/ under their COCO names'
_VQAV2 = {
    'val': ('v2_OpenEnded_mscoco_val2014_questions.json',
            'v2_mscoco_val2014_annotations.json', 'val2014'),
    'test-dev': ('v2_OpenEnded_mscoco_test-dev2015_questions.json', None, 'test2015'),
    'test': ('v2_OpenEnded_mscoco_test2015_questions.json', None, 'test2015'),
}
_OKVQA = {'val': ('OpenEnded_mscoco_val2014_questions.json', 'mscoco_val2014_annotations.json',
                  'val2014')}

BENCHMARKS = (
    Benchmark(
        'textvqa', 'TextVQA 0.5.1 without OCR tokens, soft accuracy (m4c)',
        'TextVQA_0.5.1_val.json and train_images/', {'val': 5000, 'test': 5734},
        _textvqa(False), mean_score(**_M4C),
        submission=Submission('textvqa_submission.json', _vqav2_submission)),
    Benchmark(
        'textvqa_ocr', 'TextVQA 0.5.1 with Rosetta OCR tokens in the prompt (LLaVA-HR headline)',
        'TextVQA_0.5.1_val.json, train_images/ and llava_textvqa_val_v051_ocr.jsonl or '
        'TextVQA_Rosetta_OCR_v0.2_val.json', {'val': 5000}, _textvqa(True), mean_score(**_M4C)),
    Benchmark(
        'vqav2', 'VQAv2, soft accuracy of the VQA toolkit',
        f'the v2_OpenEnded_mscoco_*_questions.json and annotations; {_COCO}',
        {'val': 214354, 'test-dev': 107394, 'test': 447793}, _coco_vqa('vqav2', _VQAV2),
        mean_score(**_OFFICIAL), submission=Submission('vqav2_submission.json', _vqav2_submission)),
    Benchmark(
        'okvqa', 'OKVQA, soft accuracy of the VQA toolkit',
        f'OpenEnded_mscoco_val2014_questions.json, mscoco_val2014_annotations.json; {_COCO}',
        {'val': 5046}, _coco_vqa('okvqa', _OKVQA),
        mean_score(**_OFFICIAL,
                   vqa_accuracy_llava_hr_okvqa=references(metric.accuracy_llava_hr_okvqa))),
    Benchmark(
        'vizwiz', 'VizWiz-VQA, soft accuracy (m4c)', 'val.json or test.json, images in val/, test/',
        {'val': 4319, 'test': 8000}, _vizwiz, mean_score(**_M4C),
        submission=Submission('vizwiz_submission.json', _vizwiz_submission)),
    Benchmark(
        'gqa', "GQA, exact match after LLaVA's clean-up",
        'testdev_balanced_questions.json and images/', {'testdev_balanced': 12578}, _gqa,
        mean_score(em_gqa=reference(match.em_gqa)),
        submission=Submission('gqa_predictions.json', _gqa_submission)),
    Benchmark(
        'ocrvqa', 'OCRVQA, exact match (strip, lower case)',
        'dataset.json and images/, or OCRVQA_TESTCORE.tsv (split core)',
        {'test': None, 'core': 3072, 'val': None}, _ocrvqa,
        mean_score(em_ocrvqa=references(match.em_ocrvqa)), max_new_tokens=32),
    Benchmark(
        'chartqa', 'ChartQA, relaxed accuracy', 'test/test_human.json, test/test_augmented.json, '
        'test/png/', {'test': 2500, 'val': 1920}, _chartqa, _score_chartqa),
)
