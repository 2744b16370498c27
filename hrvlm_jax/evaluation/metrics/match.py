"""Answers against references: exact and relaxed match, ANLS, OCRBench's points."""

from collections.abc import Sequence
import re

# OCRBench: type of question -> part of the score it belongs to.
PARTS = {
    'Regular Text Recognition': 'recognition',
    'Irregular Text Recognition': 'recognition',
    'Artistic Text Recognition': 'recognition',
    'Handwriting Recognition': 'recognition',
    'Digit String Recognition': 'recognition',
    'Non-Semantic Text Recognition': 'recognition',
    'Scene Text-centric VQA': 'scene_vqa',
    'Doc-oriented VQA': 'doc_vqa',
    'Key Information Extraction': 'kie',
    'Handwritten Mathematical Expression Recognition': 'hmer',
}
MATH_SOURCE = 'HME100k'


def clean_gqa(text: str) -> str:
  """LLaVA's clean-up of an answer before GQA's own evaluation: final periods off, lower case.

  Source: luogen1996/LLaVA-HR: scripts/convert_gqa_for_eval.py.
  """
  return text.rstrip('.').lower()


def exact(prediction: str, reference: str) -> float:
  """1 where the answer is the reference, letter by letter, the space around both aside."""
  return float(prediction.strip() == reference.strip())


def contains(prediction: str, reference: str) -> float:
  """1 where the words of the reference stand in the answer, one after the other, in any case."""
  words, wanted = (re.findall(r'\w+', text.casefold()) for text in (prediction, reference))
  return float(bool(wanted) and any(
    words[i:i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1)))


def em_gqa(prediction: str, reference: str) -> float:
  """1 when the cleaned prediction equals the answer as it stands in the file."""
  return float(clean_gqa(prediction) == reference)


def em_ocrvqa(prediction: str, references: str | Sequence[str]) -> float:
  """1 when a reference equals the prediction, both stripped and in lower case.

  Source: luogen1996/LLaVA-HR: llava_hr/eval/m4c_evaluator.py.
  """
  references = [references] if isinstance(references, str) else references
  wanted = prediction.strip().lower()
  return float(any(wanted == reference.strip().lower() for reference in references))


def em_realworldqa(prediction: str, reference: str) -> float:
  """1 when both are equal in lower case, stripped, without final periods (lmms-eval's rule)."""
  clean = lambda text: text.lower().strip().rstrip('.')
  return float(clean(prediction) == clean(reference))


def em_relaxed(prediction: str, reference: str) -> float:
  """ChartQA's relaxed accuracy: numbers within 5 % of the reference, other text equal.

  A number is what Python's float() reads, a final % divides by 100; `1,000` is no number. A
  reference of zero is compared as text. Text is compared in lower case and not stripped.
  """
  found, wanted = _number(prediction), _number(reference)
  if found is not None and wanted:
    return float(abs(found - wanted) / abs(wanted) <= 0.05)
  return float(prediction.lower() == reference.lower())


def em_relaxed_strict(prediction: str, reference: str) -> float:
  """`em_relaxed` after taking white space, a final period, `$` and `,` off both sides.

  Not the published metric; it tells formatting faults from wrong numbers.
  """
  clean = lambda text: text.strip().rstrip('.').replace('$', '').replace(',', '').strip()
  return em_relaxed(clean(prediction), clean(reference))


def _number(text: str) -> float | None:
  try:
    return float(text.rstrip('%')) / 100 if text.endswith('%') else float(text)
  except ValueError:
    return None


def edit_distance(a: str, b: str) -> int:
  """Levenshtein distance: insertions, deletions and substitutions cost 1."""
  if len(a) < len(b):
    a, b = b, a
  row = list(range(len(b) + 1))
  for i, letter in enumerate(a, 1):
    diagonal, row[0] = row[0], i
    for j, other in enumerate(b, 1):
      diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
  return row[-1]


def anls_lmms(prediction: str, references: Sequence[str]) -> float:
  """Similarity to the nearest reference; 0 when it is below 0.5.

  As lmms-eval, VLMEvalKit and Qwen-VL compute it: the distance is between normalised texts (lower
  case, single spaces), the length it is divided by is that of the texts as they came.
  """
  similarity = 1 - _nearest(prediction, references)
  return 0.0 if similarity < 0.5 else similarity


def anls_strict(prediction: str, references: Sequence[str]) -> float:
  """The challenge's own rule: already a distance of exactly 0.5 scores 0."""
  similarity = 1 - _nearest(prediction, references)
  return 0.0 if similarity <= 0.5 else similarity


def _nearest(prediction: str, references: Sequence[str]) -> float:
  if not references:
    raise ValueError('ANLS needs at least one reference answer')
  normal = lambda text: ' '.join(text.strip().lower().split())
  distances = []
  for reference in references:
    # Upper case can be longer (the German sharp s becomes two letters): the originals measure it.
    longest = max(len(reference.upper()), len(prediction.upper()))
    distance = edit_distance(normal(reference), normal(prediction)) if longest else 0
    distances.append(distance / longest if longest else 0.0)
  return min(distances)


def ocrbench_point(prediction: str, references: Sequence[str], *, source: str,
                   fold: bool = False) -> float:
  """1 when a reference is a substring of the prediction, else 0: of 1000 in OCRBench.

  Args:
    prediction, references: raw texts. Compared in lower case, stripped, new lines as spaces;
      formulas of the source HME100k keep their case and lose all spaces.
    source: the item's `dataset_name`.
    fold: also turn full-width ASCII into ASCII, as lmms-eval does (not for formulas).
  """
  def clean(text: str) -> str:
    if source == MATH_SOURCE:
      return text.strip().replace('\n', ' ').replace(' ', '')
    text = fold_full_width(text) if fold else text
    return text.lower().strip().replace('\n', ' ')

  wanted = clean(prediction)
  return float(any(clean(reference) in wanted for reference in references))


def fold_full_width(text: str) -> str:
  """Full-width forms of ASCII characters and the ideographic space to ASCII."""
  table = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
  return text.translate(table)
