"""Pheye's encoder: one tower over a global view and tiles, each with its own low-rank set."""

import torch
from torch import nn
from torch.nn import functional as F

from .attention import attend
from .towers import Tower, TowerLayer, few

WHOLE, TILES = range(2)  # the sets, in the order of `LowRank.sets`


class LowRank:
  """What an adapted layer has beside its base: one set for the global view (the first of every
  `views` rows), one for the tiles. Which set acts follows from a row's place, so that recomputing a
  layer in the backward pass gives the same; or the caller says it, of rows of one kind.

  Args:
    sets: settings of the sets, or None; `frozen` ones get no gradient.
  """

  def add_sets(self, sets, views, shape_a, shape_b):
    """The parameters `lora_a_<name>`, `lora_b_<name>`."""
    self.views, self.sets = views, sets
    self.register_buffer('merged', None, persistent=False)
    for one in filter(None, sets):
      setattr(self, f'lora_a_{one.name}', nn.Parameter(torch.zeros(shape_a(one.rank))))
      setattr(self, f'lora_b_{one.name}', nn.Parameter(torch.zeros(shape_b(one.rank))))

  def merge(self):
    """The weights of the tiles, base and set added in float32, beside the base: all but one of the
    views are tiles, and the global view needs the base, as saving does."""
    one = self.sets[TILES]
    if one is None:
      return
    a, b = (getattr(self, f'lora_{side}_{one.name}').detach().float() for side in 'ab')
    weight = self.weight.detach()
    low = (b @ a.flatten(1)).reshape(weight.shape).mul_(one.alpha / one.rank)
    self.merged = low.add_(weight).to(weight.dtype)

  def train(self, mode=True):
    """Weights that may change are no longer merged."""
    self.merged = None if mode else self.merged
    return super().train(mode)

  def added(self, which, y, x, run):
    """y plus what a set adds to rows x [n ...] of its own; `run` (x, a, b) -> the term."""
    one = self.sets[which]
    if one is None:
      return y
    a, b = (getattr(self, f'lora_{side}_{one.name}').to(x.dtype) for side in 'ab')
    a, b = (a.detach(), b.detach()) if one.frozen else (a, b)
    low = run(F.dropout(x, one.dropout, self.training), a, b)
    return torch.add(y, low, alpha=one.alpha / one.rank)

  def of(self, which, x, whole, run):
    """Rows [n ...] of one kind; `whole` (x, weight) -> the layer without its sets."""
    if which == TILES and self.merged is not None:
      return whole(x, self.merged)
    return self.added(which, whole(x, self.weight), x, run)

  def both(self, x, whole, run):
    """Rows [n*views ...] of both kinds, by their places."""
    cut = lambda x: [rows.flatten(0, 1) for rows in x.unflatten(
      0, (-1, self.views)).split([1, self.views - 1], dim=1)]
    if self.merged is None:  # one product with the base
      y = cut(whole(x, self.weight))
      parts = [self.added(which, y[which], rows, run) for which, rows in enumerate(cut(x))]
    else:
      parts = [self.of(which, rows, whole, run) for which, rows in enumerate(cut(x))]
    count = len(x) // self.views
    return torch.cat([part.unflatten(0, (count, -1)) for part in parts], dim=1).flatten(0, 1)


class AdaptedLinear(LowRank, nn.Linear):
  """A linear layer with its sets, a [r in] and b [out r]."""

  def __init__(self, base, sets, views):
    super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
    self.add_sets(sets, views, lambda r: (r, base.in_features), lambda r: (base.out_features, r))

  def forward(self, x, which=None):
    """[n ... i] -> [n ... o]; which: the kind of all rows, None: by their places."""
    how = (x, lambda x, weight: F.linear(x, weight, self.bias), lambda x, a, b: x @ a.T @ b.T)
    return self.both(*how) if which is None else self.of(which, *how)


class AdaptedConv(LowRank, nn.Conv2d):
  """A patch embedding with its sets, a [r c h w] and b [out r]."""

  def __init__(self, base, sets, views):
    super().__init__(base.in_channels, base.out_channels, base.kernel_size, base.stride,
                     bias=base.bias is not None)
    self.add_sets(sets, views, lambda r: (r, base.in_channels, *base.kernel_size),
                  lambda r: (base.out_channels, r))

  def forward(self, x):
    """[n c h w] -> [n o H W]."""
    return self.both(
      x, lambda x, weight: F.conv2d(x, weight, self.bias, self.stride),
      lambda x, a, b: torch.einsum('nrhw,or->nohw', F.conv2d(x, a, stride=self.stride), b))


class PheyeLayer(TowerLayer):
  """A layer of adapted parts. Few rows at a time are of one kind: no product is cut and joined."""

  views = 1

  def forward(self, x, attention_mask=None):
    """[n*views t d] -> [n*views t d]."""
    if few(x, self.mlp.fc1) is None:
      return super().forward(x, attention_mask)
    out = torch.empty_like(x)
    for at in range(0, len(x), self.views):
      for which, own in ((WHOLE, slice(at, at + 1)), (TILES, slice(at + 1, at + self.views))):
        pictures = self.pictures(x[own])
        for rows, part in zip(x[own].split(pictures), out[own].split(pictures)):
          self._attention(rows, part, which)
        self.add_mlp(out[own], which)
    return out

  def _attention(self, x, out, which):
    """x + attention(norm(x)) of views of one kind, into `out`."""
    own, y = self.self_attn, self.layer_norm1(x)
    q, k, v = (layer(y, which).unflatten(-1, (own.num_heads, -1)).transpose(1, 2)
               for layer in (own.q_proj, own.k_proj, own.v_proj))
    y = attend(own, q, k, v, scale=own.scale).flatten(2)
    torch.add(x, own.out_proj(y, which), out=out)


class PheyeVision(nn.Module):
  """Tower, a norm per level, positions of the sub-images."""

  def __init__(self, c, config):
    super().__init__()
    self.c, self.views = c, 1 + c.level**2
    width = c.vision.width
    self.tower = Tower(c.vision, config.vision_config, PheyeLayer)
    if c.first is not None:
      c.first.frozen = not c.train_first_adapter
    sets = (c.first, c.second)
    for layer in self.tower.encoder.layers:
      layer.views = self.views
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
