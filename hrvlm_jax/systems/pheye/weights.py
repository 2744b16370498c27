"""Pheye's released layout: tensor names, aliases and config.json, both directions.

The reference wraps the tower with peft and holds every decoder layer and every cross-attention
block under two names.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from hrvlm_jax.checkpoint.formats import GENERIC, same, used
from hrvlm_jax.checkpoint.rows import (
  Row,
  Table,
  conv1x1,
  conv_kernel,
  identity,
  joined,
  linear,
  norm,
  prefixed,
  split_rows,
  transpose,
)
from hrvlm_jax.checkpoint.settings import Keys, Reader
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.fusion import CrossAttentionFusion
from hrvlm_jax.systems.pheye.config import PheyeConfig, model
from hrvlm_jax.vision import vit
from hrvlm_jax.vision.vit import CLIP_H_224, ViTConfig

# The names that stand in config.json, and what they are. The first of each kind is written.
ENCODERS = {'apple/DFN5B-CLIP-ViT-H-14': CLIP_H_224}
DECODERS = {'miguelcarv/phi-1_5-slimorca': language.phi(), 'microsoft/phi-1_5': language.phi()}
TOKENIZER = 'miguelcarv/phi-1_5-slimorca'
CUSTOM = 'hrvlm'  # stands for sizes that are no released ones; they are in the key of this name

_ADAPTED = ('blocks/attn/', 'blocks/mlp/', 'patch_embed/')
_PEFT = 'vision_model.base_model.model.'


def tower_table(config: PheyeConfig) -> Table:
  """Rows of the ViT with its LoRA sets; names as in the wrapped `CLIPVisionModel`."""
  base = vit.clip_table(config.vision)
  rows = []
  for row in base.rows:
    if not row.ours.startswith(_ADAPTED):
      rows.append(row)
      continue
    module, leaf = row.theirs.rsplit('.', 1)
    rows.append(dataclasses.replace(row, theirs=f'{module}.base_layer.{leaf}'))
    ours, name = row.ours.rsplit('/', 1)
    if name != 'kernel':
      continue
    down, up = (conv_kernel, conv1x1) if row.op is conv_kernel else (transpose, transpose)
    for spec in config.tower.lora:
      a, b = spec.leaves
      rows += [Row(f'{ours}/{a}', f'{module}.lora_A.{spec.name}.weight', down),
               Row(f'{ours}/{b}', f'{module}.lora_B.{spec.name}.weight', up)]
  return dataclasses.replace(base, rows=tuple(rows))


def vision_table(config: PheyeConfig) -> Table:
  """Rows of the encoder, `vision_encoder.` of the whole."""
  own = Table((
    *norm('norm1', 'norm_lvl_1'), *norm('norm2', 'norm_lvl_2'), *norm('norm3', 'norm_lvl_3'),
    Row('sub_image/embedding', 'connector.embedding.weight', identity),
  ), {}, {'norm3/*': 'dead in the original, kept for export'})
  return joined(prefixed(tower_table(config), ours='tower/', theirs=_PEFT), own)


def block_table() -> Table:
  """Rows of one cross-attention block."""
  kv = split_rows(2, transpose)
  return Table((
    *norm('norm1', 'attn.norm'), *linear('attn/q', 'attn.to_q'),
    Row(('attn/k/kernel', 'attn/v/kernel'), 'attn.to_kv.weight', kv),
    Row(('attn/k/bias', 'attn/v/bias'), 'attn.to_kv.bias', split_rows(2)),
    *linear('attn/out', 'attn.to_out'),
    *norm('norm2', 'ff.norm'), *linear('mlp/fc1', 'ff.fc1'), *linear('mlp/fc2', 'ff.fc2'),
  ))


def table(config: ModelConfig) -> Table:
  """Rows of the whole model."""
  vision = prefixed(vision_table(config.encoder), ours='vision/', theirs='vision_encoder.')
  text = language.table(config.text)
  layers = 'model.layers.{i}.'
  rows = tuple(
    dataclasses.replace(row, theirs=(
      row.theirs.replace(layers, f'{layers}decoder_layer.'),
      row.theirs.replace(layers, 'old_decoder_blocks.{i}.'))) if row.layered else row
    for row in text.rows)
  text = prefixed(dataclasses.replace(text, rows=rows), ours='language/', theirs='lang_encoder.')
  at = config.fusion.layers(config.text.depth)
  blocks = Table(tuple(
    dataclasses.replace(row, indices=at, theirs=(
      f'{layers}cross_attn_layer.{row.theirs}', f'cross_attn_layers.{{i}}.{row.theirs}'))
    for row in block_table().rows))
  return joined(vision, text, prefixed(blocks, ours='fusion/blocks/', theirs='lang_encoder.'))


def vision_from_hf(values: Mapping[str, Any]) -> ViTConfig:
  """Hugging Face's settings of a CLIP vision tower; what is absent takes ViT-H/14's value."""
  base = CLIP_H_224
  return dataclasses.replace(
    base, image_size=values.get('image_size', base.image_size),
    patch_size=values.get('patch_size', base.patch_size),
    width=values.get('hidden_size', base.width),
    depth=values.get('num_hidden_layers', base.depth),
    heads=values.get('num_attention_heads', base.heads),
    mlp_width=values.get('intermediate_size', base.mlp_width),
    activation=values.get('hidden_act', base.activation),
    norm_eps=values.get('layer_norm_eps', base.norm_eps),
    channels=values.get('num_channels', base.channels))


def from_release(values: Mapping[str, Any]) -> ModelConfig | None:
  """config.json of a released folder -> ModelConfig; None when it is not Pheye's.

  The released file names its encoder and decoder and holds no sizes. Ours adds the key `hrvlm`
  with everything the original's file cannot say; it then decides.

  Raises:
    UserError: an encoder or decoder of unknown size, unequal dtypes.
  """
  if not {'encoder', 'decoder', 'cross_interval', 'level'} <= set(values):
    return None
  read = Reader(values, where='Pheye config.json')
  problems = read.problems
  dtypes = {str(values[k]) for k in ('encoder_dtype', 'decoder_dtype', 'other_params_dtype')
            if k in values}
  sizes = {key: read.integer(key, least, least=least, most=1000) for key, least in (
    ('level', 1), ('cross_interval', 1), ('from_layer', 0), ('reduce', 1))}
  if len(dtypes) > 1:
    problems.append(f'the three dtypes must be equal, found {sorted(dtypes)}')
  ours = values.get(CUSTOM)
  if ours is None:
    for key, known in (('encoder', ENCODERS), ('decoder', DECODERS)):
      if not isinstance(values[key], str) or values[key] not in known:
        problems.append(f'{key} {values[key]!r} is of unknown size; known: {sorted(known)}')
  first = {} if read.values.get('first_level', True) else {'first': None}
  read.done()
  if ours is None:
    encoder = read.build(lambda: PheyeConfig(
      vision=ENCODERS[values['encoder']], level=sizes['level'], **first))
    text = DECODERS[values['decoder']]
  else:
    ours = ours if isinstance(ours, Mapping) else {}
    encoder = from_dict(PheyeConfig, ours.get('encoder'), path=f'{CUSTOM}.encoder',
                        title=read.where)
    text = from_dict(language.DecoderConfig, ours.get('text'), path=f'{CUSTOM}.text',
                     title=read.where)
    for key, value in (('level', encoder.level), ('first_level', encoder.first is not None)):
      if values.get(key, value) != value:
        raise UserError(f'Pheye config.json: {key} is {values[key]!r}, {CUSTOM}.encoder says '
                        f'{value!r}')
  return read.build(lambda: model(encoder, text, interval=sizes['cross_interval'],
                                  from_layer=sizes['from_layer'], reduce=sizes['reduce']))


# Keys of config.json; see `checkpoint.settings`.
KEYS: Keys = {
  **GENERIC,
  **used('encoder', 'decoder', 'first_level', 'level', 'cross_interval', 'from_layer', 'reduce',
         'encoder_dtype', 'decoder_dtype', 'other_params_dtype', CUSTOM),
  **same('the tokenizer comes with the checkpoint', 'tokenizer'),
}


def to_release(config: ModelConfig) -> dict[str, Any]:
  """config.json of the original, with our settings under `hrvlm` (which its code ignores)."""
  fusion: CrossAttentionFusion = config.fusion
  encoder: PheyeConfig = config.encoder
  name = lambda known, value: next((n for n, v in known.items() if v == value), CUSTOM)
  return {'config.json': {
    'encoder': name(ENCODERS, encoder.vision), 'decoder': name(DECODERS, config.text),
    'tokenizer': TOKENIZER, 'first_level': encoder.first is not None, 'level': encoder.level,
    'cross_interval': fusion.interval, 'from_layer': fusion.from_layer, 'reduce': fusion.reduce,
    'encoder_dtype': 'torch.float32', 'decoder_dtype': 'torch.float32',
    'other_params_dtype': 'torch.float32',
    CUSTOM: {'encoder': to_dict(encoder), 'text': to_dict(config.text)},
  }}
