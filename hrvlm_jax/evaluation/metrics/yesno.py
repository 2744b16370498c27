"""Yes/no benchmarks: POPE and MME."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Literal

MME_PERCEPTION = ('existence', 'count', 'position', 'color', 'posters', 'celebrity', 'scene',
                  'landmark', 'artwork', 'OCR')
MME_COGNITION = ('commonsense_reasoning', 'numerical_calculation', 'text_translation',
                 'code_reasoning')


def pope_llava(text: str) -> Literal['yes', 'no']:
  """LLaVA's reading of a POPE answer: everything that does not say no in its first sentence is yes.

  Source: luogen1996/LLaVA-HR: llava_hr/eval/eval_pope.py. `Not really` is yes: only the words No,
  no and not count.
  """
  words = text.split('.')[0].replace(',', '').split(' ')
  return 'no' if {'No', 'no', 'not'} & set(words) else 'yes'


def pope_exact(text: str) -> Literal['yes', 'no', 'other']:
  """lmms-eval's reading: the answer, stripped and in lower case, is the word itself."""
  text = text.lower().strip()
  return text if text in ('yes', 'no') else 'other'


@dataclasses.dataclass(frozen=True)
class Binary:
  """Counts of a binary decision with positive class yes, and the rates made of them.

  `other` answers (neither yes nor no) are in `other_yes` and `other_no` by their label: wrong, but
  not a prediction of the opposite class.
  """

  tp: int
  fp: int
  tn: int
  fn: int
  other_yes: int = 0
  other_no: int = 0

  @property
  def total(self) -> int:
    return self.tp + self.fp + self.tn + self.fn + self.other_yes + self.other_no

  @property
  def accuracy(self) -> float:
    return _ratio(self.tp + self.tn, self.total)

  @property
  def precision(self) -> float:
    return _ratio(self.tp, self.tp + self.fp)

  @property
  def recall(self) -> float:
    return _ratio(self.tp, self.tp + self.fn + self.other_yes)

  @property
  def f1(self) -> float:
    precision, recall = self.precision, self.recall
    return _ratio(2 * precision * recall, precision + recall)

  @property
  def yes_ratio(self) -> float:
    """Share of predictions (not of labels) that say yes."""
    return _ratio(self.tp + self.fp, self.total)


def binary(predictions: Sequence[str], labels: Sequence[str]) -> Binary:
  """Counts of parsed predictions ('yes', 'no', else other) against labels ('yes' or 'no')."""
  if len(predictions) != len(labels):
    raise ValueError(f'{len(predictions)} predictions for {len(labels)} labels')
  counts = dict.fromkeys(('tp', 'fp', 'tn', 'fn', 'other_yes', 'other_no'), 0)
  for found, wanted in zip(predictions, labels):
    if found not in ('yes', 'no'):
      counts[f'other_{wanted}'] += 1
    elif found == 'yes':
      counts['tp' if wanted == 'yes' else 'fp'] += 1
    else:
      counts['tn' if wanted == 'no' else 'fn'] += 1
  return Binary(**counts)


def pope_summary(counts: Binary) -> str:
  """F1, accuracy, precision, recall and yes ratio in one line, as LLaVA prints them."""
  rates = (counts.f1, counts.accuracy, counts.precision, counts.recall, counts.yes_ratio)
  return ', '.join(f'{rate:.3f}' for rate in rates)


def mme_answer(text: str) -> Literal['yes', 'no', 'other']:
  """The official tool's reading of an MME answer."""
  text = text.lower().strip().replace('.', '')
  if text in ('yes', 'no'):
    return text
  if len(text) == 1:
    return {'y': 'yes', 'n': 'no'}.get(text, 'other')
  head = text[:4]
  return 'yes' if 'yes' in head else 'no' if 'no' in head else 'other'


def mme_subtask(right: Mapping[str, Sequence[bool]]) -> tuple[float, float]:
  """(accuracy, accuracy+) of one MME subtask in percent.

  Args:
    right: for every image, whether each of its (two) questions was answered correctly. Accuracy
      counts questions, accuracy+ counts images whose questions are all right.
  """
  questions = [answer for answers in right.values() for answer in answers]
  both = [all(answers) for answers in right.values()]
  return 100 * _ratio(sum(questions), len(questions)), 100 * _ratio(sum(both), len(both))


def _ratio(part: float, whole: float) -> float:
  return part / whole if whole else 0.0
