"""Settings of dynamic S2 (NVILA): square grids for small scales, the closest-aspect for the last.

Source: `NVlabs/VILA: llava/mm_utils.py, llava/model/llava_arch.py`.
"""

from __future__ import annotations

import dataclasses

from hrvlm_jax.language import config as language
from hrvlm_jax.systems.baselines.tiles import grid_candidates
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.pictures import Pair
from hrvlm_jax.vision.blocks import block_side, is_projector
from hrvlm_jax.vision.vit import SIGLIP_SO400M_384, ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicS2Config:
  """Tiles of several scales, merged, joined on channels, projected block by block.

  Attributes:
    layer: hidden state that is read, -1 the last block's output.
    scales: pixels per side, ascending multiples of the first, which is `vision.image_size`.
    max_tiles: of the last scale; it has at least (last / first)^2.
    output: index of the scale whose map size the tokens have; -1 the last (NVILA).
    projector, width: `vila_hd.projector`, applied to every block of tile size.
  """

  vision: ViTConfig = dataclasses.replace(SIGLIP_SO400M_384, image_size=448)
  layer: int = -2
  scales: tuple[int, ...] = (448, 896, 1344)
  max_tiles: int = 12
  output: int = -1
  projector: str = 'mlp_downsample'
  width: int = 3584
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)

  def __post_init__(self):
    problems, size = [], self.vision.image_size
    if not -self.vision.depth <= self.layer <= -1:
      problems.append(f'layer must lie in {-self.vision.depth}..-1, got {self.layer}')
    if not self.scales or self.scales[0] != size or list(self.scales) != sorted(self.scales) or any(
        scale % size for scale in self.scales):
      problems.append(f'scales must be ascending multiples of vision.image_size {size}, the first '
                      f'equal to it, got {self.scales}')
    else:
      if not -len(self.scales) <= self.output < len(self.scales):
        problems.append(f'output {self.output} is no index of {len(self.scales)} scales')
      if self.max_tiles < self.min_tiles:
        problems.append(f'max_tiles must be at least (last/first scale)^2 = {self.min_tiles}, got '
                        f'{self.max_tiles}')
    if not is_projector(self.projector):
      problems.append(f'projector {self.projector!r} is unknown')
    if problems:
      raise ValueError('DynamicS2Config: ' + '; '.join(problems))

  @property
  def min_tiles(self) -> int:
    return (self.scales[-1] // self.scales[0]) ** 2

  @property
  def candidates(self) -> list[Pair]:
    """(columns, rows) that the last scale can have."""
    return grid_candidates(self.min_tiles, self.max_tiles)

  @property
  def squares(self) -> list[Pair]:
    """Grids of all scales but the last."""
    return [(scale // self.scales[0],) * 2 for scale in self.scales[:-1]]

  @property
  def block_tokens(self) -> int:
    """Tokens of a projected block."""
    return (-(-self.vision.grid // block_side(self.projector))) ** 2

  @property
  def max_views(self) -> int:
    return sum(r * c for r, c in self.squares) + self.max_tiles

  @property
  def max_tokens(self) -> int:
    last = self.output in (-1, len(self.scales) - 1)
    blocks = self.max_tiles if last else self.squares[self.output][0] ** 2
    return blocks * self.block_tokens


RELEASED: dict[str, ModelConfig] = {}


def tiny(*, vocab_size: int = 264) -> ModelConfig:
  """A model that trains on a laptop: scales of 40 and 80 pixels, width 96."""
  vision = ViTConfig(image_size=40, patch_size=8, width=96, depth=3, heads=4, mlp_width=192,
                     pool='map')
  return ModelConfig(
    system='s2_dynamic',
    encoder=DynamicS2Config(vision=vision, layer=-1, scales=(40, 80), max_tiles=6, width=128),
    text=language.phi(vocab_size=vocab_size, width=128, depth=2, heads=4, mlp_width=256,
                      max_positions=512))
