"""Pheye's encoder: one tower over a global view and tiles, each with its own low-rank set."""

import torch
from torch import nn
from torch.nn import functional as F

from .towers import Tower


class LowRank:
  """What an adapted layer has beside its base: one set for the global view (the first of every
  `views` rows), one for the tiles. Which set acts follows from a row's place alone, so that
  recomputing a layer in the backward pass gives the same.

  Args:
    sets: settings of the sets, or None; `frozen` ones get no gradient.
  """

  def add_sets(self, sets, views, shape_a, shape_b):
    """The parameters `lora_a_<name>`, `lora_b_<name>`."""
    self.views, self.sets, self.merged = views, sets, None
    for one in filter(None, sets):
      setattr(self, f'lora_a_{one.name}', nn.Parameter(torch.zeros(shape_a(one.rank))))
      setattr(self, f'lora_b_{one.name}', nn.Parameter(torch.zeros(shape_b(one.rank))))

  def merge(self):
    """The weights with each set added, in float32; frees nothing, so that the sets are saved."""
    whole = []
    for one in self.sets:
      weight = self.weight.detach()
      if one is not None:
        a, b = (getattr(self, f'lora_{side}_{one.name}').detach().float() for side in 'ab')
        low = (b @ a.flatten(1)).reshape(weight.shape) * (one.alpha / one.rank)
        weight = (weight.float() + low).to(weight.dtype)
      whole.append(weight)
    self.merged = whole

  def apart(self, x, run):
    """Global views and tiles of x [n ...] through their own merged weights by `run` (x, weight)."""
    rows = x.unflatten(0, (-1, self.views))
    parts = [run(own.flatten(0, 1), weight) for own, weight in zip(
      (rows[:, :1], rows[:, 1:]), self.merged)]
    return torch.cat([part.unflatten(0, (len(rows), -1)) for part in parts], dim=1).flatten(0, 1)

  def low_rank(self, x, y, run):
    """y [n ...] plus the sets' terms; `run` (x, a, b) -> the term."""
    parts = []
    for one, part in zip(self.sets, (slice(0, 1), slice(1, None))):
      rows = y.unflatten(0, (-1, self.views))[:, part]
      if one is not None:
        a, b = (getattr(self, f'lora_{side}_{one.name}').to(x.dtype) for side in 'ab')
        a, b = (a.detach(), b.detach()) if one.frozen else (a, b)
        own = x.unflatten(0, (-1, self.views))[:, part]
        low = run(F.dropout(own, one.dropout, self.training).flatten(0, 1), a, b)
        rows = rows + low.unflatten(0, rows.shape[:2]) * (one.alpha / one.rank)
      parts.append(rows)
    return torch.cat(parts, dim=1).flatten(0, 1)


class AdaptedLinear(nn.Linear, LowRank):
  """A linear layer with its sets, a [r in] and b [out r]."""

  def __init__(self, base, sets, views):
    super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
    self.add_sets(sets, views, lambda r: (r, base.in_features), lambda r: (base.out_features, r))

  def forward(self, x):
    """[n ... i] -> [n ... o]."""
    if self.merged is not None and not self.training:
      return self.apart(x, lambda x, weight: F.linear(x, weight, self.bias))
    return self.low_rank(x, super().forward(x), lambda x, a, b: x @ a.T @ b.T)


class AdaptedConv(nn.Conv2d, LowRank):
  """A patch embedding with its sets, a [r c h w] and b [out r]."""

  def __init__(self, base, sets, views):
    super().__init__(base.in_channels, base.out_channels, base.kernel_size, base.stride,
                     bias=base.bias is not None)
    self.add_sets(sets, views, lambda r: (r, base.in_channels, *base.kernel_size),
                  lambda r: (base.out_channels, r))

  def forward(self, x):
    """[n c h w] -> [n o H W]."""
    if self.merged is not None and not self.training:
      return self.apart(x, lambda x, weight: F.conv2d(x, weight, self.bias, self.stride))
    return self.low_rank(x, super().forward(x), lambda x, a, b: torch.einsum(
      'nrhw,or->nohw', F.conv2d(x, a, stride=self.stride), b))


class PheyeVision(nn.Module):
  """Tower, a norm per level, positions of the sub-images."""

  def __init__(self, c, config):
    super().__init__()
    self.c, self.views = c, 1 + c.level**2
    width = c.vision.width
    self.tower = Tower(c.vision, config.vision_config)
    if c.first is not None:
      c.first.frozen = not c.train_first_adapter
    sets = (c.first, c.second)
    for layer in self.tower.encoder.layers:
      for part in (layer.self_attn, layer.mlp):
        for name, child in list(part.named_children()):
          if isinstance(child, nn.Linear):
            setattr(part, name, AdaptedLinear(child, sets, self.views))
    embeddings = self.tower.embeddings
    embeddings.patch_embedding = AdaptedConv(embeddings.patch_embedding, sets, self.views)
    norm = lambda: nn.LayerNorm(width, eps=c.norm_eps)
    self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()
    self.sub_image = nn.Embedding(c.sub_image_rows, width)

  def merge_adapters(self):
    """See the model's."""
    for module in self.modules():
      if isinstance(module, LowRank):
        module.merge()

  def forward(self, pixel_values):
    """Sub-images [n*views 3 s s] -> [n views*t d], the global view first."""
    x = self.tower(pixel_values).unflatten(0, (-1, self.views))
    x = torch.cat([self.norm1(x[:, :1]), self.norm2(x[:, 1:])], dim=1)
    return (x + self.sub_image.weight[:self.views, None].to(x.dtype)).flatten(1, 2)
