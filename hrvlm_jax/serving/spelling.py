"""Text that appears token by token, and the strings at which it stops."""

from __future__ import annotations

from collections.abc import Sequence

from hrvlm_jax.language.tokenizer import Tokenizer

UNFINISHED = '\ufffd'  # what the bytes of a character that is not complete decode to


class Spelling:
  """The text of one answer as its tokens come: what was shown is never taken back.

  The pieces joined are the text of all tokens without outer white space, cut before the first stop
  string. Only the last few tokens are decoded again; the tokens before them stay as context,
  because a tokenizer may drop the space in front of its first token.

  Args:
    hidden: ids that are no text (the model's end tokens).
    stops: strings that end the text; they are not part of it.

  Attributes:
    stopped: a stop string was found.
    text: what was shown so far.
  """

  def __init__(self, tokenizer: Tokenizer, hidden: Sequence[int] = (), stops: Sequence[str] = ()):
    self._tokenizer, self._hidden = tokenizer, frozenset(hidden)
    self._stops = tuple(stop for stop in stops if stop)
    self._ids: list[int] = []
    self._context = self._read = 0  # ids[context:read] are decoded again, those before never
    self._raw = ''  # text of ids[:read]
    self._given = 0  # characters of it that were shown, or dropped in front
    self.stopped = False
    self.text = ''

  def add(self, token: int) -> str:
    """The next piece of text, perhaps ''."""
    if self.stopped or token in self._hidden:
      return ''
    self._ids.append(token)
    known = self._decode(self._ids[self._context:self._read])
    now = self._decode(self._ids[self._context:])
    if len(now) <= len(known) or now.endswith(UNFINISHED):
      return ''
    self._raw += now[len(known):]
    self._context, self._read = self._read, len(self._ids)
    return self._show(final=False)

  def finish(self) -> str:
    """The rest of the text; after it nothing may be added."""
    if self.stopped:
      return ''
    whole = self._decode(self._ids)
    if whole.startswith(self._raw):
      self._raw = whole
    return self._show(final=True)

  def _decode(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode(ids)

  def _show(self, *, final: bool) -> str:
    raw, end = self._raw, len(self._raw)
    found = [at for at in (raw.find(stop, self._given) for stop in self._stops) if at >= 0]
    if found:
      self.stopped, end = True, min(found)
    elif not final:
      end -= max([0, *(_begun(raw[self._given:], stop) for stop in self._stops)])
    start = self._given
    if not self.text:
      start += len(raw[start:end]) - len(raw[start:end].lstrip())
    # White space at the end waits: it is text only when something follows.
    piece = raw[start:end].rstrip()
    self._given = start + len(piece)
    self.text += piece
    return piece


def _begun(text: str, stop: str) -> int:
  """How many of the last characters of a text may be the beginning of a stop string."""
  return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1)
               if text.endswith(stop[:n])), 0)
