"""Where PS3 looks closer: selection probabilities and the ranking of high-resolution cells.

Source: `NVlabs/PS3: ps3/modeling_ps3.py`. Axis letters: b images, n thumbnail tokens, d width,
s high scales, g side of the thumbnail's grid, h w cells of the ConvNet, o its width.

As in the original the map of the first high scale is used for all of them: the other chunks of
`proj/fc2` and `prompt_proj` exist in checkpoints and never influence a result. They are computed on
request only (`all_scales=True`).
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hrvlm_jax.core import resample
from hrvlm_jax.core.conv import DepthwiseConv
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import (
  LayerNorm,
  Linear,
  Mlp,
  PatchEmbed,
  activation,
  normal,
  patchify,
  torch_uniform,
  unit,
  wide,
)
from hrvlm_jax.core.module import Module, Param, Rngs, scan_layers, stacked
from hrvlm_jax.systems.ps3.config import PS3Config, SaliencyConfig
from hrvlm_jax.systems.ps3.plan import Plan

SMOOTH_GRID = 6
NARROW = 16  # channels up to which the stem is summed in order


def _exactly(method):
  """Products at the highest precision: a TPU rounds the factors of a float32 product to half
  precision otherwise, which would make cells tie or change places."""

  @functools.wraps(method)
  def run(*args, **options):
    with jax.default_matmul_precision('highest'):
      return method(*args, **options)

  return run


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
  """What the selection knows of an image before it is asked anything.

  Attributes:
    low: [b n s d] projected features of the thumbnail (s = 1 unless all scales were asked for).
    detail: [b h w o] of the ConvNet, or None.
  """

  low: jax.Array
  detail: jax.Array | None


class ProjectionHead(Module):
  """fc2(norm(gelu(fc1(x)))), norm eps 1e-5; torch's default initial values."""

  def __init__(self, n_in: int, hidden: int, n_out: int, *, param_dtype=jnp.float32, rngs: Rngs):
    self.fc1 = torch_linear(n_in, hidden, param_dtype=param_dtype, rngs=rngs)
    self.norm = LayerNorm(hidden, eps=1e-5, param_dtype=param_dtype, rngs=rngs)
    self.fc2 = torch_linear(hidden, n_out, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, x: Float[Array, '... i'], *, columns: int | None = None):
    """Args: columns: compute the first outputs only."""
    y = self.norm(activation('gelu')(self.fc1(x)))
    return first_columns(self.fc2, y, columns)


def torch_linear(n_in: int, n_out: int, *, param_dtype, rngs: Rngs) -> Linear:
  """A linear layer with torch's default initial values."""
  init = torch_uniform(n_in)
  return Linear(n_in, n_out, kernel_init=init, bias_init=init, param_dtype=param_dtype, rngs=rngs)


def first_columns(layer: Linear, x: Float[Array, '... i'], columns: int | None):
  """The first outputs of a linear layer; all of them for None."""
  kernel, bias = layer.kernel[...], layer.bias[...]
  return x @ kernel[:, :columns].astype(x.dtype) + bias[:columns].astype(x.dtype)


class ChannelNorm(LayerNorm):
  """A layer norm that takes the moments of a few channels one channel after the other (Welford), as
  PyTorch does: rounding the mean shifts all channels by eps * mean / spread, which is visible where
  the channels are nearly equal (see `in_order`)."""

  def __call__(self, x: Float[Array, '... c']) -> Float[Array, '... c']:
    channels = x.shape[-1]
    if channels > NARROW:
      return super().__call__(x)
    mean, squares = x[..., :1], 0.0
    for i in range(1, channels):
      part = x[..., i:i + 1]
      before, mean = part - mean, mean + (part - mean) / (i + 1)
      squares = squares + before * (part - mean)
    y = (x - mean) / jnp.sqrt(squares / channels + self.eps)
    return y * self.scale[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class ConvNextBlock(Module):
  """x + weight * fc2(gelu(fc1(norm(depthwise 7x7(x)))))."""

  SIDE = 7

  def __init__(self, width: int, *, param_dtype=jnp.float32, rngs: Rngs):
    init = torch_uniform(self.SIDE**2)
    self.depthwise = DepthwiseConv(self.SIDE, width, kernel_init=init, param_dtype=param_dtype,
                                   rngs=rngs)
    self.depthwise.bias = Param(init(rngs.params(), (width,), param_dtype))
    self.norm = ChannelNorm(width, eps=1e-6, param_dtype=param_dtype, rngs=rngs)
    # fc2's fan-in is four times fc1's; the original draws each from its own.
    self.mlp = Mlp(width, 4 * width, activation='gelu', kernel_init=torch_uniform(width),
                   bias_init=torch_uniform(width), param_dtype=param_dtype, rngs=rngs)
    self.mlp.fc2 = torch_linear(4 * width, width, param_dtype=param_dtype, rngs=rngs)
    self.weight = Param(jnp.full((width,), 1e-6, param_dtype))

  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
    y = self.mlp(self.norm(self.depthwise(x)))
    return x + y * self.weight[...].astype(x.dtype)


class ShallowConvNet(Module):
  """Stem of stride = kernel, norm, ConvNeXt blocks, 1x1 convolution."""

  def __init__(self, config: SaliencyConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    init = torch_uniform(config.kernel**2 * 3)
    self.stem = PatchEmbed(config.kernel, 3, config.width, bias=True, param_dtype=param_dtype,
                           rngs=rngs)
    self.stem.kernel = Param(init(rngs.params(), self.stem.kernel.shape, param_dtype))
    self.stem.bias = Param(init(rngs.params(), (config.width,), param_dtype))
    self.norm = ChannelNorm(config.width, eps=1e-6, param_dtype=param_dtype, rngs=rngs)
    self.blocks = stacked(lambda r: ConvNextBlock(config.width, param_dtype=param_dtype, rngs=r),
                          config.depth, rngs=rngs)
    self.out = torch_linear(config.width, config.out, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, images: Float[Array, 'b H W 3'], *, ex: Execution = HERE
               ) -> Float[Array, 'b h w o']:
    """Normalised images of any size, squashed to a square here."""
    side = self.config.input_size
    cells = side // self.config.kernel
    patches = patchify(resample.bicubic(images, side, side, ex=ex), self.config.kernel)
    kernel = self.stem.kernel[...].astype(images.dtype).reshape(-1, self.config.width)
    product = in_order if self.config.width <= NARROW else jnp.matmul
    x = self.norm(product(patches, kernel) + self.stem.bias[...].astype(images.dtype))
    x = x.reshape(x.shape[0], cells, cells, -1)
    x, _ = scan_layers(self.blocks, x, lambda block, x, _: (block(x), None), ex=ex.plain)
    return self.out(x)


def in_order(x: Float[Array, '... k'], kernel: Float[Array, 'k c']) -> Float[Array, '... c']:
  """x @ kernel, summed over k one term after the other.

  The norm behind the stem divides by the spread over channels. With few channels that can be a
  thousandth of the values, and then the roundings of the long sum (2352 terms) decide the result:
  a more exact sum is further from the original's, which adds row, column, channel, one fused
  multiply-add at a time. Compiled with optimisation this is bit-equal to it on a CPU; matrix
  products of many channels, where nothing of this matters, are faster.
  """

  def add(total, term):
    column, row = term
    return total + column[..., None] * row, None

  total = jnp.zeros((*x.shape[:-1], kernel.shape[-1]), x.dtype)
  return jax.lax.scan(add, total, (jnp.moveaxis(x, -1, 0), kernel))[0]


class Selection(Module):
  """Scores of the thumbnail's cells for a prompt, or for the learned prior without one."""

  def __init__(self, config: PS3Config, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    width, scales = config.vision.width, config.high_scales
    n_in = width * len(config.select_layers)
    self.prior_prompt = Param(normal(1.0)(rngs.params(), (width,), param_dtype))
    self.proj = ProjectionHead(n_in, n_in, width * scales, param_dtype=param_dtype, rngs=rngs)
    net = config.saliency
    self.saliency = None if net is None else ShallowConvNet(net, param_dtype=param_dtype, rngs=rngs)
    self.prompt_proj = None if net is None else torch_linear(
      width, net.out * scales, param_dtype=param_dtype, rngs=rngs)

  @_exactly
  def features(
    self, hidden: Sequence[Float[Array, 'b n d']], images: Float[Array, 'b H W 3'], *,
    all_scales: bool = False, ex: Execution = HERE,
  ) -> Features:
    """Prompt-independent part, float32 whatever the trunk computes in and at the highest precision
    of products (half precision would make nearly all cells tie).

    Args:
      hidden: outputs of the blocks `select_layers`, in order.
    """
    scales = self.config.high_scales if all_scales else 1
    x = wide(jnp.concatenate(hidden, axis=-1))
    low = self.proj(x, columns=scales * self.config.vision.width)
    low = low.reshape(*low.shape[:-1], scales, -1)
    detail = None if self.saliency is None else self.saliency(wide(images), ex=ex)
    return Features(low, detail)

  @_exactly
  def cosines(self, features: Features, prompt: Float[Array, 'b d'] | None):
    """(thumbnail [b s g g], detail [b s g g] or None): cosines with the prompt."""
    grid = self.config.grid
    batch, _, scales, width = features.low.shape
    if prompt is None:
      prompt = jnp.broadcast_to(self.prior_prompt[...], (batch, width))
    prompt = wide(prompt)
    low = jnp.einsum('bnsd,bd->bsn', unit(features.low), unit(prompt))
    low = low.reshape(batch, scales, grid, grid)
    if features.detail is None:
      return low, None
    columns = scales * self.config.saliency.out
    asked = first_columns(self.prompt_proj, prompt, columns).reshape(batch, scales, -1)
    high = jnp.einsum('bhwo,bso->bshw', unit(features.detail), unit(asked))
    return low, resample.adaptive_max(high, grid, grid)

  def low_probabilities(self, features: Features, prompt=None) -> Float[Array, 'b s g g']:
    """Probability of every thumbnail cell, per scale of `features`."""
    low, high = self.cosines(features, prompt)
    logit = low if high is None else (low + high) / 2
    return jax.nn.sigmoid(self.config.cosine_scale * logit)

  def __call__(self, features: Features, prompt, plan: Plan) -> tuple[jax.Array, ...]:
    """Probability maps [b rows cols] of every high scale, before any override."""
    first = self.low_probabilities(features, prompt)[:, 0]
    return tuple(resample.nearest(first, *grid) for grid in plan.grids[1:])


def override(
  probs: Sequence[Float[Array, 'b r c']], target: Float[Array, 'b H W'], plan: Plan
) -> tuple[jax.Array, ...]:
  """Probability 1 wherever a ground-truth map touches the cell of the FIRST high scale.

  A box that touches one of its cells marks the whole block at finer scales.
  """
  covered = resample.area(wide(target), *plan.grids[1]) > 0
  return tuple(jnp.where(resample.nearest(covered, *p.shape[1:]), jnp.ones_like(p), p)
               for p in probs)


def smooth(probs: Sequence[Float[Array, 'b r c']]) -> tuple[jax.Array, ...]:
  """Every map averaged over a 6 x 6 grid."""
  return tuple(
    resample.nearest(resample.area(p, SMOOTH_GRID, SMOOTH_GRID), *p.shape[1:]) for p in probs)


def choose(probs: Sequence[Float[Array, 'b r c']], plan: Plan) -> list[Int[Array, 'b t']]:
  """Per look, the chosen cells: flat over all high scales, rising.

  One stable sort per scale ranks its cells (probability falling, then raster order); look k takes
  the ranks that its plan gives it. Cells are never taken twice.
  """
  starts = [sum(plan.cells[:i]) for i in range(len(plan.cells))]
  ranked = [jax.lax.top_k(jax.lax.stop_gradient(p).reshape(p.shape[0], -1), k)[1] + start
            for p, k, start in zip(probs, plan.deepest, starts, strict=True)]
  before = [[0] * len(plan.cells) for _ in plan.counts]
  chosen = []
  for number in range(plan.looks):
    rows = []
    for taken, counts in zip(before, plan.look(number), strict=True):
      # One plan for all instances, or one per instance: the latter are cut out row by row.
      row = slice(None) if len(plan.counts) == 1 else slice(len(rows), len(rows) + 1)
      rows.append(jnp.concatenate(
        [r[row, t:t + n] for r, t, n in zip(ranked, taken, counts, strict=True)], axis=1))
      taken[:] = [t + n for t, n in zip(taken, counts, strict=True)]
    chosen.append(jnp.sort(jnp.concatenate(rows, axis=0), axis=1))
  return chosen


def maps_of(cells: Int[Array, 'b t'], plan: Plan, dtype=jnp.float32) -> tuple[jax.Array, ...]:
  """0/1 maps [b rows cols] per high scale of flat cell indices."""
  batch = cells.shape[0]
  flat = jnp.zeros((batch, sum(plan.cells)), dtype)
  flat = flat.at[jnp.arange(batch)[:, None], cells].set(1)
  out, start = [], 0
  for grid, n in zip(plan.grids[1:], plan.cells, strict=True):
    out.append(flat[:, start:start + n].reshape(batch, *grid))
    start += n
  return tuple(out)
