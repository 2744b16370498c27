"""CIDEr-D on tokenised captions, in NumPy-free Python.

Follows salaniz/pycocoevalcap: cider/cider_scorer.py (n = 1..4, sigma 6, document frequencies from
the references of the images that are scored). A number is comparable with published CIDEr only when
the captions were tokenised by the Stanford PTB tokeniser and the whole split was scored, because
the frequencies depend on the set: hence two names.

* `cider_simple`: tokens from `simple_tokens`, no Java.
* `cider_ptb`: tokens from `ptb_tokens` (needs the package pycocoevalcap and Java).
"""

import collections
from collections.abc import Sequence
import math
import re

Tokens = Sequence[str]

_ORDERS = (1, 2, 3, 4)
_SIGMA = 6.0

# Tokens that the reference evaluation drops after tokenising.
DROPPED = frozenset(
    ["''", "'", '``', '`', '-LRB-', '-RRB-', '-LCB-', '-RCB-', '.', '?', '!', ',', ':', '-', '--',
     '...', ';'])

_TOKEN = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+?(?=n't\b)|[\w$%&#@]+(?:[-./]\w+)*|[^\s\w]")


def simple_tokens(caption: str) -> list[str]:
  """Lower-case words without punctuation; `n't` and `'s` apart, as PTB does.

  An approximation of the PTB tokeniser, so scores made with it are named `cider_simple`.
  """
  marks = DROPPED | set('"()[]{}')
  return [token for token in _TOKEN.findall(caption.lower()) if token not in marks]


def ptb_tokens(captions: Sequence[str]) -> list[list[str]]:
  """Tokens of the Stanford PTB tokeniser, punctuation dropped.

  Raises:
    ModuleNotFoundError: pycocoevalcap is not installed (extra `caption`).
  """
  from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
  rows = {i: [{'caption': caption}] for i, caption in enumerate(captions)}
  tokenised = PTBTokenizer().tokenize(rows)
  return [tokenised[i][0].split() for i in range(len(captions))]


def cider_d(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
  """CIDEr-D of every image, in units where papers print 100 times the mean.

  Args:
    hypotheses: one tokenised caption for each image.
    references: the tokenised reference captions of each image, at least one.

  Returns:
    One score for each image. With a single image every score is 0 (all idf are 0).
  """
  if len(hypotheses) != len(references):
    raise ValueError(f'{len(hypotheses)} captions but references of {len(references)} images')
  if empty := [i for i, captions in enumerate(references) if not captions]:
    raise ValueError(f'images without a reference caption: {empty}')
  counts = [[_grams(caption) for caption in captions] for captions in references]
  frequency: collections.Counter = collections.Counter()
  for captions in counts:
    frequency.update(set().union(*captions))
  log_images = math.log(len(references)) if references else 0.0

  def vector(grams: collections.Counter):
    weighted = [{} for _ in _ORDERS]
    for gram, count in grams.items():
      weight = count * (log_images - math.log(max(1.0, frequency[gram])))
      weighted[len(gram) - 1][gram] = weight
    norms = [math.sqrt(sum(w * w for w in part.values())) for part in weighted]
    return weighted, norms, sum(n for gram, n in grams.items() if len(gram) == 2)

  scores = []
  for tokens, captions in zip(hypotheses, counts):
    hypothesis = vector(_grams(tokens))
    similarity = [_similarity(hypothesis, vector(caption)) for caption in captions]
    scores.append(10.0 * sum(similarity) / len(captions))
  return scores


def _grams(tokens: Tokens) -> collections.Counter:
  counts: collections.Counter = collections.Counter()
  for n in _ORDERS:
    counts.update(tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1))
  return counts


def _similarity(hypothesis, reference) -> float:
  found, found_norms, found_bigrams = hypothesis
  wanted, wanted_norms, wanted_bigrams = reference
  penalty = math.exp(-((found_bigrams - wanted_bigrams) ** 2) / (2 * _SIGMA ** 2))
  total = 0.0
  for n in range(len(_ORDERS)):
    value = sum(min(w, wanted[n].get(gram, 0.0)) * wanted[n].get(gram, 0.0)
                for gram, w in found[n].items())
    if found_norms[n] and wanted_norms[n]:
      value /= found_norms[n] * wanted_norms[n]
    total += value * penalty
  return total / len(_ORDERS)
