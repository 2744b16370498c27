"""Names of the tensors in LLaVA's manner, and config.json, both directions.

NVILA's own release keeps its parts in three folders (see `vila_hd`); this layout is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hrvlm_jax.systems.baselines import layout
from hrvlm_jax.systems.contract import ModelConfig

table = layout.table


def from_release(values: Mapping[str, Any]) -> ModelConfig | None:
  """config.json that `to_release` wrote -> ModelConfig; None for anything else."""
  return layout.own_config(values, 's2_dynamic')


def to_release(config: ModelConfig) -> dict[str, Any]:
  """config.json and processor."""
  encoder = config.encoder
  return layout.release(config, {
    'dynamic_s2': True, 's2_scales': ','.join(map(str, encoder.scales)),
    's2_max_split_size': encoder.scales[0], 's2_resize_output_to_scale_idx': encoder.output,
    'image_aspect_ratio': 'dynamic_s2', 'max_tiles': encoder.max_tiles})
