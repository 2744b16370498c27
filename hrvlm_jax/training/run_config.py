"""A run config as a dataclass: what a file or a name gives, and overrides `a.b=value` on top.

Overrides are parsed here and not by a flag library because mistakes must be one sentence: the key
path, what was found, what was expected and the nearest known key; and because a value keeps the
type it has in the config. Keys that the file leaves at their default can be overridden as well.
"""

import ast
from collections.abc import Iterable, Sequence
import dataclasses
import itertools
import typing
from typing import Any, NoReturn, TypeVar

import ml_collections

from hrvlm_jax.core.config import field_types, from_dict, to_dict
from hrvlm_jax.core.errors import UserError, nearest, raise_all
from hrvlm_jax.training.recipe import evaluate, find, key_now

T = TypeVar('T')
Overrides = Sequence[tuple[str, str]]


def load(schema: type[T], spec: str, overrides: Overrides = ()) -> T:
  """The config of one run, as the dataclass `schema`.

  Args:
    schema: dataclass of the whole run config.
    spec: `FILE.py[:ARGUMENT]` or `NAME[:ARGUMENT]` (see `training.recipe`); the argument is handed
      to `get_config` as a string.
    overrides: (key path, text) pairs, later ones win.

  Raises:
    UserError: no such file, no `get_config`, or the problems of all overrides together.
  """
  return grid(schema, spec, overrides, several=False)[0][1]


def sweep(schema: type[T], spec: str, overrides: Overrides = ()) -> list[T]:
  """The run configs of `grid`."""
  return [config for _, config in grid(schema, spec, overrides)]


def grid(
    schema: type[T], spec: str, overrides: Overrides = (), *, several: bool = True
) -> list[tuple[list[tuple[str, str]], T]]:
  """All run configs that overrides with comma lists span: `a=1,2 b=x,y` gives four.

  The last override varies fastest. With `several=False` a comma list is refused.

  Returns:
    Per run: (key path, text) of the overrides that vary, and its config.

  Raises:
    UserError: as `load`.
  """
  path, argument = find(spec)
  spec = path if argument is None else f'{path}:{argument}'
  template = _complete(schema, evaluate(spec))
  overrides = [(key_now(key), text) for key, text in overrides]
  problems: list[str] = []
  choices: list[list[tuple[str, str]]] = []
  for key, text in overrides:
    if not _known(template, key):
      hint = nearest(key, _paths(template))
      problems.append(f'unknown key config.{key} (nearest known: config.{hint})')
      continue
    parts = _split_list(template, key, text, several)
    if len(parts) > 1 and not several:
      problems.append(f'config.{key}={text}: a list of values spans several runs, '
                      f'this command makes one; give one value')
      continue
    try:
      for part in parts:
        _parse(template, key, part, schema)
    except UserError as error:
      problems.append(str(error))
    choices.append([(key, part) for part in parts])
  raise_all(spec, problems)
  varies = {parts[0][0] for parts in choices if len(parts) > 1}
  return [([pair for pair in chosen if pair[0] in varies], _resolve(schema, spec, chosen))
          for chosen in itertools.product(*choices)]


def _resolve(schema: type[T], spec: str, overrides: Iterable[tuple[str, str]]) -> T:
  overrides = list(overrides)
  config = evaluate(spec)
  # Keys of the file first: other values of the file may be computed from them.
  for key, text in overrides:
    if _known(config, key):
      _assign(config, key, _parse(config, key, text, schema))
  if not all(_known(config, key) for key, _ in overrides):
    config = _complete(schema, config)
    for key, text in overrides:
      _assign(config, key, _parse(config, key, text, schema))
  return from_dict(schema, config, path='config', title=spec)


def _complete(schema: type, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The config with all defaults filled in; unchanged when it is not valid by itself (yet)."""
  try:
    return ml_collections.ConfigDict(to_dict(from_dict(schema, config)))
  except UserError:
    return config


def _parent(config: ml_collections.ConfigDict, key: str) -> tuple[Any, str]:
  *groups, name = key.split('.')
  for group in groups:
    config = config[group]
  return config, name


def _known(config: ml_collections.ConfigDict, key: str) -> bool:
  for part in key.split('.'):
    if not isinstance(config, ml_collections.ConfigDict) or part not in config:
      return False
    config = config.get(part)
  return True


def _paths(config: ml_collections.ConfigDict, prefix: str = '') -> list[str]:
  """All key paths, groups included."""
  found = []
  for name in config:
    found.append(prefix + name)
    if isinstance(config.get(name), ml_collections.ConfigDict):
      found += _paths(config.get(name), f'{prefix}{name}.')
  return found


def _split_list(
    template: ml_collections.ConfigDict, key: str, text: str, several: bool
) -> list[str]:
  """The values of a comma list. A text value is only split when several runs are asked for."""
  parent, name = _parent(template, key)
  current = parent.get(name)
  if isinstance(current, (list, tuple, dict)) or text[:1] in ('(', '[', '{', '"', "'"):
    return [text]
  if not several and isinstance(current, str):
    return [text]
  return text.split(',')


def _parse(template: ml_collections.ConfigDict, key: str, text: str, schema: type) -> Any:
  """The text of an override as a value of the type that the key has in the config."""
  parent, name = _parent(template, key)
  current, kind = parent.get(name), parent.get_type(name)

  def refuse(expected: str) -> NoReturn:
    raise UserError(f'config.{key}: found {text!r}, expected {expected}')

  hint = _hint(schema, template, key)
  if isinstance(current, ml_collections.ConfigDict):
    if typing.get_origin(hint) is dict:
      try:
        value = ast.literal_eval(text)
      except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
      return value if isinstance(value, dict) else refuse("a mapping, such as {'key': (0, 8)}")
    if str in typing.get_args(hint):
      return text  # its short form
    refuse(f'one of its keys to be set ({", ".join(f"{key}.{k}" for k in list(current)[:5])})')
  if text.lower() in ('none', 'null') and (
      kind is not str or type(None) in typing.get_args(hint)):
    return None  # where none is not allowed, the schema refuses it
  words = [word for part in typing.get_args(hint) if typing.get_origin(part) is typing.Literal
           for word in typing.get_args(part)]
  if text in words:  # beside numbers: looks are a number or 'all'
    return text
  if kind is bool:
    if text.lower() not in ('true', 'false', '1', '0'):
      refuse('true or false')
    return text.lower() in ('true', '1')
  if kind is str and not (words and int in typing.get_args(hint) and text.isdigit()):
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in '"\'' else text
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    value = text
  if kind is type(None):
    return value  # the schema knows the type
  if kind is str:
    return value
  if kind is float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      refuse('a number')
    try:
      return float(value)
    except OverflowError:
      refuse('a smaller number')
  if kind is int:
    if isinstance(value, float) and value.is_integer() and 'e' in text.lower():
      return int(value)  # 1e4 steps
    if isinstance(value, bool) or not isinstance(value, int):
      refuse(' or '.join(['an integer', *map(repr, words)]))
    return value
  if kind in (list, tuple):
    if not isinstance(value, (list, tuple)):
      refuse('a list such as (1,2)')
    return kind(value)
  return value


def _hint(schema: type, config: ml_collections.ConfigDict, key: str) -> Any:
  """The type that the schema gives a key; None where that cannot be told."""
  *groups, name = key.split('.')
  try:
    for group in groups:
      hint = field_types(schema, config).get(group)
      classes = [c for c in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(c)]
      if len(classes) != 1:
        return None
      schema, config = classes[0], config[group]
    return field_types(schema, config).get(name)
  except UserError:  # of the config itself, which says so when it is built
    return None


def _assign(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
  parent, name = _parent(config, key)
  with parent.ignore_type():
    parent[name] = value
