"""Whether the layout of a system's original holds a model, and the library's own where it does not.

An original's config.json describes what its authors built: one language model, one projector, one
chat format. A combination of ours that it would describe wrongly is written in the house's layout
(`systems.contract.FORMAT`): tensors under our own paths and the whole `ModelConfig` in config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
from typing import Any

from hrvlm_jax.checkpoint.rows import entries
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import FORMAT, ModelConfig, System


def lost(config: ModelConfig, abstract: Mapping[str, Any] | None = None) -> list[str]:
  """The settings that the original's layout would not bring back, as `key = value`.

  Args:
    abstract: the model's parameters; with them, tensors that the layout has no names for too.
  """
  system = registry.get(config.system)
  try:
    values = json.loads(json.dumps(system.to_release(config)['config.json']))
    back = system.from_release(values)
  except (AttributeError, UserError, ValueError) as error:  # it knows no such model
    return [f'fusion.kind = {config.fusion.kind!r}' if isinstance(error, AttributeError)
            else str(error)]
  ours = _flat(to_dict(config))
  theirs = {} if back is None else _flat(to_dict(back))
  fields = [f'{key} = {value!r}' for key, value in ours.items()
            if key not in theirs or theirs[key] != value]
  return fields or ([] if abstract is None else _nameless(config, abstract))


def _nameless(config: ModelConfig, abstract: Mapping[str, Any]) -> list[str]:
  """The parts of a model that the original's weight table has no names for, or other ones."""
  names = registry.get(config.system).table(config)
  try:
    list(entries(names, abstract))
  except UserError as error:
    known = {path for row in names.rows for path in row.our_paths}
    parts = sorted({path.partition('/')[0] for path in known ^ set(paths.flatten(abstract))})
    return [f'fusion.kind = {config.fusion.kind!r}' if part == 'fusion' else
            f'the tensors of {part}' for part in parts] or [str(error)]
  return []


def _flat(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  out: dict[str, Any] = {}
  for key, value in values.items():
    if isinstance(value, Mapping) and value:
      out |= _flat(value, f'{prefix}{key}.')
    else:
      out[prefix + key] = value
  return out


def is_own(values: Mapping[str, Any]) -> bool:
  """Whether a config.json is of the house's own layout."""
  return (str(values.get('model_type', '')).startswith('hrvlm_') and 'format' in values
          and 'layout' not in values)


def recognise(values: Mapping[str, Any]) -> ModelConfig | None:
  """The model of a config.json of the house's own layout; None for others.

  Raises:
    UserError: a system that is not here, another version, keys that are no model of ours.
  """
  if not is_own(values):
    return None
  return System.from_release(registry.get(values['model_type'].removeprefix('hrvlm_')), values)


def table(config: ModelConfig, *, own: bool):
  """The weight table of the whole model in the original's layout, or in the house's own."""
  system = registry.get(config.system)
  return System.table(system, config) if own else system.table(config)


def files(config: ModelConfig, *, own: bool) -> dict[str, Any]:
  """{file name: JSON value} beside the tensors."""
  system = registry.get(config.system)
  return System.to_release(system, config) if own else system.to_release(config)


def said(config: ModelConfig, fields: list[str]) -> str:
  """One line on why the house's own layout is written."""
  shown = ', '.join(fields[:4]) + (f' and {len(fields) - 4} more' if len(fields) > 4 else '')
  return (f"the original's layout of {config.system} cannot hold {shown}: written in the layout "
          f'{FORMAT}, which hrvlm convert and hrvlm_jax.load read; for PyTorch: --for transformers')
