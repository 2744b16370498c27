"""The decoder: Phi (parallel block), LLaMA/Vicuna, Qwen2, GPT-2 (sequential block) in one module.

Source: Hugging Face `models/{phi,llama,qwen2,gpt2}`. Caches are arguments and results.
Axis letters: b batch, t new tokens, s cache slots, l layers, h heads, k key/value heads, p head
width, d model width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from hrvlm_jax.core.attention import attention, attention_weights, last_true, visible
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import (
  Embedding,
  LayerNorm,
  Linear,
  Mlp,
  RMSNorm,
  activation,
  dropout,
  normal,
  wide_dtype,
  zeros,
)
from hrvlm_jax.core.module import (
  List,
  Module,
  Param,
  Rngs,
  depth_of,
  layer_at,
  scan_layers,
  stacked,
)
from hrvlm_jax.language.config import DecoderConfig

Cache = Any  # {'k', 'v': [l b s k p]} when layers are stacked; a list of {'k', 'v'} when unrolled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotation angles of the positions at hand: float32 cos and sin [b t rotary_dim/2]."""

  cos: jax.Array
  sin: jax.Array


def inverse_frequencies(config: DecoderConfig) -> np.ndarray:
  """float32 [rotary_dim/2]: theta^(-2i/r), divided by the linear factor."""
  r = config.rotary_dim
  exponent = np.arange(0, r, 2, dtype=np.float32) / np.float32(r)
  return (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32) / np.float32(
    config.rope_linear_factor)


def rope_table(config: DecoderConfig, positions: Int[Array, 'b t']) -> Rope:
  """Angles position * inverse frequency, in float32."""
  angle = positions.astype(jnp.float32)[..., None] * inverse_frequencies(config)
  return Rope(jnp.cos(angle), jnp.sin(angle))


def apply_rope(x: Float[Array, 'b t h p'], rope: Rope) -> Float[Array, 'b t h p']:
  """Rotates the leading 2*len(cos) components of each head by halves; the rest pass through."""
  half = rope.cos.shape[-1]
  first, second, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
  cos = rope.cos[:, :, None].astype(x.dtype)
  sin = rope.sin[:, :, None].astype(x.dtype)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What every layer of one call shares.

  Attributes:
    rope: angles of the new tokens.
    positions: int [b t] of the new tokens where a table of them is learned, else None.
    valid: bool [b s]: which cache slots (or new tokens, without a cache) hold real tokens.
    segments: int [b t] of the new tokens and kv_segments [b s] of what they read: packed examples,
      a token reads its own; None: one example a row.
    slot: first cache slot of the new tokens; 0 with `fresh` means a prefill.
    fresh: the new tokens attend to each other only, even when they are written to a cache.
  """

  rope: Rope
  valid: jax.Array
  segments: jax.Array | None = None
  kv_segments: jax.Array | None = None
  slot: jax.Array | int = 0
  positions: jax.Array | None = None
  fresh: bool = dataclasses.field(default=True, metadata={'static': True})
  ex: Execution = dataclasses.field(default=HERE, metadata={'static': True})

  @property
  def reads(self) -> dict[str, Any]:
    """What the new tokens may read, as `core.attention.attention` is told."""
    return dict(valid=self.valid, segments=self.segments, kv_segments=self.kv_segments,
                causal=True, slot=0 if self.fresh else self.slot)

  def mask(self, queries: int) -> Bool[Array, 'b 1 t s']:
    """The same as an array, for attention weights that are looked at."""
    return visible(queries, self.valid.shape[1], **self.reads)


def default_positions(valid: Bool[Array, 'b t']) -> Int[Array, 'b t']:
  """cumsum(valid) - 1, and 1 at padded positions, as Hugging Face numbers padded batches."""
  count = jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1
  return jnp.where(valid, count, 1)


class SelfAttention(Module):
  """Grouped-query attention with rotary positions and an explicit cache."""

  def __init__(self, c: DecoderConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
    make = lambda n_in, n_out, bias: Linear(
      n_in, n_out, bias=bias, lora=c.lora, kernel_init=normal(c.init_std),
      param_dtype=param_dtype, rngs=rngs)
    self.q = make(c.width, c.heads * c.head_dim, c.qkv_bias)
    self.k = make(c.width, c.kv_heads * c.head_dim, c.qkv_bias)
    self.v = make(c.width, c.kv_heads * c.head_dim, c.qkv_bias)
    self.out = make(c.heads * c.head_dim, c.width, c.out_bias)

  def project(self, x: Float[Array, 'b t d'], rope: Rope, *, key=None, ex: Execution = HERE):
    """Rotated queries [b t h p], rotated keys and values [b t k p]."""
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    split = lambda y, heads: y.reshape(*y.shape[:-1], heads, self.head_dim)
    q = apply_rope(split(self.q(x, key=keys[0], ex=ex), self.heads), rope)
    k = apply_rope(split(self.k(x, key=keys[1], ex=ex), self.kv_heads), rope)
    return q, k, split(self.v(x, key=keys[2], ex=ex), self.kv_heads)

  def __call__(self, x, context: Context, cache=None, *, key=None):
    """Returns (output [b t d], cache with the new keys and values written at context.slot)."""
    keys = (None, None) if key is None else jax.random.split(key)
    q, k, v = self.project(x, context.rope, key=keys[0], ex=context.ex)
    if cache is not None:
      cache = {'k': _write(cache['k'], k, context), 'v': _write(cache['v'], v, context)}
    if cache is None or context.fresh:
      y = attention(q, k, v, **context.reads, ex=context.ex)
    else:
      y = _read(q, cache, context)
    return self.out(y.reshape(*x.shape[:2], -1), key=keys[1], ex=context.ex), cache


class GatedMlp(Module):
  """down(activation(gate(x)) * up(x))."""

  def __init__(self, c: DecoderConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    make = lambda n_in, n_out: Linear(n_in, n_out, bias=c.mlp_bias, lora=c.lora,
                                      kernel_init=normal(c.init_std), param_dtype=param_dtype,
                                      rngs=rngs)
    self.gate, self.up = make(c.width, c.mlp_width), make(c.width, c.mlp_width)
    self.down = make(c.mlp_width, c.width)
    self.activation = c.activation

  def __call__(self, x, *, key=None, ex: Execution = HERE):
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    rest = lambda gate, up: self.down(activation(self.activation)(gate) * up, key=keys[2], ex=ex)
    return ex.kept_once(rest)(self.gate(x, key=keys[0], ex=ex), self.up(x, key=keys[1], ex=ex))


class DecoderLayer(Module):
  """One block: parallel (`norm1` feeds both branches) or sequential (`norm1`, `norm2`)."""

  def __init__(self, c: DecoderConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    make_norm = LayerNorm if c.norm == 'layernorm' else RMSNorm
    norm = lambda: make_norm(c.width, eps=c.norm_eps, param_dtype=param_dtype, rngs=rngs)
    self.norm1 = norm()
    self.attn = SelfAttention(c, param_dtype=param_dtype, rngs=rngs)
    self.norm2 = None if c.parallel_block else norm()
    self.mlp = GatedMlp(c, param_dtype=param_dtype, rngs=rngs) if c.gated_mlp else Mlp(
      c.width, c.mlp_width, activation=c.activation, bias=c.mlp_bias, lora=c.lora,
      kernel_init=normal(c.init_std), param_dtype=param_dtype, rngs=rngs)
    self.residual_dropout = c.residual_dropout

  def __call__(self, x: Float[Array, 'b t d'], context: Context, cache=None, *, key=None,
               between: Callable[[jax.Array], jax.Array] | None = None):
    """(output, cache); `between`: applied to the residual stream before the MLP."""
    keys = (None,) * 4 if key is None else jax.random.split(key, 4)
    drop = lambda y, sub: dropout(y, self.residual_dropout, sub)
    normed = self.norm1(x)
    y, cache = self.attn(normed, context, cache, key=keys[0])
    y = drop(y, keys[1])
    if self.norm2 is None:
      return y + drop(self.mlp(normed, key=keys[2], ex=context.ex), keys[3]) + x, cache
    x = x + y
    if between is not None:
      x = between(x)
    return x + drop(self.mlp(self.norm2(x), key=keys[2], ex=context.ex), keys[3]), cache


class Head(Module):
  """The output projection: float32 logits, with a bias in Phi."""

  def __init__(self, c: DecoderConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    self.kernel = Param(normal(c.init_std)(rngs.params(), (c.width, c.rows), param_dtype))
    self.bias = Param(zeros(None, (c.rows,), param_dtype)) if c.head_bias else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
  """The output projection as arrays: kernel [d v], bias [v] or None; the first `known` columns are
  tokens, the others fill up. Called, it gives float32 logits, -inf where it is filled up."""

  kernel: jax.Array
  bias: jax.Array | None
  known: int = dataclasses.field(metadata={'static': True})

  def __call__(self, hidden: Float[Array, '... d']) -> Float[Array, '... v']:
    y = jnp.matmul(hidden, self.kernel.astype(hidden.dtype),
                   preferred_element_type=wide_dtype(hidden.dtype))
    y = y if self.bias is None else y + self.bias.astype(y.dtype)
    rows = y.shape[-1]
    return y if rows == self.known else jnp.where(jnp.arange(rows) < self.known, y, -jnp.inf)


class Decoder(Module):
  """Embedding table, layers, final norm and head.

  Args:
    unrolled: layers are a list instead of a stack, for one-token decoding (`unstack` turns
      stacked parameters into these).
  """

  def __init__(self, config: DecoderConfig, *, unrolled: bool = False, param_dtype=jnp.float32,
               rngs: Rngs):
    c = self.config = config
    self.embed = Embedding(c.rows, c.width, std=c.init_std, param_dtype=param_dtype, rngs=rngs)
    self.positions = Embedding(c.max_positions, c.width, std=c.init_std, param_dtype=param_dtype,
                               rngs=rngs) if c.learned_positions else None
    self.blocks = stacked(lambda r: DecoderLayer(c, param_dtype=param_dtype, rngs=r), c.depth,
                          unrolled=unrolled, rngs=rngs)
    make_norm = LayerNorm if c.norm == 'layernorm' else RMSNorm
    self.norm = make_norm(c.width, eps=c.norm_eps, param_dtype=param_dtype, rngs=rngs)
    self.head = None if c.tie_embeddings else Head(c, param_dtype=param_dtype, rngs=rngs)

  def context(
    self, valid: Bool[Array, 'b s'], *, positions=None, slot: jax.Array | int = 0,
    queries: int | None = None, segments=None, ex: Execution = HERE,
  ) -> Context:
    """The context of new tokens at cache slots slot..slot+queries of a row of `valid` slots.

    Without `queries` all slots are new tokens (prefill or training). `positions` [b t] default to
    the count of valid slots before each token.
    """
    fresh = queries is None
    if positions is None:
      positions = default_positions(valid)
      if not fresh:
        positions = jax.lax.dynamic_slice_in_dim(positions, slot, queries, axis=1)
    own = segments
    if segments is not None and not fresh:
      own = jax.lax.dynamic_slice_in_dim(segments, slot, queries, axis=1)
    return Context(rope_table(self.config, positions), valid, own, segments, slot,
                   None if self.positions is None else positions, fresh=fresh, ex=ex)

  def placed(self, x: Float[Array, 'b t d'], context: Context) -> Float[Array, 'b t d']:
    """The residual stream in front of layer 0: learned positions added, where there are some."""
    return x if self.positions is None else x + self.positions(context.positions, dtype=x.dtype)

  def layers(
    self, x: Float[Array, 'b t d'], context: Context, cache: Cache = None, *, start: int = 0,
    stop: int | None = None, key=None,
    before: Callable[[Any, jax.Array], jax.Array] | None = None,
    between: Callable[[Any, jax.Array], jax.Array] | None = None, extras: Any = None,
    placed: bool = False,
  ):
    """Runs layers start..stop of the residual stream.

    Args:
      context: its `ex` is the execution of the layers.
      placed: x has gone through `placed`; else it does in front of layer 0.
      between: as `before`, between the self-attention and the MLP of a layer.
      before: `before(extra_i, x) -> x`, applied to the residual stream in front of every layer,
        `extras` being per-layer inputs in the form of the cache.

    Returns:
      (x, cache of the layers that ran: [stop - start ...] leaves, or None).
    """
    keys = None if key is None else jax.random.split(key, depth_of(self.blocks))
    if keys is not None and isinstance(self.blocks, List):
      keys = list(keys)
    count = depth_of(self.blocks)
    empty = [None] * count if isinstance(self.blocks, List) else None
    pick = lambda value: empty if value is None else value
    if isinstance(self.blocks, List):
      xs = list(zip(pick(cache), pick(keys), pick(extras), strict=True))
    else:
      xs = (cache, keys, extras)

    def body(layer, x, inputs):
      layer_cache, sub, extra = inputs
      if before is not None:
        x = before(extra, x)
      inside = None if between is None else lambda y: between(extra, y)
      return layer(x, context, layer_cache, key=sub, between=inside)

    if start == 0 and not placed:
      x = self.placed(x, context)

    x, new = scan_layers(self.blocks, x, body, xs=xs, start=start, stop=stop,
                         ex=context.ex)
    return x, (None if cache is None else new)

  def __call__(
    self, x: Float[Array, 'b t d'], valid: Bool[Array, 'b t'], *, positions=None, segments=None,
    key=None, ex: Execution = HERE,
  ) -> Float[Array, 'b t d']:
    """Final-normed hidden states of a whole sequence, without a cache."""
    context = self.context(valid, positions=positions, segments=segments, ex=ex)
    x, _ = self.layers(x, context, key=key)
    return self.norm(x)

  @property
  def output(self) -> Output:
    """The output projection, the embedding table turned over where it is tied."""
    kernel = self.embed.embedding[...].T if self.head is None else self.head.kernel[...]
    bias = None if self.head is None or self.head.bias is None else self.head.bias[...]
    return Output(kernel, bias, self.config.vocab_size)

  def logits(self, hidden: Float[Array, '... d']) -> Float[Array, '... v']:
    """float32 logits of final-normed states; padded vocabulary rows are -inf."""
    return self.output(hidden)

  def prefill(self, embeds: Float[Array, 'b t d'], valid: Bool[Array, 'b t'], *, slots: int,
              before=None, between=None, extras=None, ex: Execution = HERE):
    """Reads a padded prompt and fills the first t of `slots` cache slots.

    Returns:
      (float32 logits [b v] after each row's last real token, its final-normed hidden state [b d],
      cache). Rows may be padded on either side.
    """
    held = isinstance(self.blocks, List)
    cache = empty_cache(self.config, len(valid), slots, dtype=embeds.dtype, unrolled=held)
    x, cache = self.layers(embeds, self.context(valid, ex=ex), cache, before=before,
                           between=between, extras=extras)
    hidden = self.norm(jnp.take_along_axis(x, last_true(valid)[:, None, None], axis=1)[:, 0])
    return self.logits(hidden), hidden, cache

  def extend(self, embeds: Float[Array, 'b t d'], valid: Bool[Array, 'b s'], cache: Cache,
             slot: jax.Array | int, *, before=None, between=None, extras=None,
             ex: Execution = HERE):
    """Appends new tokens at cache slots slot..slot+t; one-token decoding is t = 1.

    Args:
      valid: which cache slots hold real tokens, the new ones included.

    Returns:
      (final-normed hidden states [b t d], cache).
    """
    context = self.context(valid, slot=slot, queries=embeds.shape[1], ex=ex)
    x, cache = self.layers(embeds, context, cache, before=before, between=between, extras=extras)
    return self.norm(x), cache

  def step(self, tokens: Int[Array, 'b'], valid: Bool[Array, 'b s'], cache: Cache, slot, *,
           before=None, between=None, extras=None, ex: Execution = HERE):
    """One token per row: (float32 logits [b v], cache)."""
    embeds = self.embed(tokens[:, None], dtype=ex.dtype)
    hidden, cache = self.extend(embeds, valid, cache, slot, before=before, between=between,
                                extras=extras, ex=ex)
    return self.logits(hidden[:, 0]), cache

  def hidden_states(self, x, valid, *, positions=None, ex: Execution = HERE) -> list[jax.Array]:
    """[input, output of each layer, final-normed]: for parity checks and analyses, not training."""
    context = self.context(valid, positions=positions, ex=ex)
    states = [x]
    for index in range(depth_of(self.blocks)):
      x, _ = self.layers(x, context, start=index, stop=index + 1)
      states.append(x)
    return [*states, self.norm(x)]

  def attention_of(self, x, valid, layer: int, *, positions=None,
                   queries: Sequence[int] | None = None, ex: Execution = HERE):
    """Queries, keys, values and float32 attention weights [b h t s] of one layer.

    Only that layer's weights are materialised (FastV, ViCrop, appendix C of Pheye).
    """
    context = self.context(valid, positions=positions, ex=ex)
    x, _ = self.layers(x, context, stop=layer)
    block = layer_at(self.blocks, layer)
    q, k, v = block.attn.project(block.norm1(x), context.rope, ex=ex)
    mask = context.mask(x.shape[1])
    if queries is not None:
      index = jnp.asarray(queries)
      return q, k, v, attention_weights(q[:, index], k, mask=mask[:, :, index])
    return q, k, v, attention_weights(q, k, mask=mask)


def _write(store: jax.Array, new: jax.Array, context: Context) -> jax.Array:
  """The cache [b k s p] with new keys or values [b t k p] from place `context.slot` on."""
  return jax.lax.dynamic_update_slice_in_dim(store, by_head(new).astype(store.dtype),
                                             context.slot, axis=2)


def _read(q: Float[Array, 'b t h p'], cache: dict[str, jax.Array], context: Context) -> jax.Array:
  """Attention of new tokens to the cache, which holds them already: [b t h p]."""
  def read(q, k, v):
    k, v = (by_head(x).astype(q.dtype) for x in (k, v))
    return attention(q, k, v, **context.reads, ex=context.ex)

  if q.shape[1] > 1 or not context.ex.one_cpu:
    return read(q, cache['k'], cache['v'])
  # Always true, which only the run can know: XLA for CPUs joins the write of the cache with what
  # reads it, writes it once more for that, and then copies the cache at every token.
  return jax.lax.cond(jnp.any(context.valid), read, lambda q, k, v: jnp.zeros_like(q), q,
                      cache['k'], cache['v'])


def by_head(x: jax.Array) -> jax.Array:
  """[b s k p] as the cache has it, [b k s p], and back; between two of them nothing is moved."""
  return jnp.swapaxes(x, 1, 2)


def empty_cache(config: DecoderConfig, batch: int, slots: int, *, dtype=jnp.float32,
                unrolled: bool = False) -> Cache:
  """A cache of zeros, [b k s p]; with `unrolled` one dict per layer, else a leading layer axis.

  A head's places lie together: the products of a token with its keys and values take them as they
  lie, where the other order is copied whole at every token (on a CPU 8 to 13 times slower).
  """
  shape = (batch, config.kv_heads, slots, config.head_dim)
  if unrolled:
    return [{'k': jnp.zeros(shape, dtype), 'v': jnp.zeros(shape, dtype)}
            for _ in range(config.depth)]
  shape = (config.depth, *shape)
  return {'k': jnp.zeros(shape, dtype), 'v': jnp.zeros(shape, dtype)}
