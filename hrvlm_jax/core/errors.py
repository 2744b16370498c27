"""Errors that a user can cause and mend, and the way several of them become one message.

Form of a message: what was found (with the file, config key or tensor path), what was expected,
what to do. The command line prints a `UserError` as it is, without a traceback, and exits with 2.
"""

from collections.abc import Iterable, Sequence
import difflib


class UserError(ValueError):
  """Bad input: a file, a config key, a checkpoint, a question. Never a fault of the library."""


MOST = 50  # problems that one message lists
_TAIL = 5  # of them from the end of a longer list, where advice on all of them stands


def raise_all(title: str, problems: Iterable[str], *, most: int = MOST) -> None:
  """Raises one `UserError` naming every problem; does nothing when there is none.

  Example: `raise_all('run.py', ['a: unknown key', 'b: missing'])` raises
  `run.py: 2 problems` followed by one indented line per problem; a single problem stays on one
  line. Of a list longer than `most` its first and its last ones are shown.

  Args:
    title: what was being done and to which file or object.
    problems: one sentence each, without a final line break.

  Raises:
    UserError: when `problems` is not empty.
  """
  problems = list(problems)
  if not problems:
    return
  if len(problems) == 1:
    raise UserError(f'{title}: {problems[0]}')
  count = len(problems)
  if count > most:
    last = min(_TAIL, most // 2)
    problems[most - last:count - last] = [f'and {count - most} more']
  lines = '\n'.join(f'  {problem}' for problem in problems)
  raise UserError(f'{title}: {count} problems\n{lines}')


def rarest_first(*kinds: Sequence[str]) -> list[str]:
  """One list of the problems of several kinds: a long kind must not push a short one out of a
  message, such as a hundred missing tensors the one unexpected tensor that explains them."""
  return [problem for kind in sorted(kinds, key=len) for problem in kind]


def nearest(name: str, known: Iterable[str]) -> str | None:
  """The known name most similar to `name`, or None when nothing is known.

  There is no lower bound on the similarity: a user who is told 'unknown' is helped by any
  existing name. Equal similarities: the alphabetically first one.
  """
  ranked = sorted(known)
  if not ranked:
    return None
  return max(ranked, key=lambda other: difflib.SequenceMatcher(None, name, other).ratio())


def unknown(name: str, known: Iterable[str], *, what: str = 'key') -> str:
  """The sentence for an unknown name: `unknown key stepz (nearest known: steps)`."""
  hint = nearest(name.rsplit('.', 1)[-1], known)
  if hint is None:
    return f'unknown {what} {name} (none is known here)'
  return f'unknown {what} {name} (nearest known: {hint})'


def shortened(names: Sequence[str]) -> str:
  """The first names of a list, and how many more there are."""
  return ', '.join(names[:6]) + (f' and {len(names) - 6} more' if len(names) > 6 else '')
