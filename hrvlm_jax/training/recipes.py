"""From a system's recipe to a run config: what all files in `configs/` share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_collections

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.systems.contract import ModelConfig


def config(model: ModelConfig, recipe: Mapping[str, Any], *, seed: int = 0,
           **training: Any) -> ml_collections.ConfigDict:
  """The run config of a model and the `data` and `training` sections of its recipe.

  Args:
    training: settings of `training` that win.
  """
  values = ml_collections.ConfigDict()
  values.seed = seed
  values.model = to_dict(model)
  values.data = dict(recipe['data'])
  values.training = {**recipe['training'], **training}
  return values
