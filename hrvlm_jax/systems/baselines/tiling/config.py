"""Settings of closest-aspect tiling (InternVL; NVILA's "dynamic").

Source: `NVlabs/VILA: llava/mm_utils.py` (dynamic_preprocess).
"""

from __future__ import annotations

import dataclasses

from hrvlm_jax.language import config as language
from hrvlm_jax.systems.baselines import tiled
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vision.vit import SIGLIP_SO400M_384, ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TilingConfig:
  """The grid of tiles whose aspect is closest to the image's; the image is squashed onto it.

  Attributes:
    layer: hidden state that is read, -1 the last block's output.
    min_tiles, max_tiles: of the grid, the thumbnail not counted.
    thumbnail: the whole image at tile size comes last, when there is more than one tile.
    newline: a learned vector after every tile (NVILA's image encoder).
    projector, width: as in AnyRes.
  """

  vision: ViTConfig = dataclasses.replace(SIGLIP_SO400M_384, image_size=448)
  layer: int = -2
  min_tiles: int = 1
  max_tiles: int = 12
  thumbnail: bool = True
  newline: bool = True
  projector: str | None = 'mlp_downsample'
  width: int = 3584
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)

  def __post_init__(self):
    problems = tiled.common_problems(self)
    if not 1 <= self.min_tiles <= self.max_tiles:
      problems.append(f'expected 1 <= min_tiles <= max_tiles, got {self.min_tiles} and '
                      f'{self.max_tiles}')
    if problems:
      raise ValueError('TilingConfig: ' + '; '.join(problems))

  @property
  def has_newline(self) -> bool:
    return self.newline

  @property
  def max_views(self) -> int:
    return self.max_tiles + int(self.thumbnail and self.max_tiles > 1)

  @property
  def max_tokens(self) -> int:
    return self.max_views * (tiled.token_side(self) ** 2 + int(self.newline))


RELEASED: dict[str, ModelConfig] = {}


def tiny(*, vocab_size: int = 264) -> ModelConfig:
  """A model that trains on a laptop: up to six tiles of 40 pixels, width 96."""
  vision = ViTConfig(image_size=40, patch_size=8, width=96, depth=3, heads=4, mlp_width=192,
                     pool='map')
  return ModelConfig(
    system='tiling',
    encoder=TilingConfig(vision=vision, layer=-1, max_tiles=6, width=128),
    text=language.phi(vocab_size=vocab_size, width=128, depth=2, heads=4, mlp_width=256,
                      max_positions=512))
