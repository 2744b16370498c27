"""The vision-language model: any system's encoder, a projector, a fusion, a decoder.

Parameter paths: `vision/...`, `projector/...`, `fusion/...` (cross-attention only), `language/...`.
A batch is a dict (see `Batch`); everything in it was given a fixed shape on the host.
"""

from __future__ import annotations

import functools
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import Linear, activation, torch_uniform
from hrvlm_jax.core.module import Functional, Module, Rngs, unstack
from hrvlm_jax.core.registry import load_object
from hrvlm_jax.language.decoder import Cache, Decoder, Output
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig, VisualTokens


class Batch(TypedDict, total=False):
  """Inputs of the model.

  tokens int32 [b t]: ids; 0 at visual positions. visual_index int32 [b t]: which visual token of
  the row stands there, -1 for text. valid bool [b t]. labels int32 [b t]: -100 ignored, unshifted.
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
  """Replaces the positions with visual_index >= 0 by that visual token of their row.

  Positions are decided on the host by index arithmetic, never by looking for zero embeddings (the
  original's way, which a zero row of the table would break).
  """
  index = jnp.clip(visual_index, 0, visual.values.shape[1] - 1)
  taken = jnp.take_along_axis(visual.values, index[..., None], axis=1)
  return jnp.where(visual_index[..., None] >= 0, taken.astype(text.dtype), text)


def merge_valid(
  valid: Bool[Array, 'b t'], visual: VisualTokens, visual_index: Int[Array, 'b t']
) -> Bool[Array, 'b t']:
  """Drops positions whose visual token is padding (counts that are known on the device only)."""
  index = jnp.clip(visual_index, 0, visual.valid.shape[1] - 1)
  real = jnp.take_along_axis(visual.valid, index, axis=1)
  return valid & ((visual_index < 0) | real)


class VLM(Module):
  """Encoder, projector and decoder joined by prefix fusion.

  Args:
    unrolled: decoder layers are a list, for generation.
  """

  def __init__(self, config: ModelConfig, *, unrolled: bool = False, param_dtype=jnp.float32,
               rngs: Rngs):
    if not isinstance(self, load_object(config.fusion.model, f'fusion {config.fusion.kind}')):
      raise ValueError(f'{type(self).__name__}: fusion {config.fusion.kind!r} has another model, '
                       f'{config.fusion.model}')
    self.config = config
    system = registry.get(config.system)
    self.vision = system.encoder(config.encoder, param_dtype=param_dtype, rngs=rngs)
    self.projector = None if config.projector is None else Projector(
      config.projector, param_dtype=param_dtype, rngs=rngs)
    self.language = Decoder(config.text, unrolled=unrolled, param_dtype=param_dtype, rngs=rngs)

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
    """Final-normed hidden states of every position; `logits` turns them into scores.

    Args:
      key: dropout key; None at inference.
    """
    keys = (None, None) if key is None else jax.random.split(key)
    visual = self.encode(batch['views'], key=keys[0], ex=ex)
    embeds, valid = self.embed(batch, visual, ex=ex)
    return self.language(embeds, valid, positions=batch.get('positions'),
                         segments=batch.get('segments'), key=keys[1], ex=ex)

  @property
  def output(self) -> Output:
    """The output projection."""
    return self.language.output

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

  def held(self, extras: dict[str, Any]) -> dict[str, Any]:
    """What of a prompt's extras every `step` reads again: a server keeps it beside the cache."""
    return extras


# Shapes of all parameters take a second and more, and one start or conversion asks several times.
@functools.lru_cache(maxsize=16)
def _joined(kind, system, config: ModelConfig, unrolled: bool, dtype: str) -> Functional:
  """The model of a config; the system is part of the key, for another may take its name."""
  del system
  return Functional(lambda rngs: kind(config, unrolled=unrolled, param_dtype=jnp.dtype(dtype),
                                      rngs=rngs))


@functools.lru_cache(maxsize=4)
def _alone(make, encoder, dtype: str) -> Functional:
  return Functional(lambda rngs: make(encoder, param_dtype=jnp.dtype(dtype), rngs=rngs))


def build(config: ModelConfig, *, unrolled: bool = False, param_dtype=jnp.float32) -> Functional:
  """The model of a config, chosen by its fusion, as pure functions (`init`, `apply`).

  Without a language model it is the system's own (`System.alone`).

  Raises:
    UserError: no language model, and a system that has no model without one; visual tokens of
      another width than what reads them.
  """
  if config.text is None:
    alone = registry.get(config.system).alone
    if alone is None:
      raise UserError(f'model.text is none, but {config.system} needs a language model')
    return _alone(alone, config.encoder, jnp.dtype(param_dtype).name)
  kind = load_object(config.fusion.model, f'fusion {config.fusion.kind}')
  fn = _joined(kind, registry.get(config.system), config, unrolled, jnp.dtype(param_dtype).name)
  # Last: what cannot be joined at all says so itself.
  read, width = config.fusion.reads(config), registry.get(config.system).width(config.encoder)
  if None not in (read, width) and width != read[1]:
    raise UserError(f'model.{read[0]} is {read[1]}, but the visual tokens of {config.system} with '
                    f'these settings have width {width}; set the one or the other')
  return fn


def unroll(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
  """Training parameters -> parameters of `build(config, unrolled=True)`."""
  apart = lambda part: part | {'blocks': unstack(part['blocks'])}
  return params | {name: apart(params[name]) for name in config.fusion.unrolled}
