"""Settings of S2 (scaling on scales) in a LLaVA-style model.

Sources: `bfshi/scaling_on_scales: s2wrapper/core.py`; LLaVA's keys `s2`, `s2_scales`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.pixels import CLIP_MEAN, CLIP_STD
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.baselines.s2.scaling import squares_per_side
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.vision.blocks import block_side, is_projector
from hrvlm_jax.vision.vit import CLIP_L_336, ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class S2Config:
  """One tower over the image at several sizes.

  Attributes:
    layer: hidden state that is read: -1 the last block's output, -2 the one before (LLaVA).
    sizes: side of every scale in pixels; squares of `vision.image_size` tile each.
    output: index of the scale whose map size the tokens have: 0 in LLaVA, -1 in the PS3 paper.
    fit: 'pad' pastes the image on a square of the mean colour first, 'squash' ignores the aspect,
      'crop' resizes the short side and crops the centre (what LLaVA's processor does by itself).
    projector: type string (`vila_hd.projector`) of a projector inside the encoder, for those that
      join neighbours ('mlp_downsample', PS3 paper); None: the model's ordinary projector follows.
    width: of the tokens that leave a projector in the encoder.
  """

  vision: ViTConfig = CLIP_L_336
  layer: int = -2
  sizes: tuple[int, ...] = (336, 672, 1008)
  output: int = 0
  fit: Literal['pad', 'squash', 'crop'] = 'pad'
  projector: str | None = None
  width: int | None = None
  mean: tuple[float, float, float] = CLIP_MEAN
  std: tuple[float, float, float] = CLIP_STD

  def __post_init__(self):
    problems = []
    if not -self.vision.depth <= self.layer <= -1:
      problems.append(f'layer must lie in {-self.vision.depth}..-1, got {self.layer}')
    if not self.sizes:
      problems.append('sizes must name at least one scale')
    elif not -len(self.sizes) <= self.output < len(self.sizes):
      problems.append(f'output {self.output} is no index of {len(self.sizes)} sizes')
    for size in self.sizes:
      try:
        squares_per_side(size, self.vision.image_size)
      except UserError as error:
        problems.append(str(error))
    if (self.projector is None) != (self.width is None):
      problems.append('projector and width go together')
    if self.projector is not None and not is_projector(self.projector):
      problems.append(f'projector {self.projector!r} is unknown')
    if problems:
      raise ValueError('S2Config: ' + '; '.join(problems))

  @property
  def side(self) -> int:
    """Pixels per side that travel to the device."""
    return max(self.sizes)

  @property
  def channels(self) -> int:
    """Width of the joined features."""
    return self.vision.width * len(self.sizes)

  @property
  def tokens(self) -> int:
    """Visual tokens of an image."""
    size = self.sizes[self.output]
    k = squares_per_side(size, self.vision.image_size)
    cells = k * (size // k // self.vision.patch_size)
    return (-(-cells // (1 if self.projector is None else block_side(self.projector)))) ** 2

  @property
  def squares(self) -> int:
    """Sub-images of an image over all scales."""
    return sum(squares_per_side(size, self.vision.image_size)**2 for size in self.sizes)


RELEASED = {
  'llava_1_5_7b_s2': ModelConfig(
    system='s2', encoder=S2Config(), text=language.llama(),
    projector=ProjectorConfig(n_in=3072, n_out=4096), chat='vicuna_v1'),
}


def tiny(*, vocab_size: int = 264) -> ModelConfig:
  """A model that trains on a laptop: two scales of 40 and 80 pixels, width 96."""
  vision = ViTConfig(image_size=40, patch_size=8, width=96, depth=3, heads=4, mlp_width=192,
                     pool='map')
  return ModelConfig(
    system='s2',
    encoder=S2Config(vision=vision, layer=-1, sizes=(40, 80), mean=(0.5,) * 3, std=(0.5,) * 3),
    text=language.phi(vocab_size=vocab_size, width=128, depth=2, heads=4, mlp_width=256,
                      max_positions=512),
    projector=ProjectorConfig(n_in=192, n_out=128))
