"""Settings of AnyRes (LLaVA-1.6): candidate resolutions, tiles, how their features are merged.

Source: `haotian-liu/LLaVA: llava/mm_utils.py, llava/model/llava_arch.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from hrvlm_jax.core.pixels import CLIP_MEAN, CLIP_STD
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.baselines import tiled
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vision.vit import CLIP_L_336, ViTConfig

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyResConfig:
  """A thumbnail and the tiles of the best candidate resolution.

  The projector is part of the encoder, because the learned newline has the language model's width.

  Attributes:
    layer: hidden state that is read: -1 the last block's output, -2 the one before (LLaVA).
    pinpoints: candidate resolutions (width, height), multiples of the tower's image size.
    merge: 'flat' tile after tile, 'spatial' one map of all tiles, 'spatial_unpad' that map without
      padding and with a learned newline after every row.
    projector: type string (`vila_hd.projector`); 'mlp_downsample' joins 2x2 patches, as in the
      comparison of the PS3 paper. None leaves the tower's width (for cross-attention).
    width: of the tokens that leave the encoder.
  """

  vision: ViTConfig = CLIP_L_336
  layer: int = -2
  pinpoints: tuple[tuple[int, int], ...] = PINPOINTS
  merge: Literal['flat', 'spatial', 'spatial_unpad'] = 'spatial_unpad'
  projector: str | None = 'mlp2x_gelu'
  width: int = 4096
  mean: tuple[float, float, float] = CLIP_MEAN
  std: tuple[float, float, float] = CLIP_STD

  def __post_init__(self):
    problems = tiled.common_problems(self)
    if not self.pinpoints:
      problems.append('pinpoints must name at least one resolution')
    size = self.vision.image_size
    for width, height in self.pinpoints:
      if width < 1 or height < 1 or width % size or height % size:
        problems.append(f'pinpoint {width}x{height}: both sides must be multiples of '
                        f'vision.image_size {size}')
    if problems:
      raise ValueError('AnyResConfig: ' + '; '.join(problems))

  @property
  def has_newline(self) -> bool:
    return self.merge == 'spatial_unpad'

  @property
  def max_views(self) -> int:
    size = self.vision.image_size
    return 1 + max(w * h for w, h in self.pinpoints) // size**2

  @property
  def max_tokens(self) -> int:
    size, side = self.vision.image_size, tiled.token_side(self)
    maps = [(h // size * side, w // size * side) for w, h in self.pinpoints]
    return side**2 + max(rows * (columns + int(self.has_newline)) for rows, columns in maps)


RELEASED = {
  'llava_1_6_vicuna_7b': ModelConfig(
    system='anyres', encoder=AnyResConfig(), text=language.llama(), chat='vicuna_v1'),
}


def tiny(*, vocab_size: int = 264) -> ModelConfig:
  """A model that trains on a laptop: tiles of 40 pixels, width 96."""
  vision = ViTConfig(image_size=40, patch_size=8, width=96, depth=3, heads=4, mlp_width=192,
                     pool='map')
  return ModelConfig(
    system='anyres',
    encoder=AnyResConfig(
      vision=vision, layer=-1, pinpoints=((40, 80), (80, 40), (80, 80), (120, 40), (40, 120)),
      width=128, mean=(0.5,) * 3, std=(0.5,) * 3),
    text=language.phi(vocab_size=vocab_size, width=128, depth=2, heads=4, mlp_width=256,
                      max_positions=512))
