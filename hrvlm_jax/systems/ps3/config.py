"""Settings of PS3; released and tiny sizes.

Source: `NVlabs/PS3: ps3/configuration_ps3.py` and the published configs (`train/src/open_clip/
model_configs/PS3-*.json`). Scale 0 is the thumbnail; scales 1.. are "high".
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from hrvlm_jax.core import bounds
from hrvlm_jax.core.layers import activation
from hrvlm_jax.core.resample import CLIP_MEAN, CLIP_STD
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vision.vit import ViTConfig

MLP_RATIO = 3.7362  # SO400M's; widths are truncated, not rounded


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolConfig:
  """The attention pool; its sizes differ from the trunk's for C-RADIO."""

  width: int = 1152
  heads: int = 16
  mlp_width: int = 4304

  BOUNDS: ClassVar = dict.fromkeys(('width', 'heads', 'mlp_width'), bounds.SIZE)

  def __post_init__(self):
    bounds.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
  """C-RADIO's MLP in front of the pool (adapter "v2"): width -> hidden, `depth` times
  y += linear(gelu(norm(y))), then out."""

  hidden: int = 1520
  out: int = 1152
  depth: int = 3

  BOUNDS: ClassVar = dict.fromkeys(('hidden', 'out', 'depth'), bounds.SIZE)

  def __post_init__(self):
    bounds.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaliencyConfig:
  """The shallow ConvNet of the selection.

  Attributes:
    kernel: side and stride of the stem.
    input_size: the image is squashed to this square whatever its shape or the model's scales.
  """

  width: int = 512
  out: int = 512
  depth: int = 3
  kernel: int = 28
  input_size: int = 1512

  BOUNDS: ClassVar = dict.fromkeys(('width', 'out', 'depth', 'kernel', 'input_size'), bounds.SIZE)

  def __post_init__(self):
    bounds.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
  """The text tower and the head that turns its output into a prompt.

  Attributes:
    out: width of the contrastive features.
    prompt_width: width of the vision trunk.
    activation: of the blocks; the prompt head is always exact GELU.
    pad: id that fills a row up to `context`; positions are never masked, so it is part of the
      function (1 for SigLIP, 0 for SigLIP2). The end id is 1 for both.
  """

  vocab_size: int = 32000
  context: int = 64
  width: int = 1152
  depth: int = 27
  heads: int = 16
  mlp_width: int = 4304
  out: int = 1152
  prompt_width: int = 1152
  activation: str = 'gelu'
  norm_eps: float = 1e-6
  pad: int = 1

  BOUNDS: ClassVar = {
    **dict.fromkeys(('vocab_size', 'context', 'width', 'depth', 'heads', 'mlp_width', 'out',
                     'prompt_width'), bounds.SIZE),
    'pad': bounds.COUNT, 'norm_eps': bounds.ABOVE_ZERO}

  def __post_init__(self):
    bounds.check(self)
    activation(self.activation)
    if self.width % self.heads:
      raise ValueError(f'TextConfig: width {self.width} is not divisible by heads {self.heads}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookConfig:
  """How much of an image is encoded when the encoder is called through its views.

  Attributes:
    looks: number of looks, or 'all' to cover the image; 0 is the thumbnail alone.
    tokens: number of high-resolution tokens instead of `looks`.
    first_scales: use the first n high scales only (see `plan.make_plan` for its quirks).
    smooth: smooth the selection probabilities over 6x6 areas.
  """

  looks: int | Literal['all'] | None = 1
  tokens: int | None = None
  first_scales: int | None = None
  smooth: bool = False

  BOUNDS: ClassVar = {'looks': bounds.COUNT, 'tokens': bounds.COUNT, 'first_scales': bounds.SIZE}

  def __post_init__(self):
    bounds.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PS3Config:
  """The encoder.

  Attributes:
    vision: the trunk; `pool` stays None there (the pool is this system's own).
    scales: sides in pixels of the square scales, rising.
    select_layers: blocks (from 0) whose outputs feed the selection.
    max_select: T, tokens of one look.
    budgets: tokens per high scale in one look; None: shares by area (`resolved_budgets`).
    residual: a learned position residual per high scale.
    saliency: the ConvNet branch of the selection; None switches it off.
    adapter: C-RADIO only.
    cosine_scale: logits of the selection are this times the cosine.
    quirks: 'reference' reproduces the original's budget arithmetic for `first_scales`; 'strict'
      gives later scales nothing and keeps the size of a shortened look.
    looks_at_once: encode looks as one batch (fast) or in sequence (memory of one look).
    low_context: looks attend to the thumbnail's keys and values. Off is the paper's ablation
      ("low-res KV cache"); every released model has it on.
    text: the text tower that belongs to the encoder; None where a language model prompts it.
  """

  vision: ViTConfig
  scales: tuple[int, ...]
  select_layers: tuple[int, ...] = (0, 9, 18, 26)
  max_select: int = 2560
  budgets: tuple[int, ...] | None = None
  residual: bool = True
  saliency: SaliencyConfig | None = SaliencyConfig()
  adapter: AdapterConfig | None = None
  pool: PoolConfig = PoolConfig()
  cosine_scale: float = 5.0
  quirks: Literal['reference', 'strict'] = 'reference'
  looks_at_once: bool = False
  low_context: bool = True
  look: LookConfig = LookConfig()
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)
  text: TextConfig | None = None

  BOUNDS: ClassVar = {
    'scales': bounds.SIZE, 'max_select': bounds.SIZE, 'select_layers': bounds.COUNT,
    'budgets': bounds.COUNT, 'cosine_scale': bounds.ABOVE_ZERO, 'std': bounds.ABOVE_ZERO,
    'mean': bounds.FINITE}

  def __post_init__(self):
    bounds.check(self)
    problems = []
    patch, depth = self.vision.patch_size, self.vision.depth
    if len(self.scales) < 2 or list(self.scales) != sorted(set(self.scales)):
      problems.append(f'scales must rise and be at least two, got {self.scales}')
    if min(self.scales, default=0) < patch:
      problems.append(f'every scale must hold a patch of {patch}, got {self.scales}')
    if wrong := [layer for layer in self.select_layers if not 0 <= layer < depth]:
      problems.append(f'select_layers {wrong} are no blocks of a trunk of depth {depth}')
    if self.budgets is not None:
      if len(self.budgets) != len(self.scales) - 1:
        problems.append(f'budgets needs one number per high scale ({len(self.scales) - 1}), got '
                        f'{self.budgets}')
      if sum(self.budgets) < 1:
        problems.append(f'budgets must sum to at least 1, got {self.budgets}')
    inside = self.vision.width if self.adapter is None else self.adapter.out
    if inside != self.pool.width:
      problems.append(f'pool.width {self.pool.width} is not the width of its input, {inside}')
    if self.vision.pool is not None or self.vision.class_token:
      problems.append('vision.pool must be None and vision.class_token False')
    if problems:
      raise ValueError('PS3Config: ' + '; '.join(problems))

  @property
  def grid(self) -> int:
    """Side of the thumbnail's grid."""
    return self.scales[0] // self.vision.patch_size

  @property
  def high_scales(self) -> int:
    """Number of scales above the thumbnail."""
    return len(self.scales) - 1

  @property
  def resolved_budgets(self) -> tuple[int, ...]:
    """Tokens per high scale in one look.

    Shares by area, truncated; the rest goes to the last scale. (ps3-torch 0.1.3 loses the rest.)
    """
    if self.budgets is not None:
      return self.budgets
    areas = [s**2 for s in self.scales[1:]]
    shares = [int(self.max_select * area / sum(areas)) for area in areas]
    return (*shares[:-1], shares[-1] + self.max_select - sum(shares))


SO400M = ViTConfig(image_size=378, patch_size=14, width=1152, depth=27, heads=16, mlp_width=4304,
                   activation='gelu')
# timm's vit_large_patch16_224 at img_size 4096: a 256 x 256 table, cropped, and no final norm.
C_RADIO_L = ViTConfig(image_size=384, patch_size=16, width=1024, depth=24, heads=16,
                      mlp_width=4096, activation='gelu', position='crop', position_grid=256,
                      post_norm=False)
# By the name timm gives the trunk (`model_name` in vision_config).
TRUNKS = {
  'vit_so400m_patch14_siglip_384': SO400M,
  'vit_so400m_patch14_siglip_378': SO400M,
  'vit_large_patch16_224': C_RADIO_L,
}

_SIGLIP = TextConfig()
_SIGLIP2 = TextConfig(vocab_size=256000, activation='gelu_tanh', pad=0)


def siglip(scales: tuple[int, ...], text: TextConfig) -> PS3Config:
  """A released SigLIP or SigLIP2 variant."""
  return PS3Config(vision=SO400M, scales=scales, text=text)


def c_radio(scales: tuple[int, ...]) -> PS3Config:
  """A C-RADIO-v2-L variant (configs were published, weights were not)."""
  return PS3Config(
    vision=C_RADIO_L, scales=scales, select_layers=(0, 7, 14, 23), adapter=AdapterConfig(),
    mean=CLIP_MEAN, std=CLIP_STD, text=dataclasses.replace(_SIGLIP, prompt_width=1024))


def _alone(encoder: PS3Config) -> ModelConfig:
  return ModelConfig(system='ps3', encoder=encoder, text=None, image_token=None)


RELEASED = {
  'ps3_1_5k_siglip': _alone(siglip((378, 756, 1512), _SIGLIP)),
  'ps3_4k_siglip': _alone(siglip((378, 756, 1512, 3780), _SIGLIP)),
  'ps3_1_5k_siglip2': _alone(siglip((378, 756, 1512), _SIGLIP2)),
  'ps3_4k_siglip2': _alone(siglip((378, 756, 1512, 3780), _SIGLIP2)),
  'ps3_1_5k_cradio_v2_l': _alone(c_radio((384, 768, 1536))),
  'ps3_4k_cradio_v2_l': _alone(c_radio((384, 768, 1536, 3840))),
}


def tiny_encoder(*, vocab_size: int = 264, max_select: int = 32) -> PS3Config:
  """An encoder that trains on a laptop: a 40-pixel thumbnail of images of 80 and 160 pixels."""
  vision = ViTConfig(image_size=40, patch_size=8, width=64, depth=3, heads=4, mlp_width=128,
                     activation='gelu')
  return PS3Config(
    vision=vision, scales=(40, 80, 160), select_layers=(0, 2), max_select=max_select,
    saliency=SaliencyConfig(width=32, out=32, depth=2, kernel=8, input_size=160),
    pool=PoolConfig(width=64, heads=4, mlp_width=128),
    text=TextConfig(vocab_size=vocab_size, context=32, width=64, depth=2, heads=4, mlp_width=128,
                    out=64, prompt_width=64))


def tiny() -> ModelConfig:
  """The tiny encoder with its text tower, without a language model, as PS3 is released."""
  return _alone(tiny_encoder())
