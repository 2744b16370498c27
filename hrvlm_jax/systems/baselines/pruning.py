"""Fewer visual tokens without training: ToMe's merging and VisionZip's selection.

Sources: `facebookresearch/ToMe` (paper, sections 3 and 4; written from the description, its code is
under a non-commercial licence); `dvlab-research/VisionZip`. All counts are static. Axis letters: b
rows, n tokens, d width, h heads, p head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import unit, wide
from hrvlm_jax.vision.vit import ViT


def rows_of(x: jax.Array, index: jax.Array) -> jax.Array:
  """x[b, index[b, k]] as [b k d]."""
  return jnp.take_along_axis(x, index[..., None], axis=1)


def tome_merge(
  metric: Float[Array, 'b n e'], x: Float[Array, 'b n d'], size: Float[Array, 'b n'], r: int, *,
  class_token: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """One round of bipartite merging: r tokens join their most similar partner.

  Tokens at even places look for a partner among those at odd places; the r best pairs are merged,
  weighted by the number of patches each token stands for.

  Args:
    metric: what similarity is measured on (mean of the keys over heads, or the tokens).
    r: how many tokens disappear; at most half of those that may.
    class_token: the first token is never merged away and stays first.

  Returns:
    (tokens [b n-r d], sizes [b n-r]): kept even tokens (by falling score, in their order with a
    class token), then all odd ones.
  """
  n = x.shape[1]
  r = max(0, min(r, (n - int(class_token)) // 2))
  if r == 0:
    return x, size
  unit_metric = unit(metric)
  scores = jnp.einsum('bie,bje->bij', unit_metric[:, ::2], unit_metric[:, 1::2],
                      precision='highest')
  if class_token:
    scores = scores.at[:, 0].set(-jnp.inf)
  best, partner = scores.max(axis=-1), scores.argmax(axis=-1)
  order = jnp.argsort(-best, axis=-1)
  merged, kept = order[:, :r], order[:, r:]
  if class_token:
    kept = jnp.sort(kept, axis=-1)
  weighted = wide(x) * size[..., None]
  target = jnp.take_along_axis(partner, merged, axis=1)
  onto = jax.nn.one_hot(target, n // 2, dtype=weighted.dtype)  # [b r odd]
  add = lambda source: jnp.einsum('brk,brd->bkd', onto, source, precision='highest')
  even, even_size = weighted[:, ::2], size[:, ::2, None]
  odd = weighted[:, 1::2] + add(rows_of(even, merged))
  odd_size = size[:, 1::2, None] + add(rows_of(even_size, merged))
  values = jnp.concatenate([rows_of(even, kept), odd], axis=1)
  sizes = jnp.concatenate([rows_of(even_size, kept), odd_size], axis=1)
  return (values / sizes).astype(x.dtype), sizes[..., 0]


def tome_reduce(x: Float[Array, 'b n d'], keep: int) -> Float[Array, 'b k d']:
  """Rounds of merging on a finished encoder's tokens until `keep` are left.

  The form of the PS3 paper's comparison; how it splits a budget over rounds is not stated. Each
  round here merges as many as are left to merge, at most half.
  """
  size = jnp.ones(x.shape[:2], jnp.float32)
  while x.shape[1] > keep:
    x, size = tome_merge(x, x, size, x.shape[1] - keep)
  return x


def tome_schedule(r: int | tuple[int, float], depth: int) -> list[int]:
  """How many tokens each layer merges: r in all, or (r, inflect) changing linearly (-1 falls)."""
  if isinstance(r, int):
    return [r] * depth
  value, inflect = r
  first = int(value * (1 - inflect))
  last = 2 * value - first
  step = (last - first) / (depth - 1) if depth > 1 else 0.0
  return [int(first + step * i) for i in range(depth)]


def tome_tower(tower: ViT, images: Float[Array, 'n h w c'], schedule: list[int], *,
               proportional: bool = True, ex: Execution = HERE) -> tuple[jax.Array, jax.Array]:
  """A tower that merges between attention and MLP of every block: (tokens, sizes), before any norm.

  Args:
    proportional: later blocks add log(size) of the key to the logits (for towers that were not
      trained with merging).
  """
  from hrvlm_jax.core.module import depth_of, layer_at

  x = tower.embed(images, ex=ex)
  size = jnp.ones(x.shape[:2], jnp.float32)
  class_token = tower.config.class_token
  for index in range(depth_of(tower.blocks)):
    block = layer_at(tower.blocks, index)
    q, k, v = block.attn.project(block.norm1(x), ex=ex)
    bias = jnp.log(size)[:, None, None] if proportional else 0.0
    y = jnp.einsum('bhts,bshp->bthp', _probs(q, k, bias), wide(v)).astype(x.dtype)
    x = x + block.attn.out(y.reshape(x.shape), ex=ex)
    x, size = tome_merge(k.mean(axis=2), x, size, schedule[index], class_token=class_token)
    x = x + block.mlp(block.norm2(x), ex=ex)
  return x, size


def _probs(q, k, bias=0.0) -> Float[Array, 'b h t s']:
  scores = jnp.einsum('bthp,bshp->bhts', wide(q), wide(k)) * q.shape[-1] ** -0.5
  return jax.nn.softmax(scores + bias, axis=-1)


def importance(q: Float[Array, 'b n h p'], k: Float[Array, 'b n h p'], *, class_token: bool
               ) -> Float[Array, 'b m']:
  """VisionZip's score of every patch: the class token's attention summed over heads, or, without
  one, the mean over all queries of the attention that the patch receives."""
  probs = _probs(q[:, :1] if class_token else q, k)
  received = probs.mean(axis=2).sum(axis=1)
  return received[:, 1:] if class_token else received


def visionzip(
  x: Float[Array, 'b n d'], score: Float[Array, 'b m'], keys: Float[Array, 'b n e'], *,
  dominant: int, contextual: int, class_token: bool,
) -> Float[Array, 'b k d']:
  """The most attended tokens, and a few that gather the others.

  Args:
    x: tokens, the class token first if there is one.
    score: of the patches (without the class token).
    keys: what similarity is measured on: the mean of the keys over heads.
    dominant: kept tokens, the class token among them, in their order.
    contextual: targets, evenly spaced among the rest; every other token goes to the most similar
      one and the mean of those is ADDED to it, as the released code does.
  """
  n, first = x.shape[1], int(class_token)
  top = jax.lax.top_k(score, dominant - first)[1] + first
  chosen = jnp.zeros(x.shape[:2], bool).at[jnp.arange(x.shape[0])[:, None], top].set(True)
  if class_token:
    chosen = chosen.at[:, 0].set(True)
  # A stable sort puts the chosen ones in front and keeps both groups in their order.
  order = jnp.argsort(~chosen, axis=-1, stable=True)
  kept, rest = rows_of(x, order[:, :dominant]), rows_of(x, order[:, dominant:])
  if not contextual:
    return kept
  metric = unit(rows_of(keys, order[:, dominant:]))
  left = n - dominant
  places = np.arange(0, left, max(1, left // contextual))[:contextual]
  others = np.setdiff1d(np.arange(left), places)
  near = jnp.einsum('boe,bte->bot', metric[:, others], metric[:, places],
                    precision='highest').argmax(axis=-1)
  onto = jax.nn.one_hot(near, len(places), dtype=jnp.float32)
  total = jnp.einsum('bot,bod->btd', onto, wide(rest[:, others]), precision='highest')
  mean = total / jnp.maximum(onto.sum(axis=1), 1)[..., None]
  return jnp.concatenate([kept, (wide(rest[:, places]) + mean).astype(x.dtype)], axis=1)
