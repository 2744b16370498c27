"""What AnyRes and closest-aspect tiling share: tiles through one tower, gathered tokens.

Every tile is encoded and projected on its own; which tokens stand where, and where the learned
newline stands between them, is an index array made on the host. Axis letters: v tile slots of a
batch, p tokens of a tile, b rows, t visual places of a row, d width.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import normal
from hrvlm_jax.core.module import Module, Param, Rngs
from hrvlm_jax.core.resample import normalise
from hrvlm_jax.parallel.rules import WHOLE_VECTORS, Rule
from hrvlm_jax.systems.contract import VisualTokens
from hrvlm_jax.systems.packing import Entry, Packing
from hrvlm_jax.vision.blocks import BlockProjector, block_side, is_projector
from hrvlm_jax.vision.vit import ViT, ViTConfig

NEWLINE = 0  # in an index: the newline; token i of the flattened tiles is i + 1


class TiledConfig(Protocol):
  """What the shared parts read of a configuration.

  projector: a type of `vila_hd.projector` ('mlp2x_gelu', 'mlp_downsample', ...), or None for tokens
  in the tower's width. width: of the projected tokens, the language model's. has_newline: there is
  a learned newline. max_views, max_tokens: the most an image can cost.
  """

  vision: ViTConfig
  layer: int
  projector: str | None
  width: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  @property
  def has_newline(self) -> bool: ...
  @property
  def max_views(self) -> int: ...
  @property
  def max_tokens(self) -> int: ...


def common_problems(config: TiledConfig) -> list[str]:
  """What is wrong with the shared settings."""
  problems = []
  if not -config.vision.depth <= config.layer <= -1:
    problems.append(f'layer must lie in {-config.vision.depth}..-1, got {config.layer}')
  if config.projector is None:
    if config.width != config.vision.width:
      problems.append(f"without a projector, width must be the tower's {config.vision.width}, got "
                      f'{config.width}')
  elif not is_projector(config.projector):
    problems.append(f'projector {config.projector!r} is unknown')
  return problems


def token_side(config: TiledConfig) -> int:
  """Tokens per side of a projected tile."""
  side = 1 if config.projector is None else block_side(config.projector)
  return -(-config.vision.grid // side)


def packing(config: TiledConfig) -> Packing:
  """Tiles of all rows share their slots; `gather` says which tokens an image takes, and where the
  newline stands between them."""
  size = config.vision.image_size
  return Packing(slots={'pixels': Entry((size, size, 3))}, each=token_side(config) ** 2, fixed=1,
                 gather=1, views=config.max_views, tokens=config.max_tokens)


def rules(config: TiledConfig) -> tuple[Rule, ...]:
  """Sharding row of the newline."""
  del config
  return (Rule(r'.*/newline', (), why=WHOLE_VECTORS),)


class TiledEncoder(Module):
  """Tower, projector per tile, newline, gathering."""

  def __init__(self, config: TiledConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    self.tower = ViT(config.vision, param_dtype=param_dtype, rngs=rngs)
    self.projector = None if config.projector is None else BlockProjector(
      config.projector, config.vision.width, config.width, param_dtype=param_dtype, rngs=rngs)
    self.newline = Param(normal(config.width**-0.5)(
      rngs.params(), (config.width,), param_dtype)) if config.has_newline else None

  def __call__(self, views: dict[str, jax.Array], *, key=None, ex: Execution = HERE
               ) -> VisualTokens:
    """Views of a batch (`packing`) -> [b t d]."""
    c = self.config
    pixels = normalise(views['pixels'], c.mean, c.std).astype(ex.dtype)
    x = self.tower(pixels, stop=c.vision.depth + 1 + c.layer, key=key, ex=ex)
    return VisualTokens(self.arrange(x[:, int(c.vision.class_token):], views['index']),
                        views['valid'])

  def arrange(self, features: Float[Array, 'v n c'], index: Int[Array, 'b t']
              ) -> Float[Array, 'b t d']:
    """Patches of every tile -> projected tokens in their places."""
    x = features if self.projector is None else self.projector(features)
    flat = x.reshape(-1, x.shape[-1])
    newline = jnp.zeros((1, x.shape[-1]), x.dtype) if self.newline is None else (
      self.newline[...].astype(x.dtype)[None])
    return jnp.take(jnp.concatenate([newline, flat]), index, axis=0)
