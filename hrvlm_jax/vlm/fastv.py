"""FastV: half of the visual tokens leave the language model after its first layers.

Source: `pkunlp-icler/FastV: src/FastV/lmms-eval-with-kvcache/fastv_kvcache.py`; attention of the
last query position alone, as its issue 14 explains (the paper's text says all). A step between any
system whose visual tokens stand in the prompt and any decoder, at inference only; the released form
with a cache is followed. Of a two-pass model the second pass is pruned, as in PS3's comparison.

Layers below `layer` run on everything and keep a cache of all slots; the rest run on the kept
tokens with their original positions and have shorter caches. Both lengths are static: how many
positions a batch of prompts has less there is the length of its array `dropped`. Axis letters: b
rows, t prompt positions, s cache slots, d width, n dropped positions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from hrvlm_jax.core.attention import attention_weights, last_true
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.module import Functional, depth_of, layer_at
from hrvlm_jax.core.registry import load_object
from hrvlm_jax.language.decoder import Decoder, default_positions, empty_cache
from hrvlm_jax.language.generate import Generator
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vlm.answer import Answerer, Items
from hrvlm_jax.vlm.model import VLM, Batch
from hrvlm_jax.vlm.two_pass import TwoPassVLM

_STEP = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastV:
  """Settings.

  Attributes:
    layer: K; layers 0..K-1 see everything. The original keeps random tokens for K = 0, which is
      not offered.
    ratio: share of the visual tokens that leave.
  """

  layer: int = 2
  ratio: float = 0.5

  def __post_init__(self):
    problems = []
    if self.layer < 1:
      problems.append(f'layer must be at least 1, got {self.layer}')
    if not 0 <= self.ratio < 1:
      problems.append(f'ratio must lie in [0, 1), got {self.ratio}')
    if problems:
      raise ValueError('FastV: ' + '; '.join(problems))


def dropped_positions(visual: Bool[np.ndarray, 'b t'], ratio: float) -> int:
  """How many positions the later layers have less: what every row of a batch loses.

  Rounded down to a multiple of 16, so that few lengths are compiled.
  """
  counts = visual.sum(axis=1).astype(np.float32)
  return int((counts - np.round(np.float32(1 - ratio) * counts)).min()) // _STEP * _STEP


def last_attention(decoder: Decoder, x: Float[Array, 'b t d'], valid: Bool[Array, 'b t'],
                   layer: int, *, ex: Execution = HERE) -> Float[Array, 'b h t']:
  """Attention of each row's last real position in one layer, x being that layer's input."""
  context = decoder.context(valid, ex=ex)
  block = layer_at(decoder.blocks, layer)
  if layer == 0:
    x = decoder.placed(x, context)
  q, k, _ = block.attn.project(block.norm1(x), context.rope, ex=ex)
  one = jnp.take_along_axis(q, last_true(valid)[:, None, None, None], axis=1)
  return attention_weights(one, k, mask=valid[:, None, None])[:, :, 0]


def kept_positions(
  score: Float[Array, 'b t'], visual: Bool[Array, 'b t'], valid: Bool[Array, 'b t'], ratio: float,
  length: int,
) -> tuple[Int[Array, 'b k'], Bool[Array, 'b k']]:
  """Positions that stay, in their order, and which of the `length` slots they fill.

  All text stays, and of the visual positions those with the highest scores: round((1 - ratio) * n)
  of a row's n.
  """
  visual = visual & valid
  keep = jnp.round((1 - ratio) * visual.sum(axis=1)).astype(jnp.int32)
  order = jnp.argsort(jnp.where(visual, -score, jnp.inf), axis=1, stable=True)
  rank = jnp.argsort(order, axis=1, stable=True)
  stays = valid & (~visual | (rank < keep[:, None]))
  kept = jnp.argsort(~stays, axis=1, stable=True)[:, :length]
  return kept, jnp.take_along_axis(stays, kept, axis=1)


class _Dropping(VLM):
  """A model with visual tokens in its prompt whose prefill drops some after `fastv.layer` layers.

  In front of `VLM` or of a class that derives from it.
  """

  def __init__(self, config: ModelConfig, fastv: FastV, **options):
    super().__init__(config, **options)
    self.fastv = fastv

  def whole_prompt(self, batch: Batch, *, ex: Execution = HERE):
    """(embeddings, valid) of all positions of the prompt."""
    return super().prompt(batch, ex=ex)[:2]

  def prompt(self, batch: Batch, *, ex: Execution = HERE):
    """See `VLM.prompt`; the extras say which positions are visual, and how many are dropped."""
    embeds, valid = self.whole_prompt(batch, ex=ex)
    return embeds, valid, {'visual': batch['visual_index'] >= 0, 'dropped': batch['dropped']}

  def prefill(self, embeds, valid, *, slots: int, visual: Bool[Array, 'b t'],
              dropped: Bool[Array, 'n'], ex: Execution = HERE):
    """See `Decoder.prefill`; the cache is {'head', 'tail', 'valid'}."""
    decoder, f = self.language, self.fastv
    batch, length = valid.shape
    depth, less = depth_of(decoder.blocks), len(dropped)
    room = length - less
    make = lambda size: empty_cache(decoder.config, batch, size, dtype=embeds.dtype,
                                    unrolled=True)
    context = decoder.context(valid, ex=ex)
    none: list[Any] = [None] * depth
    head = make(slots)[:f.layer]
    x, first = decoder.layers(embeds, context, [*head[:-1], *none[f.layer - 1:]],
                              stop=f.layer - 1) if f.layer > 1 else (embeds, [])
    score = last_attention(decoder, x, valid, f.layer - 1, ex=ex).mean(axis=1)
    own = [*none[:f.layer - 1], head[-1], *none[f.layer:]]
    x, last_head = decoder.layers(x, context, own, start=f.layer - 1, stop=f.layer)
    index, real = kept_positions(score, visual, valid, f.ratio, room)
    positions = jnp.take_along_axis(default_positions(valid), index, axis=1)
    x = jnp.take_along_axis(x, index[..., None], axis=1)
    tail = [*none[:f.layer], *make(slots - less)[f.layer:]]
    x, tail = decoder.layers(x, decoder.context(real, positions=positions, ex=ex), tail,
                             start=f.layer)
    hidden = decoder.norm(jnp.take_along_axis(x, last_true(real)[:, None, None], axis=1)[:, 0])
    kept = jnp.pad(real, ((0, 0), (0, slots - length)))
    return decoder.logits(hidden), hidden, {'head': [*first, *last_head], 'tail': tail,
                                            'valid': kept}

  def step(self, tokens, valid, cache, slot, *, visual, dropped, ex: Execution = HERE):
    """See `Decoder.step`: positions go on from the original length."""
    del visual
    decoder, f = self.language, self.fastv
    none: list[Any] = [None] * depth_of(decoder.blocks)
    x = decoder.embed(tokens[:, None], dtype=ex.dtype)
    context = decoder.context(valid, slot=slot, queries=1, ex=ex)
    x, head = decoder.layers(x, context, [*cache['head'], *none[f.layer:]], stop=f.layer)
    short = slot - len(dropped)
    kept = cache['valid'].at[:, short].set(True)
    positions = jax.lax.dynamic_slice_in_dim(default_positions(valid), slot, 1, axis=1)
    context = decoder.context(kept, positions=positions, slot=short, queries=1, ex=ex)
    x, tail = decoder.layers(x, context, [*none[:f.layer], *cache['tail']], start=f.layer)
    return decoder.logits(decoder.norm(x)[:, 0]), {'head': head, 'tail': tail, 'valid': kept}


class FastVVLM(_Dropping, VLM):
  """A prefix model that drops visual tokens."""


class FastVTwoPassVLM(_Dropping, TwoPassVLM):
  """A two-pass model that drops visual tokens of its second pass, which is computed whole."""

  def whole_prompt(self, batch: Batch, *, ex: Execution = HERE):
    """See `_Dropping.whole_prompt`; nothing of the first pass's cache is used again."""
    visual, _, _ = self.look(batch, ex=ex)
    return self.embed(batch, visual, ex=ex)


def build(config: ModelConfig, fastv: FastV, *, param_dtype=jnp.float32) -> Functional:
  """The model for generation (layers unrolled), as pure functions; its parameters are those of
  `vlm.model.build(config, unrolled=True)`.

  Raises:
    UserError: a model without visual tokens in its prompt, or with too few layers.
  """
  problems = []
  kind = load_object(config.fusion.model, f'fusion {config.fusion.kind}')
  kind = {VLM: FastVVLM, TwoPassVLM: FastVTwoPassVLM}.get(kind)
  if kind is None:
    problems.append('it prunes visual tokens of the prompt; fusion '
                    f'{config.fusion.kind!r} has none')
  if config.text is not None and fastv.layer >= config.text.depth:
    problems.append(f'layer {fastv.layer} leaves no layer of {config.text.depth} to run on less')
  if problems:
    raise UserError('FastV cannot work here: ' + '; '.join(problems))
  return Functional(lambda rngs: kind(config, fastv, unrolled=True, param_dtype=param_dtype,
                                      rngs=rngs))


class FastVAnswerer(Answerer):
  """The same model, answering with fewer visual tokens in its later layers.

  Raises:
    UserError: as `build`.
  """

  def __init__(self, answerer: Answerer, fastv: FastV = FastV()):
    vars(self).update(vars(answerer))
    old, self.fastv = answerer.generator, fastv
    self.generator = Generator(build(answerer.config, fastv), old.params, ex=old.ex)
    self.methods = {**answerer.methods, 'fastv': dataclasses.asdict(fastv)}

  def batch(self, items: Items) -> dict[str, Any]:
    """See `Answerer.batch`; the length of `dropped` is that of the positions which leave."""
    batch = super().batch(items)
    dropped = dropped_positions((batch['visual_index'] >= 0) & batch['valid'], self.fastv.ratio)
    return batch | {'dropped': np.zeros(dropped, bool)}
