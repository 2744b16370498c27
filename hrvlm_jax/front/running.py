"""Training from Python: a config in any of its forms, and keys of it that are replaced."""

from __future__ import annotations

from collections.abc import Mapping
import os
from typing import Any

from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.training import loop, run_config
from hrvlm_jax.training.config import RunConfig


def train(config: Any, workdir: str | os.PathLike, overrides: Mapping[str, Any], *,
          progress: bool) -> Any:
  """See `hrvlm_jax.api.train`."""
  if isinstance(config, (str, os.PathLike)):
    texts = [(key, value if isinstance(value, str) else repr(value))
             for key, value in overrides.items()]
    config = run_config.load(RunConfig, os.fspath(config), texts)
  elif overrides or not isinstance(config, RunConfig):
    values = to_dict(config) if isinstance(config, RunConfig) else config
    config = from_dict(RunConfig, replaced(values, overrides), path='config')
  return loop.train(config, workdir, progress=progress)


def replaced(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
  """Nested values with some keys (`a.b`) replaced; unknown ones are left to the schema."""
  out = dict(values)
  for key, value in overrides.items():
    group, dot, rest = key.partition('.')
    out[group] = replaced(out.get(group) or {}, {rest: value}) if dot else value
  return out
