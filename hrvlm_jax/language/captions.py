"""Text side of contrastive models: caption cleaning and fixed-length token rows.

Follows PS3 (NVlabs/PS3: train/src/open_clip/tokenizer.py, itself after google-research/big_vision):
captions are cleaned, tokenised without a begin token, cut to leave room for the end token, and
padded on the right to the context length. Every position counts: the tower reads the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import html
import string

import ftfy
from jaxtyping import Int
import numpy as np

from hrvlm_jax.language.tokenizer import Tokenizer

_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)


def clean_whitespace(text: str) -> str:
  """Repairs the encoding, resolves HTML entities (twice), makes all white space single spaces."""
  return ' '.join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def clean_lower(text: str) -> str:
  """`clean_whitespace`, in lower case."""
  return clean_whitespace(text).lower()


def canonicalize(text: str) -> str:
  """Lower-case words without ASCII punctuation; an underscore counts as a space.

  Example: 'Isn't it a_photo-of' -> 'isnt it a photoof'.
  """
  words = clean_whitespace(text).replace('_', ' ').translate(_NO_PUNCTUATION)
  return ' '.join(words.lower().split())


CLEANERS: dict[str, Callable[[str], str]] = {
  'canonicalize': canonicalize,
  'lower': clean_lower,
  'whitespace': clean_whitespace,
}


class CaptionTokenizer:
  """Rows of token ids for a text tower.

  Args:
    tokenizer: without a begin token of its own (one it has is not used).
    context_length: ids per row.
    end: id after the last token, always kept.
    pad: id of the rest of the row (SigLIP pads with its end id 1, SigLIP2 with 0).
    clean: a key of `CLEANERS`, or None.
  """

  def __init__(self, tokenizer: Tokenizer, *, context_length: int = 64, end: int = 1, pad: int = 1,
               clean: str | None = 'canonicalize'):
    if clean is not None and clean not in CLEANERS:
      raise ValueError(f'clean: expected one of {sorted(CLEANERS)} or None, got {clean!r}')
    self.tokenizer, self.context_length = tokenizer, context_length
    self.end, self.pad, self.clean = end, pad, clean

  def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, 'b t']:
    """int32 ids [b t], right-padded; longer captions are cut and keep the end id."""
    rows = np.full((len(texts), self.context_length), self.pad, np.int32)
    for row, text in zip(rows, texts, strict=True):
      text = CLEANERS[self.clean](text) if self.clean else text
      ids = [*self.tokenizer.encode(text, bos=False)[:self.context_length - 1], self.end]
      row[:len(ids)] = ids
    return rows
