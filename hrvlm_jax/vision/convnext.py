"""ConvNeXt trunk, as timm builds it, and its weight table.

Source: `luogen1996/LLaVA-HR: llava_hr/model/multimodal_encoder/convnext.py` (a copy of timm's
`convnext.py`). Axis letters: n images, h w rows and columns, c channels.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from hrvlm_jax.checkpoint.rows import Row, Table, conv_kernel, identity, linear, norm
from hrvlm_jax.core import bounds
from hrvlm_jax.core.conv import DEPTHWISE, DepthwiseConv, PatchConv
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import LayerNorm, Linear, Mlp, normal
from hrvlm_jax.core.module import List, Module, Param, Rngs, scan_layers, stacked

KERNEL = 7
STEM = 4
LAYER_SCALE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvNeXtConfig:
  """Sizes of a ConvNeXt.

  Attributes:
    depths, widths: blocks and channels of each stage.
    norm_eps: of all norms (1e-6 in most, 1e-5 in XXL).
    classes: outputs of the classifier that its checkpoints hold; 0: it has none. The trunk never
      runs it.
    head_width: hidden width of the classifier (the `_mlp` variants), or None.
    depthwise: form of the depthwise convolutions (`core.conv.depthwise`).
  """

  depths: tuple[int, ...]
  widths: tuple[int, ...]
  norm_eps: float = 1e-6
  channels: int = 3
  classes: int = 0
  head_width: int | None = None
  depthwise: str = 'auto'

  BOUNDS: ClassVar = {
    **dict.fromkeys(('depths', 'widths', 'head_width'), bounds.SIZE),
    'channels': '[3, 3]', 'classes': bounds.COUNT, 'norm_eps': bounds.ABOVE_ZERO}

  def __post_init__(self):
    bounds.check(self)
    problems = []
    if len(self.depths) != len(self.widths):
      problems.append(f'depths and widths must have one value per stage, got {self.depths} and '
                      f'{self.widths}')
    if self.depthwise not in DEPTHWISE:
      problems.append(f'depthwise must be one of {DEPTHWISE}, got {self.depthwise!r}')
    if problems:
      raise ValueError('ConvNeXtConfig: ' + '; '.join(problems))

  @property
  def stride(self) -> int:
    """Pixels per cell of the last stage."""
    return STEM * 2 ** (len(self.depths) - 1)

  def grid(self, size: int, stage: int = -1) -> int:
    """Cells of one side of a stage's output for an image side of `size` pixels."""
    size //= STEM
    for _ in range(stage % len(self.depths)):
      size //= 2
    return size


CONVNEXT_L = ConvNeXtConfig(
  depths=(3, 3, 27, 3), widths=(192, 384, 768, 1536), norm_eps=1e-6, classes=1000, head_width=1536)
CONVNEXT_XXL = ConvNeXtConfig(
  depths=(3, 4, 30, 3), widths=(384, 768, 1536, 3072), norm_eps=1e-5, classes=1000)


class Block(Module):
  """x + layer_scale * fc2(gelu(fc1(norm(depthwise(x)))))."""

  def __init__(self, config: ConvNeXtConfig, width: int, *, param_dtype=jnp.float32, rngs: Rngs):
    shared = dict(param_dtype=param_dtype, rngs=rngs)
    self.conv_dw = DepthwiseConv(KERNEL, width, impl=config.depthwise, **shared)
    self.norm = LayerNorm(width, eps=config.norm_eps, **shared)
    self.mlp = Mlp(width, 4 * width, activation='gelu', kernel_init=normal(0.02), **shared)
    self.layer_scale = Param(jnp.full((width,), LAYER_SCALE, param_dtype))

  def __call__(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n h w c']:
    y = self.mlp(self.norm(self.conv_dw(x)))
    return x + y * self.layer_scale[...].astype(x.dtype)


class Downsample(Module):
  """Norm, then a 2 x 2 convolution of stride 2."""

  def __init__(self, n_in: int, n_out: int, *, eps: float, param_dtype=jnp.float32, rngs: Rngs):
    self.norm = LayerNorm(n_in, eps=eps, param_dtype=param_dtype, rngs=rngs)
    self.conv = PatchConv(2, n_in, n_out, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n H W d']:
    return self.conv(self.norm(x))


class Stem(Module):
  """A 4 x 4 convolution of stride 4, then a norm."""

  def __init__(self, config: ConvNeXtConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    shared = dict(param_dtype=param_dtype, rngs=rngs)
    self.conv = PatchConv(STEM, config.channels, config.widths[0], **shared)
    self.norm = LayerNorm(config.widths[0], eps=config.norm_eps, **shared)

  def __call__(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n H W d']:
    return self.norm(self.conv(x))


class Stage(Module):
  """Downsampling (not in the first stage) and a scanned stack of blocks."""

  def __init__(self, config: ConvNeXtConfig, index: int, *, param_dtype=jnp.float32, rngs: Rngs):
    width = config.widths[index]
    self.downsample = None if index == 0 else Downsample(
      config.widths[index - 1], width, eps=config.norm_eps, param_dtype=param_dtype, rngs=rngs)
    self.blocks = stacked(lambda r: Block(config, width, param_dtype=param_dtype, rngs=r),
                          config.depths[index], rngs=rngs)

  def __call__(self, x: Float[Array, 'n h w c'], *, ex: Execution = HERE
               ) -> Float[Array, 'n H W d']:
    if self.downsample is not None:
      x = self.downsample(x)
    return scan_layers(self.blocks, x, lambda block, x, _: (block(x), None), ex=ex)[0]


class Classifier(Module):
  """The classifier of a checkpoint: held for a lossless round trip, never run."""

  def __init__(self, config: ConvNeXtConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    shared = dict(param_dtype=param_dtype, rngs=rngs)
    width, hidden = config.widths[-1], config.head_width
    self.norm = LayerNorm(width, eps=config.norm_eps, **shared)
    self.pre_logits = None if hidden is None else Linear(width, hidden, **shared)
    self.fc = Linear(hidden or width, config.classes, **shared)


class ConvNeXt(Module):
  """Stem and stages; no norm after the last stage."""

  def __init__(self, config: ConvNeXtConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    self.stem = Stem(config, param_dtype=param_dtype, rngs=rngs)
    self.stages = List([Stage(config, index, param_dtype=param_dtype, rngs=rngs)
                        for index in range(len(config.depths))])
    self.head = Classifier(config, param_dtype=param_dtype, rngs=rngs) if config.classes else None

  def __call__(self, images: Float[Array, 'n h w c'], *, ex: Execution = HERE
               ) -> Float[Array, 'n H W d']:
    """Output of the last stage."""
    x = self.stem(images)
    for stage in self.stages:
      x = stage(x, ex=ex)
    return x


def table(config: ConvNeXtConfig, *, layout: str = 'llava_hr') -> Table:
  """Rows of a trunk; the three sources of its weights differ in two names.

  LLaVA-HR calls the layer scale `blocks.{j}.weight`; timm and open_clip call the same vector
  `gamma`, and open_clip puts `visual.trunk.` in front and has a projection instead of the
  classifier (which is then left as it was drawn).
  """
  if layout not in ('llava_hr', 'timm', 'open_clip'):
    raise ValueError(f"layout must be 'llava_hr', 'timm' or 'open_clip', got {layout!r}")
  scale = 'weight' if layout == 'llava_hr' else 'gamma'
  prefix = 'visual.trunk.' if layout == 'open_clip' else ''
  rows = [*_conv('stem/conv', f'{prefix}stem.0'), *norm('stem/norm', f'{prefix}stem.1')]
  for index in range(len(config.depths)):
    ours, theirs = f'stages/{index}', f'{prefix}stages.{index}'
    if index:
      rows += norm(f'{ours}/downsample/norm', f'{theirs}.downsample.0')
      rows += _conv(f'{ours}/downsample/conv', f'{theirs}.downsample.1')
    ours, theirs = f'{ours}/blocks', theirs + '.blocks.{i}'
    rows += [
      Row(f'{ours}/layer_scale', f'{theirs}.{scale}', identity),
      *_conv(f'{ours}/conv_dw', f'{theirs}.conv_dw'), *norm(f'{ours}/norm', f'{theirs}.norm'),
      *linear(f'{ours}/mlp/fc1', f'{theirs}.mlp.fc1'),
      *linear(f'{ours}/mlp/fc2', f'{theirs}.mlp.fc2'),
    ]
  ignored, unused = {}, {}
  if config.classes:
    options = dict(optional=layout == 'open_clip')
    rows += norm('head/norm', f'{prefix}head.norm', **options)
    if config.head_width is not None:
      rows += linear('head/pre_logits', f'{prefix}head.pre_logits.fc', **options)
    rows += linear('head/fc', f'{prefix}head.fc', **options)
    unused['head/*'] = 'classifier of the checkpoint; the trunk ends with its last stage'
  if layout == 'open_clip':
    ignored = {'visual.head.*': 'projection of CLIP', 'text*': 'text tower',
               'transformer.*': 'text tower', 'token_embedding.*': 'text tower',
               'positional_embedding': 'text tower', 'ln_final.*': 'text tower',
               'attn_mask': 'buffer', 'logit_scale': 'contrastive temperature'}
  return Table(tuple(rows), ignored, unused)


def _conv(ours: str, theirs: str) -> list[Row]:
  return [Row(f'{ours}/kernel', f'{theirs}.weight', conv_kernel),
          Row(f'{ours}/bias', f'{theirs}.bias', identity)]
