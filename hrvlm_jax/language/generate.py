"""Batched generation over an explicit cache: one compilation per bucket, none per token.

Sampling, beam search and streaming, over any module with a cache.

Prompts are padded, on either side, to a bucket length; generated tokens take the cache slots after
the bucket in every row, so rows of different length need no moving. `Generator` works over any
module that offers `prefill(embeds, valid, slots=, ex=, **extras)` and `step(tokens, valid, cache,
slot, ex=, **extras)`, as `language.decoder.Decoder` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.module import Functional, unstack
from hrvlm_jax.language.config import DecoderConfig
from hrvlm_jax.language.decoder import Decoder
from hrvlm_jax.language.sampling import Sampling, choose, penalise
from hrvlm_jax.parallel.distributed import to_host

# A run meets few lengths, each compiled once; about four to an octave from 256 to 8192, so that at
# most a fifth of what is read there is padding.
BUCKETS = (32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792,
           2048, 2560, 3072, 3840, 4608, 5376, 6144, 7168, 8192)
_BUDGET_STEP = 16  # the budget of new tokens is rounded up to it, so that few sizes are compiled


@dataclasses.dataclass(frozen=True)
class Generated:
  """New tokens.

  Attributes:
    tokens: int32 [b n]; the pad id follows a row's stop token.
    lengths: int32 [b], tokens of each row, the stop token included.
    logits: float32 [b n v] that chose each token, when asked for.
    scores: float32 [b], of beam search only.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  logits: np.ndarray | None = None
  scores: np.ndarray | None = None

  def rows(self) -> list[list[int]]:
    """The tokens of each row without padding."""
    return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths, strict=True)]


def bucket(length: int, buckets: Sequence[int] = BUCKETS) -> int:
  """The smallest bucket that holds `length`; beyond the last one, its next multiple."""
  for size in buckets:
    if length <= size:
      return size
  return -(-length // buckets[-1]) * buckets[-1]


class Generator:
  """Generation with a module that has `prefill` and `step`.

  Args:
    fn: the module's functional form, its layers unrolled.
    params: its parameters.
    ex: of all programs; its dtype is that of activations and cache. It may be replaced later.
  """

  def __init__(self, fn: Functional, params, *, ex: Execution = HERE):
    self.fn, self.params, self.ex = fn, params, ex
    compiled = functools.partial(jax.jit, compiler_options=ex.options)
    # A cache is given away by whoever goes on from it, and comes back: it is never there twice.
    self._prefill = compiled(self.prefill_fn, static_argnames=('slots', 'ex'))
    self._loop = compiled(self._loop_fn, static_argnames=('sampling', 'keep_logits', 'ex'),
                          donate_argnames=('cache',))
    self._step = compiled(self.step_fn, static_argnames=('ex',), donate_argnames=('cache',))
    self._choose = jax.jit(lambda logits, key, i, *, sampling: choose(
      logits, sampling, jax.random.fold_in(key, i)), static_argnames=('sampling',))
    self._apply = compiled(fn.apply, static_argnames=('method', 'ex'))

  def prompt(self, batch):
    """(embeddings, valid, extras) of a batch, for modules with a `prompt` method."""
    return self._apply(self.params, batch, method='prompt', ex=self.ex)

  def info(self, batch):
    """What the model says about a batch's views, for overlays."""
    return to_host(self._apply(self.params, batch, method='info', ex=self.ex))

  def compilations(self) -> int:
    """How many programs were compiled so far: it must not grow inside a bucket."""
    return sum(fn._cache_size() for fn in (self._prefill, self._loop, self._step, self._apply))

  def prefill_fn(self, params, embeds, valid, extras, *, slots, ex: Execution):
    """(logits of the next token [b v], cache): the program that reads a prompt, not compiled."""
    logits, _, cache = self.fn.apply(params, embeds.astype(ex.dtype), valid, slots=slots,
                                     method='prefill', ex=ex, **extras)
    return logits, ex.constrain('cache', cache)

  def step_fn(self, params, tokens, valid, cache, slot, extras, *, ex: Execution):
    """(logits [b v], valid, cache): the program of one token, not compiled."""
    valid = valid.at[:, slot].set(True)
    logits, cache = self.fn.apply(params, tokens, valid, cache, slot, ex=ex,
                                  method='step', **extras)
    return logits, valid, ex.constrain('cache', cache)

  def _loop_fn(self, params, logits, valid, cache, start, limit, key, extras, *, sampling,
               keep_logits, ex: Execution):
    budget = sampling.max_new_tokens  # rounded up; `limit` is the caller's
    batch = logits.shape[0]
    stops = jnp.asarray(sampling.stop_ids or (-1,), jnp.int32)

    def select(logits, i, finished, tokens):
      if sampling.counts:
        logits = penalise(logits, tokens, i, sampling)
      token = choose(logits, sampling, jax.random.fold_in(key, i))
      token = jnp.where(finished, sampling.pad_id, token)
      return token, finished | jnp.isin(token, stops)

    def record(state, i, token, finished_before, logits):
      state['tokens'] = state['tokens'].at[:, i].set(token)
      state['lengths'] = state['lengths'] + (~finished_before).astype(jnp.int32)
      if keep_logits:
        state['logits'] = state['logits'].at[:, i].set(logits)
      return state

    state = {'tokens': jnp.full((batch, budget), sampling.pad_id, jnp.int32),
             'lengths': jnp.zeros((batch,), jnp.int32)}
    if keep_logits:
      state['logits'] = jnp.zeros((batch, budget, logits.shape[-1]), jnp.float32)
    none = jnp.zeros((batch,), bool)
    token, finished = select(logits, 0, none, state['tokens'])
    state = record(state, 0, token, none, logits)

    def more(carry):
      i, _, finished, *_ = carry
      return (i < limit) & ~jnp.all(finished)

    def body(carry):
      i, token, finished, valid, cache, state = carry
      held = params
      if ex.gathers:  # else the compiler gathers all weights in front of the loop, and keeps them
        token, held = jax.lax.optimization_barrier((token, params))
      logits, valid, cache = self.step_fn(held, token, valid, cache, start + i - 1, extras,
                                           ex=ex)
      token, now = select(logits, i, finished, state['tokens'])
      return i + 1, token, now, valid, cache, record(dict(state), i, token, finished, logits)

    carry = (jnp.int32(1), token, finished, valid, cache, state)
    *_, cache, state = jax.lax.while_loop(more, body, carry)
    return state, cache

  def generate(self, embeds, valid, sampling: Sampling, *, key=None, keep_logits: bool = False,
               extras: dict[str, Any] | None = None) -> Generated:
    """Continues each row of a padded prompt.

    Args:
      embeds: [b t d] prompt embeddings, t being a bucket.
      valid: bool [b t], real positions; every row needs at least one.
      extras: keyword arguments handed to `prefill` and `step` (keys and values of a
        cross-attention, for example).
    """
    extras = extras or {}
    valid = np.asarray(to_host(valid), bool)
    if not valid.any(axis=1).all():
      raise ValueError('generate: every row needs at least one real token')
    length = valid.shape[1]
    budget = -(-sampling.max_new_tokens // _BUDGET_STEP) * _BUDGET_STEP
    logits, cache = self._prefill(self.params, embeds, valid, extras, slots=length + budget,
                                  ex=self.ex)
    valid = np.pad(valid, ((0, 0), (0, budget)))
    if sampling.beams > 1:
      step = functools.partial(self._step, self.params, ex=self.ex)
      tokens, lengths, scores = beam_search(step, logits, valid, cache, length, sampling, extras,
                                            ex=self.ex)
      return Generated(tokens, lengths, scores=scores)
    key = jax.random.key(0) if key is None else key
    state, _ = self._loop(self.params, logits, valid, cache, length, sampling.max_new_tokens, key,
                          extras, sampling=dataclasses.replace(sampling, max_new_tokens=budget),
                          keep_logits=keep_logits, ex=self.ex)
    state = to_host(state)
    n = sampling.max_new_tokens
    kept = state['logits'][:, :n] if keep_logits else None
    return Generated(state['tokens'][:, :n], state['lengths'], kept)

  def stream(self, embeds, valid, sampling: Sampling, *, key=None,
             extras: dict[str, Any] | None = None) -> Iterator[np.ndarray]:
    """Yields int32 [b], one token per row and step, until all rows stopped (pad after a stop)."""
    if sampling.beams > 1:
      raise ValueError('stream: beam search knows its answer only at the end; use generate')
    extras = extras or {}
    length = valid.shape[1]
    budget = -(-sampling.max_new_tokens // _BUDGET_STEP) * _BUDGET_STEP
    key = jax.random.key(0) if key is None else key
    logits, cache = self._prefill(self.params, embeds, valid, extras, slots=length + budget,
                                  ex=self.ex)
    valid = np.pad(np.asarray(to_host(valid), bool), ((0, 0), (0, budget)))
    finished = np.zeros(valid.shape[0], bool)
    written = np.zeros((valid.shape[0], budget), np.int32)
    for i in range(sampling.max_new_tokens):
      if sampling.counts:
        logits = _penalise(logits, written, i, sampling=sampling)
      token = to_host(self._choose(logits, key, i, sampling=sampling))
      token = np.where(finished, sampling.pad_id, token).astype(np.int32)
      written[:, i] = token
      yield token
      finished |= np.isin(token, sampling.stop_ids)
      if finished.all() or i + 1 == sampling.max_new_tokens:
        return
      logits, valid, cache = self._step(self.params, token, valid, cache, length + i, extras,
                                        ex=self.ex)


class TextGenerator:
  """Generation from token ids with a language model alone.

  Args:
    params: parameters of a stacked `Decoder`.
  """

  def __init__(self, config: DecoderConfig, params, *, ex: Execution = HERE):
    self.config = config
    fn = Functional(lambda rngs: Decoder(config, unrolled=True, rngs=rngs))
    self.generator = Generator(fn, params | {'blocks': unstack(params['blocks'])}, ex=ex)

  def embed(self, ids) -> jax.Array:
    """Token embeddings [b t d]."""
    return jnp.take(self.generator.params['embed']['embedding'], jnp.asarray(ids), axis=0)

  def generate(self, ids, valid, sampling: Sampling, **options) -> Generated:
    """Continues rows of ids [b t], padded on either side to any length (bucketed here)."""
    ids, valid = pad_to_bucket(np.asarray(ids), np.asarray(valid, bool))
    return self.generator.generate(self.embed(ids), valid, sampling, **options)


def pad_to_bucket(ids: np.ndarray, valid: np.ndarray, buckets: Sequence[int] = BUCKETS):
  """Pads [b t] arrays on the right to the next bucket with zeros."""
  extra = bucket(ids.shape[1], buckets) - ids.shape[1]
  pad = lambda x: np.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2))
  return pad(ids), pad(valid)


_penalise = jax.jit(penalise, static_argnames=('sampling',))


@functools.partial(jax.jit, static_argnames=('sampling', 'keep'))
def _candidates(logits, scores, tokens, count, *, sampling, keep):
  """The `keep` best (score, beam, token) of every row: logits [b*beams v], scores [b beams],
  tokens [b*beams n] of which `count` are written."""
  logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  if sampling.counts:
    logp = penalise(logp, tokens, count, sampling)
  total = scores[..., None] + logp.reshape(*scores.shape, -1)
  best, index = jax.lax.top_k(total.reshape(scores.shape[0], -1), keep)
  return best, index // logp.shape[-1], index % logp.shape[-1]


@functools.partial(jax.jit, static_argnames=('ex',))
def _reorder(tree, parents, *, ex: Execution):
  """Rows of logits, masks and cache in another order.

  Args:
    parents: int32 [b beams], which of the rows of its prompt each beam goes on from. A prompt's
      beams lie on one device, so that no row ever leaves it.
  """
  def pick(leaf):
    of_prompt = leaf.reshape(len(parents), -1, *leaf.shape[1:])
    taken = jax.vmap(lambda rows, order: jnp.take(rows, order, axis=0))(of_prompt, parents)
    return taken.reshape(-1, *leaf.shape[1:])

  return ex.constrain('cache', jax.tree.map(pick, tree))


class _Finished:
  """The best `size` finished hypotheses of one row."""

  def __init__(self, size: int, penalty: float):
    self.size, self.penalty = size, penalty
    self.items: list[tuple[float, list[int]]] = []

  def add(self, tokens: list[int], total: float, length: int):
    self.items.append((total / length**self.penalty, tokens))
    self.items.sort(key=lambda item: -item[0])
    del self.items[self.size:]

  def done(self, best: float, length: int) -> bool:
    full = len(self.items) == self.size
    return full and self.items[-1][0] >= best / length**self.penalty


def beam_search(step: Callable, logits, valid, cache, start: int, sampling: Sampling, extras, *,
                ex: Execution = HERE):
  """Beam search from prefilled rows, with Hugging Face's bookkeeping (early_stopping=False).

  Source: `huggingface/transformers: generation/beam_search.py` as described in the Pheye
  specification, section 5. Scores and candidates are computed on the device; the short lists of
  hypotheses are kept on the host.

  Args:
    step: (tokens [b*beams], valid, cache, slot, extras) -> (logits, valid, cache); it may take the
      cache's memory. The module sees rows in the order row * beams + beam; extras stay per row
      (index them by row // beams).
    cache: layers unrolled, leaves with the batch axis first; its memory is given back.
    ex: of `step`; what the host decides is the same on all its processes.

  Returns:
    (tokens int32 [b n], lengths int32 [b], scores float32 [b]): the best hypothesis of each row; a
    stop token is appended when there is room, then padding. A score is the sum of
    log-probabilities over length ** penalty.
  """
  batch, beams, budget = logits.shape[0], sampling.beams, sampling.max_new_tokens
  stops = set(sampling.stop_ids)
  prompt, parents = cache, np.zeros((batch, beams), np.int32)
  logits, cache, valid = _reorder((logits, cache, valid), parents, ex=ex)
  for leaf in jax.tree.leaves(prompt):
    leaf.delete()  # the caller still has its name
  scores = np.full((batch, beams), -1e9, np.float32)
  scores[:, 0] = 0
  live: list[list[list[int]]] = [[[] for _ in range(beams)] for _ in range(batch)]
  finished = [_Finished(beams, sampling.length_penalty) for _ in range(batch)]
  done = [False] * batch
  # As many candidates as leave enough beams when all end tokens are among them.
  keep = min(max(2, 1 + len(stops)), logits.shape[-1]) * beams
  written = np.zeros((batch * beams, budget if sampling.counts else 1), np.int32)
  for length in range(1, budget + 1):
    best, origin, token = to_host(_candidates(
      logits, scores, written, length - 1, sampling=sampling, keep=keep))
    parents = np.zeros((batch, beams), np.int32)
    tokens = np.full((batch, beams), sampling.pad_id, np.int32)
    for row in range(batch):
      if done[row]:
        continue
      kept: list[tuple[float, int, int]] = []
      for rank in range(keep):
        score, beam, tok = float(best[row, rank]), int(origin[row, rank]), int(token[row, rank])
        if tok in stops:
          if rank < beams:
            finished[row].add(live[row][beam] + [tok], score, length)
        else:
          kept.append((score, beam, tok))
        if len(kept) == beams:
          break
      # A vocabulary of end tokens alone, or one that is banned whole, leaves none to go on.
      kept += [(-1e9, 0, sampling.pad_id)] * (beams - len(kept))
      live[row] = [live[row][beam] + [tok] for _, beam, tok in kept]
      scores[row] = [score for score, _, _ in kept]
      parents[row] = [beam for _, beam, _ in kept]
      tokens[row] = [tok for _, _, tok in kept]
      done[row] = finished[row].done(float(best[row].max()), length)
    if all(done) or length == budget:
      break
    if sampling.counts:
      written = written[(np.arange(batch)[:, None] * beams + parents).reshape(-1)]
      written[:, length - 1] = tokens.reshape(-1)
    valid, cache = _reorder((valid, cache), parents, ex=ex)
    logits, valid, cache = step(tokens.reshape(-1), valid, cache, start + length - 1, extras)
  out = np.full((batch, budget), sampling.pad_id, np.int32)
  lengths, values = np.zeros(batch, np.int32), np.zeros(batch, np.float32)
  for row in range(batch):
    if not done[row]:  # the length limit: live beams compete with their own normalised score
      for score, tokens_ in zip(scores[row], live[row], strict=True):
        finished[row].add(tokens_, float(score), len(tokens_))
    values[row], chosen = finished[row].items[0]
    out[row, :len(chosen)], lengths[row] = chosen, len(chosen)
  return out, lengths, values
