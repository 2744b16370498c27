"""GPT-2's names: weights and config.json, both directions.

Source: Hugging Face `models/gpt2`. Its linear layers are stored input first (`Conv1D`), query, key
and value in one; positions are a learned table.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hrvlm_jax.checkpoint.rows import Op, Row, Table, filled, identity, norm, transpose
from hrvlm_jax.checkpoint.settings import Reader
from hrvlm_jax.core.layers import activation_name
from hrvlm_jax.language.config import DecoderConfig, gpt2

# What the class of transformers has where a file leaves a key out.
_DEFAULTS = {'vocab_size': 50257, 'n_embd': 768, 'n_layer': 12, 'n_head': 12, 'n_positions': 1024}
_ACTIVATIONS = ('gelu_new', 'gelu', 'gelu_pytorch_tanh', 'relu', 'silu')


def from_hf(read: Reader) -> DecoderConfig:
  """A config.json of model type gpt2 -> DecoderConfig.

  Raises:
    UserError: values that are none.
  """
  size = {key: read.integer(key, default) for key, default in _DEFAULTS.items()}
  width, heads = size['n_embd'], size['n_head']
  if width % heads:
    read.bad('n_embd', f'a multiple of n_head {heads}')
  inner = read.integer('n_inner', 4 * width, null=True)
  return read.build(lambda: gpt2(
    vocab_size=size['vocab_size'], width=width, depth=size['n_layer'], heads=heads,
    mlp_width=inner, max_positions=size['n_positions'],
    activation=activation_name(read.word('activation_function', 'gelu_new', _ACTIVATIONS)),
    norm_eps=read.number('layer_norm_epsilon', 1e-5),
    residual_dropout=read.number('resid_pdrop', 0.0),
    init_std=read.number('initializer_range', 0.02),
    tie_embeddings=read.flag('tie_word_embeddings', True)))


def to_hf(c: DecoderConfig) -> dict[str, Any]:
  """The inverse of `from_hf`, as `transformers` writes it."""
  return dict(
    architectures=['GPT2LMHeadModel'], model_type='gpt2', vocab_size=c.vocab_size, n_embd=c.width,
    n_layer=c.depth, n_head=c.heads, n_inner=c.mlp_width, n_positions=c.max_positions,
    activation_function='gelu_new' if c.activation == 'gelu_tanh' else c.activation,
    layer_norm_epsilon=c.norm_eps, initializer_range=c.init_std, resid_pdrop=c.residual_dropout,
    tie_word_embeddings=c.tie_embeddings)


def _columns(parts: int) -> Op:
  """One tensor [..., parts * m] <-> `parts` of ours [..., m]."""
  return Op(f'columns({parts})', lambda x: tuple(np.split(x, parts, axis=-1)),
            lambda arrays: np.concatenate(arrays, axis=-1),
            lambda shapes: (*shapes[0][:-1], sum(s[-1] for s in shapes)))


def table(c: DecoderConfig) -> Table:
  """Weight names of `GPT2LMHeadModel`."""
  layer, whole = 'transformer.h.{i}', lambda inner: filled(c.vocab_size, c.rows, inner)
  fused = lambda leaf: tuple(f'blocks/attn/{name}/{leaf}' for name in ('q', 'k', 'v'))
  plain = lambda ours, theirs: [Row(f'{ours}/kernel', f'{theirs}.weight', identity),
                                Row(f'{ours}/bias', f'{theirs}.bias', identity)]
  rows = [
    Row('embed/embedding', 'transformer.wte.weight', whole(identity)),
    Row('positions/embedding', 'transformer.wpe.weight', identity),
    *norm('blocks/norm1', f'{layer}.ln_1'), *norm('blocks/norm2', f'{layer}.ln_2'),
    Row(fused('kernel'), f'{layer}.attn.c_attn.weight', _columns(3)),
    Row(fused('bias'), f'{layer}.attn.c_attn.bias', _columns(3)),
    *plain('blocks/attn/out', f'{layer}.attn.c_proj'),
    *plain('blocks/mlp/fc1', f'{layer}.mlp.c_fc'), *plain('blocks/mlp/fc2', f'{layer}.mlp.c_proj'),
    *norm('norm', 'transformer.ln_f')]
  buffers = {'*.attn.bias': 'buffer, the causal mask', '*.attn.masked_bias': 'buffer'}
  if c.tie_embeddings:
    return Table(tuple(rows), buffers, tied={'lm_head.weight': 'transformer.wte.weight'})
  return Table((*rows, Row('head/kernel', 'lm_head.weight', whole(transpose))), buffers)
