"""Errors that a user can cause and mend, and the way several of them become one message.

Form of a message: what was found (with the file, config key or tensor path), what was expected,
what to do. The command line prints a `UserError` as it is, without a traceback, and exits with 2.
"""

from collections.abc import Iterable, Sequence
import difflib


class UserError(ValueError):
  """Bad input: a file, a config key, a checkpoint, a question. Never a fault of the library."""


MOST = 50  # problems that one message lists


def raise_all(title: str, problems: Iterable[str], *, most: int = MOST) -> None:
  """Raises one `UserError` naming every problem; does nothing when there is none.

  Example: `raise_all('run.py', ['a: unknown key', 'b: missing'])` raises
  `run.py: 2 problems` followed by one indented line per problem (at most `most`); a single
  problem stays on one line.

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
  lines = '\n'.join(f'  {problem}' for problem in problems[:most])
  if len(problems) > most:
    lines += f'\n  and {len(problems) - most} more'
  raise UserError(f'{title}: {len(problems)} problems\n{lines}')


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
