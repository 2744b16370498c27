"""The vision-language model: any system's encoder, a projector, a fusion, a decoder.

Parameter paths: `vision/...`, `projector/...`, `fusion/...` (cross-attention only), `language/...`.
A batch is a dict (see `Batch`); everything in it was given a fixed shape on the host.
"""

from __future__ import annotations

from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import Linear, activation, torch_uniform
from hrvlm_jax.core.module import Functional, Module, Rngs, unstack
from hrvlm_jax.language.decoder import Cache, Decoder
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import (
  CrossAttentionFusion,
  ModelConfig,
  PrefixFusion,
  ProjectorConfig,
  TwoPassFusion,
  VisualTokens,
)
from hrvlm_jax.vlm.cross_attention import CrossAttention, Media


class Batch(TypedDict, total=False):
  """Inputs of the model.

  tokens int32 [b t]: ids; 0 at visual places. visual_index int32 [b t]: which visual token of the
  row stands there, -1 for text. valid bool [b t]. labels int32 [b t]: -100 ignored, unshifted.
  segments, positions int32 [b t]: packed rows only. views: the system's arrays. With
  cross-attention `visual_index` is not read, and there may be k rows of text per image: b = k *
  images, the rows of one image one after the other.
  """

  tokens: jax.Array
  visual_index: jax.Array
  valid: jax.Array
  labels: jax.Array
  segments: jax.Array
  positions: jax.Array
  views: dict[str, jax.Array]


class Projector(Module):
  """fc1, activation, fc2, ... : `depth` linear layers, the hidden ones in language width."""

  def __init__(self, config: ProjectorConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    depth = 1 if config.kind == 'linear' else config.depth
    for index in range(depth):
      n_in = config.n_in if index == 0 else config.n_out
      setattr(self, f'fc{index + 1}', Linear(
        n_in, config.n_out, kernel_init=torch_uniform(n_in), bias_init=torch_uniform(n_in),
        param_dtype=param_dtype, rngs=rngs))
    self.depth = depth

  def __call__(self, x: Float[Array, '... i']) -> Float[Array, '... o']:
    for index in range(self.depth):
      if index:
        x = activation(self.config.activation)(x)
      x = getattr(self, f'fc{index + 1}')(x)
    return x


def merge(
  text: Float[Array, 'b t d'], visual: VisualTokens, visual_index: Int[Array, 'b t']
) -> Float[Array, 'b t d']:
  """Replaces the places with visual_index >= 0 by that visual token of their row.

  Places are decided on the host by index arithmetic, never by looking for zero embeddings (the
  original's way, which a zero row of the table would break).
  """
  index = jnp.clip(visual_index, 0, visual.values.shape[1] - 1)
  taken = jnp.take_along_axis(visual.values, index[..., None], axis=1)
  return jnp.where(visual_index[..., None] >= 0, taken.astype(text.dtype), text)


def merge_valid(
  valid: Bool[Array, 'b t'], visual: VisualTokens, visual_index: Int[Array, 'b t']
) -> Bool[Array, 'b t']:
  """Drops places whose visual token is padding (counts that are known on the device only)."""
  index = jnp.clip(visual_index, 0, visual.valid.shape[1] - 1)
  real = jnp.take_along_axis(visual.valid, index, axis=1)
  return valid & ((visual_index < 0) | real)


class VLM(Module):
  """Encoder, projector and decoder joined by prefix fusion.

  Args:
    hold_apart: decoder layers are a list, for generation.
  """

  FUSION = PrefixFusion

  def __init__(self, config: ModelConfig, *, hold_apart: bool = False, param_dtype=jnp.float32,
               rngs: Rngs):
    if not isinstance(config.fusion, self.FUSION):
      raise ValueError(f'{type(self).__name__}: fusion {config.fusion.kind!r} is not a '
                       f'{self.FUSION.__name__}')
    self.config = config
    system = registry.get(config.system)
    self.vision = system.encoder(config.encoder, param_dtype=param_dtype, rngs=rngs)
    self.projector = None if config.projector is None else Projector(
      config.projector, param_dtype=param_dtype, rngs=rngs)
    self.language = Decoder(config.text, hold_apart=hold_apart, param_dtype=param_dtype, rngs=rngs)

  def encode(self, views: dict[str, jax.Array], *, key=None, ex: Execution = HERE
             ) -> VisualTokens:
    """Visual tokens in language width, [b n d]."""
    visual = self.vision(views, key=key, ex=ex)
    if self.projector is None:
      return visual
    return VisualTokens(self.projector(visual.values), visual.valid, visual.info)

  def embed(self, batch: Batch, visual: VisualTokens, *, ex: Execution = HERE):
    """(embeddings [b t d], valid [b t]) of the prompt with its visual tokens in place."""
    text = self.language.embed(batch['tokens'], dtype=ex.dtype)
    index = batch['visual_index']
    return merge(text, visual, index), merge_valid(batch['valid'], visual, index)

  def __call__(self, batch: Batch, *, key=None, ex: Execution = HERE) -> Float[Array, 'b t d']:
    """Final-normed hidden states of every place; `logits` turns them into scores.

    Args:
      key: dropout key; None at inference.
    """
    keys = (None, None) if key is None else jax.random.split(key)
    visual = self.encode(batch['views'], key=keys[0], ex=ex)
    embeds, valid = self.embed(batch, visual, ex=ex)
    return self.language(embeds, valid, positions=batch.get('positions'),
                         segments=batch.get('segments'), key=keys[1], ex=ex)

  def logits(self, hidden: Float[Array, '... d']) -> Float[Array, '... v']:
    """float32 logits."""
    return self.language.logits(hidden)

  def prompt(self, batch: Batch, *, ex: Execution = HERE):
    """What generation needs of a batch: (embeddings, valid, extras for `prefill` and `step`)."""
    embeds, valid = self.embed(batch, self.encode(batch['views'], ex=ex), ex=ex)
    return embeds, valid, {}

  def info(self, batch: Batch, *, ex: Execution = HERE) -> dict[str, Any]:
    """What overlays draw of a batch: the encoder's info."""
    return self.encode(batch['views'], ex=ex).info

  def prefill(self, embeds, valid, *, slots: int, ex: Execution = HERE, **extras):
    """See `Decoder.prefill`."""
    return self.language.prefill(embeds, valid, slots=slots, ex=ex, **extras)

  def step(self, tokens, valid, cache: Cache, slot, *, ex: Execution = HERE, **extras):
    """See `Decoder.step`."""
    return self.language.step(tokens, valid, cache, slot, ex=ex, **extras)


class CrossAttentionVLM(VLM):
  """Encoder and decoder joined by cross-attention blocks; the prompt holds text alone."""

  FUSION = CrossAttentionFusion

  def __init__(self, config: ModelConfig, *, hold_apart: bool = False, param_dtype=jnp.float32,
               rngs: Rngs):
    super().__init__(config, hold_apart=hold_apart, param_dtype=param_dtype, rngs=rngs)
    self.fusion = CrossAttention(config.fusion, config.text, hold_apart=hold_apart,
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


def build(config: ModelConfig, *, hold_apart: bool = False, param_dtype=jnp.float32) -> Functional:
  """The model of a config, chosen by its fusion, as pure functions (`init`, `apply`).

  Without a language model it is the system's own (`System.alone`).

  Raises:
    UserError: no language model, and a system that has no model without one.
  """
  if config.text is None:
    alone = registry.get(config.system).alone
    if alone is None:
      raise UserError(f'model.text is none, but {config.system} needs a language model')
    return Functional(lambda rngs: alone(config.encoder, param_dtype=param_dtype, rngs=rngs))
  kind = CrossAttentionVLM
  if isinstance(config.fusion, TwoPassFusion):
    from hrvlm_jax.vlm.two_pass import TwoPassVLM as kind  # it builds on this module
  elif isinstance(config.fusion, PrefixFusion):
    kind = VLM
  return Functional(lambda rngs: kind(config, hold_apart=hold_apart, param_dtype=param_dtype,
                                      rngs=rngs))


def hold_apart(params: dict[str, Any]) -> dict[str, Any]:
  """Training parameters -> parameters of `build(..., hold_apart=True)`."""
  apart = lambda part: part | {'blocks': unstack(part['blocks'])}
  return params | {name: apart(params[name]) for name in ('language', 'fusion') if name in params}
