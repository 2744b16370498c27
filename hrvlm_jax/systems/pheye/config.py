"""Settings of Pheye; released and tiny sizes.

Source: Pheye (arXiv 2501.02584), section 3 and appendix B; `miguelscarv/pheye:
pheye_builder/encoder.py, factory.py`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from hrvlm_jax.core import bounds
from hrvlm_jax.core.layers import LoRA
from hrvlm_jax.core.resample import CLIP_MEAN, CLIP_STD
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.fusion import CrossAttentionFusion
from hrvlm_jax.vision.vit import CLIP_H_224, ViTConfig

FIRST = LoRA(rank=8, alpha=16.0, name='first', dropout=0.05)
SECOND = LoRA(rank=16, alpha=32.0, name='second', dropout=0.05)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PheyeConfig:
  """The encoder: one ViT over a global view and level x level tiles.

  Attributes:
    vision: the frozen tower, without LoRA sets (they are `first` and `second`).
    level: tiles per side of the enlarged image; 2 and 3 were released. The original's code names
      1 and 4 but runs neither; 4 works here.
    first: LoRA set of the global view; None: the tower alone (`first_level` false).
    second: LoRA set of the tiles.
    train_first_adapter: False gives `first` no gradient, as the original's code by accident (its
      published shapes and counts say the same; its paper trains both).
    norm_eps: of the norms per level.
    sub_image_rows: rows of the position table of sub-images; 1 + level^2 of them are used.
  """

  vision: ViTConfig = CLIP_H_224
  level: int = 2
  first: LoRA | None = FIRST
  second: LoRA = SECOND
  train_first_adapter: bool = True
  norm_eps: float = 1e-5
  sub_image_rows: int = 21
  mean: tuple[float, float, float] = CLIP_MEAN
  std: tuple[float, float, float] = CLIP_STD

  BOUNDS: ClassVar = {
    'level': '[2, inf)', 'norm_eps': bounds.ABOVE_ZERO, 'std': bounds.ABOVE_ZERO,
    'sub_image_rows': bounds.SIZE, 'mean': bounds.FINITE}

  def __post_init__(self):
    bounds.check(self)
    problems = []
    if self.sub_images > self.sub_image_rows:
      problems.append(f'level {self.level} needs {self.sub_images} rows of positions, '
                      f'sub_image_rows is {self.sub_image_rows}')
    if self.vision.lora:
      problems.append('vision.lora must be empty: the sets are first and second')
    if self.second.name != 'second' or (self.first and self.first.name != 'first'):
      problems.append("the LoRA sets must be named 'first' and 'second'")
    if self.first and self.first.frozen and self.train_first_adapter:
      problems.append('first.frozen: set train_first_adapter=False, which says it')
    if problems:
      raise ValueError('PheyeConfig: ' + '; '.join(problems))

  @property
  def tiles(self) -> int:
    """Tiles of an image."""
    return self.level**2

  @property
  def sub_images(self) -> int:
    """Views of an image: the global one and the tiles."""
    return 1 + self.tiles

  @property
  def tokens(self) -> int:
    """Visual tokens of an image, class tokens included."""
    return self.sub_images * self.vision.tokens

  @property
  def side(self) -> int:
    """Side in pixels of the enlarged image that is cut into tiles."""
    return self.level * self.vision.image_size

  @property
  def adapters(self) -> tuple[tuple[str, int], ...]:
    """Which set acts on which of the sub-images, in order."""
    return (('first', 1), ('second', self.tiles))

  @property
  def tower(self) -> ViTConfig:
    """The tower with its LoRA sets."""
    first = () if self.first is None else (
      dataclasses.replace(self.first, frozen=not self.train_first_adapter),)
    return dataclasses.replace(self.vision, lora=(*first, self.second))


def backbones(config: PheyeConfig) -> dict[str, ViTConfig]:
  """The tower can start from a release of its own."""
  return {'vision/tower': config.vision}


def model(encoder: PheyeConfig, text: language.DecoderConfig, *, interval: int,
          from_layer: int = 0, reduce: int = 1) -> ModelConfig:
  """A whole Pheye: the decoder reads `encoder` in front of every `interval`-th layer."""
  return ModelConfig(
    system='pheye', encoder=encoder, text=text,
    fusion=CrossAttentionFusion(width=encoder.vision.width, interval=interval,
                                from_layer=from_layer, reduce=reduce),
    chat='pheye', image_token=None)


RELEASED = {
  f'pheye_x{interval}_{side}': model(PheyeConfig(level=side // 224), language.phi(),
                                     interval=interval)
  for interval in (4, 2) for side in (448, 672)
}


def tiny(*, vocab_size: int = 264, level: int = 2) -> ModelConfig:
  """A model that trains on a laptop: 40-pixel views, widths 96 and 128, two blocks."""
  vision = ViTConfig(image_size=40, patch_size=8, width=96, depth=2, heads=4, mlp_width=192,
                     activation='quick_gelu', norm_eps=1e-5, class_token=True, patch_bias=False,
                     pre_norm=True)
  text = language.phi(vocab_size=vocab_size, width=128, depth=4, heads=4, mlp_width=256,
                      max_positions=512)
  return model(PheyeConfig(vision=vision, level=level), text, interval=2)
