"""LLaVA-HR on the device: a ViT on a small image, a ConvNeXt on a large one, joined by adapters.

Source: `luogen1996/LLaVA-HR: llava_hr/model/multimodal_encoder/multipath_encoder_wapper.py`. Axis
letters: n image slots, b rows, t places of a row, h w rows and columns, d width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hrvlm_jax.core import resample
from hrvlm_jax.core.attention import attention
from hrvlm_jax.core.conv import average_pool
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import LayerNorm, Mlp, normal
from hrvlm_jax.core.module import List, Module, Param, Rngs
from hrvlm_jax.core.resample import normalise
from hrvlm_jax.systems.contract import VisualTokens
from hrvlm_jax.systems.llava_hr.adapter import AlignModule, MRAdapter, align
from hrvlm_jax.systems.llava_hr.config import LlavaHRConfig
from hrvlm_jax.vision.convnext import ConvNeXt
from hrvlm_jax.vision.vit import Attention, ViT


class Resampler(Module):
  """Learned queries read all tokens by one cross-attention, then a residual MLP.

  The paper's Table 2 names a resampler without its form; this is ours (README).
  """

  def __init__(self, width: int, heads: int, queries: int, *, param_dtype=jnp.float32, rngs: Rngs):
    shared = dict(param_dtype=param_dtype, rngs=rngs)
    self.queries = Param(normal(0.02)(rngs.params(), (queries, width), param_dtype))
    self.norm_tokens = LayerNorm(width, eps=1e-5, **shared)
    self.attn = Attention(width, heads, **shared)
    self.norm = LayerNorm(width, eps=1e-5, **shared)
    self.mlp = Mlp(width, 4 * width, activation='gelu', **shared)

  def __call__(self, x: Float[Array, 'n t d'], *, ex: Execution = HERE) -> Float[Array, 'n q d']:
    queries = self.queries[...].astype(x.dtype)
    q = jnp.broadcast_to(queries, (x.shape[0], *queries.shape))
    split = lambda y: y.reshape(*y.shape[:-1], self.attn.heads, -1)
    tokens = self.norm_tokens(x)
    y = attention(split(self.attn.q(q)), split(self.attn.k(tokens)), split(self.attn.v(tokens)),
                  ex=ex)
    y = q + self.attn.out(y.reshape(q.shape))
    return y + self.mlp(self.norm(y))


class Encoder(Module):
  """Both towers, adapters and align module; or one tower alone."""

  def __init__(self, config: LlavaHRConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    c = self.config = config
    shared = dict(param_dtype=param_dtype, rngs=rngs)
    self.fast = None if c.fast is None else ViT(c.fast, **shared)
    self.slow = None if c.slow is None else ConvNeXt(c.slow, **shared)
    self.adapters = None if c.adapters is None else List([
      MRAdapter(slow, fast, c.adapters, **shared) for slow, fast in adapter_widths(c)])
    self.align = AlignModule(
      c.slow.widths[-1], c.fast.width, **shared) if c.dual and c.fusion == 'sum' else None
    self.resampler = Resampler(
      c.fast.width, c.fast.heads, c.queries, **shared) if c.reduce == 'queries' else None

  def __call__(self, views: dict[str, jax.Array], *, key=None, ex: Execution = HERE
               ) -> VisualTokens:
    """Views of a batch (`views.batch`) -> [b t d], before the projector.

    `info` holds per image slot and adapter: gates [n k 1] or [n k d], and injected, the strength
    of what entered each cell: [n k g g], or a list of [n g g] where the grids differ.
    """
    images = normalise(views['pixels'], self.config.mean, self.config.std).astype(ex.dtype)
    tokens, info = self.tower(images, key=key, ex=ex)
    flat = tokens.reshape(-1, tokens.shape[-1])
    return VisualTokens(jnp.take(flat, views['index'], axis=0), views['valid'], info)

  def tower(self, images: Float[Array, 'n h w 3'], *, keep: bool = False, key=None,
            ex: Execution = HERE):
    """Normalised square images -> (tokens [n t d], info).

    Args:
      keep: also put every intermediate state into `info['states']` (golden cases, analyses).
    """
    if self.slow is None:
      return self._fast_alone(images, key, ex), {}
    if self.fast is None:
      return _tokens(self.slow(images, ex=ex)), {}
    states: dict[str, jax.Array] = {}
    fast, slow, gates, injected = self._paths(images, states, key, ex)
    states['slow_out'] = slow
    if self.align is None:
      out = jnp.concatenate([fast, align(slow, fast.shape[1])], axis=-1)
    else:
      out = self.align(fast, slow)
    info: dict[str, Any] = {'states': states} if keep else {}
    if gates:
      widths_agree = len({gate.shape for gate in gates}) == 1
      grids_agree = len({s.shape for s in injected}) == 1
      info['gates'] = jnp.stack(gates, axis=1) if widths_agree else gates
      info['injected'] = jnp.stack(injected, axis=1) if grids_agree else injected
    return _tokens(out), info

  def _paths(self, images, states, key, ex: Execution):
    """Last maps of both paths, gates and strengths of the adapters."""
    size = self.config.fast_image_size
    matrix = resample.bilinear_corners_matrix(images.shape[1], size)
    small = resample.resize(images, matrix, matrix)
    embedded, x = embed_patches(self.fast, small, ex=ex)
    states.update(fast_input=small, fast_embeddings=embedded, fast_pre_ln=x)
    adapters = [] if self.adapters is None else list(self.adapters)
    gates, injected = [], []

    def adapt(number, fast, slow):
      y, gate, strength = adapters[number](fast, slow)
      gates.append(gate)
      injected.append(strength)
      states[f'adapter{number}_out'] = y
      return y

    run = lambda x, start, stop: self.fast.run(x, start=start, stop=stop, key=key, ex=ex).x
    depth = self.config.fast.depth
    if not adapters:
      return _map(run(x, 0, depth)), self.slow(images, ex=ex), gates, injected
    if self.config.adapters.direction == 'low_to_high':
      fast = _map(run(x, 0, depth))
      slow = self.slow.stem(images)
      for number, stage in enumerate(self.slow.stages):
        slow = stage(slow, ex=ex)
        if number < len(adapters):
          slow = adapt(number, slow, fast)
      return fast, slow, gates, injected
    slow = self.slow(images, ex=ex)
    quarter = depth // 4
    for number in range(4):
      x = run(x, number * quarter, (number + 1) * quarter)
      states[f'fast_quarter{number + 1}'] = x
      if number < len(adapters):
        x = _tokens(adapt(number, _map(x), slow))
    return _map(x), slow, gates, injected

  def _fast_alone(self, images, key, ex: Execution):
    """The ViT of the single-path baselines: class token kept until the end, no last norm."""
    c = self.config
    stop = c.fast.depth + 1 + c.select_layer
    x = self.fast.run(self.fast.embed(images, ex=ex), stop=stop, key=key, ex=ex).x
    x = x[:, int(c.fast.class_token):]
    if c.reduce == 'average':
      return _tokens(average_pool(_map(x), c.reduce_factor))
    return x if self.resampler is None else self.resampler(x, ex=ex)


def embed_patches(vit: ViT, images: Float[Array, 'n h w 3'], *, ex: Execution = HERE
                  ) -> tuple[jax.Array, jax.Array]:
  """The ViT's input in the dual path, [n t d]: embeddings without class token, and those normed.

  The class token is dropped BEFORE the norm. Positions are resampled in every pass, so that
  gradients reach the whole table.
  """
  patch = vit.config.patch_size
  grid = (images.shape[1] // patch, images.shape[2] // patch)
  positions = vit.positions(grid)[int(vit.config.class_token):]
  x = vit.patch_embed(images, ex=ex) + positions.astype(images.dtype)
  return x, x if vit.pre_norm is None else vit.pre_norm(x)


def adapter_widths(config: LlavaHRConfig) -> list[tuple[int, int]]:
  """(injected, receiving) channels of each adapter."""
  if config.adapters.direction == 'high_to_low':
    return [(config.slow.widths[-1], config.fast.width)] * 3
  return [(config.fast.width, width) for width in config.slow.widths[:-1]]


def _map(tokens: Float[Array, 'n t d']) -> Float[Array, 'n g g d']:
  side = round(tokens.shape[1] ** 0.5)
  return tokens.reshape(tokens.shape[0], side, side, tokens.shape[-1])


def _tokens(cells: Float[Array, 'n h w d']) -> Float[Array, 'n t d']:
  return cells.reshape(cells.shape[0], -1, cells.shape[-1])
