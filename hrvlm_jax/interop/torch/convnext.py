"""ConvNeXt's trunk, channels last between the convolutions."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .towers import Mlp, few


def convolved(layer, x):
  """A convolution of maps [n h w c]."""
  return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(GradientCheckpointingLayer):
  """x + layer_scale * fc2(gelu(fc1(norm(depthwise(x)))))."""

  def __init__(self, width, eps):
    super().__init__()
    self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
    self.norm = nn.LayerNorm(width, eps=eps)
    self.mlp = Mlp(width, 4 * width, width)
    self.layer_scale = nn.Parameter(torch.full((width,), 1e-6))

  def forward(self, x):
    """[n h w c] -> [n h w c]."""
    y, count = convolved(self.conv_dw, x), few(x, self.mlp.fc1)
    if count is None:
      return x + self.mlp(self.norm(y)) * self.layer_scale
    y = y.contiguous()
    for rows, own in zip(y.flatten(0, 2).split(count), x.flatten(0, 2).split(count)):
      torch.addcmul(own, self.mlp(self.norm(rows)), self.layer_scale, out=rows)
    return y


class Stem(nn.Module):
  """A convolution without overlap, then a norm."""

  def __init__(self, patch, n_in, n_out, eps):
    super().__init__()
    self.conv, self.norm = nn.Conv2d(n_in, n_out, patch, patch), nn.LayerNorm(n_out, eps=eps)

  def forward(self, x):
    """[n h w c] -> [n H W d]."""
    return self.norm(convolved(self.conv, x.contiguous()))  # channels last from here on


class Downsample(nn.Module):
  """A norm, then a 2 x 2 convolution without overlap."""

  def __init__(self, n_in, n_out, eps):
    super().__init__()
    self.norm, self.conv = nn.LayerNorm(n_in, eps=eps), nn.Conv2d(n_in, n_out, 2, 2)

  def forward(self, x):
    """[n h w c] -> [n H W d]."""
    return convolved(self.conv, self.norm(x))


class Stage(nn.Module):
  """Downsampling, except in the first stage, and blocks."""

  def __init__(self, before, width, depth, eps):
    super().__init__()
    self.downsample = None if before is None else Downsample(before, width, eps)
    self.blocks = nn.ModuleList(Block(width, eps) for _ in range(depth))

  def forward(self, x):
    """[n h w c] -> [n H W d]."""
    x = x if self.downsample is None else self.downsample(x)
    for block in self.blocks:
      x = block(x)
    return x


class Classifier(nn.Module):
  """What a checkpoint of timm ends with; kept, never run."""

  def __init__(self, c):
    super().__init__()
    self.norm = nn.LayerNorm(c.widths[-1], eps=c.norm_eps)
    self.pre_logits = None if c.head_width is None else nn.Linear(c.widths[-1], c.head_width)
    self.fc = nn.Linear(c.head_width or c.widths[-1], c.classes)


class ConvNeXt(nn.Module):
  """Stem and stages; no norm behind the last stage."""

  def __init__(self, c):
    super().__init__()
    self.stem = Stem(4, c.channels, c.widths[0], c.norm_eps)
    self.stages = nn.ModuleList(
      Stage(None if i == 0 else c.widths[i - 1], width, depth, c.norm_eps)
      for i, (width, depth) in enumerate(zip(c.widths, c.depths)))
    self.head = Classifier(c) if c.classes else None

  def forward(self, images):
    """[n h w 3] -> the last stage's map [n H W d]."""
    x = self.stem(images)
    for stage in self.stages:
      x = stage(x)
    return x
