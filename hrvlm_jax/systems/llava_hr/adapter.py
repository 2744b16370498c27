"""The parts of LLaVA-HR between the two paths: resampling, MR-Adapter, final align module.

Source: `luogen1996/LLaVA-HR: llava_hr/model/multimodal_encoder/multipath_encoder_wapper.py`
(S2FStitchAlignModuleV2, MultiPathAlignModule); arXiv 2403.03003, section 3.3. Axis letters:
n images, h w g rows and columns, c channels injected, d channels of the receiving path,
p pooled channels (2d), o outputs of the gate.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hrvlm_jax.core import resample
from hrvlm_jax.core.conv import DepthwiseConv, average_pool, xavier_uniform
from hrvlm_jax.core.layers import Linear, activation, torch_uniform, wide, wide_dtype, zeros
from hrvlm_jax.core.module import Module, Rngs
from hrvlm_jax.systems.llava_hr.config import AdapterConfig

KERNEL = 7
GATES = {'tanh': jnp.tanh, 'sigmoid': jax.nn.sigmoid, 'hsigmoid': jax.nn.hard_sigmoid}
_gelu = activation('gelu')


def align(x: Float[Array, 'n h h c'], grid: int) -> Float[Array, 'n g g c']:
  """A square map on another grid: itself, bilinear up (corners aligned), or averaged down.

  Raises:
    ValueError: neither side is a multiple of the other.
  """
  side = x.shape[1]
  if side == grid:
    return x
  if max(side, grid) % min(side, grid):
    raise ValueError(f'align: grids of {side} and {grid} cells are no multiples of each other')
  if side > grid:
    return average_pool(x, side // grid)
  matrix = resample.bilinear_corners_matrix(side, grid)
  return resample.resize(x, matrix, matrix)


class Gate(Module):
  """The logit of a gate from pooled features: Linear, GELU, Linear to 1 or d outputs."""

  def __init__(self, width: int, out: int, *, param_dtype=jnp.float32, rngs: Rngs):
    make = lambda n_in, n_out: Linear(
      n_in, n_out, kernel_init=torch_uniform(n_in), bias_init=torch_uniform(n_in),
      param_dtype=param_dtype, rngs=rngs)
    self.fc1, self.fc2 = make(2 * width, width // 2), make(width // 2, out)

  def __call__(self, pooled: Float[Array, 'n p']) -> Float[Array, 'n o']:
    return self.fc2(_gelu(self.fc1(pooled)))


class MRAdapter(Module):
  """out = f + gate * u; see `AdapterConfig`. Both projections start at zero, so that a new adapter
  changes nothing.

  Args:
    slow: channels of the path that is injected.
    fast: channels of the path that receives.
  """

  def __init__(self, slow: int, fast: int, config: AdapterConfig, *, param_dtype=jnp.float32,
               rngs: Rngs):
    self.config = config
    shared = dict(param_dtype=param_dtype, rngs=rngs)

    def first(kind: str, width: int) -> Module:
      if kind == 'mlp':
        return Linear(width, width, kernel_init=xavier_uniform(width, width), **shared)
      cells = KERNEL * KERNEL
      return DepthwiseConv(KERNEL, width, kernel_init=xavier_uniform(cells, cells * width),
                           **shared)

    self.slow_conv = first(config.slow_map, slow)
    self.slow_proj = Linear(slow, fast, kernel_init=zeros, **shared)
    self.fast_conv = first(config.fast_map, fast)
    self.fast_proj = Linear(fast, fast, kernel_init=zeros, **shared)
    self.gate = Gate(fast, 1 if config.gate_width == 'scalar' else fast, **shared)

  def map_slow(self, slow: Float[Array, 'n h h c']) -> Float[Array, 'n h h d']:
    """f_h, on the grid of the injected path."""
    return self.slow_proj(_gelu(self.slow_conv(slow)))

  def map_fast(self, fast: Float[Array, 'n g g d']) -> Float[Array, 'n g g d']:
    """f_l, without the skip."""
    return self.fast_proj(_gelu(self.fast_conv(fast)))

  def pool(self, fast: Float[Array, 'n g g d'], slow: Float[Array, 'n g g d']):
    """What the gate reads, [n 2d]: means over the cells, the receiving path first."""
    both = jnp.concatenate([fast, slow], axis=-1)
    return both.mean(axis=(1, 2), dtype=wide_dtype(fast.dtype)).astype(fast.dtype)

  def __call__(self, fast: Float[Array, 'n g g d'], slow: Float[Array, 'n h h c']):
    """(output [n g g d], gate [n 1] or [n d], how much was injected into each cell [n g g])."""
    u = align(self.map_slow(slow), fast.shape[1])
    mapped = self.map_fast(fast)
    f = fast + mapped
    pooled = self.pool(f if self.config.gate_input == 'with_skip' else mapped, u)
    gate = GATES[self.config.gate](self.gate(pooled))
    injected = gate[:, None, None] * u
    strength = jnp.sqrt(jnp.square(wide(injected)).mean(axis=-1))
    return f + injected, gate, strength


class AlignModule(Module):
  """fast_proj(fast) + slow_proj(slow on the fast grid), both linear."""

  def __init__(self, slow: int, fast: int, *, param_dtype=jnp.float32, rngs: Rngs):
    make = lambda n_in: Linear(
      n_in, fast, kernel_init=torch_uniform(n_in), bias_init=torch_uniform(n_in),
      param_dtype=param_dtype, rngs=rngs)
    self.fast_proj, self.slow_proj = make(fast), make(slow)

  def __call__(self, fast: Float[Array, 'n g g d'], slow: Float[Array, 'n h h c']):
    return self.fast_proj(fast) + self.slow_proj(align(slow, fast.shape[1]))
