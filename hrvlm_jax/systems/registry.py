"""All systems by name; a system is imported when it is asked for."""

from __future__ import annotations

import importlib

from hrvlm_jax.core.errors import UserError, unknown
from hrvlm_jax.systems.contract import System

_MODULES = {
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


def names() -> list[str]:
  """Names of all systems."""
  return sorted(_MODULES)


def get(name: str) -> System:
  """The system of that name.

  Raises:
    UserError: unknown name.
  """
  if name not in _MODULES:
    raise UserError(unknown(name, _MODULES, what='system'))
  return importlib.import_module(_MODULES[name]).SYSTEM
