"""Look, ask, look closer: the language model says where the encoder encodes in high resolution.

Pass 1 reads the low-resolution tokens and the question. The final-normed state of the question's
last token becomes the selection prompt; the encoder then adds the tokens of the patches that match
it, and pass 2 reads everything. What both passes share is computed once: the encoder's
low-resolution states, and, in generation, the decoder's keys and values up to and including the
low-resolution tokens of the first image, which no later token can change.

In training the text before the high-resolution tokens runs twice: pass 1 has no gradient (the
original's rule), pass 2 needs one, so keys and values of the first cannot serve the second.

Source: `NVlabs/VILA: llava/model/llava_arch.py` (`LlavaTopDownMetaForCausalLM`). Axis letters: b
rows, t positions of a row, s positions of pass 1, r positions that pass 2 adds, d width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hrvlm_jax.core.attention import first_true, last_true
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.module import List, Rngs, stop_gradient
from hrvlm_jax.language.decoder import Cache, Decoder, empty_cache
from hrvlm_jax.systems.contract import ModelConfig, VisualTokens
from hrvlm_jax.vlm.model import VLM, Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FirstPass:
  """What pass 1 leaves behind.

  Attributes:
    state: [b d] final-normed state of the last token of the first question.
    index: int32 [b s] place of the row each slot of pass 1 stands for.
    kept: bool [b s] slots whose keys and values pass 2 may use.
    shared: bool [b t] the same as positions of the row.
    cache: keys and values of pass 1, when asked for.
  """

  state: jax.Array
  index: jax.Array
  kept: jax.Array
  shared: jax.Array
  cache: Cache


class TwoPassVLM(VLM):
  """Encoder and decoder joined by prefix fusion in two passes.

  The batch may hold `prompt_end` int32 [b], the place of the last token of each first question;
  without it the last token of a row is taken.
  """

  def __init__(self, config: ModelConfig, *, unrolled: bool = False, param_dtype=jnp.float32,
               rngs: Rngs):
    super().__init__(config, unrolled=unrolled, param_dtype=param_dtype, rngs=rngs)
    missing = [name for name in ('low', 'high', 'arrange', 'prompts')
               if not hasattr(self.vision, name)]
    if missing or self.projector is not None:
      raise UserError(
        f'two-pass fusion needs an encoder that looks twice (methods {missing} are missing) and '
        f'projects by itself; system {config.system!r} cannot be joined this way, use '
        'PrefixFusion')
    encoder = config.encoder
    self.low_tokens, self.each = encoder.low_tokens, encoder.low_tokens + encoder.high_tokens

  @property
  def steers(self) -> bool:
    """Whether the question decides what is encoded."""
    encoder = self.config.encoder
    return encoder.mode == 'after_prompt' and encoder.looks_closer

  def first_pass(self, batch: Batch, seen, *, language: Decoder | None = None,
                 keep_cache: bool = False, ex: Execution = HERE) -> FirstPass:
    """Runs the decoder over text and low-resolution tokens up to the end of the first question.

    Positions are compacted: neither padding nor those of high-resolution tokens are computed.

    Args:
      seen: of `Encoder.low`.
      language: the decoder to use (one without gradient); default: the model's own.
    """
    language = self.language if language is None else language
    valid, visual = jnp.asarray(batch['valid']), jnp.asarray(batch['visual_index'])
    length = valid.shape[1]
    place = jnp.arange(length)
    last = last_true(valid)
    end = jnp.asarray(batch.get('prompt_end', last))[:, None]
    is_high = (visual >= 0) & (visual % self.each >= self.low_tokens)
    pictured = is_high.any(axis=1, keepdims=True)
    # Rows without an image do not change between the passes: all but their last token is shared.
    changed = jnp.where(pictured, jnp.argmax(is_high, axis=1)[:, None], last[:, None])
    shared = valid & (place < changed)
    taken = shared | (valid & ~is_high & (place <= end) & pictured)
    size = max(length - (self.each - self.low_tokens), 1)
    rank = jnp.cumsum(taken, axis=1) - 1
    shared &= rank < size
    index, real = first_true(taken, size)
    pick = lambda x: jnp.take_along_axis(x, index, axis=1)
    embeds = self._low_embeds(language, batch, seen, index, ex)
    cache = None
    if keep_cache:
      cache = empty_cache(self.config.text, len(valid), size, dtype=ex.dtype,
                          unrolled=isinstance(self.language.blocks, List))
    x, cache = language.layers(embeds, language.context(real, ex=ex), cache)
    at = jnp.clip(jnp.take_along_axis(rank, jnp.clip(end, 0, length - 1), axis=1), 0, size - 1)
    state = language.norm(jnp.take_along_axis(x, at[..., None], axis=1)[:, 0])
    return FirstPass(state, index, real & pick(shared), shared, cache)

  def _low_embeds(self, language, batch, seen, index, ex: Execution):
    """Embeddings [b s d] of chosen positions, visual ones from the low-resolution tokens."""
    pick = lambda x: jnp.take_along_axis(jnp.asarray(x), index, axis=1)
    visual = pick(batch['visual_index'])
    text = language.embed(pick(batch['tokens']), dtype=ex.dtype)
    place = jnp.take_along_axis(batch['views']['index'], jnp.clip(visual, 0), axis=1)
    low = place // self.each * self.low_tokens + jnp.clip(place % self.each, 0,
                                                          self.low_tokens - 1)
    taken = jnp.take(seen.tokens.reshape(-1, seen.tokens.shape[-1]), low, axis=0)
    return jnp.where(visual[..., None] >= 0, taken.astype(text.dtype), text)

  def look(self, batch: Batch, *, gradient: bool = False, keep_cache: bool = False,
           ex: Execution = HERE):
    """Both looks at the images of a batch.

    Args:
      gradient: pass 1 of the decoder and what it reads stay without gradient; the prompt head and
        the selection get theirs (the selection's loss trains them).

    Returns:
      (VisualTokens of all rows, FirstPass or None where no question steers, prompt [b c] or None).
    """
    if batch.get('segments') is not None:
      raise UserError('two-pass models read one conversation per row: rows packed of several '
                      'examples are not supported; switch packing off')
    views = batch['views']
    seen = self.vision.low(views, ex=ex)
    first = prompt = asked = None
    if self.steers and batch['tokens'].shape[1] > self.each:
      language, before = self.language, seen
      if gradient:
        language = stop_gradient(language)
        before = jax.lax.stop_gradient(seen)
      first = self.first_pass(batch, before, language=language, keep_cache=keep_cache, ex=ex)
      state = jax.lax.stop_gradient(first.state) if gradient else first.state
      prompt = self.vision.prompt_head(state)
      asked = self.vision.prompts(views, prompt)
    high = self.vision.high(seen, views, asked, ex=ex)
    return self.vision.arrange(views, seen, high), first, prompt

  def run(self, batch: Batch, *, key=None, ex: Execution = HERE
          ) -> tuple[Float[Array, 'b t d'], dict[str, Any]]:
    """(final-normed states of every place, info of the encoder): the training forward."""
    visual, _, _ = self.look(batch, gradient=True, ex=ex)
    embeds, valid = self.embed(batch, visual, ex=ex)
    hidden = self.language(embeds, valid, positions=batch.get('positions'), key=key, ex=ex)
    return hidden, visual.info

  def __call__(self, batch: Batch, *, key=None, ex: Execution = HERE) -> Float[Array, 'b t d']:
    """See `VLM.__call__`."""
    return self.run(batch, key=key, ex=ex)[0]

  def info(self, batch: Batch, *, ex: Execution = HERE) -> dict[str, Any]:
    """Selection maps and probabilities for the question of the batch."""
    return self.look(batch, ex=ex)[0].info

  def prompt(self, batch: Batch, *, reuse: bool = True, ex: Execution = HERE):
    """What generation needs: (embeddings of what pass 2 adds, valid of all slots, extras).

    Slots are those of pass 1 (valid where shared) followed by the new ones.

    Args:
      reuse: False recomputes everything in pass 2 (for comparison).
    """
    visual, first, _ = self.look(batch, keep_cache=reuse, ex=ex)
    return self.second_pass(batch, visual, first if reuse else None, ex=ex)

  def second_pass(self, batch: Batch, visual: VisualTokens, first: FirstPass | None, *,
                  ex: Execution = HERE):
    """See `prompt`; without `first` every place is new."""
    embeds, valid = self.embed(batch, visual, ex=ex)
    if first is None:
      return embeds, valid, {}
    length = valid.shape[1]
    # At least the low-resolution tokens of one image are shared; rows without an image keep what
    # pass 1 had no room for.
    size = max(length - self.low_tokens, self.each - self.low_tokens, 1)
    index, real = first_true(valid & ~first.shared, size)
    new = jnp.take_along_axis(embeds, index[..., None], axis=1)
    return new, jnp.concatenate([first.kept, real], axis=1), {'seen': first.cache}

  def prefill(self, embeds, valid, *, slots: int, seen: Cache | None = None,
              ex: Execution = HERE):
    """See `Decoder.prefill`; `seen` fills the first slots, the embeddings follow."""
    if seen is None:
      return super().prefill(embeds, valid, slots=slots, ex=ex)
    batch, total = valid.shape
    start = total - embeds.shape[1]
    cache = empty_cache(self.config.text, batch, slots, dtype=embeds.dtype,
                        unrolled=isinstance(self.language.blocks, List))
    cache = jax.tree.map(lambda store, old: jax.lax.dynamic_update_slice_in_dim(
      store, old.astype(store.dtype), 0, axis=-2), cache, seen)  # places, stacked or not
    hidden, cache = self.language.extend(
      embeds, jnp.pad(valid, ((0, 0), (0, slots - total))), cache, start, ex=ex)
    last = last_true(valid[:, start:])[:, None, None]
    hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    return self.logits(hidden), hidden, cache

  def step(self, tokens, valid, cache: Cache, slot, *, seen: Cache | None = None,
           ex: Execution = HERE):
    """See `Decoder.step`."""
    del seen  # already part of the cache
    return super().step(tokens, valid, cache, slot, ex=ex)

  def held(self, extras):
    """See `VLM.held`: the cache of pass 1 has become part of the prompt's."""
    del extras
    return {}
