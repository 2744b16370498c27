"""Beam search with the bookkeeping of Hugging Face's `generate` (early_stopping=False).

Source: `huggingface/transformers: generation/beam_search.py` as described in the Pheye
specification, section 5. Scores and candidates are computed on the device; the short lists of
hypotheses are kept on the host.
"""

from __future__ import annotations

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.language.sampling import Sampling


@functools.partial(jax.jit, static_argnames=('beams',))
def _candidates(logits, scores, *, beams):
  """The 2*beams best (score, beam, token) of every row: logits [b*beams v], scores [b beams]."""
  logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  total = scores[..., None] + logp.reshape(scores.shape[0], beams, -1)
  best, index = jax.lax.top_k(total.reshape(scores.shape[0], -1), 2 * beams)
  return best, index // logp.shape[-1], index % logp.shape[-1]


@jax.jit
def _reorder(cache, rows):
  return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), cache)


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


def beam_search(step: Callable, logits, valid, cache, start: int, sampling: Sampling, extras):
  """Beam search from prefilled rows.

  Args:
    step: (tokens [b*beams], valid, cache, slot, extras) -> (logits, valid, cache). The module sees
      rows in the order row * beams + beam; extras stay per row (index them by row // beams).
    cache: layers held apart, leaves with the batch axis first.

  Returns:
    (tokens int32 [b n], lengths int32 [b], scores float32 [b]): the best hypothesis of each row; a
    stop token is appended when there is room, then padding. A score is the sum of
    log-probabilities over length ** penalty.
  """
  batch, beams, budget = logits.shape[0], sampling.beams, sampling.max_new_tokens
  stops = set(sampling.stop_ids)
  rows = jnp.repeat(jnp.arange(batch), beams)
  logits, cache, valid = logits[rows], _reorder(cache, rows), valid[rows]
  scores = np.full((batch, beams), -1e9, np.float32)
  scores[:, 0] = 0
  live: list[list[list[int]]] = [[[] for _ in range(beams)] for _ in range(batch)]
  finished = [_Finished(beams, sampling.length_penalty) for _ in range(batch)]
  done = [False] * batch
  for length in range(1, budget + 1):
    best, origin, token = jax.device_get(_candidates(logits, scores, beams=beams))
    parents = np.repeat(np.arange(batch) * beams, beams).reshape(batch, beams)
    tokens = np.full((batch, beams), sampling.pad_id, np.int32)
    for row in range(batch):
      if done[row]:
        continue
      kept: list[tuple[float, int, int]] = []
      for rank in range(2 * beams):
        score, beam, tok = float(best[row, rank]), int(origin[row, rank]), int(token[row, rank])
        if tok in stops:
          if rank < beams:
            finished[row].add(live[row][beam] + [tok], score, length)
        else:
          kept.append((score, beam, tok))
        if len(kept) == beams:
          break
      live[row] = [live[row][beam] + [tok] for _, beam, tok in kept]
      scores[row] = [score for score, _, _ in kept]
      parents[row] = [row * beams + beam for _, beam, _ in kept]
      tokens[row] = [tok for _, _, tok in kept]
      done[row] = finished[row].done(float(best[row].max()), length)
    if all(done) or length == budget:
      break
    order = jnp.asarray(parents.reshape(-1))
    logits, valid, cache = step(jnp.asarray(tokens.reshape(-1)), valid[order],
                                _reorder(cache, order), start + length - 1, extras)
  out = np.full((batch, budget), sampling.pad_id, np.int32)
  lengths, values = np.zeros(batch, np.int32), np.zeros(batch, np.float32)
  for row in range(batch):
    if not done[row]:  # the length limit: live beams compete with their own normalised score
      for score, tokens_ in zip(scores[row], live[row], strict=True):
        finished[row].add(tokens_, float(score), len(tokens_))
    values[row], chosen = finished[row].items[0]
    out[row, :len(chosen)], lengths[row] = chosen, len(chosen)
  return out, lengths, values
