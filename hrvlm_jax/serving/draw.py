"""The next token of every slot, each with settings and randomness of its own.

The settings are arrays, so that requests of all kinds share one program. A slot's numbers come from
its own key folded with the number of its token: who else is in the batch cannot matter. The rule is
that of `language.sampling.choose`, whose settings are static.

Axis letters: s slots, v vocabulary, n reported tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32
import numpy as np

from hrvlm_jax.language.sampling import Sampling, penalise

TOP = 20  # most alternatives a token is reported with


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
  """How each slot draws, one entry a slot.

  Attributes:
    key: uint32 [s 2], the data of a random key.
    temperature: float32 [s]; 0 is greedy.
    top_k: int32 [s]; 0: off.
    top_p: float32 [s]; 1: off.
    min_p: float32 [s]; 0: off.
    report: bool [s], whether log-probabilities are wanted.
  """

  key: jax.Array
  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  min_p: jax.Array
  report: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
  """One token a slot.

  Attributes:
    token: int32 [s].
    logprob: float32 [s], its log-probability before penalties, temperature and cuts; 0 where none
      is wanted.
    best: int32 [s n], the most probable tokens, best first.
    best_logprobs: float32 [s n].
  """

  token: jax.Array
  logprob: jax.Array
  best: jax.Array
  best_logprobs: jax.Array


def settings(slots: int) -> Settings:
  """Greedy in every slot, on the host."""
  return Settings(np.zeros((slots, 2), np.uint32), np.zeros(slots, np.float32),
                  np.zeros(slots, np.int32), np.ones(slots, np.float32),
                  np.zeros(slots, np.float32), np.zeros(slots, bool))


PLAIN = Sampling()


def penalties(sampling: Sampling) -> Sampling:
  """Its penalties alone: what of the settings every slot shares, and programs are compiled for."""
  return dataclasses.replace(PLAIN, repetition_penalty=sampling.repetition_penalty,
                             no_repeat_ngram_size=sampling.no_repeat_ngram_size)


def penalised(logits: Float[Array, 's v'], written: Int[Array, 's n'], count: Int[Array, 's'],
              usual: Sampling) -> Float[Array, 's v']:
  """Logits after the penalties of `usual` (a release's own), each slot by its own new tokens.

  Args:
    written: the first `count` of each slot are its new tokens.
  """
  if not usual.counts:
    return logits
  one = lambda row, tokens, number: penalise(row[None], tokens[None], number, usual)[0]
  return jax.vmap(one)(logits, written, count)


def draw(logits: Float[Array, 's v'], chosen: Settings, count: Int[Array, 's'],
         said: Float[Array, 's v'] | None = None) -> Drawn:
  """The token after each row of logits; sorting and reports cost only when a slot wants them.

  Args:
    count: how many tokens the slot has drawn before: the number its key is folded with.
    said: logits that reports speak of, where penalties changed those that are drawn from.
  """
  greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  warm = chosen.temperature > 0
  cut = warm & ((chosen.top_k > 0) | (chosen.top_p < 1) | (chosen.min_p > 0))
  # Less the largest one, so that a small temperature gives no infinity, as in `restrict`.
  scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.where(
    warm, chosen.temperature, 1)[:, None]
  token = jax.lax.cond(
    warm.any(),
    lambda: jnp.where(warm, _sampled(jax.lax.cond(
      cut.any(), lambda: jax.vmap(_cut)(scaled, chosen.top_k, chosen.top_p, chosen.min_p),
      lambda: scaled), chosen.key, count), greedy),
    lambda: greedy)
  logprob, best, best_logprobs = jax.lax.cond(
    chosen.report.any(), lambda: _report(logits if said is None else said, token),
    lambda: _nothing(logits))
  return Drawn(token, logprob, best, best_logprobs)


def _sampled(logits: Float[Array, 's v'], key: UInt32[Array, 's 2'], count: Int[Array, 's']):
  def one(row, data, number):
    folded = jax.random.fold_in(jax.random.wrap_key_data(data), number)
    # A row of its own, so that it draws the numbers which `choose` draws for a batch of one.
    return jax.random.categorical(folded, row[None])[0]

  return jax.vmap(one)(logits, key, count).astype(jnp.int32)


def _cut(logits: Float[Array, 'v'], top_k, top_p, min_p) -> Float[Array, 'v']:
  """top-k, top-p, then min-p, as `sampling.restrict`, with numbers known on the device only."""
  order = jnp.argsort(-logits)
  ranked = logits[order]
  place = jnp.clip(top_k - 1, 0, len(logits) - 1)
  ranked = jnp.where((top_k > 0) & (ranked < ranked[place]), -jnp.inf, ranked)
  probability = jax.nn.softmax(ranked)
  before = jnp.cumsum(probability) - probability
  kept: Bool[Array, 'v'] = (top_p >= 1) | (before < top_p)
  ranked = jnp.where(kept, ranked, -jnp.inf)
  probability = jax.nn.softmax(ranked)
  ranked = jnp.where(probability < min_p * probability[0], -jnp.inf, ranked)
  return ranked[jnp.argsort(order)]


def _report(logits: Float[Array, 's v'], token: Int[Array, 's']):
  logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  best_logprobs, best = jax.lax.top_k(logprobs, min(TOP, logits.shape[-1]))
  own = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
  return own, best.astype(jnp.int32), best_logprobs


def _nothing(logits: Float[Array, 's v']):
  rows, count = logits.shape[0], min(TOP, logits.shape[-1])
  return (jnp.zeros(rows, jnp.float32), jnp.zeros((rows, count), jnp.int32),
          jnp.zeros((rows, count), jnp.float32))
