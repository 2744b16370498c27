"""Text as it enters: half a character of UTF-16 (a lone surrogate) is no character.

Such a half stands in texts that were cut in the middle of an emoji, in JSON escapes, and in
arguments of a command line that are no UTF-8. No tokenizer and no file takes it.
"""

from __future__ import annotations

import re

_HALF = re.compile('[\ud800-\udfff]')
MARK = '\ufffd'  # the replacement character


def has_half(text: str) -> bool:
  """Whether a text holds half a character."""
  return _HALF.search(text) is not None


def whole(text: str) -> str:
  """The text with the replacement character for every half; as many characters as before."""
  return _HALF.sub(MARK, text)
