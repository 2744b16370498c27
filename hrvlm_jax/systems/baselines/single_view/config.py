"""Settings of plain LLaVA: one resized view, all of its patch tokens.

Source: `haotian-liu/LLaVA: llava/model/multimodal_encoder/clip_encoder.py, llava/mm_utils.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from hrvlm_jax.core.pixels import CLIP_MEAN, CLIP_STD
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.vision.vit import CLIP_L_336, ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleViewConfig:
  """One view of the whole image.

  Attributes:
    layer: hidden state that is read: -1 the last block's output, -2 the one before (LLaVA).
    fit: 'squash' ignores the aspect ratio, 'pad' first pastes the image on a square of the mean
      colour (LLaVA-1.5).
    last_tokens: keep only the last K patch tokens of the view; None keeps all. Comparing with a
      multi-crop model of the same encoder needs it (MC-LLaVA keeps the last K of each view).
  """

  vision: ViTConfig = dataclasses.replace(CLIP_L_336, post_norm=True)
  layer: int = -2
  fit: Literal['squash', 'pad'] = 'pad'
  last_tokens: int | None = None
  mean: tuple[float, float, float] = CLIP_MEAN
  std: tuple[float, float, float] = CLIP_STD

  def __post_init__(self):
    problems = []
    if not -self.vision.depth <= self.layer <= -1:
      problems.append(f'layer must lie in {-self.vision.depth}..-1, got {self.layer}')
    if self.last_tokens is not None and not 1 <= self.last_tokens <= self.vision.grid**2:
      problems.append(f'last_tokens must lie in 1..{self.vision.grid**2}, got {self.last_tokens}')
    if problems:
      raise ValueError('SingleViewConfig: ' + '; '.join(problems))

  @property
  def tokens(self) -> int:
    """Visual tokens of an image."""
    return self.last_tokens or self.vision.grid**2


RELEASED = {
  'llava_1_5_7b': ModelConfig(
    system='single_view', encoder=SingleViewConfig(), text=language.llama(),
    projector=ProjectorConfig(n_in=1024, n_out=4096), chat='vicuna_v1'),
}


def tiny(*, vocab_size: int = 264) -> ModelConfig:
  """A model that trains on a laptop: one 40-pixel view, width 96."""
  vision = ViTConfig(image_size=40, patch_size=5, width=96, depth=3, heads=4, mlp_width=192,
                     pool='map')
  return ModelConfig(
    system='single_view',
    encoder=SingleViewConfig(vision=vision, layer=-1, fit='squash', mean=(0.5,) * 3,
                             std=(0.5,) * 3),
    text=language.phi(vocab_size=vocab_size, width=128, depth=2, heads=4, mlp_width=256,
                      max_positions=512),
    projector=ProjectorConfig(n_in=96, n_out=128))
