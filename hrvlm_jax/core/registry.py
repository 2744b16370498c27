"""Named things that are imported when they are asked for: objectives, evaluators, metrics.

    KNOWN = Registry('objective', {'next_token': 'hrvlm_jax.training.next_token:NextToken'},
                     variable='HRVLM_OBJECTIVES')
    KNOWN.register('mine', 'my_module:Mine')     # in a config file, a test, a notebook
    HRVLM_OBJECTIVES=mine=my_module:Mine         # or for every command, without a line of code

A name stands for `module:attribute`, so that a list of names costs no import and a lower room can
name what a higher one holds. Things with options in a config have them as a dataclass `Options`
with the field `name`.
"""

from __future__ import annotations

from collections.abc import Mapping
import importlib
import os
from typing import Any

from hrvlm_jax.core.errors import UserError, unknown


class Registry:
  """Names and where each thing is.

  Args:
    what: what the things are, for messages.
    known: name -> 'module:attribute'.
    variable: environment variable with further ones, `name=module:attribute`, split by commas.
  """

  def __init__(self, what: str, known: Mapping[str, str], *, variable: str):
    self.what, self.variable = what, variable
    self._known: dict[str, Any] = dict(known)

  def register(self, name: str, where: Any) -> None:
    """Adds one: the thing itself, or 'module:attribute' of it. A known name is replaced."""
    self._known[name] = where

  def names(self) -> list[str]:
    """All names, sorted.

    Raises:
      UserError: a malformed environment variable.
    """
    return sorted(self._all())

  def get(self, name: str) -> Any:
    """The thing of that name.

    Raises:
      UserError: unknown (with the nearest and all known), or it cannot be imported.
    """
    known = self._all()
    if not isinstance(name, str):
      raise UserError(f'{self.what}: found {name!r}, expected one of {", ".join(sorted(known))}')
    if name not in known:
      raise UserError(f'{unknown(name, known, what=self.what)}; all: {", ".join(sorted(known))}; '
                      f'yours: {self.variable}={name}=module:attribute')
    where = known[name]
    return load_object(where, f'{self.what} {name}') if isinstance(where, str) else where

  def options(self, value: Any) -> type:
    """The class `Options` of the thing that a config names.

    Args:
      value: a name, a mapping with `name`, or such options.

    Raises:
      UserError: no name, an unknown one, or it cannot be imported.
    """
    name = value if isinstance(value, str) else (
      value.get('name') if hasattr(value, 'get') else getattr(value, 'name', None))
    if not isinstance(name, str):
      raise UserError(f'{self.what} {value!r:.60}: expected its name, or a mapping with its name')
    return self.get(name).Options

  def default(self, name: str) -> Any:
    """The options of a thing where nothing but its name is said.

    Raises:
      UserError: as `get`; or some of them have no default.
    """
    try:
      return self.options(name)(name=name)
    except TypeError as error:
      raise UserError(f'{self.what} {name}: {error}; give a mapping with its name and these') from (
        error)

  def _all(self) -> dict[str, Any]:
    found = dict(self._known)
    for entry in filter(None, os.environ.get(self.variable, '').split(',')):
      name, equals, where = entry.strip().partition('=')
      if not equals or not name:
        raise UserError(f'{self.variable}: found {entry!r}, expected name=module:attribute')
      found[name] = where
    return found


def load_object(spec: str, what: str) -> Any:
  """What `module:attribute` names.

  Raises:
    UserError: not of that form, or not there.
  """
  module, colon, name = spec.partition(':')
  if not colon or not module or not name:
    raise UserError(f'{what} {spec!r}: expected module:name')
  try:
    return getattr(importlib.import_module(module), name)
  except ImportError as error:
    raise UserError(f'{what} {spec!r}: {module} cannot be imported ({error})') from error
  except AttributeError as error:
    raise UserError(f'{what} {spec!r}: module {module} has no {name}') from error


def load_callable(spec: str, what: str) -> Any:
  """The function or class that `module:name` names.

  Raises:
    UserError: as `load_object`; or it cannot be called.
  """
  found = load_object(spec, what)
  if not callable(found):
    raise UserError(f'{what} {spec!r}: it is {type(found).__name__}, expected a function')
  return found
