"""Resamplers: a fixed number of learned queries reads any number of visual tokens.

Sources: Flamingo's Perceiver Resampler (6 layers, as in Pheye's appendix B.2) and the single-layer
resampler of Qwen-VL and Monkey (`Yuliang-Liu/Monkey: monkey_model/visual.py`). Axis letters:
b rows, f frames, n tokens, q queries, c width.
"""

from __future__ import annotations

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from hrvlm_jax.core import resample
from hrvlm_jax.core.attention import attention
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import LayerNorm, Linear, activation, normal
from hrvlm_jax.core.module import Module, Param, Rngs, scan_layers, stacked
from hrvlm_jax.systems.grid import TokenMap

EPS_PERCEIVER, EPS_SINGLE = 1e-5, 1e-6


class PerceiverLayer(Module):
  """latents += attention(concat(x, latents)); latents += feed-forward. No biases in projections."""

  def __init__(self, width: int, heads: int, head_dim: int, mlp_ratio: int, activation_name: str, *,
               param_dtype=jnp.float32, rngs: Rngs):
    norm = lambda: LayerNorm(width, eps=EPS_PERCEIVER, param_dtype=param_dtype, rngs=rngs)
    make = lambda n_in, n_out: Linear(n_in, n_out, bias=False, kernel_init=normal(n_in**-0.5),
                                      param_dtype=param_dtype, rngs=rngs)
    inner = heads * head_dim
    self.heads, self.activation = heads, activation_name
    self.norm_media, self.norm_latents, self.norm_ff = norm(), norm(), norm()
    self.q, self.k, self.v = make(width, inner), make(width, inner), make(width, inner)
    self.out = make(inner, width)
    self.fc1, self.fc2 = make(width, mlp_ratio * width), make(mlp_ratio * width, width)

  def __call__(self, x: Float[Array, 'b n c'], latents: Float[Array, 'b q c'],
               valid: Bool[Array, 'b n'] | None = None, *, ex: Execution = HERE
               ) -> Float[Array, 'b q c']:
    media, own = self.norm_media(x), self.norm_latents(latents)
    both = jnp.concatenate([media, own], axis=1)
    split = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)
    if valid is not None:
      valid = jnp.pad(valid, ((0, 0), (0, own.shape[1])), constant_values=True)
    y = attention(split(self.q(own)), split(self.k(both)), split(self.v(both)), valid=valid, ex=ex)
    latents = latents + self.out(y.reshape(*own.shape[:2], -1))
    if self.activation == 'squared_relu':
      act = lambda h: jnp.square(jax.nn.relu(h))
    else:
      act = activation(self.activation)
    return latents + self.fc2(act(self.fc1(self.norm_ff(latents))))


class PerceiverResampler(Module):
  """Learned latents that read the tokens of one image (or of several frames) in several layers.

  Args:
    frames: rows of the time embedding; 1 for images.
    activation_name: 'gelu', or 'squared_relu' as in the original paper.
  """

  def __init__(self, width: int, *, queries: int, depth: int = 6, heads: int = 8,
               head_dim: int = 64, mlp_ratio: int = 4, frames: int = 1,
               activation_name: str = 'gelu', param_dtype=jnp.float32, rngs: Rngs):
    self.latents = Param(normal(1.0)(rngs.params(), (queries, width), param_dtype))
    self.time = Param(normal(1.0)(rngs.params(), (frames, 1, width), param_dtype))
    self.layers = stacked(
      lambda r: PerceiverLayer(width, heads, head_dim, mlp_ratio, activation_name,
                               param_dtype=param_dtype, rngs=r), depth, rngs=rngs)
    self.norm = LayerNorm(width, eps=EPS_PERCEIVER, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, x: Float[Array, 'b f n c'], *, valid: Bool[Array, 'b fn'] | None = None,
               ex: Execution = HERE) -> Float[Array, 'b q c']:
    """Args: valid: which of the flattened tokens are real (all by default)."""
    batch, frames, _, width = x.shape
    x = (x + self.time[...][:frames].astype(x.dtype)).reshape(batch, -1, width)
    latents = jnp.broadcast_to(self.latents[...].astype(x.dtype),
                               (batch, *self.latents[...].shape))
    ex = ex.replace(remat='none')
    latents, _ = scan_layers(self.layers, latents,
                             lambda layer, y, _: (layer(x, y, valid, ex=ex), None), ex=ex)
    return self.norm(latents)


def sincos_positions(side: int, width: int) -> np.ndarray:
  """float32 [side*side, width]: the first half of the channels encodes the column, the second the
  row; each half is [sin, cos] of position * 10000^(-2i/half), with i below a quarter of the width.

  Raises:
    ValueError: the width is no multiple of four.
  """
  if width % 4:
    raise ValueError(f'positions need a width that is a multiple of 4, got {width}')
  half = width // 2
  rate = 10000.0 ** (-2 * np.arange(half // 2, dtype=np.float64) / half)
  encode = lambda place: np.concatenate([np.sin(place[:, None] * rate),
                                         np.cos(place[:, None] * rate)], axis=1)
  rows, columns = (axis.reshape(-1).astype(np.float64) for axis in np.mgrid[:side, :side])
  return np.concatenate([encode(columns), encode(rows)], axis=1).astype(np.float32)


class SingleLayerResampler(Module):
  """One cross-attention from learned queries: no residual, no feed-forward.

  Positions are fixed; those of the keys are the queries' resampled to the key grid. The originals
  have a square number of queries; of another one (257 in Pheye's appendix B.2, which does not say
  how they lie) the first have no position, as a class token, and the rest form a square.

  Args:
    n_in: width of the tokens; queries and result have `width`.
    maps: how the tokens lie on the image; tokens in no map have no position.
    heads: default width // 128, at least one.
  """

  def __init__(self, n_in: int, width: int, *, queries: int, maps: Sequence[TokenMap],
               heads: int | None = None, param_dtype=jnp.float32, rngs: Rngs):
    self.side, self.maps = math.isqrt(queries), tuple(maps)
    self.heads, self.width = heads or max(width // 128, 1), width
    norm = lambda: LayerNorm(width, eps=EPS_SINGLE, param_dtype=param_dtype, rngs=rngs)
    make = lambda: Linear(width, width, kernel_init=normal(width**-0.5), param_dtype=param_dtype,
                          rngs=rngs)
    # The original's truncation at +-2 is a hundred standard deviations away.
    self.query = Param(normal(0.02)(rngs.params(), (queries, width), param_dtype))
    self.kv_proj = None if n_in == width else Linear(
      n_in, width, bias=False, kernel_init=normal(n_in**-0.5), param_dtype=param_dtype, rngs=rngs)
    self.norm_q, self.norm_kv, self.norm_post = norm(), norm(), norm()
    self.q, self.k, self.v, self.out = make(), make(), make(), make()
    self.proj = Param(normal(width**-0.5)(rngs.params(), (width, width), param_dtype))

  def __call__(self, x: Float[Array, 'b n c'], *, ex: Execution = HERE) -> Float[Array, 'b q d']:
    """Tokens that lie as `maps` say -> one token per query."""
    keys = key_positions(self.maps, x.shape[1], self.side, self.width)
    x = x if self.kv_proj is None else self.kv_proj(x)
    kv, query = self.norm_kv(x), self.norm_q(self.query[...].astype(x.dtype))
    table = sincos_positions(self.side, self.width)
    table = np.pad(table, ((query.shape[0] - len(table), 0), (0, 0)))
    split = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)
    q = jnp.broadcast_to(self.q(query + table.astype(x.dtype)),
                         (x.shape[0], *query.shape))
    y = attention(split(q), split(self.k(kv + keys.astype(x.dtype))), split(self.v(kv)),
                  ex=ex)
    y = self.norm_post(self.out(y.reshape(*q.shape)))
    return y @ self.proj[...].astype(x.dtype)


def key_positions(maps: Sequence[TokenMap], tokens: int, side: int, width: int) -> np.ndarray:
  """float32 [tokens, width]: the positions of a side x side grid over the image where the maps lie.

  A map of a part of the image takes its part of the grid that the whole image would have at its
  resolution.
  """
  out, table = np.zeros((tokens, width), np.float32), sincos_positions(side, width)
  square = table.reshape(side, side, width)
  for one in maps:
    x0, y0, x1, y1 = one.box
    rows, columns = round(one.rows / (y1 - y0)), round(one.columns / (x1 - x0))
    whole = square if (rows, columns) == (side, side) else np.einsum(
      'Yy,Xx,yxc->YXc', resample.bicubic_matrix(side, rows), resample.bicubic_matrix(side, columns),
      square)
    top, left = round(y0 * rows), round(x0 * columns)
    part = whole[top:top + one.rows, left:left + one.columns]
    out[one.tokens] = part.reshape(-1, width)
  return out


def pool_maps(x: Float[Array, 'b n c'], sizes: Sequence[tuple[int, int]], factor: int
              ) -> Float[Array, 'b m c']:
  """Mean of factor x factor neighbours in each of the maps that the tokens are, in turn.

  The last windows of a side may overlap (area).

  Args:
    sizes: (rows, columns) of every map.
  """
  out, start = [], 0
  for rows, columns in sizes:
    part = x[:, start:start + rows * columns].reshape(x.shape[0], rows, columns, -1)
    matrices = [resample.area_matrix(n, -(-n // factor)) for n in (rows, columns)]
    out.append(resample.resize(part, *matrices).reshape(x.shape[0], -1, x.shape[-1]))
    start += rows * columns
  return jnp.concatenate(out, axis=1)
