"""Run configs by name: where `--config` looks, and what the files in `configs/` share.

A run config is a Python file with `get_config()`, given as `FILE.py[:ARGUMENT]`, or by the name it
has in the folder `configs/` (`pheye:x2_448,stage1`, `tiny/pheye`). A recipe's argument is a list of
words with commas, read by `words`; a recipe takes its numbers from nowhere but its own file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
import functools
import importlib.util
import os
import pathlib
import re
import sys
import traceback

import ml_collections

from hrvlm_jax.core import installed
from hrvlm_jax.core.errors import UserError, nearest, raise_all

# Names that recipes had before each system had one file: pattern, name now, words, and the words
# that were understood without an argument. Answered until 0.3.
RENAMED = (
  (r'pheye_(x[24]_(?:448|672))_(stage[123])', 'pheye', r'\1,\2', ''),
  (r'llava_hr_(7b|x_13b)_(stage[12])', 'llava_hr', r'\1,\2', ''),
  (r'mc_llava_3b_(full|lora|projector)', 'mc_llava', r'\1', ''),
  (r'ps3_(1_5k|4k)_pretrain', 'ps3', r'\1', ''),
  (r'vila_hd_8b_(1_5k|4k)', 'vila_hd', r'\1', 'sft'),
)
# Keys of a run config that had another name. Answered until 0.3.
RENAMED_KEYS = {'data.lanes': 'data.shards'}


def folder() -> pathlib.Path:
  """`configs/` of the checkout this package runs from, or the copy that the wheel holds."""
  shipped = installed.PACKAGE / 'configs'
  return shipped if shipped.is_dir() else installed.PACKAGE.parent / 'configs'


def names() -> list[str]:
  """The published recipes, by name."""
  return sorted(path.stem for path in folder().glob('*.py'))


def find(spec: str, *, say: Callable[[str], None] | None = None) -> tuple[str, str | None]:
  """The file and the argument of `FILE.py[:ARGUMENT]` or `NAME[:ARGUMENT]`.

  Args:
    say: takes the line about a name that has changed; default: standard error.

  Raises:
    UserError: no such file or name.
  """
  path, colon, argument = spec.partition(':')
  if os.path.isfile(path):
    if not path.endswith('.py'):
      raise UserError(f'run config {path}: expected a Python file (.py) with get_config()')
    return path, argument if colon else None
  # As the pages write it; the recipes of a wheel do not lie in the current folder.
  inside = folder() / pathlib.PurePath(path).relative_to('configs') if (
    pathlib.PurePath(path).parts[:1] == ('configs',)) else None
  if inside is not None and inside.suffix == '.py' and inside.is_file():
    return str(inside), argument if colon else None
  head, stem = os.path.split(path.removesuffix('.py'))
  for pattern, name, chosen, default in RENAMED:
    if match := re.fullmatch(pattern, stem):
      found = pathlib.Path(head, f'{name}.py') if head else folder() / f'{name}.py'
      argument = ','.join(filter(None, (match.expand(chosen), argument or default)))
      if found.is_file():
        (say or _warn)(f'{path} is now {found}:{argument}; used that')
        return str(found), argument
  named = folder() / f'{path}.py'
  if not path.endswith('.py') and named.is_file():
    return str(named), argument if colon else None
  hint = nearest(stem, names())
  hint = f', or a name in {folder()} (nearest: {hint})' if hint else ''
  raise UserError(f'run config {path}: no such file; expected a Python file with get_config()'
                  f'{hint}')


def evaluate(spec: str) -> ml_collections.ConfigDict:
  """What `get_config` of a file or name returns; keys left out are not yet filled in.

  Raises:
    UserError: no such file or name, no `get_config`, or what it refused.
  """
  path, argument = find(spec)
  found = importlib.util.spec_from_file_location('_hrvlm_run_config', path)
  module = importlib.util.module_from_spec(found)
  # Config files may import their neighbours, as scripts do.
  sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
  try:
    found.loader.exec_module(module)
  except SyntaxError as error:
    raise UserError(f'run config {path}: line {error.lineno}: {error.msg}') from error
  except Exception as error:  # the file is code: anything may come out of it
    raise UserError(f'run config {path}: {_said(error, path)}') from error
  finally:
    sys.path.pop(0)
  if not callable(getattr(module, 'get_config', None)):
    raise UserError(f'run config {path}: has no function get_config()')
  try:
    config = module.get_config() if argument is None else module.get_config(argument)
  except UserError as error:
    raise UserError(f'run config {spec}: {error}') from error
  except Exception as error:
    raise UserError(f'run config {spec}: {_said(error, path)}') from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f'run config {path}: get_config() returned {type(config).__name__}, '
                    f'expected ml_collections.ConfigDict')
  for old in RENAMED_KEYS:
    group, _, name = old.rpartition('.')
    if isinstance(config.get(group), ml_collections.ConfigDict) and name in config[group]:
      with config.unlocked():
        config[group][key_now(old).rpartition('.')[2]] = config[group][name]
        del config[group][name]
  return config


def _said(error: Exception, path: str) -> str:
  """What went wrong in a config file, with the last of its lines that was at work."""
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
           if os.path.abspath(frame.filename) == os.path.abspath(path)]
  where = f'line {lines[-1]}: ' if lines else ''
  return f'{where}{type(error).__name__}: {" ".join(str(error).split())[:300]}'


@functools.cache  # a line is said once
def key_now(key: str) -> str:
  """The key path by its name of today; a line on standard error where that is another one."""
  if key in RENAMED_KEYS:
    _warn(f'config.{key} is now config.{RENAMED_KEYS[key]}; used that')
  return RENAMED_KEYS.get(key, key)


def words(argument: str, *choices: Collection[str]) -> tuple[str, ...]:
  """The words of a recipe's argument, in any order: one of each choice, its first by default.

  Example: `words('stage2', ('7b', '13b'), ('stage1', 'stage2'))` is `('7b', 'stage2')`.

  Raises:
    UserError: a word that no choice has, or two words of one choice.
  """
  given = [word for word in argument.split(',') if word]
  problems, chosen = [], []
  for word in given:
    if not any(word in choice for choice in choices):
      known = '; '.join(' or '.join(choice) for choice in choices)
      hint = nearest(word, [known for choice in choices for known in choice])
      problems.append(f'unknown word {word!r} (nearest: {hint}); known: {known}')
  for choice in choices:
    found = [word for word in given if word in choice]
    if len(found) > 1:
      problems.append(f'give one of {", ".join(found)}')
    chosen.append(found[0] if found else next(iter(choice)))
  raise_all(f'argument {argument!r}', problems)
  return tuple(chosen)


def _warn(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
