"""Cross-attention fusion: dense blocks between decoder layers read the visual tokens.

Source: Pheye (arXiv 2501.02584), section 3.2; `miguelscarv/pheye: pheye_builder/xattn.py,
wrapper_lm.py`. The original computes keys and values of the visual tokens anew at every generated
token; here they are computed once per image (`CrossAttention.media`).

Axis letters: b images, r text rows per image (beams, or several texts of one image), n = b * r text
rows, t text tokens, m visual tokens, h heads, p head width, d text width, e visual width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hrvlm_jax.core.attention import attention, attention_weights
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import LayerNorm, Linear, activation, normal
from hrvlm_jax.core.module import (
  List,
  Module,
  Rngs,
  depth_of,
  grouped,
  layer_at,
  scan_layers,
  stacked,
)
from hrvlm_jax.language.config import DecoderConfig
from hrvlm_jax.language.decoder import Cache, Context, Decoder, by_head
from hrvlm_jax.systems.contract import ModelConfig, VisualTokens
from hrvlm_jax.systems.fusion import CrossAttentionFusion
from hrvlm_jax.vlm.model import VLM, Batch

HEAD_WIDTH = 64  # fixes the number of heads and the scale, also when `reduce` narrows the heads
_INIT = 0.01


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Media:
  """Keys and values of the visual tokens, computed once and read at every generated token.

  Attributes:
    keys, values: [b h m p] of every block (a list), as the cache of the language model lies.
    valid: bool [b m], tokens that may be read.
  """

  keys: list[Any]
  values: list[Any]
  valid: Any


class MediaAttention(Module):
  """Text queries, visual keys and values; no gate, no positions, no causal mask.

  The number of heads is max(d, e) / 64, their joint width max(d, e) / reduce, the scale 1/8.
  """

  def __init__(self, width: int, fusion: CrossAttentionFusion, depth: int, *,
               param_dtype=jnp.float32, rngs: Rngs):
    largest = max(width, fusion.width)
    self.heads, inner = largest // HEAD_WIDTH, largest // fusion.reduce
    if self.heads < 1 or inner % self.heads:
      raise ValueError(
        f'cross-attention: the larger of text width {width} and visual width {fusion.width} gives '
        f'{self.heads} heads of {HEAD_WIDTH}, which must be at least 1 and divide the inner width '
        f'{inner} (reduce={fusion.reduce})')
    make = lambda n_in, n_out, std: Linear(n_in, n_out, kernel_init=normal(std),
                                           param_dtype=param_dtype, rngs=rngs)
    self.q = make(width, inner, _INIT)
    self.k, self.v = make(fusion.width, inner, _INIT), make(fusion.width, inner, _INIT)
    self.out = make(inner, width, _out_std(depth))

  def keys_values(self, media: Float[Array, 'b m e']):
    """(keys, values), each [b h m p]."""
    return by_head(self._split(self.k(media))), by_head(self._split(self.v(media)))

  def __call__(self, x: Float[Array, 'n t d'], keys: Float[Array, 'b h m p'],
               values: Float[Array, 'b h m p'], valid: Bool[Array, 'b m'], *,
               ex: Execution = HERE) -> Float[Array, 'n t d']:
    y = attention(self._queries(x, keys), by_head(keys), by_head(values), valid=valid,
                  scale=HEAD_WIDTH**-0.5, ex=ex)
    return self.out(y.reshape(*x.shape[:2], -1))

  def weights(self, x, keys, valid) -> Float[Array, 'n h t m']:
    """The float32 attention probabilities."""
    n, t = x.shape[:2]
    probs = attention_weights(self._queries(x, keys), by_head(keys), mask=valid[:, None, None],
                              scale=HEAD_WIDTH**-0.5)
    b, h, _, m = probs.shape
    return jnp.swapaxes(probs.reshape(b, h, -1, t, m), 1, 2).reshape(n, h, t, m)

  def _split(self, y):
    return y.reshape(*y.shape[:-1], self.heads, -1)

  def _queries(self, x, keys):
    """[b r*t h p]: the rows of one image become one long row, so that nothing is replicated."""
    rows, images = x.shape[0], keys.shape[0]
    if rows % images:
      raise ValueError(f'cross-attention: {rows} text rows are no multiple of {images} images')
    q = self._split(self.q(x))
    return q.reshape(images, -1, *q.shape[2:])


class FeedForward(Module):
  """fc2(gelu(fc1(x))) with the exact gelu; the output starts small."""

  def __init__(self, width: int, hidden: int, depth: int, *, param_dtype=jnp.float32, rngs: Rngs):
    make = lambda n_in, n_out, std: Linear(n_in, n_out, kernel_init=normal(std),
                                           param_dtype=param_dtype, rngs=rngs)
    self.fc1, self.fc2 = make(width, hidden, _INIT), make(hidden, width, _out_std(depth))

  def __call__(self, x: Float[Array, '... d']) -> Float[Array, '... d']:
    return self.fc2(activation('gelu')(self.fc1(x)))


class CrossBlock(Module):
  """x += attn(norm1(x), media); x += mlp(norm2(x)). The visual tokens are not normed.

  Inside a layer (`fusion.inside`) it is the attention alone: the layer's own MLP follows.
  """

  def __init__(self, text: DecoderConfig, fusion: CrossAttentionFusion, *,
               param_dtype=jnp.float32, rngs: Rngs):
    norm = lambda: LayerNorm(text.width, eps=1e-5, param_dtype=param_dtype, rngs=rngs)
    options = dict(param_dtype=param_dtype, rngs=rngs)
    self.norm1, self.norm2 = norm(), None if fusion.inside else norm()
    self.attn = MediaAttention(text.width, fusion, text.depth, **options)
    self.mlp = None if fusion.inside else FeedForward(
      text.width, 4 * text.width // fusion.reduce, text.depth, **options)

  def __call__(self, x: Float[Array, 'n t d'], keys, values, valid, *, ex: Execution = HERE):
    """One block over keys and values of `attn.keys_values`."""
    x = x + self.attn(self.norm1(x), keys, values, valid, ex=ex)
    return x if self.mlp is None else x + self.mlp(self.norm2(x))


class _Group(Module):
  """Decoder layers and the block in front of their last one."""

  def __init__(self, layers: Module, block: Module):
    self.layers, self.block = layers, block


class CrossAttention(Module):
  """The blocks of a model and the way of the residual stream through them and the decoder.

  Args:
    unrolled: blocks are a list, for generation (as the decoder's layers).
  """

  def __init__(self, fusion: CrossAttentionFusion, text: DecoderConfig, *,
               unrolled: bool = False, param_dtype=jnp.float32, rngs: Rngs):
    self.interval, self.at = fusion.interval, fusion.layers(text.depth)
    self.inside = fusion.inside
    self.blocks = stacked(lambda r: CrossBlock(text, fusion, param_dtype=param_dtype, rngs=r),
                          len(self.at), unrolled=unrolled, rngs=rngs)

  def media(self, visual: VisualTokens) -> Media:
    """Keys and values of every block."""
    pairs = [block.attn.keys_values(visual.values) for block in self._blocks()]
    return Media([k for k, _ in pairs], [v for _, v in pairs], visual.valid)

  def hooks(self, decoder: Decoder, media: Media, *, ex: Execution = HERE) -> dict[str, Any]:
    """`before` (or `between`) and `extras` for a decoder whose layers are unrolled."""
    if not isinstance(decoder.blocks, List):
      raise ValueError('cross-attention: generation needs layers unrolled; use vlm.model.build('
                       'config, unrolled=True) and vlm.model.unroll(config, params)')
    extras: list[Any] = [None] * depth_of(decoder.blocks)
    for layer, *extra in zip(self.at, self._blocks(), media.keys, media.values, strict=True):
      extras[layer] = extra

    def before(extra, x):
      if extra is None:
        return x
      block, keys, values = extra
      return block(x, keys, values, media.valid, ex=ex)

    return {'between' if self.inside else 'before': before, 'extras': extras}

  def run(self, decoder: Decoder, x: Float[Array, 'n t d'], context: Context,
          visual: VisualTokens, *, key=None) -> Float[Array, 'n t d']:
    """All decoder layers and blocks, without a cache; before the final norm.

    Stacked layers run as one scan over groups of `interval` layers, the block standing in front of
    a group's last layer; layers before the first and after the last group have no block. Keys and
    values are made inside the group, so that those of one block exist at a time.
    """
    ex = context.ex
    if isinstance(decoder.blocks, List):
      return decoder.layers(x, context, **self.hooks(decoder, self.media(visual), ex=ex))[0]
    size, depth = self.interval, depth_of(decoder.blocks)
    start, stop = self.at[0] + 1 - size, self.at[-1] + 1
    keys = None if key is None else jax.random.split(key, depth)
    grouped_keys = None if keys is None else keys[start:stop].reshape(-1, size)
    plain = lambda layer, x, sub: layer(x, context, key=sub)

    def body(group, x, subs):
      def last(layer, x, sub):
        pair = group.block.attn.keys_values(visual.values)
        block = lambda y: group.block(y, *pair, visual.valid, ex=ex)
        if self.inside:
          return layer(x, context, key=sub, between=block)
        return layer(block(x), context, key=sub)

      if size > 1:
        x, _ = scan_layers(group.layers, x, plain, xs=subs, stop=size - 1, ex=ex)
      return scan_layers(group.layers, x, last, xs=subs, start=size - 1, ex=ex)

    x = decoder.placed(x, context)
    x, _ = decoder.layers(x, context, stop=start, key=key, placed=True) if start else (x, None)
    groups = _Group(grouped(decoder.blocks, size, start=start, stop=stop), self.blocks)
    x, _ = scan_layers(groups, x, body, xs=grouped_keys, ex=ex.replace(remat='none'))
    if stop < depth:
      x, _ = decoder.layers(x, context, start=stop, key=key)
    return x

  def attention(self, decoder: Decoder, x: Float[Array, 'n t d'], context: Context,
                visual: VisualTokens, *, ranges: int | None = None
                ) -> Float[Array, 'l n h t m']:
    """Attention probabilities of every block, float32, l being the blocks.

    Args:
      ranges: sum over that many equal ranges of visual tokens (sub-images), one block at a time;
        the last axis then has `ranges` entries.
    """
    if self.inside:
      raise UserError('attention inside the layers (fusion.inside) is not looked at; analyses read '
                      'blocks in front of layers')
    found, start = [], 0
    x = decoder.placed(x, context)
    for index, layer in enumerate(self.at):
      if layer > start:
        x, _ = decoder.layers(x, context, start=start, stop=layer, placed=True)
      block = layer_at(self.blocks, index)
      keys, values = block.attn.keys_values(visual.values)
      probs = block.attn.weights(block.norm1(x), keys, visual.valid)
      if ranges is not None:
        probs = probs.reshape(*probs.shape[:-1], ranges, -1).sum(-1)
      found.append(probs)
      x, start = block(x, keys, values, visual.valid, ex=context.ex), layer
    return jnp.stack(found)

  def _blocks(self) -> list[Module]:
    return [layer_at(self.blocks, index) for index in range(len(self.at))]


class CrossAttentionVLM(VLM):
  """Encoder and decoder joined by cross-attention blocks; the prompt holds text alone."""

  def __init__(self, config: ModelConfig, *, unrolled: bool = False, param_dtype=jnp.float32,
               rngs: Rngs):
    super().__init__(config, unrolled=unrolled, param_dtype=param_dtype, rngs=rngs)
    self.fusion = CrossAttention(config.fusion, config.text, unrolled=unrolled,
                                 param_dtype=param_dtype, rngs=rngs)

  def embed(self, batch: Batch, visual: VisualTokens | None = None, *, ex: Execution = HERE):
    """(embeddings [b t d], valid [b t]) of the text."""
    del visual
    if batch.get('segments') is not None:
      raise UserError('cross-attention reads one image per row: rows packed of several examples '
                      'are not supported; switch packing off')
    return self.language.embed(batch['tokens'], dtype=ex.dtype), batch['valid']

  def __call__(self, batch: Batch, *, key=None, ex: Execution = HERE) -> Float[Array, 'b t d']:
    """See `VLM.__call__`."""
    keys = (None, None) if key is None else jax.random.split(key)
    embeds, valid = self.embed(batch, ex=ex)
    visual = self.encode(batch['views'], key=keys[0], ex=ex)
    context = self.language.context(valid, positions=batch.get('positions'), ex=ex)
    x = self.fusion.run(self.language, embeds, context, visual, key=keys[1])
    return self.language.norm(x)

  def prompt(self, batch: Batch, *, ex: Execution = HERE):
    """See `VLM.prompt`; the extras hold keys and values of the visual tokens, made once."""
    embeds, valid = self.embed(batch, ex=ex)
    media = self.fusion.media(self.encode(batch['views'], ex=ex))
    return embeds, valid, {'media': media}

  def prefill(self, embeds, valid, *, slots: int, media: Media, ex: Execution = HERE):
    """See `Decoder.prefill`."""
    hooks = self.fusion.hooks(self.language, media, ex=ex)
    return self.language.prefill(embeds, valid, slots=slots, ex=ex, **hooks)

  def step(self, tokens, valid, cache: Cache, slot, *, media: Media, ex: Execution = HERE):
    """See `Decoder.step`; rows may be a multiple of the images (beams)."""
    hooks = self.fusion.hooks(self.language, media, ex=ex)
    return self.language.step(tokens, valid, cache, slot, ex=ex, **hooks)

  def attention(self, batch: Batch, *, ranges: int | None = None, ex: Execution = HERE):
    """Cross-attention probabilities of a prompt with its answer, see `CrossAttention.attention`."""
    embeds, valid = self.embed(batch, ex=ex)
    context = self.language.context(valid, positions=batch.get('positions'), ex=ex)
    visual = self.encode(batch['views'], ex=ex)
    return self.fusion.attention(self.language, embeds, context, visual, ranges=ranges)

  def info(self, batch: Batch, *, ex: Execution = HERE) -> dict[str, Any]:
    """`attention_share` float32 [b sub-images]: where the text of a row looks.

    Mean over blocks, heads and the row's tokens of the attention on each sub-image; sums to 1.
    """
    ranges = getattr(self.config.encoder, 'sub_images', 1)
    probs = self.attention(batch, ranges=ranges, ex=ex).mean(axis=(0, 2))
    weight = batch['valid'].astype(jnp.float32)
    return {'attention_share': jnp.einsum('btr,bt->br', probs, weight / weight.sum(1)[:, None])}


def _out_std(depth: int) -> float:
  """Output matrices start near zero: 0.01 / sqrt(2 * max(depth, 36))."""
  return _INIT / (2 * max(depth, 36)) ** 0.5
