"""Settings of LLaVA-HR; released and tiny sizes, stages, and the axes of its ablations.

Source: `luogen1996/LLaVA-HR: llava_hr/model/multimodal_encoder/`, arXiv 2403.03003.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from hrvlm_jax.core import bounds
from hrvlm_jax.core.resample import CLIP_MEAN, CLIP_STD
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.vision.convnext import CONVNEXT_L, CONVNEXT_XXL, ConvNeXtConfig
from hrvlm_jax.vision.vit import CLIP_L_336, ViTConfig

_CHOICES = {
  'direction': ('high_to_low', 'low_to_high'), 'slow_map': ('mlp', 'conv'),
  'fast_map': ('conv', 'mlp'), 'gate': ('tanh', 'sigmoid', 'hsigmoid'),
  'gate_width': ('scalar', 'vector'), 'gate_input': ('with_skip', 'mapped'),
  'fusion': ('sum', 'concat'), 'reduce': ('none', 'average', 'queries'),
  'aspect': ('pad', 'square'),
}


def _bad_choices(config) -> list[str]:
  return [f'{name} must be one of {_CHOICES[name]}, got {getattr(config, name)!r}'
          for name in (f.name for f in dataclasses.fields(config))
          if name in _CHOICES and getattr(config, name) not in _CHOICES[name]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
  """An MR-Adapter: out = f + gate * u, f = fast + fast_map(fast), u = slow_map(slow).

  "fast" is the path that receives, "slow" the one that is injected; `direction` says which
  backbone plays which part.

  Attributes:
    direction: 'high_to_low' injects the ConvNeXt's last stage into the ViT after each of its first
      three quarters (the paper); 'low_to_high' the ViT's output into the ConvNeXt after each of
      its stages but the last.
    slow_map, fast_map: f_h and f_l of the paper: 'mlp' is 1x1, GELU, 1x1; 'conv' is depthwise
      7x7, GELU, 1x1.
    gate: function of the gate's logit.
    gate_width: 'scalar', one gate per image (the released code), or 'vector', one per channel
      (equation 4 of the paper).
    gate_input: pooled into the gate: f with its skip (the released code), or 'mapped', fast_map
      alone (the paper).
  """

  direction: str = 'high_to_low'
  slow_map: str = 'mlp'
  fast_map: str = 'conv'
  gate: str = 'tanh'
  gate_width: str = 'scalar'
  gate_input: str = 'with_skip'

  def __post_init__(self):
    if problems := _bad_choices(self):
      raise ValueError('AdapterConfig: ' + '; '.join(problems))


RELEASED_ADAPTERS = AdapterConfig()
PAPER_ADAPTERS = AdapterConfig(gate_width='vector', gate_input='mapped')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaHRConfig:
  """The encoder: two paths, or one of them alone.

  Attributes:
    image_size: S, side in pixels of the image the slow path reads.
    fast: the ViT; None leaves the ConvNeXt alone.
    slow: the ConvNeXt; None leaves the ViT alone, at S pixels.
    adapters: MR-Adapters; None in stage 1, where they do not exist.
    fusion: of both outputs: 'sum' of two linear maps (released), or 'concat' of the channels.
    fast_size: side the ViT sees; None: `low_resolution(image_size)`.
    reduce: of the ViT's tokens when it is alone: 'average' over reduce_factor x reduce_factor
      windows, 'queries' by cross-attention of learned queries.
    select_layer: hidden state read when the ViT is alone, counted from the end: -1 is the output
      of the last block, -2 (released) of the one before.
    aspect: 'pad' to a square (stage 2, evaluation) or 'square', a centre crop (stage 1).
  """

  image_size: int = 1024
  fast: ViTConfig | None = CLIP_L_336
  slow: ConvNeXtConfig | None = CONVNEXT_L
  adapters: AdapterConfig | None = RELEASED_ADAPTERS
  fusion: str = 'sum'
  fast_size: int | None = None
  reduce: str = 'none'
  reduce_factor: int = 2
  queries: int = 144
  select_layer: int = -2
  aspect: str = 'pad'
  mean: tuple[float, float, float] = CLIP_MEAN
  std: tuple[float, float, float] = CLIP_STD

  BOUNDS: ClassVar = {
    **dict.fromkeys(('image_size', 'fast_size', 'reduce_factor', 'queries'), bounds.SIZE),
    'select_layer': bounds.FROM_END, 'mean': bounds.FINITE, 'std': bounds.ABOVE_ZERO}

  def __post_init__(self):
    bounds.check(self)
    problems = _bad_choices(self)
    if self.fast is None and self.slow is None:
      problems.append('fast and slow are both None; at least one backbone is needed')
    elif self.dual:
      problems += self._dual_problems()
    else:
      problems += self._single_problems()
    problems += self._unread()
    if problems:
      raise ValueError('LlavaHRConfig: ' + '; '.join(problems))

  def _unread(self) -> list[str]:
    """Settings that say something and that nothing reads."""
    alone = self.fast is not None and self.slow is None
    read = {'reduce_factor': self.reduce == 'average', 'queries': self.reduce == 'queries',
            'select_layer': alone}
    where = {'reduce_factor': "with reduce='average'", 'queries': "with reduce='queries'",
             'select_layer': 'of the ViT alone (slow=None)'}
    default = {field.name: field.default for field in dataclasses.fields(self)}
    return [f'{key} {getattr(self, key)} is read only {where[key]}; leave it at {default[key]}'
            for key in read if not read[key] and getattr(self, key) != default[key]]

  def _dual_problems(self) -> list[str]:
    problems = []
    if self.reduce != 'none':
      problems.append(f'reduce={self.reduce!r} belongs to the ViT alone (slow=None)')
    fast, slow = self.fast_grid, self.slow_grid
    if min(fast, slow) < 1:
      problems.append(f'image_size {self.image_size} leaves grids of {fast} and {slow} cells')
    elif max(fast, slow) % min(fast, slow):
      problems.append(
        f'image_size {self.image_size} gives a ViT grid of {fast} and a ConvNeXt grid of {slow}; '
        'one must be a multiple of the other (sides of at least 768 in steps of 32 are, with the '
        'released backbones, and 384, 256, 192, 128, 96, 64, 32)')
    direction = None if self.adapters is None else self.adapters.direction
    if direction == 'high_to_low' and self.fast.depth % 4:
      problems.append(f'fast.depth {self.fast.depth} is not a multiple of 4; the adapters stand '
                      'after the first three quarters')
    if direction == 'low_to_high':
      grids = [self.slow.grid(self.image_size, i) for i in range(len(self.slow.depths) - 1)]
      bad = [g for g in grids if max(g, fast) % max(min(g, fast), 1)]
      if bad:
        problems.append(f'low_to_high: ConvNeXt grids {bad} and the ViT grid {fast} are no '
                        'multiples of each other')
    return problems

  def _single_problems(self) -> list[str]:
    problems = []
    if self.adapters is not None or self.fusion != 'sum':
      problems.append('one backbone alone has neither adapters nor a fusion; set adapters=None')
    if self.slow is not None and self.reduce != 'none':
      problems.append(f'reduce={self.reduce!r} belongs to the ViT alone (slow=None)')
    if self.grid < 1:
      problems.append(f'image_size {self.image_size} leaves no token')
    if self.fast is not None and not -self.fast.depth <= self.select_layer <= -1:
      problems.append(f'select_layer must be in -{self.fast.depth}..-1, got {self.select_layer}')
    return problems

  @property
  def dual(self) -> bool:
    """Both backbones are there."""
    return self.fast is not None and self.slow is not None

  @property
  def fast_image_size(self) -> int:
    """F, side in pixels of the image the ViT reads."""
    if self.slow is None:
      return self.image_size
    return self.fast_size or low_resolution(self.image_size)

  @property
  def fast_grid(self) -> int:
    """Patches per side of the ViT."""
    return self.fast_image_size // self.fast.patch_size

  @property
  def slow_grid(self) -> int:
    """Cells per side of the ConvNeXt's last stage."""
    return self.slow.grid(self.image_size)

  @property
  def grid(self) -> int:
    """Tokens per side before `reduce='queries'`."""
    if self.fast is None:
      return self.slow_grid
    return self.fast_grid // (self.reduce_factor if self.reduce == 'average' else 1)

  @property
  def tokens(self) -> int:
    """Visual tokens of one image, whatever its size."""
    return self.queries if self.reduce == 'queries' else self.grid**2

  @property
  def width(self) -> int:
    """Width of a visual token."""
    if not self.dual:
      return self.slow.widths[-1] if self.fast is None else self.fast.width
    return self.fast.width + (self.slow.widths[-1] if self.fusion == 'concat' else 0)


def backbones(config: LlavaHRConfig) -> dict[str, ViTConfig | ConvNeXtConfig]:
  """The towers that can start from releases of their own."""
  towers = {'vision/fast': config.fast, 'vision/slow': config.slow}
  return {path: tower for path, tower in towers.items() if tower is not None}


def low_resolution(image_size: int) -> int:
  """F for S: the ViT's grid at patch 14 equals the ConvNeXt's at stride 32, but at least 336."""
  return max(int(image_size / 32 * 14), 336)


def model(encoder: LlavaHRConfig, text: language.DecoderConfig, *,
          chat: str = 'vicuna_v1') -> ModelConfig:
  """A whole model around an encoder: its projector follows from both widths."""
  return ModelConfig(
    system='llava_hr', encoder=encoder, text=text,
    projector=ProjectorConfig(n_in=encoder.width, n_out=text.width), chat=chat)


VICUNA_7B = language.llama()
VICUNA_13B = language.llama(width=5120, depth=40, heads=40, mlp_width=13824)
_STAGE_1 = LlavaHRConfig(image_size=384, adapters=None, aspect='square')

RELEASED = {
  'llava_hr_7b': model(LlavaHRConfig(), VICUNA_7B),
  'llava_hr_13b': model(LlavaHRConfig(), VICUNA_13B),  # in the paper only
  'llava_hr_x_13b': model(LlavaHRConfig(slow=CONVNEXT_XXL), VICUNA_13B),
  'llava_hr_7b_stage1': model(_STAGE_1, VICUNA_7B, chat='plain'),
  'llava_hr_x_13b_stage1': model(
    dataclasses.replace(_STAGE_1, slow=CONVNEXT_XXL), VICUNA_13B, chat='plain'),
}

# Weights the ConvNeXt starts from. The original's flag names a plain CLIP tower, but timm then
# loads the architecture's default tag, which was fine-tuned on ImageNet: 'released' is what the
# released models started from, 'flag' what paper and flag say.
SLOW_START = {
  'convnext_l': {'released': 'timm/convnext_large_mlp.clip_laion2b_soup_ft_in12k_in1k_320',
                 'flag': 'timm/convnext_large_mlp.clip_laion2b_ft_320'},
  'convnext_xxl': {'released': 'timm/convnext_xxlarge.clip_laion2b_soup_ft_in1k',
                   'flag': 'timm/convnext_xxlarge.clip_laion2b_soup'},
}


def tiny(*, vocab_size: int = 264, image_size: int = 256) -> ModelConfig:
  """A model that trains on a laptop: both grids 8 x 8, the ViT sees a quarter of the side."""
  fast = ViTConfig(
    image_size=48, patch_size=8, width=96, depth=4, heads=4, mlp_width=192,
    activation='quick_gelu', norm_eps=1e-5, class_token=True, patch_bias=False, pre_norm=True)
  slow = ConvNeXtConfig(depths=(1, 1, 2, 1), widths=(16, 32, 64, 96), classes=3, head_width=96)
  return model(
    LlavaHRConfig(image_size=image_size, fast=fast, slow=slow, fast_size=image_size // 4),
    language.llama(vocab_size=vocab_size, width=128, depth=2, heads=4, mlp_width=256,
                   max_positions=512))
