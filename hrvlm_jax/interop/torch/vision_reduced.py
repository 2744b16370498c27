"""Any encoder, then fewer tokens of each picture: pooling, resamplers, ToMe, VisionZip."""

import torch
from torch import nn
from torch.nn import functional as F

from .attention import attend


def _split(x, heads):
  return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class PerceiverLayer(nn.Module):
  """latents += attention(concat(x, latents)); latents += feed-forward; projections without bias."""

  is_causal = False

  def __init__(self, width, c, config):
    super().__init__()
    norm = lambda: nn.LayerNorm(width, eps=1e-5)
    make = lambda n_in, n_out: nn.Linear(n_in, n_out, bias=False)
    inner = c.heads * c.head_dim
    self.config, self.heads, self.scale = config, c.heads, c.head_dim**-0.5
    self.squared = c.activation == 'squared_relu'
    self.norm_media, self.norm_latents, self.norm_ff = norm(), norm(), norm()
    self.q, self.k, self.v = make(width, inner), make(width, inner), make(width, inner)
    self.out = make(inner, width)
    self.fc1, self.fc2 = make(width, c.mlp_ratio * width), make(c.mlp_ratio * width, width)

  def forward(self, x, latents, mask):
    """[n t c], [n q c] -> [n q c]; mask bool [n 1 1 t+q] or None."""
    own = self.norm_latents(latents)
    both = torch.cat([self.norm_media(x), own], dim=1)
    y = attend(self, *(_split(part, self.heads) for part in (self.q(own), self.k(both),
                                                            self.v(both))),
               scale=self.scale, mask=mask)
    latents = latents + self.out(y.flatten(2))
    y = self.fc1(self.norm_ff(latents))
    return latents + self.fc2(F.relu(y).square() if self.squared else F.gelu(y))


class Perceiver(nn.Module):
  """Learned latents read any number of tokens in several layers."""

  def __init__(self, width, out, c, config):
    del out
    super().__init__()
    self.latents = nn.Parameter(torch.zeros(c.queries, width))
    self.time = nn.Parameter(torch.zeros(1, 1, width))
    self.layers = nn.ModuleList(PerceiverLayer(width, c, config) for _ in range(c.depth))
    self.norm = nn.LayerNorm(width, eps=1e-5)

  def forward(self, x, valid):
    """[n t c], bool [n t] -> [n q c]."""
    x = x + self.time.to(x.dtype)
    latents, mask = self.latents.to(x.dtype).expand(len(x), -1, -1), None
    if not bool(valid.all()):
      mask = F.pad(valid, (0, latents.shape[1]), value=True)[:, None, None]
    for layer in self.layers:
      latents = layer(x, latents, mask)
    return self.norm(latents)


def sincos(side, width):
  """[side*side width]: columns in the first half of the channels, rows in the second."""
  half = width // 2
  rate = 10000.0 ** (-2 * torch.arange(half // 2, dtype=torch.float64) / half)
  place = torch.arange(side, dtype=torch.float64)
  one = torch.cat([torch.sin(place[:, None] * rate), torch.cos(place[:, None] * rate)], dim=1)
  both = torch.cat([one[None].expand(side, -1, -1), one[:, None].expand(-1, side, -1)], dim=2)
  return both.flatten(0, 1).float()


class SingleLayer(nn.Module):
  """One cross-attention from a square number of queries; no residual, no feed-forward."""

  is_causal = False

  def __init__(self, width, out, c, config):
    super().__init__()
    self.config, self.side = config, round(c.queries**0.5)
    self.heads, self.width = c.heads or max(out // 128, 1), out
    norm, make = lambda: nn.LayerNorm(out, eps=1e-6), lambda: nn.Linear(out, out)
    self.query = nn.Parameter(torch.zeros(c.queries, out))
    self.kv_proj = None if width == out else nn.Linear(width, out, bias=False)
    self.norm_q, self.norm_kv, self.norm_post = norm(), norm(), norm()
    self.q, self.k, self.v, self.out = make(), make(), make(), make()
    self.proj = nn.Parameter(torch.zeros(out, out))

  def forward(self, x, valid):
    """[n t c] of a square map -> [n q d]."""
    del valid
    side = round(x.shape[1] ** 0.5)
    x = x if self.kv_proj is None else self.kv_proj(x)
    kv, query = self.norm_kv(x), self.norm_q(self.query.to(x.dtype))
    table = sincos(self.side, self.width).to(x.device)
    keys = table
    if side != self.side:
      maps = table.T.reshape(1, -1, self.side, self.side)
      keys = F.interpolate(maps, size=(side, side), mode='bicubic')[0].flatten(1).T
    q = self.q(query + table.to(x.dtype)).expand(len(x), -1, -1)
    y = attend(self, *(_split(part, self.heads) for part in (
      q, self.k(kv + keys.to(x.dtype)), self.v(kv))), scale=(self.width // self.heads) ** -0.5)
    return self.norm_post(self.out(y.flatten(2))) @ self.proj.to(x.dtype)


def pooled(x, sizes, factor):
  """Means of factor x factor neighbours in each map of the tokens [n t c]."""
  out = []
  for part, (rows, columns) in zip(x.split([a * b for a, b in sizes], dim=1), sizes):
    maps = part.transpose(1, 2).unflatten(2, (rows, columns)).float()
    maps = F.adaptive_avg_pool2d(maps, (-(-rows // factor), -(-columns // factor)))
    out.append(maps.flatten(2).transpose(1, 2).to(x.dtype))
  return torch.cat(out, dim=1)


def tome(x, keep):
  """Rounds of bipartite merging of [n t c] until `keep` tokens are left: the most similar pairs of
  a token at an even and one at an odd place become one, weighted by what they stand for."""
  size = torch.ones(x.shape[:2], device=x.device)
  while x.shape[1] > keep:
    r = min(x.shape[1] - keep, x.shape[1] // 2)
    unit = F.normalize(x.float(), dim=-1, eps=1e-12)
    best, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)
    order = torch.sort(best, dim=-1, descending=True, stable=True)[1]
    merged, kept = order[:, :r], order[:, r:]
    take = lambda part, index: part.gather(1, index[..., None].expand(-1, -1, part.shape[-1]))
    both = torch.cat([x.float() * size[..., None], size[..., None]], dim=-1)
    even, odd = both[:, ::2], both[:, 1::2]
    onto = partner.gather(1, merged)[..., None].expand(-1, -1, both.shape[-1])
    odd = odd.scatter_add(1, onto, take(even, merged))
    both = torch.cat([take(even, kept), odd], dim=1)
    x, size = (both[..., :-1] / both[..., -1:]).to(x.dtype), both[..., -1]
  return x


class ReducedVision(nn.Module):
  """The inner encoder and a step behind it.

  Args:
    inner: class of the inner encoder.
    width: of its tokens.
  """

  def __init__(self, c, config, inner, width):
    super().__init__()
    self.c, self.step, self.sizes = c, c.step, config.token_maps
    self.inner = inner(c.encoder, config)
    kind = {'perceiver': Perceiver, 'single_layer': SingleLayer}.get(c.step.kind)
    out = getattr(c.step, 'width', None) or width
    self.resampler = None if kind is None else kind(width, out, c.step, config.vision_config)

  def forward(self, pixel_values, **arrays):
    """The inner encoder's tokens; with VisionZip those that are left."""
    if self.step.kind == 'visionzip':
      return self._zipped(pixel_values)
    return self.inner(pixel_values, **arrays)

  def reduce(self, tokens, counts):
    """Tokens [n c] of all pictures, how many of each -> those that are left [m c].

    Raises:
      ValueError: another number of tokens.
    """
    if self.step.kind == 'visionzip':
      return tokens
    if int(counts.sum()) != len(tokens):
      raise ValueError(f'{int(counts.sum())} places for visual tokens before they are reduced, but '
                       f'the images have {len(tokens)}; use the processor of this folder for both')
    x = nn.utils.rnn.pad_sequence(tokens.split(counts.tolist()), batch_first=True)
    if self.step.kind == 'pool':
      return pooled(x, self.sizes, self.step.factor).flatten(0, 1)
    if self.step.kind == 'tome':
      return tome(x, self.step.keep).flatten(0, 1)
    place = torch.arange(x.shape[1], device=x.device)
    return self.resampler(x, place < counts.to(x.device)[:, None]).flatten(0, 1)

  def _zipped(self, pixels):
    """The most attended tokens, and a few to which the most similar others are added."""
    c, step, tower = self.c.encoder, self.step, self.inner.tower
    last, first = c.vision.depth + c.layer, int(c.vision.class_token)
    x = tower.run(tower.embed(pixels), stop=last)
    layer = tower.encoder.layers[last]
    own, y = layer.self_attn, layer.layer_norm1(x)
    q, k = (_split(part(y), own.num_heads).float() for part in (own.q_proj, own.k_proj))
    probs = torch.softmax((q[:, :, :1] if first else q) @ k.transpose(2, 3) * own.scale, dim=-1)
    score, x = probs.mean(2).sum(1)[:, first:], tower.run(x, last, last + 1)
    keys, total = k.mean(1), x.shape[1]
    top = torch.sort(score, dim=1, descending=True, stable=True)[1][:, :step.dominant - first]
    chosen = torch.zeros(x.shape[:2], dtype=torch.int, device=x.device).scatter(1, top + first, 1)
    chosen[:, :first] = 1
    order = torch.sort(chosen, dim=1, descending=True, stable=True)[1]
    take = lambda part, index: part.gather(1, index[..., None].expand(-1, -1, part.shape[-1]))
    kept, rest = take(x, order[:, :step.dominant]), take(x, order[:, step.dominant:])
    if not step.contextual:
      return kept
    metric = F.normalize(take(keys, order[:, step.dominant:]), dim=-1, eps=1e-12)
    left = total - step.dominant
    places = list(range(0, left, max(1, left // step.contextual)))[:step.contextual]
    others = [i for i in range(left) if i not in places]
    near = (metric[:, others] @ metric[:, places].transpose(1, 2)).argmax(-1)
    onto = F.one_hot(near, len(places)).float().transpose(1, 2)
    mean = onto @ rest[:, others].float() / onto.sum(-1, keepdim=True).clamp(min=1)
    return torch.cat([kept, (rest[:, places].float() + mean).to(x.dtype)], dim=1)
