"""LLaVA-HR's encoder: a ViT on a small picture, a ConvNeXt on a large one, joined by adapters."""

import torch
from torch import nn
from torch.nn import functional as F

from .attention import Attention
from .configuration_hrvlm import low_resolution
from .convnext import ConvNeXt, convolved
from .towers import Mlp, Tower

GATES = {'tanh': torch.tanh, 'sigmoid': torch.sigmoid, 'hsigmoid': F.hardsigmoid}


def resized(maps, side):
  """[n h h c] -> [n side side c], bilinear with aligned corners."""
  channels_first = maps.permute(0, 3, 1, 2)
  out = F.interpolate(channels_first, size=(side, side), mode='bilinear', align_corners=True)
  return out.permute(0, 2, 3, 1)


def averaged(maps, factor):
  """Means of factor x factor windows of [n h w c]; remainders are not read."""
  return F.avg_pool2d(maps.permute(0, 3, 1, 2), factor).permute(0, 2, 3, 1)


def align(maps, side):
  """A square map on another grid: averaged down, or bilinear up."""
  if maps.shape[1] > side:
    return averaged(maps, maps.shape[1] // side)
  return maps if maps.shape[1] == side else resized(maps, side)


def as_map(tokens):
  """[n t d] -> [n side side d]."""
  side = round(tokens.shape[1] ** 0.5)
  return tokens.unflatten(1, (side, side))


class MRAdapter(nn.Module):
  """out = f + gate * u with f = receiving + map(receiving), u = map(injected) on its grid."""

  def __init__(self, slow, fast, c):
    super().__init__()
    self.c = c
    first = lambda kind, width: nn.Linear(width, width) if kind == 'mlp' else nn.Conv2d(
      width, width, 7, padding=3, groups=width)
    self.slow_conv, self.slow_proj = first(c.slow_map, slow), nn.Linear(slow, fast)
    self.fast_conv, self.fast_proj = first(c.fast_map, fast), nn.Linear(fast, fast)
    self.gate = Mlp(2 * fast, fast // 2, 1 if c.gate_width == 'scalar' else fast)

  def _mapped(self, first, second, x):
    y = first(x) if isinstance(first, nn.Linear) else convolved(first, x)
    return second(F.gelu(y))

  def forward(self, fast, slow):
    """Receiving [n g g d], injected [n h h c] -> [n g g d]."""
    u = align(self._mapped(self.slow_conv, self.slow_proj, slow), fast.shape[1])
    mapped = self._mapped(self.fast_conv, self.fast_proj, fast)
    f = fast + mapped
    read = f if self.c.gate_input == 'with_skip' else mapped
    pooled = torch.cat([x.mean((1, 2), dtype=torch.float32) for x in (read, u)], dim=-1)
    gate = GATES[self.c.gate](self.gate(pooled.to(u.dtype)))
    return torch.addcmul(f, gate[:, None, None], u)


class Align(nn.Module):
  """fast_proj(fast) + slow_proj(slow on the fast grid)."""

  def __init__(self, slow, fast):
    super().__init__()
    self.fast_proj, self.slow_proj = nn.Linear(fast, fast), nn.Linear(slow, fast)

  def forward(self, fast, slow):
    """[n g g d], [n h h c] -> [n g g d]."""
    return self.fast_proj(fast) + self.slow_proj(align(slow, fast.shape[1]))


class Resampler(nn.Module):
  """Learned queries read all tokens by one cross-attention, then a residual MLP."""

  def __init__(self, width, heads, queries, config):
    super().__init__()
    norm = lambda: nn.LayerNorm(width, eps=1e-5)
    self.queries = nn.Parameter(torch.zeros(queries, width))
    self.norm_tokens, self.norm = norm(), norm()
    self.attn, self.mlp = Attention(width, heads, config), Mlp(width, 4 * width, width)

  def forward(self, x):
    """[n t d] -> [n q d]."""
    queries = self.queries.to(x.dtype).expand(len(x), -1, -1)
    y = queries + self.attn(queries, self.norm_tokens(x))
    return y + self.mlp(self.norm(y))


class LlavaHrVision(nn.Module):
  """Both towers, or one of them alone."""

  def __init__(self, c, config):
    super().__init__()
    self.c = c
    self.fast = None if c.fast is None else Tower(c.fast, config.vision_config)
    self.slow = None if c.slow is None else ConvNeXt(c.slow)
    widths = []
    if c.adapters is not None:
      down = c.adapters.direction == 'high_to_low'
      widths = [(c.slow.widths[-1], c.fast.width)] * 3 if down else [
        (c.fast.width, width) for width in c.slow.widths[:-1]]
    self.adapters = nn.ModuleList(MRAdapter(*pair, c.adapters) for pair in widths)
    dual = c.fast is not None and c.slow is not None
    self.align = Align(c.slow.widths[-1], c.fast.width) if dual and c.fusion == 'sum' else None
    self.resampler = Resampler(c.fast.width, c.fast.heads, c.queries, config.vision_config
                               ) if c.reduce == 'queries' else None

  def forward(self, pixel_values):
    """[n 3 s s] -> [n t d]."""
    images = pixel_values.permute(0, 2, 3, 1)
    if self.slow is None:
      return self._alone(pixel_values)
    images = images.to(self.slow.stem.conv.weight.dtype)
    if self.fast is None:
      return self.slow(images).flatten(1, 2)
    fast, slow = self._paths(images)
    if self.align is not None:
      return self.align(fast, slow).flatten(1, 2)
    return torch.cat([fast, align(slow, fast.shape[1])], dim=-1).flatten(1, 2)

  def _alone(self, pixels):
    vit = self.c.fast
    x = self.fast(pixels, stop=vit.depth + 1 + self.c.select_layer)[:, int(vit.class_token):]
    if self.c.reduce == 'average':
      return averaged(as_map(x), self.c.reduce_factor).flatten(1, 2)
    return x if self.resampler is None else self.resampler(x)

  def _paths(self, images):
    depth, adapters = self.c.fast.depth, self.adapters
    small = resized(images, self._fast_size()).permute(0, 3, 1, 2)
    x = self.fast.embed(small, class_token=False)
    if not len(adapters):
      return as_map(self.fast.run(x)), self.slow(images)
    if self.c.adapters.direction == 'low_to_high':
      fast, slow = as_map(self.fast.run(x)), self.slow.stem(images)
      for number, stage in enumerate(self.slow.stages):
        slow = stage(slow)
        slow = adapters[number](slow, fast) if number < len(adapters) else slow
      return fast, slow
    slow, quarter = self.slow(images), depth // 4
    for number in range(4):
      x = self.fast.run(x, number * quarter, (number + 1) * quarter)
      if number < len(adapters):
        x = adapters[number](as_map(x), slow).flatten(1, 2)
    return as_map(x), slow

  def _fast_size(self):
    """Side in pixels of the picture the ViT sees."""
    return self.c.fast_size or low_resolution(self.c.image_size)
