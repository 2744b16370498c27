"""How the next token is chosen: greedy, temperature, top-k, top-p."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """Generation settings.

  Attributes:
    max_new_tokens: budget of new tokens per row; the stop token counts.
    stop_ids: a row ends after any of them; the stop token is part of the output.
    pad_id: fills a row after its stop token.
    temperature: 0 is greedy.
    top_k, top_p: 0 and 1 switch them off; applied in this order after the temperature.
    beams: more than 1 is beam search (greedy only).
    length_penalty: exponent of the length that divides a beam's score.
  """

  max_new_tokens: int = 64
  stop_ids: tuple[int, ...] = ()
  pad_id: int = 0
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  beams: int = 1
  length_penalty: float = 1.0

  def __post_init__(self):
    problems = []
    if self.max_new_tokens < 1:
      problems.append(f'max_new_tokens must be at least 1, got {self.max_new_tokens}')
    if self.temperature < 0:
      problems.append(f'temperature must not be negative, got {self.temperature}')
    if not 0 < self.top_p <= 1:
      problems.append(f'top_p must lie in (0, 1], got {self.top_p}')
    if self.top_k < 0:
      problems.append(f'top_k must not be negative, got {self.top_k}')
    if self.beams < 1:
      problems.append(f'beams must be at least 1, got {self.beams}')
    if self.beams > 1 and self.temperature > 0:
      problems.append('beam search is greedy: set temperature to 0 or beams to 1')
    if problems:
      raise ValueError('Sampling: ' + '; '.join(problems))


def restrict(logits: Float[Array, 'b v'], sampling: Sampling) -> Float[Array, 'b v']:
  """Logits after temperature, top-k and top-p; dropped tokens are -inf.

  top-p keeps the smallest set whose probability reaches p, the token that crosses it included.
  """
  logits = logits / sampling.temperature
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
  return logits


def choose(logits: Float[Array, 'b v'], sampling: Sampling, key) -> Int[Array, 'b']:
  """The next token of every row; the lowest id wins a greedy tie."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return jax.random.categorical(key, restrict(logits, sampling)).astype(jnp.int32)
