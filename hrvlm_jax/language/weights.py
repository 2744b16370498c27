"""Name tables of Phi, LLaMA/Vicuna and Qwen2 in the Hugging Face layout, both directions."""

from __future__ import annotations

from hrvlm_jax.checkpoint.rows import Row, Table, identity, linear, norm, transpose
from hrvlm_jax.language.config import DecoderConfig

_BUFFERS = {'*rotary_emb.inv_freq': 'buffer, recomputed from the config'}


def table(config: DecoderConfig) -> Table:
  """Rows of the whole causal language model (`model.*`, `lm_head.*`)."""
  body = _phi(config) if config.family == 'phi' else _llama(config)
  rows = [Row('embed/embedding', 'model.embed_tokens.weight', identity), *body]
  tied = {}
  if config.tie_embeddings:
    tied['lm_head.weight'] = 'model.embed_tokens.weight'
  else:
    rows.append(Row('head/kernel', 'lm_head.weight', transpose))
    if config.head_bias:
      rows.append(Row('head/bias', 'lm_head.bias', identity))
  return Table(tuple(rows), dict(_BUFFERS), tied=tied)


def _phi(c: DecoderConfig) -> list[Row]:
  layer = 'model.layers.{i}'
  attention = [row for ours, theirs in
               (('q', 'q_proj'), ('k', 'k_proj'), ('v', 'v_proj'), ('out', 'dense'))
               for row in linear(f'blocks/attn/{ours}', f'{layer}.self_attn.{theirs}')]
  return [
    *norm('blocks/norm1', f'{layer}.input_layernorm'), *attention,
    *linear('blocks/mlp/fc1', f'{layer}.mlp.fc1'), *linear('blocks/mlp/fc2', f'{layer}.mlp.fc2'),
    *norm('norm', 'model.final_layernorm'),
  ]


def _llama(c: DecoderConfig) -> list[Row]:
  layer = 'model.layers.{i}'
  attention = [row for name in ('q', 'k', 'v')
               for row in linear(f'blocks/attn/{name}', f'{layer}.self_attn.{name}_proj',
                                 bias=c.qkv_bias)]
  mlp = [row for name in ('gate', 'up', 'down')
         for row in linear(f'blocks/mlp/{name}', f'{layer}.mlp.{name}_proj', bias=c.mlp_bias)]
  return [
    *norm('blocks/norm1', f'{layer}.input_layernorm', bias=False), *attention,
    *linear('blocks/attn/out', f'{layer}.self_attn.o_proj', bias=c.out_bias),
    *norm('blocks/norm2', f'{layer}.post_attention_layernorm', bias=False), *mlp,
    *norm('norm', 'model.norm', bias=False),
  ]
