"""Losses of PS3's pre-training: sigmoid contrast over the global batch, supervised selection.

Source: `NVlabs/PS3: train/src/open_clip/loss.py`; paper 2503.19903, section 3. Axis letters: b
pairs, o feature width, g all pairs of all devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hrvlm_jax.core.layers import wide
from hrvlm_jax.core.module import Functional
from hrvlm_jax.systems.ps3.model import target_maps

MAX_LOGIT_SCALE = math.log(100)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
  """Weights and switches of the three losses.

  Attributes:
    select_target: the ground-truth map overrides the selection.
    pool_target: pool only tokens the map covers.
    intra_image: rows that show the same image are negatives of each other ("intra-image
      contrast"; the paper found it harmful, the original draws one row of an image). Off: such
      pairs are left out.
    chunk: columns of the logit matrix that exist at a time; None: all of them.
  """

  prior_weight: float = 1.0
  posterior_weight: float = 1.0
  select_target: bool = True
  pool_target: bool = True
  intra_image: bool = False
  chunk: int | None = 1024


def sigmoid_loss(
  image: Float[Array, 'b o'], text: Float[Array, 'b o'], logit_scale: Float[Array, ''],
  logit_bias: Float[Array, ''], *, axis: str | None = None, chunk: int | None = None,
  counted: Bool[Array, 'b'] | None = None, group: Int[Array, 'b'] | None = None,
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """SigLIP's loss: (sum over all pairs of softplus(-z * logit), number of rows).

  logit = exp(logit_scale) * image . text + logit_bias; z = 1 on the diagonal, -1 elsewhere; the
  loss is sum / rows. Only [b chunk] logits exist at a time, forward and backward: on a mesh that
  splits the batch, each device holds the rows of its own images.

  Args:
    image, text: of unit length; this device's rows when `axis` is given.
    axis: mesh axis of a `shard_map`: the texts of all devices are gathered (features, not logits)
      and the returned sums are this device's; add them up with `psum`.
    counted: rows that take part, None: all. Others are in no pair.
    group: rows of the same number are no negatives of each other (see `intra_image`).
  """
  image, text = wide(image), wide(text)
  rows, first = image.shape[0], 0
  own_counts = jnp.ones(rows, bool) if counted is None else counted
  other_counts = own_counts
  own_group = jnp.arange(rows) if group is None else group
  other_group = own_group
  if axis is not None:
    first = jax.lax.axis_index(axis) * rows
    text = jax.lax.all_gather(text, axis, tiled=True)
    other_counts = jax.lax.all_gather(own_counts, axis, tiled=True)
    if group is not None:
      other_group = jax.lax.all_gather(own_group, axis, tiled=True)
  columns = text.shape[0]
  chunk = columns if chunk is None else min(chunk, columns)
  extra = -columns % chunk
  parts = jnp.pad(text, ((0, extra), (0, 0))).reshape(-1, chunk, text.shape[-1])
  others = jnp.pad(other_counts, (0, extra)).reshape(-1, chunk)
  groups = None if group is None else jnp.pad(other_group, (0, extra)).reshape(-1, chunk)
  scale, bias = jnp.exp(wide(logit_scale)), wide(logit_bias)
  own = first + jnp.arange(rows)

  @jax.checkpoint
  def body(total, piece):
    number, part, other, theirs = piece
    column = number * chunk + jnp.arange(chunk)
    logits = scale * (image @ part.T) + bias
    sign = jnp.where(own[:, None] == column, 1.0, -1.0)
    pairs = own_counts[:, None] & other
    if theirs is not None:
      pairs &= (own_group[:, None] != theirs) | (sign > 0)
    loss = jnp.where(pairs, jax.nn.softplus(-sign * logits), 0.0)
    return total + loss.sum(), None

  zero = jnp.zeros((), image.dtype)
  if axis is not None:
    zero = jax.lax.pcast(zero, (axis,), to='varying') if hasattr(jax.lax, 'pcast') else zero
  total, _ = jax.lax.scan(body, zero, (jnp.arange(parts.shape[0]), parts, others, groups))
  return total, own_counts.sum().astype(image.dtype)


def selection_loss(
  probs: Sequence[Float[Array, 'b _ _']], targets: Sequence[Float[Array, 'b _ _']],
  is_local: Bool[Array, 'b'],
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """(sum over local rows, number of them) of the binary cross entropy of selection maps.

  A cell is positive where the target covers any of it; the mean is over cells, then over scales
  with equal weight. Without a local row both are 0.

  Args:
    probs: per high scale, before the ground-truth override.
    targets: per high scale, area coverage on the same grid.
  """
  total = jnp.zeros((), jnp.float32)
  for p, target in zip(probs, targets, strict=True):
    p = wide(p)
    # torch bounds the logarithms at -100; probabilities of the selection never get there.
    hit, miss = (jnp.maximum(x, -100.0) for x in (jnp.log(p), jnp.log1p(-p)))
    nll = -jnp.where(target > 0, hit, miss)
    total = total + jnp.where(is_local, nll.mean(axis=(1, 2)), 0.0).sum() / len(probs)
  return total, is_local.sum().astype(total.dtype)


def pretrain_losses(
  fn: Functional, params, batch: Mapping[str, Any], config: ContrastiveConfig, *,
  dtype=jnp.float32, remat=False, impl: str = 'xla',
) -> dict[str, jax.Array]:
  """The losses of one global batch: contrastive, prior, posterior, total.

  Args:
    fn, params: of `systems.ps3.model.build`.
    batch: see `PS3.__call__`; `is_global` absent means that all rows are local, `target` absent
      switches the selection losses off. Optional: `counted` bool [b 1], rows that take part;
      `image` int [b 1], rows of equal number show the same image; `prior_target` [b h w], what the
      bottom-up selection learns where it is not `target`.
  """
  module = fn.bind(params)
  image, text, out = module(
    dict(batch), select_target=config.select_target, pool_target=config.pool_target, dtype=dtype,
    remat=remat, impl=impl)
  counted = jnp.ones(image.shape[0], bool)
  if batch.get('counted') is not None:
    counted = batch['counted'][:, 0]
  group = None
  if batch.get('image') is not None and not config.intra_image:
    group = batch['image'][:, 0]
  total, rows = sigmoid_loss(image, text, module.logit_scale[...], module.logit_bias[...],
                             chunk=config.chunk, counted=counted, group=group)
  contrastive = total / jnp.maximum(rows, 1)
  losses = {name: jnp.zeros((), contrastive.dtype) for name in ('prior', 'posterior')}
  if batch.get('target') is not None:
    targets = target_maps(batch['target'], out.plan)
    is_local = counted
    if batch.get('is_global') is not None:
      is_local = is_local & ~batch['is_global'][:, 0]
    whole = targets
    if batch.get('prior_target') is not None:
      whole = target_maps(batch['prior_target'], out.plan)
    for name, probs, maps in (('prior', out.prior, whole), ('posterior', out.posterior, targets)):
      loss, number = selection_loss(probs, maps, is_local)
      losses[name] = loss / jnp.maximum(number, 1)
  weighted = (contrastive + config.prior_weight * losses['prior']
              + config.posterior_weight * losses['posterior'])
  return losses | {'contrastive': contrastive, 'total': weighted}


def objective(fn: Functional, params, batch, *, config: ContrastiveConfig = ContrastiveConfig(),
              dtype=jnp.float32, remat=False, impl: str = 'xla', key=None,
              chunk: int = 1024) -> tuple[jax.Array, jax.Array]:
  """(total loss times rows, rows), in the form of `training.step`'s objectives.

  Contrast is over the rows at hand: with gradient accumulation, over a micro-batch.
  """
  del key
  losses = pretrain_losses(fn, params, batch, dataclasses.replace(config, chunk=chunk), dtype=dtype,
                           remat=remat, impl=impl)
  counted = batch.get('counted')
  rows = jnp.asarray(batch['tokens'].shape[0] if counted is None else counted.sum(), jnp.int32)
  return losses['total'] * rows, rows


def clamp_logit_scale(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """After each step: exp(logit_scale) stays within [1, 100]; nothing where it is not trained."""
  if 'logit_scale' not in leaves:
    return leaves
  return leaves | {'logit_scale': jnp.clip(leaves['logit_scale'], 0.0, MAX_LOGIT_SCALE)}
