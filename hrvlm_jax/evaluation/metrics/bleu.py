"""BLEU-4 of captions against several references each, over the whole set.

Follows salaniz/pycocoevalcap: bleu/bleu_scorer.py (n = 1..4, clipped counts, the reference length
that is closest, brevity penalty over the set; two small numbers keep empty counts from a division
by zero). The name of a score says how captions were tokenised, as for CIDEr (`metrics.cider`).
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
import math

Tokens = Sequence[str]

_ORDERS = (1, 2, 3, 4)
_TINY, _SMALL = 1e-15, 1e-9


def bleu_4(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
  """BLEU-4 in 0..1 of all captions together.

  Args:
    hypotheses: one tokenised caption for each image.
    references: the tokenised reference captions of each image, at least one.
  """
  if len(hypotheses) != len(references):
    raise ValueError(f'{len(hypotheses)} captions but references of {len(references)} images')
  if empty := [i for i, captions in enumerate(references) if not captions]:
    raise ValueError(f'images without a reference caption: {empty}')
  right, guessed = dict.fromkeys(_ORDERS, 0), dict.fromkeys(_ORDERS, 0)
  length = wanted = 0
  for tokens, captions in zip(hypotheses, references):
    length += len(tokens)
    wanted += min((abs(len(caption) - len(tokens)), len(caption)) for caption in captions)[1]
    for n in _ORDERS:
      most: collections.Counter = collections.Counter()
      for caption in captions:
        most |= _grams(caption, n)
      found = _grams(tokens, n)
      right[n] += sum(min(count, most[gram]) for gram, count in found.items())
      guessed[n] += max(0, len(tokens) - n + 1)
  score = math.prod((right[n] + _TINY) / (guessed[n] + _SMALL) for n in _ORDERS) ** 0.25
  ratio = (length + _TINY) / (wanted + _SMALL)
  return score if ratio >= 1 else score * math.exp(1 - 1 / ratio)


def _grams(tokens: Tokens, n: int) -> collections.Counter:
  return collections.Counter(tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1))


def meteor(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
  """METEOR in 0..1 of all captions, by the Java program of pycocoevalcap.

  Args:
    hypotheses, references: captions as texts of PTB tokens.

  Raises:
    ModuleNotFoundError: pycocoevalcap is not installed (extra `caption`).
  """
  from pycocoevalcap.meteor.meteor import Meteor

  found = {i: [text] for i, text in enumerate(hypotheses)}
  wanted = {i: list(texts) for i, texts in enumerate(references)}
  return float(Meteor().compute_score(wanted, found)[0])
