"""LLaVA-1.6's layout: names of the tensors and config.json, both directions."""

from __future__ import annotations

import ast
from collections.abc import Mapping
import dataclasses
from typing import Any

from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.systems.baselines import layout
from hrvlm_jax.systems.baselines.anyres.config import RELEASED
from hrvlm_jax.systems.contract import ModelConfig

table = layout.table


def from_release(values: Mapping[str, Any]) -> ModelConfig | None:
  """config.json of a LLaVA-1.6 folder -> ModelConfig; None for other layouts.

  Raises:
    UserError: settings this system does not have.
  """
  if layout.written_by_us(values):
    return layout.own_config(values, 'anyres')
  if values.get('image_aspect_ratio') != 'anyres' or values.get('model_type') not in (
      'llava', 'llava_llama'):
    return None
  merge = values.get('mm_patch_merge_type', 'flat')
  projector = values.get('mm_projector_type', 'linear')
  problems = []
  if merge not in ('flat', 'spatial', 'spatial_unpad'):
    problems.append(f'mm_patch_merge_type: found {merge!r}, expected flat, spatial or '
                    'spatial_unpad')
  pinpoints = values.get('image_grid_pinpoints')
  try:
    pairs = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
    pairs = tuple((int(w), int(h)) for w, h in pairs)
  except (TypeError, ValueError, SyntaxError):
    problems.append(f'image_grid_pinpoints: found {pinpoints!r}, expected pairs (width, height)')
    pairs = ()
  raise_all('config.json of AnyRes', problems)
  text = layout.text_config(values)
  try:
    encoder = dataclasses.replace(
      RELEASED['llava_1_6_vicuna_7b'].encoder, layer=values.get('mm_vision_select_layer', -2),
      pinpoints=pairs, merge=merge, projector=projector, width=text.width)
  except ValueError as error:
    raise UserError(f'config.json of AnyRes: {error}') from error
  return ModelConfig(system='anyres', encoder=encoder, text=text, chat='vicuna_v1')


def to_release(config: ModelConfig) -> dict[str, Any]:
  """config.json and processor of the released layout."""
  encoder = config.encoder
  return layout.release(config, {
    'image_aspect_ratio': 'anyres', 'mm_patch_merge_type': encoder.merge,
    'image_grid_pinpoints': [list(pair) for pair in encoder.pinpoints]})
