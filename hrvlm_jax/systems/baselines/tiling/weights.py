"""Names of the tensors in LLaVA's manner, and config.json, both directions.

NVILA releases its three parts in folders of their own and feeds every tile as an `<image>` of its
own; no released model has exactly this form, so the layout here is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hrvlm_jax.systems.baselines import layout
from hrvlm_jax.systems.contract import ModelConfig

table = layout.table


def from_release(values: Mapping[str, Any]) -> ModelConfig | None:
  """config.json that `to_release` wrote -> ModelConfig; None for anything else."""
  return layout.own_config(values, 'tiling')


def to_release(config: ModelConfig) -> dict[str, Any]:
  """config.json and processor."""
  encoder = config.encoder
  return layout.release(config, {
    'image_aspect_ratio': 'dynamic', 'min_tiles': encoder.min_tiles,
    'max_tiles': encoder.max_tiles})
