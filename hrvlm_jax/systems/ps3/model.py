"""The whole image-text model of PS3: vision, text, scale and bias of the contrastive logits.

Parameter paths: `vision/...`, `text/...`, `logit_scale`, `logit_bias`. Source: `NVlabs/PS3:
train/src/open_clip/model.py`. Axis letters: b pairs, o feature width, d width of the trunk.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hrvlm_jax.core import resample
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import unit, wide
from hrvlm_jax.core.module import Functional, Module, Param, Rngs
from hrvlm_jax.core.resample import normalise
from hrvlm_jax.systems.ps3 import selection
from hrvlm_jax.systems.ps3.config import PS3Config
from hrvlm_jax.systems.ps3.encoder import Encoder
from hrvlm_jax.systems.ps3.plan import Plan, make_plan
from hrvlm_jax.systems.ps3.text import TextTower


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pooled:
  """One pooled vector per image, and what the selection losses need.

  Attributes:
    pooled: [b o], the thumbnail's for rows of a global caption, else of the chosen tokens.
    low, high: [b o], both before the mix.
    cells: int32 [b t] chosen cells, flat and rising.
    prior, posterior: probability maps [b rows cols] per high scale, bottom-up and (with a prompt)
      top-down, both before the ground-truth override.
    used: the maps the choice was made by.
    plan: the static counts.
  """

  pooled: jax.Array
  low: jax.Array
  high: jax.Array
  cells: jax.Array
  prior: tuple[jax.Array, ...]
  posterior: tuple[jax.Array, ...] | None
  used: tuple[jax.Array, ...]
  plan: Plan = dataclasses.field(metadata={'static': True})


def pooled_images(
  encoder: Encoder,
  images: Float[Array, 'b H W 3'],
  *,
  prompt: Float[Array, 'b d'] | None = None,
  target: Float[Array, 'b h w'] | None = None,
  select_target: bool = True,
  pool_target: bool = False,
  is_global: Bool[Array, 'b 1'] | None = None,
  ex: Execution = HERE,
) -> Pooled:
  """The pre-training forward: one look of the full budget, pooled.

  Nothing is detached: the pooled features reach the thumbnail pass through its keys and values.
  The choice of cells has no gradient.

  Args:
    images: normalised.
    target: ground-truth maps, any resolution.
    select_target: the target overrides the selection.
    pool_target: pool only tokens that the target covers, at their own scale; a row without any
      pools all.
    is_global: rows that return the thumbnail's pooled vector.
  """
  config = encoder.config
  plan = make_plan(*images.shape[1:3], config, num_looks=1)
  low = encoder.encode_low(images, ex=ex)
  prior = encoder.probabilities(low, None, plan)
  posterior = None if prompt is None else encoder.probabilities(low, prompt, plan)
  used = prior if posterior is None else posterior
  if target is not None and select_target:
    used = selection.override(used, target, plan)
  out = encoder.encode_high(low, images, used, plan, ex=ex)
  start = plan.grids[0][0] * plan.grids[0][1]
  valid = None
  if target is not None and pool_target:
    valid = covered(target, out.cells, plan) > 0
  low_pooled = encoder.pool(out.last[:, :start], ex=ex)
  high_pooled = encoder.pool(out.last[:, start:], mask=valid, ex=ex)
  pooled = high_pooled
  if is_global is not None:
    share = is_global.astype(pooled.dtype)
    pooled = share * low_pooled + (1 - share) * high_pooled
  return Pooled(pooled, low_pooled, high_pooled, out.cells, prior, posterior, used, plan)


def covered(target: Float[Array, 'b h w'], cells, plan: Plan) -> Float[Array, 'b t']:
  """Share of each chosen cell that the target covers, at the cell's own scale."""
  flat = [m.reshape(m.shape[0], -1) for m in target_maps(target, plan)]
  return jnp.take_along_axis(jnp.concatenate(flat, axis=1), cells, axis=1)


def target_maps(target: Float[Array, 'b h w'], plan: Plan) -> list[Float[Array, 'b rows cols']]:
  """Area coverage of the target on every high grid."""
  return [resample.area(wide(target), *grid) for grid in plan.grids[1:]]


class PS3(Module):
  """Image and text towers with the parameters of the sigmoid loss."""

  def __init__(self, config: PS3Config, *, param_dtype=jnp.float32, rngs: Rngs):
    if config.text is None:
      raise ValueError('PS3: config.text is None; the image-text model needs a text tower')
    self.config = config
    self.vision = Encoder(config, param_dtype=param_dtype, rngs=rngs)
    self.text = TextTower(config.text, param_dtype=param_dtype, rngs=rngs)
    self.logit_scale = Param(jnp.full((), math.log(1 / 0.07), param_dtype))
    self.logit_bias = Param(jnp.full((), -10.0, param_dtype))

  def __call__(
    self, batch: dict[str, Any], *, select_target: bool = True, pool_target: bool = True,
    ex: Execution = HERE,
  ) -> tuple[Float[Array, 'b o'], Float[Array, 'b o'], Pooled]:
    """(image features, text features, both of unit length, and the rest).

    Args:
      batch: pixels uint8 [b H W 3] (or `images`, normalised), tokens int32 [b t], target [b h w]
        (optional), is_global bool [b 1] (optional).
    """
    images = batch['images'] if 'images' in batch else normalise(
      batch['pixels'], self.config.mean, self.config.std)
    text = self.text.features(batch['tokens'], ex=ex)
    out = pooled_images(
      self.vision, images, prompt=self.text.prompt(text), target=batch.get('target'),
      select_target=select_target, pool_target=pool_target, is_global=batch.get('is_global'),
      ex=ex)
    return unit(out.pooled), text, out

  def prompt(self, tokens, *, ex: Execution = HERE) -> Float[Array, 'b d']:
    """Selection prompt of token rows."""
    return self.text.prompt(self.text.features(tokens, ex=ex))


def build(config: PS3Config, *, param_dtype=jnp.float32) -> Functional:
  """The image-text model of a config."""
  return Functional(lambda rngs: PS3(config, param_dtype=param_dtype, rngs=rngs))
