"""LLaVA's layout with S2 switched on: names of the tensors and config.json, both directions."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.systems.baselines import layout
from hrvlm_jax.systems.baselines.s2.config import RELEASED
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig

table = layout.table


def from_release(values: Mapping[str, Any]) -> ModelConfig | None:
  """config.json of a LLaVA folder with `s2` -> ModelConfig; None for other layouts.

  Raises:
    UserError: scales that are no numbers or do not fit the tower.
  """
  if layout.written_by_us(values):
    return layout.own_config(values, 's2')
  if not values.get('s2') or values.get('model_type') not in ('llava', 'llava_llama'):
    return None
  text = layout.text_config(values)
  scales = values.get('s2_scales', '336,672,1008')
  try:
    # The original sorts its scales and splits by the smallest.
    sizes = tuple(sorted(int(part) for part in str(scales).split(',')))
    encoder = dataclasses.replace(
      RELEASED['llava_1_5_7b_s2'].encoder, sizes=sizes,
      layer=values.get('mm_vision_select_layer', -2),
      fit='pad' if values.get('image_aspect_ratio') == 'pad' else 'crop')
  except ValueError as error:
    raise UserError(f'config.json with s2_scales {scales!r}: {error}') from error
  return ModelConfig(system='s2', encoder=encoder, text=text, chat='vicuna_v1',
                     projector=ProjectorConfig(n_in=encoder.channels, n_out=text.width))


def to_release(config: ModelConfig) -> dict[str, Any]:
  """config.json and processor of the released layout."""
  encoder = config.encoder
  return layout.release(config, {
    's2': True, 's2_scales': ','.join(map(str, encoder.sizes)), 'mm_hidden_size': encoder.channels,
    'image_aspect_ratio': 'pad' if encoder.fit == 'pad' else 'square'})
