"""VQA soft accuracy in its three published forms, and the normalisers under it, quirks included.

Leave-one-out: for each of the n references, min(1, matches among the other n-1 / 3); the mean over
the references. With ten references and m matches: 0, 0.3, 0.6, 0.9, 1 for m = 0, 1, 2, 3, 4+.

Two variants of normalisers, both in use by published numbers:

* `official`: the VQA toolkit (GT-Vision-Lab/VQA: PythonEvaluationTools/vqaEvaluation/vqaEval.py).
* `m4c`: the EvalAI processor of MMF (facebookresearch/mmf: pythia/tasks/processors.py), with which
  TextVQA and VizWiz are scored and LLaVA's submissions for VQAv2 and VizWiz are written.

Both delete periods with a regular expression whose look-behind is misspelt, so only the character
after a period counts, and pass the flag re.UNICODE (32) in the place of the count, so at most 32
periods go. The numbers in print were made with both faults, hence they stay.
"""

from collections.abc import Sequence
import functools
import re
from typing import Literal

Variant = Literal['official', 'm4c']

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

NUMBERS = {
    'none': '0', 'zero': '0', 'one': '1', 'two': '2', 'three': '3', 'four': '4', 'five': '5',
    'six': '6', 'seven': '7', 'eight': '8', 'nine': '9', 'ten': '10',
}
ARTICLES = frozenset({'a', 'an', 'the'})

# Right spellings; the toolkit's table maps to each of them the spellings that lack one apostrophe.
# Its entries for I'm, I've and I'd've have capitals and are looked up in lower-case text, so they
# never act; `shes` and `lets` do not occur in it (`let's` maps to itself).
_RIGHT = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""


def _contractions() -> dict[str, str]:
  table = {}
  for right in _RIGHT.split():
    for at, letter in enumerate(right):
      if letter == "'":
        table[right[:at] + right[at + 1:]] = right
  table["somebody'd"] = 'somebodyd'  # the toolkit has this pair the wrong way round
  return table


CONTRACTIONS = _contractions()

_COMMA_OFFICIAL = re.compile(r'\d,\d')
_COMMA_M4C = re.compile(r'(?<=\d),+(?=\d)')
_PERIOD = re.compile(r'\.(?!\d)')
_MAX_PERIODS = int(re.UNICODE)


def process_punctuation(text: str, *, variant: Variant = 'official') -> str:
  """Deletes or blanks the 21 punctuation characters, then periods not followed by a digit.

  A character goes without a trace when the text has it next to a space, or has a comma between
  digits anywhere; otherwise a space takes its place. The tests look at the text as it came in.
  """
  comma = _COMMA_OFFICIAL if variant == 'official' else _COMMA_M4C
  has_comma = comma.search(text) is not None
  result = text
  for mark in PUNCTUATION:
    gone = has_comma or f'{mark} ' in text or f' {mark}' in text
    result = result.replace(mark, '' if gone else ' ')
  return _PERIOD.sub('', result, count=_MAX_PERIODS)


def process_digits_articles(text: str) -> str:
  """Lower case, number words to digits, no articles, apostrophes of contractions put back."""
  words = (NUMBERS.get(word, word) for word in text.lower().split())
  return ' '.join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def flatten_space(text: str) -> str:
  """New lines and tabs to spaces, ends stripped."""
  return text.replace('\n', ' ').replace('\t', ' ').strip()


@functools.lru_cache(maxsize=1 << 16)  # the same few answers come again and again
def vqa_normalize(text: str, *, variant: Variant) -> str:
  """One answer in the form in which a scorer compares it.

  Args:
    text: an answer of a person or of a model.
    variant: 'official' or 'm4c' (see the module's text). In the official metric this function is
      applied only to questions whose reference answers are not all identical: use
      `accuracy_official`, which knows.

  Examples: `the 1,000` -> `1000` (both); `Men's room` -> `men's room` (official), `men 's room`.
  """
  if variant not in ('official', 'm4c'):
    raise ValueError(f"variant: expected 'official' or 'm4c', got {variant!r}")
  if variant == 'm4c':
    text = text.lower().replace(',', '').replace('?', '').replace("'s", " 's").strip()
  return process_digits_articles(process_punctuation(flatten_space(text), variant=variant))


def soft_accuracy(matches: int, references: int) -> float:
  """Leave-one-out accuracy of an answer that equals `matches` of `references` answers."""
  if references < 1:
    raise ValueError('soft_accuracy needs at least one reference answer')
  matched = min(1.0, max(matches - 1, 0) / 3)
  unmatched = min(1.0, matches / 3)
  return (matches * matched + (references - matches) * unmatched) / references


def accuracy_m4c(prediction: str, references: Sequence[str]) -> float:
  """TextVQA and VizWiz; lmms-eval uses it for every VQA task.

  Source: luogen1996/LLaVA-HR: llava_hr/eval/m4c_evaluator.py (always 10 references there).
  """
  wanted = vqa_normalize(prediction, variant='m4c')
  found = sum(vqa_normalize(reference, variant='m4c') == wanted for reference in references)
  return soft_accuracy(found, len(references))


def accuracy_official(prediction: str, references: Sequence[str]) -> float:
  """VQAv2 and OKVQA by the present VQA toolkit.

  When all references are identical nothing is normalised: `Yes` then misses ten times `yes`.
  """
  prediction = flatten_space(prediction)
  references = [flatten_space(reference) for reference in references]
  if len(set(references)) > 1:
    prediction = vqa_normalize(prediction, variant='official')
    references = [vqa_normalize(reference, variant='official') for reference in references]
  return soft_accuracy(references.count(prediction), len(references))


def accuracy_llava_hr_okvqa(prediction: str, references: Sequence[str]) -> float:
  """OKVQA as LLaVA-HR scores it: an older toolkit, through LAVIS.

  The prediction is always normalised in full; references only lose punctuation, and only when they
  are not all identical; they keep capitals and articles.

  Source: luogen1996/LLaVA-HR: llava_hr/eval/vqa_eval.py.
  """
  text = process_punctuation(flatten_space(prediction))
  wanted = process_digits_articles(text)
  if len(set(references)) > 1:
    references = [process_punctuation(reference) for reference in references]
  return soft_accuracy(list(references).count(wanted), len(references))


def accuracy_min3(prediction: str, references: Sequence[str]) -> float:
  """min(1, m / 3) without leaving one out, on m4c-normalised answers.

  Not a published benchmark number: 1.0 at m = 3 where the official accuracy gives 0.9. Here to
  explain differences to reports that use it (google-research/big_vision: vqa.py).
  """
  wanted = vqa_normalize(prediction, variant='m4c')
  found = sum(vqa_normalize(reference, variant='m4c') == wanted for reference in references)
  return min(1.0, found / 3)
