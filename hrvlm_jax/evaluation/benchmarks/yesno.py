"""POPE (three files) and MME (folders)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation.benchmarks.base import (
    Benchmark,
    Collector,
    Sample,
    Samples,
    Scores,
    Submission,
    file_image,
    read_json_lines,
    read_text,
)
from hrvlm_jax.evaluation.metrics import yesno

POPE_PARTS = ('random', 'popular', 'adversarial')


def _pope(folder: Path, split: str) -> Samples:
  c = Collector('pope', folder)
  for part in POPE_PARTS if split == 'all' else (split,):
    path = c.find(f'coco_pope_{part}.json', f'coco/coco_pope_{part}.json')
    for where, _, number, image, question, label in c.each(
        read_json_lines(path, c.problems), question_id=str, image=str, text=str, label=str):
      if label not in ('yes', 'no'):
        c.problems.append(f'{where}: label is {label!r}, expected yes or no')
        continue
      c.add(Sample(f'{part}_{number}', (file_image(folder / 'val2014' / image),), question,
                   (label,), category=part), where)
  return c.finish()


def _score_pope(samples: Sequence[Sample], texts: Sequence[str]) -> Scores:
  """Headline: the mean over the three parts of F1, answers read LLaVA's way."""
  labels = [sample.answers[0] for sample in samples]
  parts = list(dict.fromkeys(sample.category for sample in samples))
  members = {part: [i for i, s in enumerate(samples) if s.category == part] for part in parts}
  values: dict[str, float] = {}
  read = {'llava': [yesno.pope_llava(text) for text in texts],
          'exact': [yesno.pope_exact(text) for text in texts]}

  def counts(found: Sequence[str], chosen) -> yesno.Binary:
    return yesno.binary([found[i] for i in chosen], [labels[i] for i in chosen])

  headlines = {}
  for name, found in read.items():
    per_part = {part: counts(found, members[part]) for part in parts}
    values[f'pope_f1_{name}'] = 100 * float(np.mean([c.f1 for c in per_part.values()]))
    headlines[name] = {part: 100 * c.f1 for part, c in per_part.items()}
    for rate in ('accuracy', 'precision', 'recall', 'yes_ratio'):
      mean = float(np.mean([getattr(c, rate) for c in per_part.values()]))
      values[f'pope_{rate}_{name}'] = 100 * mean

  says_yes = np.array([answer == 'yes' for answer in read['llava']], float)
  is_yes = np.array([label == 'yes' for label in labels], float)
  place = np.array([parts.index(sample.category) for sample in samples])

  def resampled(chosen) -> float:
    total = lambda values: np.bincount(place[chosen], values[chosen], len(parts))
    f1 = 2 * total(says_yes * is_yes) / np.maximum(total(says_yes) + total(is_yes), 1)
    return 100 * float(f1.mean())

  right = [float(found == label) for found, label in zip(read['llava'], labels)]
  other = sum(answer == 'other' for answer in read['exact'])
  notes = (f'{other} answers are neither yes nor no; pope_f1_llava counts them by its own rule',)
  return Scores('pope_f1_llava', values, by_category=headlines['llava'], per_sample=right,
                units=right, statistic=resampled, strata=place, notes=notes if other else ())


def _mme(folder: Path, split: str) -> Samples:
  c = Collector('mme', folder)
  groups = {'perception': yesno.MME_PERCEPTION, 'cognition': yesno.MME_COGNITION,
            'all': yesno.MME_PERCEPTION + yesno.MME_COGNITION}
  for task in groups[split]:
    c.find(task)
    texts = sorted((folder / task).glob('questions_answers_YN/*.txt')) or \
        sorted((folder / task).glob('*.txt'))
    if not texts:
      c.problems.append(f'{task}: has no text files with questions')
    for path in texts:
      _mme_image(c, folder, task, path)
  return c.finish()


def _mme_image(c: Collector, folder: Path, task: str, path: Path) -> None:
  """Adds the questions of one image; each line is question, tab, Yes or No."""
  c.sources.append(path)
  roots = (folder / task / 'images', path.parent)
  pictures = [root / f'{path.stem}{ending}' for root in roots for ending in ('.jpg', '.png')]
  picture = next((p for p in pictures if p.is_file()), pictures[0])
  try:
    lines = [line for line in read_text(path).splitlines() if line.strip()]
  except UserError as error:
    c.problems.append(str(error))
    return
  if len(lines) != 2:
    c.problems.append(f'{task}/{path.name}: has {len(lines)} questions, expected 2')
  for number, line in enumerate(lines):
    where = f'{task}/{path.name}:{number + 1}'
    question, tab, label = line.rpartition('\t')
    label = label.strip().lower()
    if not tab or label not in ('yes', 'no'):
      c.problems.append(f'{where}: expected a question, a tab and Yes or No, found {line[:60]!r}')
      continue
    # The template has its own instruction, so the official one goes.
    text = question.replace('Please answer yes or no.', '').strip()
    c.add(Sample(f'{task}/{path.stem}/{number}', (file_image(picture),), text, (label,),
                 category=task, meta={'image': f'{task}/{path.stem}', 'line': question.strip(),
                                      'label': label.capitalize()}), where)


def _score_mme(samples: Sequence[Sample], texts: Sequence[str]) -> Scores:
  """Per subtask accuracy + accuracy+ (200 at most); perception and cognition are sums."""
  right = [float(yesno.mme_answer(text) == s.answers[0]) for text, s in zip(texts, samples)]
  other = sum(yesno.mme_answer(text) == 'other' for text in texts)
  grouped: dict[str, dict[str, list[bool]]] = {}
  for sample, value in zip(samples, right):
    grouped.setdefault(sample.category, {}).setdefault(sample.meta['image'], []).append(bool(value))
  subtasks, values = {}, {}
  for task, answers in grouped.items():
    plain, plus = yesno.mme_subtask(answers)
    subtasks[task] = plain + plus
    values[f'mme_{task}_accuracy'], values[f'mme_{task}_accuracy_plus'] = plain, plus
  for name, tasks in (('perception', yesno.MME_PERCEPTION), ('cognition', yesno.MME_COGNITION)):
    if present := [task for task in tasks if task in subtasks]:
      values[f'mme_{name}_points'] = sum(subtasks[task] for task in present)
  headline = 'mme_perception_points' if 'mme_perception_points' in values else \
      'mme_cognition_points'
  tasks = yesno.MME_PERCEPTION if headline == 'mme_perception_points' else yesno.MME_COGNITION
  images = [(task, answers) for task in tasks for answers in grouped.get(task, {}).values()]

  def resampled(chosen) -> float:
    again: dict[str, dict[str, list[bool]]] = {}
    for place, i in enumerate(chosen):
      again.setdefault(images[i][0], {})[str(place)] = images[i][1]
    return sum(sum(yesno.mme_subtask(answers)) for answers in again.values())

  return Scores(headline, values, by_category=subtasks, per_sample=right, unparsed=other,
                units=[0.0] * len(images), statistic=resampled,
                strata=[task for task, _ in images])


def _mme_submission(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, str]:
  """Lines of the official tool's result files: image, question, label, answer, tab separated."""
  files: dict[str, str] = {}
  for sample, text in zip(samples, texts):
    image = sample.images[0].path.name
    answer = ' '.join(text.split())
    files[f'{sample.category}.txt'] = files.get(f'{sample.category}.txt', '') + \
        f'{image}\t{sample.meta["line"]}\t{sample.meta["label"]}\t{answer}\n'
  return files


BENCHMARKS = (
    Benchmark(
        'pope', 'POPE on COCO, mean F1 of three parts',
        'coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json and val2014/',
        {'all': None, 'random': None, 'popular': None, 'adversarial': None}, _pope, _score_pope),
    Benchmark(
        'mme', 'MME, points (perception 2000, cognition 800)',
        'one folder per subtask with images and .txt files',
        {'all': 2374, 'perception': 2114, 'cognition': 260}, _mme, _score_mme,
        submission=Submission('mme_results', _mme_submission)),
)
