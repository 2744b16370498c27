"""Settings of generation, and what they make of the logits of one step.

Order and values as in `huggingface/transformers: generation/logits_process.py`: first what counts
repetitions (repetition penalty, no-repeat n-gram), then, where a token is drawn, temperature,
top-k, top-p and min-p. Repetitions are those among the new tokens: prompts are embeddings here, and
transformers counts no prompt that is one.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_SMALLEST = 1e-6  # temperature; below, draws are greedy but for ties


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """Generation settings.

  Attributes:
    max_new_tokens: budget of new tokens per row; the stop token counts.
    stop_ids: a row ends after any of them; the stop token is part of the output.
    pad_id: fills a row after its stop token.
    temperature: 0 is greedy.
    top_k, top_p, min_p: 0, 1 and 0 switch them off; applied in this order after the temperature.
      min_p drops tokens less likely than this share of the likeliest one.
    repetition_penalty: logits of tokens that were generated are divided by it, negative ones
      multiplied; 1 switches it off. Beam search applies it to log-probabilities.
    no_repeat_ngram_size: no sequence of so many tokens is generated twice; 0 switches it off.
    beams: more than 1 is beam search (greedy only).
    length_penalty: exponent of the length that divides a beam's score.
  """

  max_new_tokens: int = 64
  stop_ids: tuple[int, ...] = ()
  pad_id: int = 0
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  no_repeat_ngram_size: int = 0
  beams: int = 1
  length_penalty: float = 1.0

  def __post_init__(self):
    problems = []
    if not 1 <= self.max_new_tokens < 1 << 31:
      problems.append(f'max_new_tokens must be at least 1, got {self.max_new_tokens}')
    if self.temperature != 0 and not _SMALLEST <= self.temperature < math.inf:
      problems.append(f'temperature must be 0 (greedy) or a number from {_SMALLEST:g}, got '
                      f'{self.temperature}')
    if not 0 < self.top_p <= 1:
      problems.append(f'top_p must lie in (0, 1], got {self.top_p}')
    if not 0 <= self.min_p <= 1:
      problems.append(f'min_p must lie in [0, 1], got {self.min_p}')
    if not 0 < self.repetition_penalty < math.inf:
      problems.append(f'repetition_penalty must be a number above 0, got {self.repetition_penalty}')
    if self.no_repeat_ngram_size < 0:
      problems.append(f'no_repeat_ngram_size must not be negative, got {self.no_repeat_ngram_size}')
    if self.top_k < 0:
      problems.append(f'top_k must not be negative, got {self.top_k}')
    if not 1 <= self.beams <= 1024:
      problems.append(f'beams must be at least 1 and at most 1024, got {self.beams}')
    if self.beams > 1 and self.temperature > 0:
      problems.append('beam search is greedy: set temperature to 0 or beams to 1')
    if problems:
      raise ValueError('Sampling: ' + '; '.join(problems))

  @property
  def counts(self) -> bool:
    """Whether repetitions count."""
    return self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0


def penalise(
  logits: Float[Array, 'b v'], tokens: Int[Array, 'b n'], count: Int[Array, ''] | int,
  sampling: Sampling,
) -> Float[Array, 'b v']:
  """Logits after repetition penalty and no-repeat n-gram.

  Args:
    tokens: what was generated, the first `count` of every row.
  """
  rows, n = jnp.arange(tokens.shape[0])[:, None], tokens.shape[1]
  place = jnp.arange(n)
  if sampling.repetition_penalty != 1:
    seen = jnp.zeros(logits.shape, bool).at[rows, tokens].max(
      jnp.broadcast_to(place < count, tokens.shape))
    changed = jnp.where(logits < 0, logits * sampling.repetition_penalty,
                        logits / sampling.repetition_penalty)
    logits = jnp.where(seen, changed, logits)
  size = sampling.no_repeat_ngram_size
  if 0 < size <= n:
    # Every n-gram so far whose first size - 1 tokens are the last ones now: its last is banned.
    starts = jnp.arange(n - size + 1)
    ban = jnp.broadcast_to(starts + size <= count, (tokens.shape[0], len(starts)))
    for k in range(size - 1):
      last = jnp.take(tokens, jnp.maximum(count - (size - 1) + k, 0), axis=1)
      ban = ban & (tokens[:, k:k + len(starts)] == last[:, None])
    ends = tokens[:, size - 1:]
    banned = jnp.zeros(logits.shape, bool).at[rows, ends].max(ban)
    logits = jnp.where(banned, -jnp.inf, logits)
  return logits


def restrict(logits: Float[Array, 'b v'], sampling: Sampling) -> Float[Array, 'b v']:
  """Logits after temperature, top-k, top-p and min-p; dropped tokens are -inf.

  top-p keeps the smallest set whose probability reaches p, the token that crosses it included.
  """
  # Less the largest one, so that a small temperature gives no infinity.
  logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
  if sampling.top_k:
    k = min(sampling.top_k, logits.shape[-1])
    threshold = jax.lax.top_k(logits, k)[0][:, -1:]
    logits = jnp.where(logits < threshold, -jnp.inf, logits)
  if sampling.top_p < 1:
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
    logits = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
  if sampling.min_p > 0:
    probability = jax.nn.softmax(logits, axis=-1)
    least = sampling.min_p * jnp.max(probability, axis=-1, keepdims=True)
    logits = jnp.where(probability < least, -jnp.inf, logits)
  return logits


def choose(logits: Float[Array, 'b v'], sampling: Sampling, key) -> Int[Array, 'b']:
  """The next token of every row; the lowest id wins a greedy tie."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return jax.random.categorical(key, restrict(logits, sampling)).astype(jnp.int32)
