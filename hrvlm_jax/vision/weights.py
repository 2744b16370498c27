"""Name tables of vision towers in the Hugging Face layouts, both directions."""

from __future__ import annotations

from hrvlm_jax.checkpoint.rows import (
  Row,
  Table,
  conv_kernel,
  identity,
  linear,
  norm,
  split_rows,
  transpose,
)
from hrvlm_jax.vision.vit import ViTConfig

POOL_UNUSED = 'kept for export; the model reads the last block, before post_norm and pool'


def siglip(config: ViTConfig) -> Table:
  """Rows of `SiglipVisionModel`'s `vision_model.`."""
  layer = 'encoder.layers.{i}'
  rows = [
    Row('patch_embed/kernel', 'embeddings.patch_embedding.weight', conv_kernel),
    Row('patch_embed/bias', 'embeddings.patch_embedding.bias', identity),
    Row('pos_embed', 'embeddings.position_embedding.weight', identity),
    *_block(layer),
  ]
  unused = {}
  if config.post_norm:
    rows += norm('post_norm', 'post_layernorm')
    unused['post_norm/*'] = POOL_UNUSED
  if config.pool:
    rows += [
      Row('pool/probe', 'head.probe', identity),
      Row(tuple(f'pool/attn/{n}/kernel' for n in 'qkv'), 'head.attention.in_proj_weight',
          split_rows(3, transpose)),
      Row(tuple(f'pool/attn/{n}/bias' for n in 'qkv'), 'head.attention.in_proj_bias',
          split_rows(3)),
      *linear('pool/attn/out', 'head.attention.out_proj'),
      *norm('pool/norm', 'head.layernorm'),
      *linear('pool/mlp/fc1', 'head.mlp.fc1'), *linear('pool/mlp/fc2', 'head.mlp.fc2'),
    ]
    unused['pool/*'] = POOL_UNUSED
  return Table(tuple(rows), {'embeddings.position_ids': 'buffer'}, unused)


def clip(config: ViTConfig) -> Table:
  """Rows of `CLIPVisionModel`'s `vision_model.` (without LoRA)."""
  rows = [
    Row('class_token', 'embeddings.class_embedding', identity),
    Row('patch_embed/kernel', 'embeddings.patch_embedding.weight', conv_kernel),
    Row('pos_embed', 'embeddings.position_embedding.weight', identity),
    *norm('pre_norm', 'pre_layrnorm'),
    *_block('encoder.layers.{i}'),
  ]
  unused = {}
  if config.post_norm:
    rows += norm('post_norm', 'post_layernorm')
    unused['post_norm/*'] = POOL_UNUSED
  return Table(tuple(rows), {'embeddings.position_ids': 'buffer'}, unused)


def _block(layer: str) -> list[Row]:
  names = (('q', 'q_proj'), ('k', 'k_proj'), ('v', 'v_proj'), ('out', 'out_proj'))
  return [
    *norm('blocks/norm1', f'{layer}.layer_norm1'), *norm('blocks/norm2', f'{layer}.layer_norm2'),
    *(row for ours, theirs in names
      for row in linear(f'blocks/attn/{ours}', f'{layer}.self_attn.{theirs}')),
    *linear('blocks/mlp/fc1', f'{layer}.mlp.fc1'), *linear('blocks/mlp/fc2', f'{layer}.mlp.fc2'),
  ]
