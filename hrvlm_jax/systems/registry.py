"""All systems by name; a system is imported when it is asked for.

A system of a folder of your own needs one line: `register('fovea', 'fovea')` in a config file or a
test, or `HRVLM_SYSTEMS=fovea=fovea` in the environment, which commands and their workers see, too.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from hrvlm_jax.core.errors import UserError, unknown

if TYPE_CHECKING:  # systems ask for each other here, so this module imports none
  from hrvlm_jax.systems.contract import System

_MODULES: dict[str, str | System] = {
  'anyres': 'hrvlm_jax.systems.baselines.anyres',
  'llava_hr': 'hrvlm_jax.systems.llava_hr',
  'mc_llava': 'hrvlm_jax.systems.mc_llava',
  'pheye': 'hrvlm_jax.systems.pheye',
  'ps3': 'hrvlm_jax.systems.ps3',
  'reduced': 'hrvlm_jax.systems.baselines.reduced',
  's2': 'hrvlm_jax.systems.baselines.s2',
  's2_dynamic': 'hrvlm_jax.systems.baselines.s2_dynamic',
  'single_view': 'hrvlm_jax.systems.baselines.single_view',
  'tiling': 'hrvlm_jax.systems.baselines.tiling',
  'vila_hd': 'hrvlm_jax.systems.vila_hd',
}
VARIABLE = 'HRVLM_SYSTEMS'


def register(name: str, system: str | System) -> None:
  """Adds a system, or replaces one.

  Args:
    system: the object, or the name of a module that holds it as `SYSTEM`, imported when needed.
  """
  _MODULES[name] = system


def names() -> list[str]:
  """Names of all systems."""
  return sorted(_known())


def get(name: str) -> System:
  """The system of that name.

  Raises:
    UserError: unknown name, a module that cannot be imported or holds no system.
  """
  known = _known()
  if name not in known:
    raise UserError(unknown(name, known, what='system') + f'; one of your own: {VARIABLE}={name}='
                    'MODULE in the environment, or hrvlm_jax.systems.registry.register')
  found = known[name]
  if isinstance(found, str):
    try:
      found = importlib.import_module(found).SYSTEM
    except (ModuleNotFoundError, AttributeError) as error:
      if known[name].startswith('hrvlm_jax.'):
        raise
      raise UserError(f'system {name!r}: found {error}; expected an importable module '
                      f'{known[name]!r} with an object SYSTEM') from error
  if not hasattr(found, 'complete'):
    raise UserError(f'system {name!r}: SYSTEM is {found!r}, expected an object of a subclass of '
                    'hrvlm_jax.systems.contract.System')
  return found.complete(name)


def _known() -> dict[str, str | System]:
  own = {}
  for entry in filter(None, os.environ.get(VARIABLE, '').split(',')):
    name, equals, module = entry.partition('=')
    if not (name and equals and module):
      raise UserError(f'{VARIABLE}: found {entry!r}, expected name=package.module')
    own[name] = module
  return _MODULES | own
