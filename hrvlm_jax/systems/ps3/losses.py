"""Losses of PS3's pre-training: sigmoid contrast over the global batch, supervised selection.

Source: `NVlabs/PS3: train/src/open_clip/loss.py`; paper 2503.19903, section 3. Axis letters: b
pairs, o feature width, g all pairs of all devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hrvlm_jax.core import bounds
from hrvlm_jax.core.execution import HERE, Execution
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
    chunk: columns of the logit matrix that exist at a time; None: all of them. In a run
      `training.loss_chunk` takes its place.
  """

  prior_weight: float = 1.0
  posterior_weight: float = 1.0
  select_target: bool = True
  pool_target: bool = True
  intra_image: bool = False
  chunk: int | None = 1024

  BOUNDS: ClassVar = {
    'prior_weight': bounds.COUNT, 'posterior_weight': bounds.COUNT, 'chunk': bounds.SIZE}

  def __post_init__(self):
    bounds.check(self)


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


def cell_entropy(probs: Float[Array, 'b _ _'], target: Float[Array, 'b _ _']) -> Float[Array, 'b']:
  """Binary cross entropy of a selection map, the mean over its cells.

  A cell is positive where the target covers any of it.
  """
  p = wide(probs)
  # torch bounds the logarithms at -100. Where a box forced p to 1 the gradient must stay finite.
  bounded = lambda x, log, safe: jnp.where(
    x > 0, jnp.maximum(log(jnp.where(x > 0, p, safe)), -100.0), -100.0)
  hit, miss = bounded(p, jnp.log, 1.0), bounded(1 - p, lambda p: jnp.log1p(-p), 0.0)
  return -jnp.where(target > 0, hit, miss).mean(axis=(1, 2))


def selection_loss(
  probs: Sequence[Float[Array, 'b _ _']], targets: Sequence[Float[Array, 'b _ _']],
  is_local: Bool[Array, 'b'],
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """(sum over local rows, number of them) of the `cell_entropy` of selection maps.

  The mean is over cells, then over scales with equal weight. Without a local row both are 0.

  Args:
    probs: per high scale, before the ground-truth override.
    targets: per high scale, area coverage on the same grid.
  """
  total = jnp.zeros((), jnp.float32)
  for p, target in zip(probs, targets, strict=True):
    total = total + jnp.where(is_local, cell_entropy(p, target), 0.0).sum() / len(probs)
  return total, is_local.sum().astype(total.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
  """What the losses need of the towers; micro-batches of it are stacked or added up.

  Attributes:
    image, text: [b o], of unit length.
    prior, posterior: sums of the selection losses over local rows.
    local: number of local rows; 0 without targets.
  """

  image: jax.Array
  text: jax.Array
  prior: jax.Array
  posterior: jax.Array
  local: jax.Array


def features(
  fn: Functional, params, batch: Mapping[str, Any], config: ContrastiveConfig, *,
  ex: Execution = HERE,
) -> Features:
  """The towers' part of `pretrain_losses`, with the same arguments."""
  image, text, out = fn.bind(params)(
    dict(batch), select_target=config.select_target, pool_target=config.pool_target, ex=ex)
  if batch.get('target') is None:
    return Features(image, text, *(jnp.zeros((), jnp.float32),) * 3)
  targets = whole = target_maps(batch['target'], out.plan)
  if batch.get('prior_target') is not None:
    whole = target_maps(batch['prior_target'], out.plan)
  is_local = _counted(batch, image.shape[0])
  if batch.get('is_global') is not None:
    is_local = is_local & ~batch['is_global'][:, 0]
  prior, local = selection_loss(out.prior, whole, is_local)
  posterior, _ = selection_loss(out.posterior, targets, is_local)
  return Features(image, text, prior, posterior, local)


def _counted(batch: Mapping[str, Any], rows: int) -> Bool[Array, 'b']:
  return jnp.ones(rows, bool) if batch.get('counted') is None else batch['counted'][:, 0]


def losses_of(found: Features, params, batch: Mapping[str, Any],
              config: ContrastiveConfig) -> dict[str, jax.Array]:
  """The losses of a batch from its features: contrastive, prior, posterior, total."""
  group = None
  if batch.get('image') is not None and not config.intra_image:
    group = batch['image'][:, 0]
  total, rows = sigmoid_loss(
    found.image, found.text, params['logit_scale'], params['logit_bias'], chunk=config.chunk,
    counted=_counted(batch, found.image.shape[0]), group=group)
  contrastive = total / jnp.maximum(rows, 1)
  prior, posterior = (x / jnp.maximum(found.local, 1) for x in (found.prior, found.posterior))
  weighted = contrastive + config.prior_weight * prior + config.posterior_weight * posterior
  return {'prior': prior, 'posterior': posterior, 'contrastive': contrastive, 'total': weighted}


def pretrain_losses(
  fn: Functional, params, batch: Mapping[str, Any], config: ContrastiveConfig, *,
  ex: Execution = HERE,
) -> dict[str, jax.Array]:
  """The losses of one global batch: contrastive, prior, posterior, total.

  Args:
    fn, params: of `systems.ps3.model.build`.
    batch: see `PS3.__call__`; `is_global` absent means that all rows are local, `target` absent
      switches the selection losses off. Optional: `counted` bool [b 1], rows that take part;
      `image` int [b 1], rows of equal number show the same image; `prior_target` [b h w], what the
      bottom-up selection learns where it is not `target`.
  """
  found = features(fn, params, batch, config, ex=ex)
  return losses_of(found, params, batch, config)


def summed(losses: Mapping[str, jax.Array], batch) -> tuple[jax.Array, jax.Array]:
  """(total loss times rows, rows): what adds up over devices."""
  counted = batch.get('counted')
  rows = jnp.asarray(batch['tokens'].shape[0] if counted is None else counted.sum(), jnp.int32)
  return losses['total'] * rows, rows


def accumulated(fn: Functional, merge: Callable[[Any], Any], trained, batch,
                config: ContrastiveConfig, *, ex: Execution = HERE):
  """Value and gradient of the summed loss of the large batch, one micro-batch in memory at a time.

  Contrast joins all rows, so that losses of micro-batches do not add up. The features of all rows
  are computed first and kept without what made them; their gradients are then carried through each
  micro-batch's towers, which run a second time (Gao et al., 2101.06983; open_clip's `accum_freq`
  does the same for its loss).

  Args:
    merge: trained leaves -> parameters.
    batch: micro-batches [a b ...].

  Returns:
    ((total loss times rows, rows), its gradient by trained leaf).
  """
  encode = lambda trained, micro: features(fn, merge(trained), micro, config, ex=ex)
  _, found = jax.lax.scan(lambda _, micro: (None, encode(trained, micro)), None, batch)
  names = ('tokens', 'counted', 'image')
  rows = {name: _joined(batch[name]) for name in names if batch.get(name) is not None}

  def loss(trained, found):
    whole = Features(_joined(found.image), _joined(found.text), found.prior.sum(),
                     found.posterior.sum(), found.local.sum())
    return summed(losses_of(whole, merge(trained), rows, config), rows)

  value, (grads, wanted) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(trained, found)

  def carry_on(grads, piece):
    micro, wanted = piece
    _, pull = jax.vjp(lambda trained: encode(trained, micro), trained)
    return jax.tree.map(jnp.add, grads, pull(wanted)[0]), None

  return value, jax.lax.scan(carry_on, grads, (batch, wanted))[0]


def _joined(x):
  """[a b ...] -> [b*a ...]: rows stay on the devices that they lie on."""
  x = jnp.moveaxis(jnp.asarray(x), 0, 1)
  return x.reshape(-1, *x.shape[2:])


def clamp_logit_scale(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """After each step: exp(logit_scale) stays within [1, 100]; nothing where it is not trained."""
  if 'logit_scale' not in leaves:
    return leaves
  return leaves | {'logit_scale': jnp.clip(leaves['logit_scale'], 0.0, MAX_LOGIT_SCALE)}
