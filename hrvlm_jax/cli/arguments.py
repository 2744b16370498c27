"""Command-line arguments and run configs: `--config FILE.py[:arg]` and `--config.a.b=value`.

Overrides are parsed here and not by a flag library because mistakes must be one sentence: the key
path, what was found, what was expected and the nearest known key; and because values keep the
type that the config file gave them.
"""

import argparse
import ast
from collections.abc import Sequence
import importlib.util
import itertools
import os
import sys
from typing import Any, NoReturn

import ml_collections

from hrvlm_jax.core.errors import UserError, nearest, raise_all

_PREFIX = '--config.'


class Parser(argparse.ArgumentParser):
  """An argparse parser whose mistakes are `UserError`s and which never guesses abbreviations.

  With `config=True` it also takes `--config FILE.py[:arg]` and `--config.a.b=value`;
  `parse(argv).config` is then the resolved and locked ConfigDict.
  """

  def __init__(self, verb: str, description: str, *, config: bool = False,
               config_required: bool = True):
    super().__init__(prog=f'hrvlm {verb}', description=description, allow_abbrev=False)
    self._takes_config = config
    if config:
      self.add_argument(
          '--config', metavar='FILE.py[:ARG]', required=config_required,
          help='run config: a Python file with get_config(); --config.KEY=VALUE changes a key')

  def parse(self, argv: Sequence[str]) -> argparse.Namespace:
    """Parses `argv`.

    Raises:
      UserError: unknown or missing arguments, or anything wrong with the run config.
    """
    overrides: list[tuple[str, str]] = []
    if self._takes_config:
      argv, overrides = split_overrides(argv)
    arguments = self.parse_args(list(argv))
    if self._takes_config:
      if arguments.config is None and overrides:
        raise UserError(f'--config.{overrides[0][0]} needs a run config; add --config FILE.py')
      if arguments.config is not None:
        arguments.config = load_config(arguments.config, overrides)
    return arguments

  def error(self, message: str) -> NoReturn:
    raise UserError(f'{message}; see {self.prog} --help')


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
  """Separates `--config.KEY=VALUE` and `--config.KEY VALUE` from the other arguments.

  Returns:
    The remaining arguments, and (key path, text) pairs in order.

  Raises:
    UserError: an override without a value.
  """
  rest, overrides = [], []
  arguments = iter(argv)
  for argument in arguments:
    if argument == '--':
      rest += [argument, *arguments]
    elif not argument.startswith(_PREFIX):
      rest.append(argument)
    else:
      key, equals, text = argument.removeprefix(_PREFIX).partition('=')
      if not equals:
        text = next(arguments, None)
        if text is None:
          raise UserError(f'{argument} has no value; write {argument}=VALUE')
      overrides.append((key, text))
  return rest, overrides


def load_config(spec: str, overrides: Sequence[tuple[str, str]] = ()) -> ml_collections.ConfigDict:
  """The resolved run config of one run.

  Args:
    spec: `FILE.py` or `FILE.py:ARG`; ARG is handed to `get_config` as a string.
    overrides: (key path, text) pairs, later ones win.

  Raises:
    UserError: no such file, no `get_config`, or the problems of all overrides together.
  """
  configs = load_sweep(spec, overrides, sweep=False)
  return configs[0]


def load_sweep(
    spec: str, overrides: Sequence[tuple[str, str]] = (), *, sweep: bool = True
) -> list[ml_collections.ConfigDict]:
  """All run configs that overrides with comma lists span: `a=1,2 b=x,y` gives four.

  The last override varies fastest. With `sweep=False` a comma list is refused.

  Raises:
    UserError: as `load_config`.
  """
  problems: list[str] = []
  choices: list[list[tuple[str, Any]]] = []
  template = _evaluate(spec)
  for key, text in overrides:
    choices.append([])
    if not _known(template, key):
      paths = _paths(template)
      problems.append(f'unknown key config.{key} (nearest known: config.{nearest(key, paths)})')
      continue
    parts = _split_list(template, key, text, sweep)
    if len(parts) > 1 and not sweep:
      problems.append(f'config.{key}={text}: a list of values spans several runs, '
                      f'this command makes one; give one value')
      continue
    for part in parts:
      try:
        choices[-1].append((key, _parse(template, key, part)))
      except UserError as error:
        problems.append(str(error))
  raise_all(spec, problems)
  configs = []
  for combination in itertools.product(*choices):
    config = _evaluate(spec)
    for key, value in combination:
      _assign(config, key, value)
    configs.append(config.lock())
  return configs


def _evaluate(spec: str) -> ml_collections.ConfigDict:
  path, colon, argument = spec.partition(':')
  if not os.path.isfile(path):
    raise UserError(f'run config {path}: no such file; expected a Python file with get_config()')
  if not path.endswith('.py'):
    raise UserError(f'run config {path}: expected a Python file (.py) with get_config()')
  found = importlib.util.spec_from_file_location('_hrvlm_run_config', path)
  module = importlib.util.module_from_spec(found)
  # Config files may import their neighbours, as scripts do.
  sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
  try:
    found.loader.exec_module(module)
  except SyntaxError as error:
    raise UserError(f'run config {path}: line {error.lineno}: {error.msg}') from error
  finally:
    sys.path.pop(0)
  if not callable(getattr(module, 'get_config', None)):
    raise UserError(f'run config {path}: has no function get_config()')
  config = module.get_config(argument) if colon else module.get_config()
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f'run config {path}: get_config() returned {type(config).__name__}, '
                    f'expected ml_collections.ConfigDict')
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
    template: ml_collections.ConfigDict, key: str, text: str, sweep: bool
) -> list[str]:
  """The values of a comma list. A text value is only split when a sweep is asked for."""
  parent, name = _parent(template, key)
  current = parent.get(name)
  if isinstance(current, (list, tuple, dict)) or text[:1] in '([{"\'':
    return [text]
  if not sweep and (isinstance(current, str) or parent.get_type(name) is str):
    return [text]
  return text.split(',') if ',' in text else [text]


def _parse(template: ml_collections.ConfigDict, key: str, text: str) -> Any:
  """The text of an override as a value of the type that the config file gave the key."""
  parent, name = _parent(template, key)
  current, kind = parent.get(name), parent.get_type(name)

  def refuse(expected: str) -> NoReturn:
    raise UserError(f'config.{key}: found {text!r}, expected {expected}')

  if isinstance(current, ml_collections.ConfigDict):
    refuse(f'one of its keys to be set ({", ".join(f"{key}.{k}" for k in list(current)[:5])})')
  if text.lower() in ('none', 'null') and (current is None or parent.get_type(name) is type(None)):
    return None
  if kind is bool:
    if text.lower() not in ('true', 'false', '1', '0'):
      refuse('true or false')
    return text.lower() in ('true', '1')
  if kind is str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in '"\'' else text
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  if current is None and kind is type(None):
    return value  # the config file left the type open
  if kind is float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      refuse('a number')
    return float(value)
  if kind is int:
    if isinstance(value, float) and value.is_integer() and 'e' in text.lower():
      return int(value)  # 1e4 steps
    if isinstance(value, bool) or not isinstance(value, int):
      refuse('an integer')
    return value
  if kind in (list, tuple):
    if not isinstance(value, (list, tuple)):
      refuse('a list such as (1,2)')
    return kind(value)
  if not isinstance(value, kind):
    refuse(kind.__name__)
  return value


def _assign(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
  parent, name = _parent(config, key)
  with parent.ignore_type():
    parent[name] = value
