"""Sizes, switches and weight names of the one decoder behind Phi, LLaMA/Vicuna, Qwen2 and GPT-2.

Source of the settings: Hugging Face `models/phi`, `models/llama`, `models/qwen2`; GPT-2's names are
in `gpt2.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from hrvlm_jax.checkpoint.formats import GENERIC, same, used
from hrvlm_jax.checkpoint.rows import Row, Table, filled, identity, linear, norm, transpose
from hrvlm_jax.checkpoint.settings import Harmless, Keys, Only, Reader, shown
from hrvlm_jax.core import bounds
from hrvlm_jax.core.layers import LoRA, activation, activation_name

_BUFFERS = {'*rotary_emb.inv_freq': 'buffer, recomputed from the config'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """A decoder-only language model.

  Attributes:
    family: 'phi', 'llama', 'qwen2' or 'gpt2'; fixes only the names of its weights.
    rotary_dim: leading components of each head that are rotated (partial rotary in Phi); 0 with
      learned positions.
    learned_positions: a table of `max_positions` rows is added to the embeddings (GPT-2).
    rope_linear_factor: inverse frequencies are divided by it (linear RoPE scaling).
    parallel_block: attention and MLP read the same norm and are added together (Phi).
    gated_mlp: SwiGLU (gate, up, down) instead of fc1, activation, fc2.
    residual_dropout: on the attention and MLP branches, in training only.
    init_std: of linear layers and the embedding table at initialisation.
    pad_vocab_to: rows are padded to a multiple inside (sharding); padded logits are -inf. Files of
      other libraries hold the rows of `vocab_size`.
  """

  family: str
  vocab_size: int
  width: int
  depth: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp_width: int
  activation: str
  norm: str
  norm_eps: float
  parallel_block: bool
  gated_mlp: bool
  rotary_dim: int
  rope_theta: float = 10000.0
  rope_linear_factor: float = 1.0
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  head_bias: bool = False
  tie_embeddings: bool = False
  max_positions: int = 2048
  learned_positions: bool = False
  residual_dropout: float = 0.0
  init_std: float = 0.02
  pad_vocab_to: int = 1
  lora: tuple[LoRA, ...] = ()

  BOUNDS: ClassVar = {
    **dict.fromkeys(('vocab_size', 'width', 'depth', 'heads', 'kv_heads', 'head_dim', 'mlp_width',
                     'max_positions', 'pad_vocab_to'), bounds.SIZE),
    'rotary_dim': bounds.COUNT, 'init_std': bounds.COUNT,
    **dict.fromkeys(('norm_eps', 'rope_theta', 'rope_linear_factor'), bounds.ABOVE_ZERO),
    'residual_dropout': bounds.DROPOUT}

  def __post_init__(self):
    bounds.check(self)
    problems = []
    if self.family not in ('phi', 'llama', 'qwen2', 'gpt2'):
      problems.append(f"family must be 'phi', 'llama', 'qwen2' or 'gpt2', got {self.family!r}")
    if self.heads % self.kv_heads:
      problems.append(f'heads {self.heads} is not a multiple of kv_heads {self.kv_heads}')
    if self.learned_positions:
      if self.rotary_dim:
        problems.append(f'learned_positions: rotary_dim must be 0, got {self.rotary_dim}')
    elif self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
      problems.append(f'rotary_dim {self.rotary_dim} must be even and at most head_dim '
                      f'{self.head_dim}')
    if self.norm not in ('layernorm', 'rmsnorm'):
      problems.append(f"norm must be 'layernorm' or 'rmsnorm', got {self.norm!r}")
    if self.tie_embeddings and self.head_bias:
      problems.append('tie_embeddings and head_bias exclude each other')
    if problems:
      raise ValueError('DecoderConfig: ' + '; '.join(problems))
    activation(self.activation)

  @property
  def rows(self) -> int:
    """Rows of the embedding table, padding included."""
    return -(-self.vocab_size // self.pad_vocab_to) * self.pad_vocab_to


def phi(*, vocab_size=51200, width=2048, depth=24, heads=32, mlp_width=8192, rotary_factor=0.5,
        **options) -> DecoderConfig:
  """A Phi decoder; the defaults are Phi-1.5."""
  head_dim = width // heads
  settings = dict(
    family='phi', vocab_size=vocab_size, width=width, depth=depth, heads=heads, kv_heads=heads,
    head_dim=head_dim, mlp_width=mlp_width, activation='gelu_tanh', norm='layernorm',
    norm_eps=1e-5, parallel_block=True, gated_mlp=False, rotary_dim=int(rotary_factor * head_dim),
    qkv_bias=True, out_bias=True, mlp_bias=True, head_bias=True)
  return DecoderConfig(**(settings | options))


def llama(*, vocab_size=32000, width=4096, depth=32, heads=32, mlp_width=11008,
          max_positions=4096, **options) -> DecoderConfig:
  """A LLaMA / Vicuna decoder; the defaults are Vicuna-7B v1.5."""
  settings = dict(
    family='llama', vocab_size=vocab_size, width=width, depth=depth, heads=heads, kv_heads=heads,
    head_dim=width // heads, mlp_width=mlp_width, activation='silu', norm='rmsnorm',
    norm_eps=1e-5, parallel_block=False, gated_mlp=True, rotary_dim=width // heads,
    max_positions=max_positions)
  return DecoderConfig(**(settings | options))


def qwen2(*, vocab_size=152064, width=3584, depth=28, heads=28, kv_heads=4, mlp_width=18944,
          max_positions=32768, **options) -> DecoderConfig:
  """A Qwen2 decoder; the defaults are Qwen2-7B."""
  settings = dict(
    family='qwen2', vocab_size=vocab_size, width=width, depth=depth, heads=heads,
    kv_heads=kv_heads, head_dim=width // heads, mlp_width=mlp_width, activation='silu',
    norm='rmsnorm', norm_eps=1e-6, parallel_block=False, gated_mlp=True,
    rotary_dim=width // heads, rope_theta=1e6, qkv_bias=True, max_positions=max_positions)
  return DecoderConfig(**(settings | options))


def gpt2(*, vocab_size=50257, width=768, depth=12, heads=12, mlp_width=None, max_positions=1024,
         **options) -> DecoderConfig:
  """A GPT-2 decoder; the defaults are the base model."""
  settings = dict(
    family='gpt2', vocab_size=vocab_size, width=width, depth=depth, heads=heads, kv_heads=heads,
    head_dim=width // heads, mlp_width=mlp_width or 4 * width, activation='gelu_tanh',
    norm='layernorm', norm_eps=1e-5, parallel_block=False, gated_mlp=False, rotary_dim=0,
    learned_positions=True, qkv_bias=True, out_bias=True, mlp_bias=True, tie_embeddings=True,
    max_positions=max_positions)
  return DecoderConfig(**(settings | options))


RELEASED: dict[str, DecoderConfig] = {
  'phi_1_5': phi(),
  'phi_2': phi(width=2560, depth=32, mlp_width=10240, rotary_factor=0.4),
  'vicuna_7b': llama(),
  'vicuna_13b': llama(width=5120, depth=40, heads=40, mlp_width=13824),
  'qwen2_1_5b': qwen2(vocab_size=151936, width=1536, heads=12, kv_heads=2, mlp_width=8960,
                      tie_embeddings=True),
  'qwen2_7b': qwen2(),
  'gpt2': gpt2(),
  'gpt2_large': gpt2(width=1280, depth=36, heads=20),
}


# Keys of the config.json of a language model; see `checkpoint.settings`.
_ROPE = {**used('rope_type', 'type', 'rope_theta', 'factor', 'partial_rotary_factor'),
         'original_max_position_embeddings': Harmless('only of kinds that are refused')}
KEYS: Keys = {
  **GENERIC,
  **used('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads',
         'num_key_value_heads', 'intermediate_size', 'head_dim', 'hidden_act',
         'max_position_embeddings', 'tie_word_embeddings', 'initializer_range', 'qk_layernorm',
         'use_sliding_window', 'attention_bias', 'mlp_bias', 'rope_theta', 'partial_rotary_factor',
         'layer_norm_eps', 'rms_norm_eps', 'resid_pdrop'),
  'rope_parameters': _ROPE, 'rope_scaling': _ROPE,
  **same('dropout of the original training; none is applied here', 'attention_dropout',
         'embd_pdrop'),
  **same('off, as use_sliding_window says', 'sliding_window', 'max_window_layers'),
  'pretraining_tp': Only((1,)),
  # GPT-2's own.
  **used('n_embd', 'n_layer', 'n_head', 'n_inner', 'n_positions', 'activation_function',
         'layer_norm_epsilon'),
  **same('dropout of the original training; none is applied here', 'attn_pdrop'),
  **same('n_positions says it', 'n_ctx'),
  **same('of heads for classes', 'summary_activation', 'summary_first_dropout',
         'summary_proj_to_labels', 'summary_type', 'summary_use_proj'),
  **same('a number format of another library', 'reorder_and_upcast_attn'),
  'scale_attn_weights': Only((True,)), 'scale_attn_by_inverse_layer_idx': Only((False,)),
  'layer_types': Only(lambda v: isinstance(v, list) and set(map(str, v)) <= {'full_attention'},
                      'full_attention in every layer'),
}
# What the classes of transformers have where a file leaves a key out, which it does for defaults.
_DEFAULTS: dict[str, dict[str, Any]] = {
  'phi': dict(vocab_size=51200, hidden_size=2048, num_hidden_layers=24, num_attention_heads=32,
              intermediate_size=8192, max_position_embeddings=2048, hidden_act='gelu_new',
              layer_norm_eps=1e-5),
  'llama': dict(vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
                intermediate_size=11008, max_position_embeddings=2048, hidden_act='silu',
                rms_norm_eps=1e-6),
  'qwen2': dict(vocab_size=151936, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
                intermediate_size=22016, max_position_embeddings=32768, hidden_act='silu',
                rms_norm_eps=1e-6),
}
_ACTIVATIONS = ('gelu', 'gelu_new', 'gelu_pytorch_tanh', 'gelu_tanh', 'quick_gelu', 'relu', 'silu')


def config_from_hf(values: Any, *, kind: str | None = None, where: str = 'language model config',
                   prefix: str = '') -> DecoderConfig:
  """A Hugging Face `config.json` of model type phi, llama, qwen2 or gpt2 -> DecoderConfig.

  What the file leaves out has the default of the class of transformers. Rotary settings are read
  where transformers 5 writes them (`rope_parameters`) and where 4 did.

  Args:
    kind: the model type, where the file's own says something else.
    where, prefix: name the file and the place in it in errors.

  Raises:
    UserError: another model type, values that are none, a setting this decoder does not implement;
      all of them.
  """
  read = Reader(values, where=where, prefix=prefix)
  kind = kind or read.values.get('model_type')
  if kind == 'gpt2':
    from hrvlm_jax.language import gpt2 as names

    return names.from_hf(read)
  if kind not in _DEFAULTS:
    read.problems.append(f"{prefix}model_type {kind!r} is not supported; expected 'phi', 'llama', "
                         "'qwen2' or 'gpt2'")
    read.done()
  usual = _DEFAULTS[kind]
  for key in ('qk_layernorm', 'use_sliding_window'):
    if read.flag(key):
      read.problems.append(f'{prefix}{key}=True is not supported')
  for key in ('attention_bias', 'mlp_bias'):
    if read.flag(key):
      read.problems.append(f'{prefix}{key}: not supported: attention_bias or mlp_bias of {kind}')
  size = lambda key, most=1 << 24: read.integer(key, usual[key], most=most)
  heads, width = size('num_attention_heads', 4096), size('hidden_size')
  if width % heads and 'head_dim' not in read:
    read.bad('hidden_size', f'a multiple of num_attention_heads {heads}')
  head_dim = read.integer('head_dim', max(width // heads, 1), most=1 << 16, null=True)
  shared: dict[str, Any] = dict(
    vocab_size=size('vocab_size'), width=width, depth=size('num_hidden_layers', 4096), heads=heads,
    mlp_width=size('intermediate_size'),
    max_positions=size('max_position_embeddings', 1 << 30),
    tie_embeddings=read.flag('tie_word_embeddings'),
    kv_heads=read.integer('num_key_value_heads', heads, most=4096, null=True), head_dim=head_dim,
    init_std=read.number('initializer_range', 0.02),
    activation=activation_name(read.word('hidden_act', usual['hidden_act'], _ACTIVATIONS)))
  rope, part = _rotary(read, 0.5 if kind == 'phi' else 1.0)
  shared |= rope
  if kind == 'phi':
    shared |= dict(norm_eps=read.number('layer_norm_eps', usual['layer_norm_eps']),
                   residual_dropout=read.number('resid_pdrop', 0.0),
                   head_bias=not shared['tie_embeddings'], rotary_dim=int(part * head_dim))
    return read.build(lambda: phi(**shared))
  if part != 1:
    read.problems.append(f'{prefix}partial_rotary_factor: found {part:g}, expected 1 for {kind}')
  shared |= dict(norm_eps=read.number('rms_norm_eps', usual['rms_norm_eps']), rotary_dim=head_dim)
  return read.build(lambda: (llama if kind == 'llama' else qwen2)(**shared))


def _rotary(read: Reader, part: float) -> tuple[dict[str, float], float]:
  """(rotary base and linear factor, rotated share) from all places that may hold them."""
  theta, factor = 1e4, 1.0
  places = [read]
  for key in ('rope_parameters', 'rope_scaling'):
    if read.values.get(key) is None:
      continue
    inner = read.inside(key)
    for name, rule in inner.values.items():
      if name not in _ROPE:
        inner.problems.append(f'{inner.prefix}{name}: is {shown(rule)}, not a setting of the kinds '
                              'default and linear, which are those here')
    kind = inner.values.get('rope_type', inner.values.get('type'))
    if kind is None and 'factor' in inner:
      inner.bad('rope_type', "'default' or 'linear' beside a factor")
    elif kind not in (None, 'default', 'linear'):
      inner.problems.append(f"{inner.prefix}rope_type: not supported: {key} type {kind!r}, "
                            "expected 'default' or 'linear'")
    elif kind == 'linear':
      if 'factor' not in inner:
        inner.bad('factor', 'a number above 0')
      factor = inner.number('factor', 1.0, above=True)
    places.append(inner)
  for name, default in (('rope_theta', theta), ('partial_rotary_factor', part)):
    found = {place.number(name, default, above=True)
             for place in places if place.values.get(name) is not None}
    if len(found) > 1:
      read.problems.append(f'{read.prefix}{name}: two places of the file say '
                           f'{" and ".join(f"{v:g}" for v in sorted(found))}; leave one')
    if found and name == 'rope_theta':
      theta = max(found)
    elif found:
      part = max(found)
  if part > 1:
    read.problems.append(f'{read.prefix}partial_rotary_factor: found {part:g}, expected at most 1')
  return {'rope_theta': theta, 'rope_linear_factor': factor}, part


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
  """The inverse of `config_from_hf`, as `transformers` writes it."""
  c = config
  if c.family == 'gpt2':
    from hrvlm_jax.language import gpt2 as names

    return names.to_hf(c)
  names = {'phi': 'PhiForCausalLM', 'llama': 'LlamaForCausalLM', 'qwen2': 'Qwen2ForCausalLM'}
  values: dict[str, Any] = dict(
    architectures=[names[c.family]], model_type=c.family, vocab_size=c.vocab_size,
    hidden_size=c.width, num_hidden_layers=c.depth, num_attention_heads=c.heads,
    num_key_value_heads=c.kv_heads, intermediate_size=c.mlp_width,
    max_position_embeddings=c.max_positions, rope_theta=c.rope_theta,
    tie_word_embeddings=c.tie_embeddings, initializer_range=c.init_std,
    rope_scaling=None if c.rope_linear_factor == 1 else {
      'type': 'linear', 'rope_type': 'linear', 'factor': c.rope_linear_factor})
  if c.family == 'phi':
    return values | dict(hidden_act='gelu_new', layer_norm_eps=c.norm_eps, qk_layernorm=False,
                         partial_rotary_factor=c.rotary_dim / c.head_dim,
                         resid_pdrop=c.residual_dropout)
  values |= dict(hidden_act=c.activation, rms_norm_eps=c.norm_eps)
  if c.family == 'llama':
    values |= dict(attention_bias=False, mlp_bias=False, head_dim=c.head_dim)
  else:
    values |= dict(use_sliding_window=False)
    if c.head_dim != c.width // c.heads:
      values |= dict(head_dim=c.head_dim)
  return values


def table(config: DecoderConfig) -> Table:
  """Weight names of the whole causal language model in the Hugging Face layout (`model.*`,
  `lm_head.*`)."""
  if config.family == 'gpt2':
    from hrvlm_jax.language import gpt2 as names

    return names.table(config)
  body = _phi(config) if config.family == 'phi' else _llama(config)
  # Rows that fill up the vocabulary exist here alone.
  whole = lambda inner: filled(config.vocab_size, config.rows, inner)
  rows = [Row('embed/embedding', 'model.embed_tokens.weight', whole(identity)), *body]
  tied = {}
  if config.tie_embeddings:
    tied['lm_head.weight'] = 'model.embed_tokens.weight'
  else:
    rows.append(Row('head/kernel', 'lm_head.weight', whole(transpose)))
    if config.head_bias:
      rows.append(Row('head/bias', 'lm_head.bias', whole(identity)))
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
