"""One configurable vision transformer, of which SigLIP, CLIP and C-RADIO are settings, and its
weight names in the Hugging Face layouts.

Sources: Hugging Face `SiglipVisionModel` and `CLIPVisionModel`, timm `VisionTransformer` (PS3's
trunk), as described in the systems' specifications. All are pre-norm with learned positions.
Axis letters: n images, t tokens, d width, l layers, h heads, p head width, s prefix tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
from hrvlm_jax.checkpoint.settings import Reader
from hrvlm_jax.core import bounds, resample
from hrvlm_jax.core.attention import attention
from hrvlm_jax.core.cpu import few_at_a_time
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import (
  Adapter,
  LayerNorm,
  Linear,
  LoRA,
  Mlp,
  PatchEmbed,
  activation,
  activation_name,
  normal,
)
from hrvlm_jax.core.module import Module, Param, Rngs, depth_of, scan_layers, stacked

POOL_UNUSED = 'kept for export; the model reads the last block, before post_norm and pool'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
  """Sizes and switches of a vision transformer.

  Attributes:
    image_size: side in pixels the position table was made for.
    class_token: a learned token in front (CLIP); it has its own row in the position table.
    patch_bias: the patch projection has a bias (SigLIP: yes, CLIP: no).
    pre_norm: a layer norm between embeddings and blocks (CLIP's `pre_layrnorm`).
    post_norm: the final layer norm exists as a parameter; `blocks` never applies it.
    pool: 'map' adds SigLIP's attention pool (`head`), else None.
    position: 'resample' (antialiased bicubic to the grid at hand) or 'crop' (C-RADIO: the top-left
      part of a large table).
    position_grid: side of the position table when it is not image_size // patch_size (C-RADIO).
    pool_width, pool_mlp_width: sizes of the pool when they differ from the trunk's.
  """

  image_size: int
  patch_size: int
  width: int
  depth: int
  heads: int
  mlp_width: int
  activation: str = 'gelu_tanh'
  norm_eps: float = 1e-6
  channels: int = 3
  class_token: bool = False
  patch_bias: bool = True
  pre_norm: bool = False
  post_norm: bool = True
  pool: str | None = None
  pool_width: int | None = None
  pool_mlp_width: int | None = None
  position: str = 'resample'
  position_grid: int | None = None
  lora: tuple[LoRA, ...] = ()

  BOUNDS: ClassVar = {
    **dict.fromkeys(('image_size', 'patch_size', 'width', 'depth', 'heads', 'mlp_width',
                     'pool_width', 'pool_mlp_width', 'position_grid'), bounds.SIZE),
    'channels': '[3, 3]', 'norm_eps': bounds.ABOVE_ZERO}

  def __post_init__(self):
    bounds.check(self)
    problems = []
    if self.width % self.heads:
      problems.append(f'width {self.width} is not divisible by heads {self.heads}')
    if self.image_size < self.patch_size:
      problems.append(f'image_size {self.image_size} is below patch_size {self.patch_size}')
    if self.pool not in (None, 'map'):
      problems.append(f"pool must be 'map' or None, got {self.pool!r}")
    if self.position not in ('resample', 'crop'):
      problems.append(f"position must be 'resample' or 'crop', got {self.position!r}")
    if problems:
      raise ValueError('ViTConfig: ' + '; '.join(problems))
    activation(self.activation)

  @property
  def grid(self) -> int:
    """Patches per side at `image_size` (right and bottom remainders are not read)."""
    return self.image_size // self.patch_size

  @property
  def table_grid(self) -> int:
    """Side of the position table."""
    return self.position_grid or self.grid

  @property
  def tokens(self) -> int:
    """Tokens of one square image of `image_size`, the class token included."""
    return self.grid**2 + int(self.class_token)


SIGLIP_SO400M_384 = ViTConfig(
  image_size=384, patch_size=14, width=1152, depth=27, heads=16, mlp_width=4304, pool='map')
CLIP_L_336 = ViTConfig(
  image_size=336, patch_size=14, width=1024, depth=24, heads=16, mlp_width=4096,
  activation='quick_gelu', norm_eps=1e-5, class_token=True, patch_bias=False, pre_norm=True)
CLIP_H_224 = ViTConfig(
  image_size=224, patch_size=14, width=1280, depth=32, heads=16, mlp_width=5120,
  activation='quick_gelu', norm_eps=1e-5, class_token=True, patch_bias=False, pre_norm=True)


# What the classes of transformers have where a file leaves a key out, which it does for defaults.
_DEFAULTS = {True: dict(patch_size=32, hidden_act='quick_gelu', layer_norm_eps=1e-5),
             False: dict(patch_size=16, hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6)}
_ACTIVATIONS = ('gelu', 'gelu_new', 'gelu_pytorch_tanh', 'gelu_tanh', 'quick_gelu', 'relu', 'silu')


def config_from_hf(read: Reader, *, clip: bool) -> ViTConfig:
  """`vision_config` of CLIP or SigLIP -> ViTConfig; what is left out has the class's default.

  Raises:
    UserError: values that are none, all of them; a size that does not fit another.
  """
  usual = _DEFAULTS[clip]
  size = lambda key, default: read.integer(key, default, most=1 << 16)
  sizes = dict(
    image_size=size('image_size', 224), patch_size=size('patch_size', usual['patch_size']),
    width=size('hidden_size', 768), depth=size('num_hidden_layers', 12),
    heads=size('num_attention_heads', 12), mlp_width=size('intermediate_size', 3072),
    activation=activation_name(read.word('hidden_act', usual['hidden_act'], _ACTIVATIONS)),
    norm_eps=read.number('layer_norm_eps', usual['layer_norm_eps']),
    channels=size('num_channels', 3))
  own = dict(class_token=True, patch_bias=False, pre_norm=True) if clip else dict(pool='map')
  return read.build(lambda: ViTConfig(**sizes, **own))


def hf_activation(name: str) -> str:
  """Transformers' name of an activation."""
  return {'gelu_tanh': 'gelu_pytorch_tanh'}.get(activation_name(name), activation_name(name))


def config_to_hf(config: ViTConfig) -> dict[str, Any]:
  """`vision_config` of CLIP or SigLIP, by what the tower has."""
  return {
    'model_type': 'clip_vision_model' if config.class_token else 'siglip_vision_model',
    'hidden_size': config.width, 'intermediate_size': config.mlp_width,
    'num_hidden_layers': config.depth, 'num_attention_heads': config.heads,
    'image_size': config.image_size, 'patch_size': config.patch_size,
    'num_channels': config.channels, 'hidden_act': hf_activation(config.activation),
    'layer_norm_eps': config.norm_eps, 'attention_dropout': 0.0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlocksOutput:
  """What a run over transformer blocks returns.

  Attributes:
    x: output of the last block that ran, before any final norm.
    taps: outputs of the blocks asked for, by block index.
    keys, values: [l n t h p] of every block that ran, when asked for; else None.
  """

  x: jax.Array
  taps: dict[int, jax.Array]
  keys: jax.Array | None
  values: jax.Array | None


class Attention(Module):
  """Multi-head self-attention with separate q, k, v, out projections."""

  def __init__(self, width: int, heads: int, *, lora: Sequence[LoRA] = (), bias: bool = True,
               param_dtype=jnp.float32, rngs: Rngs):
    make = lambda: Linear(width, width, bias=bias, lora=lora, kernel_init=normal(width**-0.5),
                          param_dtype=param_dtype, rngs=rngs)
    self.heads = heads
    self.q, self.k, self.v, self.out = make(), make(), make(), make()

  def project(self, x: Float[Array, '... t d'], *, adapter: Adapter = None, key=None,
              ex: Execution = HERE):
    """q, k, v as [... t h p]."""
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    split = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)
    return tuple(split(layer(x, adapter=adapter, key=sub, ex=ex))
                 for layer, sub in zip((self.q, self.k, self.v), keys, strict=True))

  def __call__(self, x, *, adapter: Adapter = None, prefix=None, key=None, ex: Execution = HERE):
    """Returns (output [... t d], keys, values); `prefix` = (keys, values) put before x's own.

    A prefix of fewer rows serves equally many consecutive rows of x each.
    Leading axes beyond one (views of a sample) are flattened for the attention only.
    """
    keys = (None, None) if key is None else jax.random.split(key)
    q, k, v = self.project(x, adapter=adapter, key=keys[0], ex=ex)
    flat = lambda y: y.reshape(-1, *y.shape[-3:])
    all_k, all_v = flat(k), flat(v)
    if prefix is not None:
      before_k, before_v = (_shared(part, all_k.shape[0]).astype(k.dtype) for part in prefix)
      all_k = jnp.concatenate([before_k, all_k], axis=1)
      all_v = jnp.concatenate([before_v, all_v], axis=1)
    y = attention(flat(q), all_k, all_v, ex=ex)
    return self.out(y.reshape(x.shape), adapter=adapter, key=keys[1], ex=ex), k, v


def _shared(prefix: Float[Array, 'b s h p'], rows: int) -> Float[Array, 'n s h p']:
  times, rest = divmod(rows, prefix.shape[0])
  if rest:
    raise ValueError(f'a prefix of {prefix.shape[0]} rows cannot serve {rows} rows evenly')
  return prefix if times == 1 else jnp.repeat(prefix, times, axis=0)


class Block(Module):
  """x += attn(norm1(x)); x += mlp(norm2(x))."""

  def __init__(self, config: ViTConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    norm = lambda: LayerNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype, rngs=rngs)
    self.norm1, self.norm2 = norm(), norm()
    self.attn = Attention(config.width, config.heads, lora=config.lora, param_dtype=param_dtype,
                          rngs=rngs)
    self.mlp = Mlp(config.width, config.mlp_width, activation=config.activation, lora=config.lora,
                   kernel_init=normal(config.width**-0.5), param_dtype=param_dtype, rngs=rngs)

  def __call__(self, x, *, adapter: Adapter = None, prefix=None, key=None, ex: Execution = HERE):
    keys = (None, None) if key is None else jax.random.split(key)
    y, k, v = self.attn(self.norm1(x), adapter=adapter, prefix=prefix, key=keys[0], ex=ex)
    x = x + y
    return x + self.mlp(self.norm2(x), adapter=adapter, key=keys[1], ex=ex), k, v


class AttentionPool(Module):
  """SigLIP's pooling head: one learned query attends to all tokens, then a residual MLP.

  y = out(attention(q(probe), k(x), v(x))); y + mlp(norm(y)). There is no residual from the probe.
  Source: `huggingface/transformers: models/siglip/modeling_siglip.py`
  (SiglipMultiheadAttentionPoolingHead); timm's `AttentionPoolLatent` computes the same.
  """

  def __init__(self, width: int, heads: int, mlp_width: int, *, activation: str, eps: float,
               param_dtype=jnp.float32, rngs: Rngs):
    self.probe = Param(normal(0.02)(rngs.params(), (1, 1, width), param_dtype))
    self.attn = Attention(width, heads, param_dtype=param_dtype, rngs=rngs)
    self.norm = LayerNorm(width, eps=eps, param_dtype=param_dtype, rngs=rngs)
    self.mlp = Mlp(width, mlp_width, activation=activation, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, x: Float[Array, 'n t d'], *, mask=None, ex: Execution = HERE
               ) -> Float[Array, 'n d']:
    """Args: mask: bool [n t], keys that may be looked at (all by default)."""
    probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
    split = lambda y: y.reshape(*y.shape[:-1], self.attn.heads, -1)
    y = attention(split(self.attn.q(probe)), split(self.attn.k(x)), split(self.attn.v(x)),
                  valid=mask, ex=ex.plain)
    y = self.attn.out(y.reshape(probe.shape))
    return (y + self.mlp(self.norm(y)))[:, 0]


class ViT(Module):
  """Patch embedding, learned positions, scanned pre-norm blocks; norms and pool kept apart."""

  def __init__(self, config: ViTConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    c = config
    norm = lambda: LayerNorm(c.width, eps=c.norm_eps, param_dtype=param_dtype, rngs=rngs)
    self.patch_embed = PatchEmbed(c.patch_size, c.channels, c.width, bias=c.patch_bias,
                                  lora=c.lora, param_dtype=param_dtype, rngs=rngs)
    rows = c.table_grid**2 + int(c.class_token)
    self.pos_embed = Param(normal(0.02)(rngs.params(), (rows, c.width), param_dtype))
    self.class_token = (
      Param(normal(0.02)(rngs.params(), (c.width,), param_dtype)) if c.class_token else None)
    self.pre_norm = norm() if c.pre_norm else None
    self.blocks = stacked(lambda r: Block(c, param_dtype=param_dtype, rngs=r), c.depth, rngs=rngs)
    self.post_norm = norm() if c.post_norm else None
    self.pool = AttentionPool(
      c.pool_width or c.width, c.heads, c.pool_mlp_width or c.mlp_width, activation=c.activation,
      eps=c.norm_eps, param_dtype=param_dtype, rngs=rngs) if c.pool == 'map' else None

  def positions(self, grid: tuple[int, int]) -> Float[Array, 't d']:
    """The position table of a (rows, cols) grid, the class token's row first if there is one."""
    c = self.config
    extra = int(c.class_token)
    table = self.pos_embed[...]
    if c.position == 'crop':
      rows, cols = grid
      side = c.table_grid
      square = table[extra:].reshape(side, side, -1)[:rows, :cols].reshape(rows * cols, -1)
      return jnp.concatenate([table[:extra], square]) if extra else square
    return resample.position_table(table, grid, extra=extra)

  def embed(self, images: Float[Array, '... h w c'], *, adapter: Adapter = None, key=None,
            ex: Execution = HERE):
    """Normalised images -> tokens [... t d], after `pre_norm` where the model has one."""
    c = self.config
    x = self.patch_embed(images, adapter=adapter, key=key, ex=ex)
    grid = (images.shape[-3] // c.patch_size, images.shape[-2] // c.patch_size)
    if self.class_token is not None:
      first = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (*x.shape[:-2], 1, c.width))
      x = jnp.concatenate([first, x], axis=-2)
    x = x + self.positions(grid).astype(x.dtype)
    return x if self.pre_norm is None else self.pre_norm(x)

  def run(
    self,
    x: Float[Array, '... t d'],
    *,
    start: int = 0,
    stop: int | None = None,
    taps: Sequence[int] = (),
    adapter: Adapter = None,
    prefix: tuple[jax.Array, jax.Array] | None = None,
    return_kv: bool = False,
    key=None,
    ex: Execution = HERE,
  ) -> BlocksOutput:
    """Runs blocks start..stop.

    Args:
      taps: block indices whose outputs are returned; no other hidden state is stored.
      prefix: keys and values [l n s h p] of ALL blocks, put before each block's own; n may be a
        divisor of the rows of x (see `Attention`).
      return_kv: also return every run block's keys and values.
      key: dropout key of the LoRA branches.
    """
    depth = depth_of(self.blocks)
    stop = depth if stop is None else stop
    alone = adapter is None and prefix is None and key is None and not return_kv
    dropout_keys = None if key is None else jax.random.split(key, depth)

    # One scan for all blocks: cutting it at the taps would copy the stacked weights of every piece.
    # Tapped outputs go to a buffer [n slots ...] that travels along; its last slot takes the
    # others. Rows stand first in it, as in x, so that it lies over devices as x does.
    inner = [tap for tap in sorted(set(taps)) if start <= tap < stop - 1]
    slots = jnp.full(depth, len(inner), jnp.int32)
    for slot, tap in enumerate(inner):
      slots = slots.at[tap].set(slot)

    def body(block, carry, extra):
      x, buffer = carry
      sub, before, slot = extra
      k = v = None
      if alone:
        x = few_at_a_time(lambda part: block(part, ex=ex)[0], x, ex)
      else:
        x, k, v = block(x, adapter=adapter, prefix=before, key=sub, ex=ex)
      if inner:
        buffer = jax.lax.dynamic_update_index_in_dim(buffer, x, slot, 1)
      return (x, buffer), ((k, v) if return_kv else None)

    buffer = jnp.zeros((x.shape[0], len(inner) + 1, *x.shape[1:]), x.dtype) if inner else None
    (x, buffer), kv = scan_layers(self.blocks, (x, buffer), body, xs=(dropout_keys, prefix, slots),
                                  start=start, stop=stop, ex=ex)
    found = {tap: buffer[:, slot] for slot, tap in enumerate(inner)}
    if stop - 1 in taps:
      found[stop - 1] = x
    return BlocksOutput(x, found, *(kv if return_kv else (None, None)))

  def __call__(self, images: Float[Array, 'n h w c'], *, adapter: Adapter = None, key=None,
               ex: Execution = HERE, **options) -> Float[Array, 'n t d']:
    """Output of the last block, before `post_norm`; options as in `run`."""
    keys = (None, None) if key is None else jax.random.split(key)
    x = self.embed(images, adapter=adapter, key=keys[0], ex=ex)
    return self.run(x, adapter=adapter, key=keys[1], ex=ex, **options).x


def siglip_table(config: ViTConfig) -> Table:
  """Rows of `SiglipVisionModel`'s `vision_model.`."""
  layer = 'encoder.layers.{i}'
  rows = [
    Row('patch_embed/kernel', 'embeddings.patch_embedding.weight', conv_kernel),
    Row('patch_embed/bias', 'embeddings.patch_embedding.bias', identity),
    Row('pos_embed', 'embeddings.position_embedding.weight', identity),
    *_block_rows(layer),
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


def clip_table(config: ViTConfig) -> Table:
  """Rows of `CLIPVisionModel`'s `vision_model.` (without LoRA)."""
  rows = [
    Row('class_token', 'embeddings.class_embedding', identity),
    Row('patch_embed/kernel', 'embeddings.patch_embedding.weight', conv_kernel),
    Row('pos_embed', 'embeddings.position_embedding.weight', identity),
    *norm('pre_norm', 'pre_layrnorm'),
    *_block_rows('encoder.layers.{i}'),
  ]
  unused = {}
  if config.post_norm:
    rows += norm('post_norm', 'post_layernorm')
    unused['post_norm/*'] = POOL_UNUSED
  return Table(tuple(rows), {'embeddings.position_ids': 'buffer'}, unused)


def _block_rows(layer: str) -> list[Row]:
  names = (('q', 'q_proj'), ('k', 'k_proj'), ('v', 'v_proj'), ('out', 'out_proj'))
  return [
    *norm('blocks/norm1', f'{layer}.layer_norm1'), *norm('blocks/norm2', f'{layer}.layer_norm2'),
    *(row for ours, theirs in names
      for row in linear(f'blocks/attn/{ours}', f'{layer}.self_attn.{theirs}')),
    *linear('blocks/mlp/fc1', f'{layer}.mlp.fc1'), *linear('blocks/mlp/fc2', f'{layer}.mlp.fc2'),
  ]
