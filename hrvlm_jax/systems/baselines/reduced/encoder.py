"""Reduced systems on the device: the inner encoder, then the step, image by image."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.module import Module, Rngs, layer_at
from hrvlm_jax.core.pixels import normalise
from hrvlm_jax.systems.baselines import pruning, resamplers
from hrvlm_jax.systems.baselines.reduced.config import (
  Perceiver,
  Pool,
  ReducedConfig,
  SingleLayer,
  ToMe,
)
from hrvlm_jax.systems.baselines.reduced.views import IMAGE_INDEX, IMAGE_VALID
from hrvlm_jax.systems.contract import VisualTokens


def _resampler(config: ReducedConfig, **options) -> Module | None:
  step = config.step
  if isinstance(step, Perceiver):
    return resamplers.PerceiverResampler(
      config.inner_width, queries=step.queries, depth=step.depth, heads=step.heads,
      head_dim=step.head_dim, mlp_ratio=step.mlp_ratio, activation_name=step.activation, **options)
  if isinstance(step, SingleLayer):
    return resamplers.SingleLayerResampler(config.inner_width, config.width, queries=step.queries,
                                           heads=step.heads, **options)
  return None


class Encoder(Module):
  """Inner encoder and, for resamplers, their parameters."""

  def __init__(self, config: ReducedConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    self.inner = config.system.encoder(config.encoder, param_dtype=param_dtype, rngs=rngs)
    self.resampler = _resampler(config, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, views: dict[str, jax.Array], *, key=None, ex: Execution = HERE
               ) -> VisualTokens:
    """Views of a batch -> [b m*tokens d]."""
    c = self.config
    own = {name: value for name, value in views.items() if name not in (IMAGE_INDEX, IMAGE_VALID)}
    if c.step.kind == 'visionzip':
      x = self._zipped(own, key, ex)
    else:
      x = self._reduce(self.inner(own, key=key, ex=ex), ex)
    rows, images = views[IMAGE_INDEX].shape
    values = jnp.take(x, views[IMAGE_INDEX], axis=0).reshape(rows, images * c.tokens, -1)
    return VisualTokens(values, jnp.repeat(views[IMAGE_VALID], c.tokens, axis=1))

  def _reduce(self, visual: VisualTokens, ex: Execution) -> jax.Array:
    step, x = self.config.step, visual.values
    if isinstance(step, Perceiver):
      return self.resampler(x[:, None], valid=visual.valid, ex=ex)
    if isinstance(step, SingleLayer):
      return self.resampler(x, ex=ex)
    if isinstance(step, Pool):
      sizes = [(m.rows, m.columns) for m in self.config.inner_grid.maps]
      return resamplers.pool_maps(x, sizes, step.factor)
    assert isinstance(step, ToMe)
    return pruning.tome_reduce(x, step.keep)

  def _zipped(self, views, key, ex: Execution) -> jax.Array:
    """VisionZip: the scores come from the block whose output is read."""
    c, step = self.config.encoder, self.config.step
    tower, last = self.inner.tower, c.vision.depth + c.layer
    pixels = normalise(views['pixels'], c.mean, c.std).astype(ex.dtype)
    x = tower.run(tower.embed(pixels, ex=ex), stop=last, key=key, ex=ex).x
    block = layer_at(tower.blocks, last)
    q, k, _ = block.attn.project(block.norm1(x), ex=ex)
    x, _, _ = block(x, ex=ex)
    first = c.vision.class_token
    zipped = pruning.visionzip(
      x, pruning.importance(q, k, class_token=first), k.mean(axis=2), dominant=step.dominant,
      contextual=step.contextual, class_token=first)
    return jnp.take(zipped, views['index'][:, 0], axis=0)
