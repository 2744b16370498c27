"""Bounds of the numbers in a config: a table per class, and every number outside in one message.

    BOUNDS: ClassVar = {'steps': '[1, inf)', 'b1': '[0, 1)', 'clip_norm': '(0, inf)'}

    def __post_init__(self):
      bounds.check(self)

`core.config.from_dict` looks at the same table where other keys are wrong, so that one message
names all. Bounds are written as intervals; none holds infinity or NaN unless it ends with `inf]`.
None is not looked at; of a list, of lists in it and of the values of a mapping every number is, and
none of them may be empty (write `[1, inf) ...` for one that may be).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
import math
import re
from typing import Any

from hrvlm_jax.core.errors import UserError

MAY_BE_EMPTY = ' ...'

SIZE = '[1, inf)'
COUNT = '[0, inf)'
ABOVE_ZERO = '(0, inf)'
SHARE = '[0, 1]'
DROPOUT = '[0, 1)'
FINITE = '(-inf, inf)'
FROM_END = '(-inf, -1]'  # a layer counted from the last one


def check(config: Any, more: Iterable[str] = ()) -> None:
  """Raises for every field of a dataclass outside of its class' `BOUNDS`, and for `more`.

  Raises:
    UserError: '<class>: <key> must lie in [0, 1), got 1.0; ...'.
  """
  values = {name: getattr(config, name) for name in type(config).BOUNDS if hasattr(config, name)}
  problems = [f'{name} {text}' for name, text in outside(type(config), values)] + list(more)
  if problems:
    raise UserError(f'{type(config).__name__}: ' + '; '.join(problems))


def outside(cls: type, values: Mapping[str, Any]) -> list[tuple[str, str]]:
  """(key, 'must ..., got ...') of the given values that lie outside of the bounds of a class."""
  found = []
  for name, interval in getattr(cls, 'BOUNDS', {}).items():
    if name not in values or (value := values[name]) is None:
      continue
    items = list(_numbers(value))
    if not items and not interval.endswith(MAY_BE_EMPTY):
      found.append((name, 'must name at least one, got none'))
    interval = interval.removesuffix(MAY_BE_EMPTY)
    wrong = [item for item in items if not _inside(item, interval)]
    if wrong:
      found.append((name, f'{_words(interval, wrong[0])}, got {value}'))
  return found


def _numbers(value: Any) -> Iterator[Any]:
  """The values that a value is made of."""
  if isinstance(value, Mapping):
    value = list(value.values())
  if isinstance(value, (list, tuple)):
    for item in value:
      yield from _numbers(item)
  else:
    yield value


def _parts(interval: str) -> tuple[str, float, float, str]:
  left, low, high, right = re.fullmatch(r'([\[(])(\S+), (\S+)([\])])', interval).groups()
  return left, float(low), float(high), right


def _inside(value: Any, interval: str) -> bool:
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return True  # another type: not ours to judge
  left, low, high, right = _parts(interval)
  # NaN fails every comparison.
  return ((value >= low if left == '[' else value > low)
          and (value <= high if right == ']' else value < high))


def _words(interval: str, value: Any) -> str:
  left, low, high, _ = _parts(interval)
  if low == -float('inf'):
    return 'must be a finite number' if high == float('inf') else f'must be at most {high:g}'
  if high < float('inf'):
    return f'must lie in {interval}'
  finite = '' if math.isfinite(value) else 'a finite number '
  least = 'at least' if left == '[' else 'above'
  return f'must be {finite}{"of " if finite and left == "[" else ""}{least} {low:g}'


def is_pattern(text: str) -> str | None:
  """What is wrong with a regular expression, or None."""
  try:
    re.compile(text)
  except re.error as error:
    return str(error)
  return None
