"""PS3 on the device: a thumbnail pass, a selection, and looks at the chosen patches.

    low = encoder.encode_low(images)                  thumbnail states, keys and values, features
    probs = encoder.probabilities(low, prompt, plan)  where to look
    out = encoder.encode_high(low, images, probs, plan)

The three steps are separate so that a language model can stand between them (VILA-HD reuses `low`).
`plan` (plan.py) holds every static count. Source: `NVlabs/PS3: ps3/modeling_ps3.py`; paper
2503.19903, section 3. Axis letters: b images, n thumbnail tokens, t tokens of a look, d width,
l layers, h heads, p head width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hrvlm_jax.core import resample
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import LayerNorm, Linear, activation, torch_uniform
from hrvlm_jax.core.module import List, Module, Param, Rngs, scan_layers, stacked
from hrvlm_jax.core.resample import normalise
from hrvlm_jax.systems.contract import VisualTokens
from hrvlm_jax.systems.ps3 import selection
from hrvlm_jax.systems.ps3.config import AdapterConfig, PS3Config
from hrvlm_jax.systems.ps3.patches import embed_cells, scaled
from hrvlm_jax.systems.ps3.plan import Plan, make_plan
from hrvlm_jax.vision.vit import AttentionPool, ViT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRes:
  """The thumbnail pass.

  Attributes:
    hidden: block outputs [b n d] by block index: the kept ones, the last always.
    keys, values: [l b n h p], the prefix of every look.
    features: what the selection needs; None when the pass was made without it.
  """

  hidden: dict[int, jax.Array]
  keys: jax.Array
  values: jax.Array
  features: selection.Features | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
  """Thumbnail tokens followed by all chosen tokens, sorted by (scale, raster index).

  Attributes:
    hidden: block outputs [b n+T d] by block index, the last always (no final norm).
    cells: int32 [b T] flat indices over the high scales, rising.
    maps: per high scale, 0/1 [b rows cols]: the chosen cells.
    probs: the probabilities used.
  """

  hidden: dict[int, jax.Array]
  cells: jax.Array
  maps: tuple[jax.Array, ...]
  probs: tuple[jax.Array, ...]

  @property
  def last(self) -> jax.Array:
    """[b n+T d] output of the last block."""
    return self.hidden[max(self.hidden)]


class Adapter(Module):
  """C-RADIO's MLP in front of the pool (adapter "v2"); norms have eps 1e-5."""

  def __init__(self, width: int, config: AdapterConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    make = dict(param_dtype=param_dtype, rngs=rngs)
    self.fc1 = selection.torch_linear(width, config.hidden, **make)
    self.blocks = stacked(
      lambda r: AdapterBlock(config.hidden, config.hidden, param_dtype=param_dtype, rngs=r),
      config.depth, rngs=rngs)
    self.out = AdapterBlock(config.hidden, config.out, **make)

  def __call__(self, x: Float[Array, '... d'], *, ex: Execution = HERE) -> Float[Array, '... o']:
    y, _ = scan_layers(self.blocks, self.fc1(x), lambda block, y, _: (y + block(y), None),
                       ex=ex.plain)
    return self.out(y)


class AdapterBlock(Module):
  """linear(gelu(norm(x)))."""

  def __init__(self, n_in: int, n_out: int, *, param_dtype=jnp.float32, rngs: Rngs):
    self.norm = LayerNorm(n_in, eps=1e-5, param_dtype=param_dtype, rngs=rngs)
    self.linear = Linear(n_in, n_out, kernel_init=torch_uniform(n_in), param_dtype=param_dtype,
                         rngs=rngs)

  def __call__(self, x):
    return self.linear(activation('gelu')(self.norm(x)))


class Encoder(Module):
  """Trunk, selection, position residuals, pool."""

  def __init__(self, config: PS3Config, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    vision = config.vision
    self.tower = ViT(vision, param_dtype=param_dtype, rngs=rngs)
    self.selection = selection.Selection(config, param_dtype=param_dtype, rngs=rngs)
    sides = [scale // vision.patch_size for scale in config.scales[1:]]
    self.residual = None if not config.residual else List(
      [Param(jnp.zeros((side**2, vision.width), param_dtype)) for side in sides])
    self.adapter = None if config.adapter is None else Adapter(
      vision.width, config.adapter, param_dtype=param_dtype, rngs=rngs)
    pool = config.pool
    self.pool_head = AttentionPool(
      pool.width, pool.heads, pool.mlp_width, activation=vision.activation, eps=vision.norm_eps,
      param_dtype=param_dtype, rngs=rngs)

  def encode_low(
    self, images: Float[Array, 'b H W 3'], *, keep: int = 1, select: bool = True,
    all_scales: bool = False, ex: Execution = HERE,
  ) -> LowRes:
    """Normalised images -> states, keys and values of the square thumbnail.

    Args:
      keep: how many of the last block outputs to return (2 for VILA-HD, which reads the last but
        one); nothing else is stored.
      select: also compute the selection's features.
      all_scales: features of the maps that no result depends on, for analyses.
    """
    side, depth = self.config.scales[0], self.config.vision.depth
    small = resample.bicubic(images, side, side, ex=ex)
    x = self.tower.embed(small.astype(ex.dtype), ex=ex)
    kept = range(depth - min(max(keep, 1), depth), depth)
    layers = self.config.select_layers if select else ()
    out = self.tower.run(x, taps=sorted({*kept, *layers}), return_kv=True, ex=ex)
    features = None
    if select:
      features = self.selection.features([out.taps[i] for i in layers], images,
                                         all_scales=all_scales, ex=ex)
    return LowRes({i: out.taps[i] for i in kept}, out.keys, out.values, features)

  def probabilities(
    self, low: LowRes, prompt: Float[Array, 'b d'] | None, plan: Plan, *,
    target: Float[Array, 'b h w'] | None = None, smooth: bool = False,
  ) -> tuple[jax.Array, ...]:
    """Selection probabilities [b rows cols] per high scale.

    Args:
      prompt: top-down; None: bottom-up, by the learned prior.
      target: ground-truth maps of any resolution; what they touch gets probability 1.
      smooth: average over 6x6 areas (after the override, as the original).
    """
    probs = self.selection(low.features, prompt, plan)
    if target is not None:
      probs = selection.override(probs, target, plan)
    return selection.smooth(probs) if smooth else probs

  def embed_high(self, images, cells, counts, plan: Plan, *, ex: Execution = HERE):
    """Tokens [b t d] of one look before the blocks; `images` from `patches.scaled`."""
    residual = None if self.residual is None else [r[...] for r in self.residual]
    return embed_cells(self.tower, residual, images, cells, counts, plan, ex=ex)

  def encode_high(
    self, low: LowRes, images: Float[Array, 'b H W 3'], probs: tuple[jax.Array, ...], plan: Plan,
    *, at_once: bool | None = None, ex: Execution = HERE,
  ) -> Encoded:
    """Looks at the most probable cells and merges all looks with the thumbnail's tokens.

    Looks see the thumbnail's keys and values and their own, not each other, so they may run as one
    batch or one after the other with equal results.

    Args:
      images: the SAME normalised images as for `encode_low`.
      at_once: config.looks_at_once unless given.
    """
    at_once = self.config.looks_at_once if at_once is None else at_once
    kept = tuple(low.hidden)
    chosen = selection.choose(probs, plan)
    if not chosen or not sum(plan.look_tokens):
      none = jnp.zeros((images.shape[0], 0), jnp.int32)
      return Encoded(low.hidden, none, selection.maps_of(none, plan, probs[0].dtype), probs)
    sized = scaled(images, plan, ex=ex)

    def run(tokens, prefix=(low.keys, low.values) if self.config.low_context else None):
      return self.tower.run(tokens, taps=kept, prefix=prefix, ex=ex).taps

    def look(cells, counts):
      return run(self.embed_high(sized, cells, counts, plan, ex=ex))

    parts: list[dict[int, jax.Array]] = []
    for numbers in _equal_looks(plan):
      counts = plan.look(numbers[0])
      if len(numbers) == 1:
        parts.append(look(chosen[numbers[0]], counts))
        continue
      stack = jnp.stack([chosen[i] for i in numbers], axis=1)  # [b looks t]
      if at_once:
        tokens = jax.vmap(lambda c, n=counts: self.embed_high(sized, c, n, plan, ex=ex),
                          in_axes=1, out_axes=1)(stack)
        taps = run(tokens.reshape(-1, *tokens.shape[2:]))
        taps = {i: x.reshape(tokens.shape[0], -1, x.shape[-1]) for i, x in taps.items()}
      else:
        taps = jax.lax.map(lambda c, n=counts: look(c, n), jnp.moveaxis(stack, 1, 0))
        taps = {i: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, x.shape[-1])
                for i, x in taps.items()}
      parts.append(taps)
    return self._merge(low, chosen, parts, probs, plan)

  def _merge(self, low, chosen, parts, probs, plan):
    cells = jnp.concatenate(chosen, axis=1)
    order = None if len(chosen) == 1 else jnp.argsort(cells, axis=1)
    hidden = {}
    for layer, first in low.hidden.items():
      tokens = jnp.concatenate([part[layer] for part in parts], axis=1)
      if order is not None:
        tokens = jnp.take_along_axis(tokens, order[..., None], axis=1)
      hidden[layer] = jnp.concatenate([first, tokens], axis=1)
    if order is not None:
      cells = jnp.take_along_axis(cells, order, axis=1)
    return Encoded(hidden, cells, selection.maps_of(cells, plan, probs[0].dtype), probs)

  def encode(
    self, images: Float[Array, 'b H W 3'], plan: Plan, *, prompt=None, target=None,
    smooth: bool = False, keep: int = 1, ex: Execution = HERE,
  ) -> Encoded:
    """All three steps; arguments as there."""
    low = self.encode_low(images, keep=keep, select=plan.looks > 0, ex=ex)
    if not plan.looks:
      cells = jnp.zeros((images.shape[0], 0), jnp.int32)
      return Encoded(low.hidden, cells, (), ())
    probs = self.probabilities(low, prompt, plan, target=target, smooth=smooth)
    return self.encode_high(low, images, probs, plan, ex=ex)

  def head(self, x: Float[Array, 'b n d'], *, ex: Execution = HERE) -> Float[Array, 'b n o']:
    """What stands between the blocks and the pool: the final norm, or C-RADIO's adapter."""
    if self.tower.post_norm is not None:
      x = self.tower.post_norm(x)
    return x if self.adapter is None else self.adapter(x, ex=ex)

  def pool(self, x: Float[Array, 'b n d'], *, mask=None, ex: Execution = HERE
           ) -> Float[Array, 'b o']:
    """Attention pool of block outputs.

    Args:
      mask: bool [b n], tokens that count; a row without any counts them all.
    """
    if mask is not None:
      mask = jnp.where(mask.any(axis=1, keepdims=True), mask, True)
    return self.pool_head(self.head(x, ex=ex), mask=mask, ex=ex)

  def __call__(self, views: dict[str, jax.Array], *, prompt=None, key=None,
               ex: Execution = HERE) -> VisualTokens:
    """Views of a batch (`views.batch`) -> [b t d], as `config.look` asks.

    Args:
      prompt: [slots d], one per image slot; None looks bottom-up.
      key: unused (the encoder has no dropout).
    """
    del key
    config, ask = self.config, self.config.look
    pixels = views['pixels']
    plan = make_plan(*pixels.shape[1:3], config, num_looks=ask.looks, num_tokens=ask.tokens,
                     first_scales=ask.first_scales)
    images = normalise(pixels, config.mean, config.std)
    out = self.encode(images, plan, prompt=prompt, smooth=ask.smooth, ex=ex)
    flat = out.last.reshape(-1, out.last.shape[-1])
    values = jnp.take(flat, views['index'], axis=0)
    return VisualTokens(values, views['valid'], {'maps': out.maps, 'probs': out.probs})


def _equal_looks(plan: Plan) -> list[list[int]]:
  """Consecutive looks with equal counts, as groups that share one program."""
  groups: list[list[int]] = []
  for number in range(plan.looks):
    if not plan.look_tokens[number]:
      continue
    if groups and plan.look(groups[-1][0]) == plan.look(number):
      groups[-1].append(number)
    else:
      groups.append([number])
  return groups


def feature_maps(
  tokens: Float[Array, 'b n d'], maps: tuple[jax.Array, ...], grid: int
) -> list[Float[Array, 'b rows cols d']]:
  """Tokens back on their grids, zeros where nothing was encoded; the thumbnail's map first.

  Args:
    tokens: in the order of `Encoded`.
    maps: the 0/1 maps that belong to them.
    grid: side of the thumbnail's grid.
  """
  batch, _, width = tokens.shape
  flat = jnp.concatenate([m.reshape(batch, -1) for m in maps], axis=1) > 0
  # The k-th chosen cell holds token k: a running count is the token's index.
  index = jnp.cumsum(flat, axis=1) - 1 + grid * grid
  index = jnp.clip(index, 0, tokens.shape[1] - 1)
  dense = jnp.where(flat[..., None], jnp.take_along_axis(tokens, index[..., None], axis=1), 0)
  out, start = [tokens[:, :grid * grid].reshape(batch, grid, grid, width)], 0
  for m in maps:
    n = m.shape[1] * m.shape[2]
    out.append(dense[:, start:start + n].reshape(batch, *m.shape[1:], width))
    start += n
  return out
