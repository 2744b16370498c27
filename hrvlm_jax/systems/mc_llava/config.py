"""Settings of MC-LLaVA; released and tiny sizes.

Source: `visheratin/mc-llava: configuration_mc_llava.py, processing_mc_llava.py`.
"""

from __future__ import annotations

import dataclasses

from hrvlm_jax.language import config as language
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.vision.vit import SIGLIP_SO400M_384, ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MCLlavaConfig:
  """The multi-crop encoder.

  Attributes:
    max_crops: K; 0 keeps the whole image only. Elongated images may exceed it (3.1 of the
      specification); `crop_cap` is a hard limit.
    num_tokens: N, visual tokens of one image.
    window, growth: first crop window and its step, in pixels of the image.
    crop_cap: refuse images with more crops than this; None follows the released code.
    quirks: 'refuse' rejects num_tokens below the number of views; 'reference' reproduces the
      original's slices there (whole views, far more than num_tokens).
    view_buckets: sizes the number of views of a batch is padded to.
  """

  vision: ViTConfig = SIGLIP_SO400M_384
  max_crops: int = 100
  num_tokens: int = 728
  window: int = 384
  growth: int = 10
  crop_cap: int | None = None
  quirks: str = 'refuse'
  view_buckets: tuple[int, ...] = (1, 5, 9, 17, 33, 65, 105, 209)
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)

  def __post_init__(self):
    problems = []
    if self.max_crops < 0:
      problems.append(f'max_crops must not be negative, got {self.max_crops} (the original takes '
                      'a negative value for its default, 0)')
    if self.num_tokens < 1:
      problems.append(f'num_tokens must be at least 1, got {self.num_tokens}')
    if self.window < 2 or self.window % 2 or self.growth < 2 or self.growth % 2:
      problems.append(f'window and growth must be even and at least 2, got {self.window} and '
                      f'{self.growth}')
    if self.quirks not in ('refuse', 'reference'):
      problems.append(f"quirks must be 'refuse' or 'reference', got {self.quirks!r}")
    if list(self.view_buckets) != sorted(set(self.view_buckets)) or not self.view_buckets:
      problems.append(f'view_buckets must rise, got {self.view_buckets}')
    if problems:
      raise ValueError('MCLlavaConfig: ' + '; '.join(problems))

  @property
  def view_tokens(self) -> int:
    """Tokens of a view that can be kept: all but the first."""
    return self.vision.grid**2 - 1


def backbones(config: MCLlavaConfig) -> dict[str, ViTConfig]:
  """The tower can start from a release of its own."""
  return {'vision/tower': config.vision}


RELEASED = {
  'mc_llava_3b': ModelConfig(
    system='mc_llava',
    encoder=MCLlavaConfig(),
    text=language.phi(width=2560, depth=32, mlp_width=10240, rotary_factor=0.4,
                      residual_dropout=0.1),
    projector=ProjectorConfig(n_in=1152, n_out=2560),
    chat='mc_llava'),
}


def tiny(*, vocab_size: int = 264, max_crops: int = 9, num_tokens: int = 63) -> ModelConfig:
  """A model that trains on a laptop: 40-pixel views, width 96."""
  vision = ViTConfig(image_size=40, patch_size=5, width=96, depth=3, heads=4, mlp_width=192,
                     pool='map')
  return ModelConfig(
    system='mc_llava',
    encoder=MCLlavaConfig(vision=vision, max_crops=max_crops, num_tokens=num_tokens, window=40,
                          growth=4, view_buckets=(1, 5, 10, 17)),
    text=language.phi(vocab_size=vocab_size, width=128, depth=2, heads=4, mlp_width=256,
                      max_positions=512),
    projector=ProjectorConfig(n_in=96, n_out=128))
