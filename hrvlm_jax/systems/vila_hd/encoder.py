"""VILA-HD on the device: low-resolution tokens first, then, for a prompt, the selected ones.

    seen = encoder.low(views)                        thumbnail states and tokens
    prompt = encoder.prompt_head(state)              from the language model, or None (saliency)
    high = encoder.high(seen, views, prompt)         tokens of the complete blocks
    visual = encoder.arrange(views, seen, high)      rows of the prompt

`vlm/two_pass.py` lets the language model stand between the steps; nothing of `low` is computed
twice. Source: `NVlabs/VILA: llava/model/llava_arch.py`. Axis letters: v image slots, n
low-resolution tokens, k places for high-resolution tokens, d language width, c visual width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hrvlm_jax.core import resample
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import wide
from hrvlm_jax.core.module import Module, Rngs, depth_of, layer_at
from hrvlm_jax.core.resample import normalise
from hrvlm_jax.systems.contract import VisualTokens
from hrvlm_jax.systems.ps3.encoder import Encoder as PS3, LowRes
from hrvlm_jax.systems.vila_hd import format as form
from hrvlm_jax.systems.vila_hd.config import VilaHDConfig
from hrvlm_jax.systems.vila_hd.prompt_head import PromptHead
from hrvlm_jax.vision.attended import received
from hrvlm_jax.vision.blocks import BlockProjector


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
  """The low-resolution pass over all image slots.

  Attributes:
    images: normalised [v S S 3].
    low: PS3's thumbnail states, keys and values.
    tokens: [v n d], embeddings added.
  """

  images: jax.Array
  low: LowRes
  tokens: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class High:
  """The high-resolution pass.

  Attributes:
    tokens: [v k d].
    valid: bool [v k].
    info: `features` of the tower, `maps` and `probs` per high scale.
  """

  tokens: jax.Array
  valid: jax.Array
  info: dict[str, Any]


class Encoder(Module):
  """PS3, projector, prompt head."""

  def __init__(self, config: VilaHDConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    make = dict(param_dtype=param_dtype, rngs=rngs)
    tower, inner = config.tower, config.tower.vision.width
    self.ps3 = PS3(tower, **make)
    self.projector = BlockProjector(
      config.projector, inner, config.width, grid=tower.grid if config.positions else None,
      scales=len(tower.scales), **make)
    self.prompt_head = None if config.prompt_head is None else PromptHead(
      config.prompt_head, config.width, inner, **make)

  def low(self, views: dict[str, jax.Array], *, ex: Execution = HERE) -> Seen:
    """The low-resolution pass over `pixels` [v S S 3]: bytes, or floats normalised already."""
    config, images = self.config, jnp.asarray(views['pixels'])
    if not jnp.issubdtype(images.dtype, jnp.floating):
      images = normalise(images, config.tower.mean, config.tower.std)
    low = self.ps3.encode_low(images, keep=-config.select_layer, select=config.looks_closer,
                              ex=ex)
    return Seen(images, low, form.low_tokens(self.projector, low.hidden[config.layer]))

  def high(self, seen: Seen, views: dict[str, jax.Array], prompt: Float[Array, 'v c'] | None, *,
           ex: Execution = HERE) -> High:
    """The high-resolution pass.

    Args:
      prompt: one per image slot; None follows saliency.
      views: `boxes` (first row, last row + 1, first column, last column + 1 in pixels of the
        squashed image; zeros: none) and `first`, the number of high scales of each image.
    """
    config = self.config
    if not config.looks_closer:
      size = seen.tokens.shape[0]
      info = {'maps': (), 'probs': (), 'features': seen.low.hidden[config.layer]}
      return High(seen.tokens[:, :1], jnp.ones((size, 1), bool), info)
    target = None
    if config.select_target:
      target = form.target_maps(views['boxes'], config.side)
    first, *others = [self._look(seen, prompt, choice, target, ex)
                      for choice in config.scale_choices]
    for choice, other in zip(config.scale_choices[1:], others):
      # Both kinds of images are encoded both ways: shapes stay static. The original splits the
      # batch instead and encodes a dummy image where a group is empty.
      mine = views['first'] == choice
      pick = lambda old, new: jnp.where(mine.reshape(-1, *[1] * (old.ndim - 1)), new, old)  # noqa: B023
      first = jax.tree.map(pick, first, other)
    return first

  def _look(self, seen: Seen, prompt, first_scales: int | None, target, ex: Execution) -> High:
    config = self.config
    plan = config.plan(first_scales)
    probs = self.ps3.probabilities(seen.low, prompt, plan, target=target, smooth=config.smooth)
    if config.mode == 'random':
      probs = _random(seen.images, probs)
    out = self.ps3.encode_high(seen.low, seen.images, probs, plan, ex=ex)
    features = out.hidden[config.layer]
    maps = tuple(wide(m) for m in out.maps)
    tokens, valid = form.high_tokens(self.projector, features, seen.tokens, maps, config.slots,
                                     thumbnail=config.tower.grid**2)
    return High(tokens, valid, {'maps': maps, 'probs': out.probs, 'features': features})

  def token_attention(self, info: dict[str, Any], *, ex: Execution = HERE
                      ) -> tuple[Float[Array, 'v n'], Float[Array, 'v n e']]:
    """(attention that every token receives, its key) where all patches are selected, in the order
    of the image's tokens: means over the patches of a token.

    Of the block that reads the features, over all patches at once: looks do not see one another in
    the tower, here they do.
    """
    tower, config = self.ps3.tower, self.config
    features = info['features']
    block = layer_at(tower.blocks, min(config.layer + 1, depth_of(tower.blocks) - 1))
    q, k, _ = block.attn.project(block.norm1(features), ex=ex)
    values = jnp.concatenate([received(q, k)[..., None], wide(k).mean(axis=2)], axis=-1)
    sides = [config.tower.grid, *(m.shape[1] for m in info['maps'])]
    out, start = [], 0
    for side in sides:
      part = values[:, start:start + side * side].reshape(len(values), side, side, -1)
      blocks = -(-side // config.ratio)
      matrix = resample.area_matrix(side, blocks)
      out.append(resample.resize(part, matrix, matrix).reshape(len(values), blocks**2, -1))
      start += side * side
    joined = jnp.concatenate(out, axis=1)
    return joined[..., 0], joined[..., 1:]

  def selection_loss(self, views: dict[str, jax.Array], info: dict[str, Any]):
    """(loss of the selection against the boxes of `views`, number of images with a box)."""
    target = form.target_maps(views['boxes'], self.config.side)
    return form.selection_loss(info['probs'], target)

  def arrange(self, views: dict[str, jax.Array], seen: Seen, high: High) -> VisualTokens:
    """Tokens of the images of every row: [low; high] of each, in order."""
    values = jnp.concatenate([seen.tokens, high.tokens.astype(seen.tokens.dtype)], axis=1)
    real = jnp.concatenate([jnp.ones(seen.tokens.shape[:2], bool), high.valid], axis=1)
    index = views['index']
    taken = jnp.take(values.reshape(-1, values.shape[-1]), index, axis=0)
    return VisualTokens(taken, views['valid'] & jnp.take(real.reshape(-1), index), high.info)

  def prompts(self, views: dict[str, jax.Array], prompt: Float[Array, 'b c']):
    """One prompt per row -> one per image slot [v c]; empty slots get zeros."""
    each = self.config.low_tokens + self.config.high_tokens
    slots = len(views['pixels'])
    where = jnp.where(views['valid'][:, ::each], views['index'][:, ::each] // each, slots)
    wanted = jnp.broadcast_to(prompt[:, None], (*where.shape, prompt.shape[-1]))
    return jnp.zeros((slots + 1, prompt.shape[-1]), prompt.dtype).at[where].set(wanted)[:slots]

  def __call__(self, views: dict[str, jax.Array], *, prompt=None, key=None,
               ex: Execution = HERE) -> VisualTokens:
    """Views of a batch (`views.batch`) -> [b t d] in language width.

    Args:
      prompt: [v c], one per image slot; None follows saliency.
      key: unused (the encoder has no dropout).
    """
    del key
    seen = self.low(views, ex=ex)
    return self.arrange(views, seen, self.high(seen, views, prompt, ex=ex))


def _random(images: Float[Array, 'v h w c'], probs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
  """Uniform numbers instead of probabilities: the same for an image whatever it is asked."""
  seeds = jax.lax.bitcast_convert_type(images.astype(jnp.float32).sum(axis=(1, 2, 3)), jnp.uint32)
  keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(0), seed))(seeds)
  return tuple(
    jax.vmap(lambda key, p: jax.random.uniform(jax.random.fold_in(key, n), p.shape, p.dtype)  # noqa: B023
             )(keys, p) for n, p in enumerate(probs))
