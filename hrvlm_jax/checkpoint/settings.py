"""Settings files of a release: every key is used, known to be harmless, or refused by name.

A `Keys` table declares what becomes of each key of a file; `account` lays it beside the file.
`Reader` takes single values with their types, so that a null or an odd value is a sentence that
names file and key. The tables of the formats themselves are in `formats`, those of a system beside
its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
import dataclasses
import json
import math
from typing import Any

from hrvlm_jax.core.errors import UserError, nearest, raise_all

ADVICE = ('if it changes neither weights nor picture nor text, take the key out of the file and '
          'convert again')


@dataclasses.dataclass(frozen=True)
class Used:
  """The key is read into the model, the tokenizer or the way it answers."""


@dataclasses.dataclass(frozen=True)
class Harmless:
  """The key changes nothing here; why."""

  reason: str


@dataclasses.dataclass(frozen=True)
class Only:
  """The key changes something that is not here: refused unless it has one of these values.

  Attributes:
    fits: values, or a function of the value; null and an absent key always fit.
    expected: in words, where `fits` is a function.
  """

  fits: Collection[Any] | Callable[[Any], bool]
  expected: str = ''

  def allows(self, value: Any) -> bool:
    """Whether the value changes nothing."""
    if value is None:
      return True
    if callable(self.fits):
      return bool(self.fits(value))
    return any(value == one and isinstance(value, bool) == isinstance(one, bool)
               for one in self.fits)

  def words(self) -> str:
    """What is expected."""
    return self.expected or ' or '.join(json.dumps(one) for one in self.fits) or 'no such key'


Rule = Used | Harmless | Only | Mapping[str, Any]
Keys = Mapping[str, Rule]
USED = Used()


@dataclasses.dataclass
class Account:
  """What became of the keys of a file.

  Attributes:
    used: keys, nested ones with dots.
    harmless: key -> why it changes nothing.
    problems: a sentence per key that is refused.
  """

  used: list[str] = dataclasses.field(default_factory=list)
  harmless: dict[str, str] = dataclasses.field(default_factory=dict)
  problems: list[str] = dataclasses.field(default_factory=list)

  def lines(self, title: str) -> list[str]:
    """The account in words: what is used, then what is harmless by its reason."""
    lines = [f'{title}: used: {", ".join(self.used)}'] if self.used else []
    reasons: dict[str, list[str]] = {}
    for key, reason in self.harmless.items():
      reasons.setdefault(reason, []).append(key)
    return lines + [f'{title}: changes nothing ({reason}): {", ".join(keys)}'
                    for reason, keys in reasons.items()]


def account(values: Mapping[str, Any], keys: Keys, *, prefix: str = '', unset: str = '') -> Account:
  """Lays a table beside a file.

  Args:
    keys: key -> what becomes of it; a mapping is a table for the keys of a nested mapping.
    prefix: in front of the keys in sentences.
    unset: why a null changes nothing under any key, known or not; '': it may.
  """
  found = Account()
  for key, value in values.items():
    rule, name = keys.get(key), f'{prefix}{key}'
    if rule is None and value is None and unset:
      found.harmless[name] = unset
    elif rule is None:
      found.problems.append(f'{name}: is {shown(value)}, a key that is not known here (nearest '
                            f'known: {nearest(key, keys)}); {ADVICE}')
    elif isinstance(rule, Mapping):
      if isinstance(value, Mapping):
        inner = account(value, rule, prefix=f'{name}.')
        found.used += inner.used
        found.harmless |= inner.harmless
        found.problems += inner.problems
      else:
        found.used.append(name)  # of another kind: whoever reads it says so
    elif isinstance(rule, Harmless):
      found.harmless[name] = rule.reason
    elif isinstance(rule, Only):
      if rule.allows(value):
        found.harmless[name] = 'as without the key'
      else:
        found.problems.append(
          f'{name}: is {shown(value)}, expected {rule.words()}; nothing here does otherwise')
    else:
      found.used.append(name)
  return found


def shown(value: Any) -> str:
  """A JSON value in an error message, cut where it is long."""
  try:
    text = json.dumps(value)
  except (TypeError, ValueError):
    text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'


class Reader:
  """Values of a settings file with their types; what is wrong is collected, see `done`.

  A key that is left out has the default of the class that wrote the file, as in transformers, which
  leaves defaults out. A null is refused, except for keys that may be null.

  Args:
    where: the file in sentences; nested keys have their own `prefix`.
  """

  def __init__(self, values: Any, *, where: str = 'config.json', prefix: str = '',
               problems: list[str] | None = None):
    self.where, self.prefix = where, prefix
    self.problems = [] if problems is None else problems
    if not isinstance(values, Mapping):
      self.problems.append(f'{prefix.rstrip(".") or where}: found {shown(values)}, expected a '
                           'mapping of settings')
      values = {}
    self.values = values

  def __contains__(self, key: str) -> bool:
    return self.values.get(key) is not None

  def bad(self, key: str, expected: str) -> None:
    """Notes a value that is none."""
    self.problems.append(f'{self.prefix}{key}: found {shown(self.values.get(key))}, expected '
                         f'{expected}')

  def _take(self, key: str, default: Any, fits: Callable[[Any], bool], expected: str,
            null: bool) -> Any:
    if key not in self.values or (null and self.values[key] is None):
      return default
    if not fits(self.values[key]):
      self.bad(key, expected)
      return default
    return self.values[key]

  def integer(self, key: str, default: Any, *, least: int = 1, most: int = 1 << 24,
              null: bool = False) -> Any:
    """A whole number."""
    fits = lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most
    return self._take(key, default, fits, f'a whole number from {least} to {most}', null)

  def number(self, key: str, default: Any, *, least: float = 0.0, above: bool = False,
             null: bool = False) -> Any:
    """A finite number of at least `least`, or above it."""
    def fits(v: Any) -> bool:
      return (isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e30
              and math.isfinite(v) and (v > least if above else v >= least))
    value = self._take(key, default, fits, f'a number {"above" if above else "of at least"} '
                       f'{least:g}', null)
    return value if value is None else float(value)

  def flag(self, key: str, default: bool = False) -> bool:
    """True or false; null is false, as in Python."""
    return bool(self._take(key, default, lambda v: isinstance(v, bool), 'true or false', True))

  def word(self, key: str, default: Any, known: Collection[str] = (), *, null: bool = False) -> Any:
    """A string, one of `known` where it is given."""
    fits = lambda v: isinstance(v, str) and (not known or v in known)
    expected = f'one of {", ".join(sorted(known))}' if known else 'a string'
    return self._take(key, default, fits, expected, null)

  def inside(self, key: str) -> Reader:
    """A nested mapping; left out it is empty."""
    return Reader(self.values.get(key, {}), where=self.where, prefix=f'{self.prefix}{key}.',
                  problems=self.problems)

  def build(self, make: Callable[[], Any]) -> Any:
    """What is made of the values; a refusal of its class is a sentence of this file.

    Raises:
      UserError: everything that was wrong.
    """
    self.done()
    try:
      return make()
    except UserError:
      raise
    except (ValueError, ZeroDivisionError, OverflowError, TypeError) as error:
      raise UserError(f'{self.where}: {error}') from error

  def done(self) -> None:
    """Raises what was wrong, all of it."""
    raise_all(self.where, self.problems)
