"""Names of the tensors: the inner system's, and our own for a resampler."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from hrvlm_jax.checkpoint.rows import Row, Table, identity, joined, linear, norm
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.baselines import layout
from hrvlm_jax.systems.baselines.reduced.config import Perceiver, ReducedConfig, SingleLayer
from hrvlm_jax.systems.contract import ModelConfig

_OURS, _THEIRS = 'vision/resampler', 'model.resampler'


def inner_model(config: ModelConfig) -> ModelConfig:
  """The model without the step (its projector keeps this model's input width)."""
  encoder: ReducedConfig = config.encoder
  return dataclasses.replace(config, system=encoder.inner, encoder=encoder.encoder)


def table(config: ModelConfig) -> Table:
  """Rows of the whole model."""
  inner = registry.get(config.encoder.inner).table(inner_model(config))
  move = lambda path: path.replace('vision/', 'vision/inner/', 1) if (
    path.startswith('vision/')) else path
  rows = tuple(dataclasses.replace(row, ours=(
    move(row.ours) if isinstance(row.ours, str) else tuple(map(move, row.ours))))
    for row in inner.rows)
  moved = dataclasses.replace(
    inner, rows=rows, unused={move(path): why for path, why in inner.unused.items()})
  return joined(moved, Table(tuple(_resampler_rows(config.encoder))))


def backbones(encoder: ReducedConfig) -> dict[str, Any]:
  """The inner system's parts that have releases of their own."""
  inner = registry.get(encoder.inner).backbones(encoder.encoder)
  return {path.replace('vision/', 'vision/inner/', 1): part for path, part in inner.items()}


def _resampler_rows(encoder: ReducedConfig) -> list[Row]:
  if isinstance(encoder.step, Perceiver):
    layer, theirs = f'{_OURS}/layers', f'{_THEIRS}.layers.{{i}}'
    return [
      Row(f'{_OURS}/latents', f'{_THEIRS}.latents', identity),
      Row(f'{_OURS}/time', f'{_THEIRS}.frame_embs', identity),
      *norm(f'{_OURS}/norm', f'{_THEIRS}.norm'),
      *(row for name in ('norm_media', 'norm_latents', 'norm_ff')
        for row in norm(f'{layer}/{name}', f'{theirs}.{name}')),
      *(row for name in ('q', 'k', 'v', 'out', 'fc1', 'fc2')
        for row in linear(f'{layer}/{name}', f'{theirs}.{name}', bias=False))]
  if isinstance(encoder.step, SingleLayer):
    rows = [Row(f'{_OURS}/query', f'{_THEIRS}.query', identity),
            Row(f'{_OURS}/proj', f'{_THEIRS}.proj', identity),
            *(row for ours, name in (('q', 'q'), ('kv', 'kv'), ('post', 'post'))
              for row in norm(f'{_OURS}/norm_{ours}', f'{_THEIRS}.ln_{name}')),
            *(row for name in ('q', 'k', 'v') for row in linear(
              f'{_OURS}/{name}', f'{_THEIRS}.attn.{name}_proj')),
            *linear(f'{_OURS}/out', f'{_THEIRS}.attn.out_proj')]
    if encoder.inner_width != encoder.width:
      rows += linear(f'{_OURS}/kv_proj', f'{_THEIRS}.kv_proj', bias=False)
    return rows
  return []


def from_release(values: Mapping[str, Any]) -> ModelConfig | None:
  """config.json that `to_release` wrote -> ModelConfig; None for anything else."""
  return layout.own_config(values, 'reduced')


def to_release(config: ModelConfig) -> dict[str, Any]:
  """The inner system's files; config.json names this system and holds the whole model."""
  files = registry.get(config.encoder.inner).to_release(inner_model(config))
  values = files['config.json'] | {'hrvlm': {'system': 'reduced', 'model': to_dict(config)},
                                   'model_type': 'hrvlm_reduced'}
  return files | {'config.json': values}
