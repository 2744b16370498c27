"""PS3: a thumbnail pass, a selection, and looks at the chosen patches."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .attention import Attention, attend
from .convnext import convolved
from .ps3_plan import LOOK, Plan, unpacked
from .towers import Mlp, Tower, TowerLayer, few


class LookLayer(TowerLayer):
  """A layer that also gives its keys and values, and can read others' in front of its own."""

  def forward(self, x, prefix=None):
    """[n t d] -> ([n t d], keys, values [n h t p])."""
    own = self.self_attn
    y = self.layer_norm1(x)
    q, k, v = (layer(y).unflatten(-1, (own.num_heads, -1)).transpose(1, 2)
               for layer in (own.q_proj, own.k_proj, own.v_proj))
    keys, values = (k, v) if prefix is None else (
      torch.cat([before.to(part.dtype), part], dim=2) for before, part in zip(prefix, (k, v)))
    x = x + own.out_proj(attend(own, q, keys, values, scale=own.scale).flatten(2))
    if few(x, self.mlp.fc1) is None:
      return x + self.mlp(self.layer_norm2(x)), k, v
    return self.add_mlp(x), k, v


class ProjectionHead(nn.Module):
  """fc2(norm(gelu(fc1(x))))."""

  def __init__(self, n_in, hidden, n_out):
    super().__init__()
    self.fc1, self.norm = nn.Linear(n_in, hidden), nn.LayerNorm(hidden, eps=1e-5)
    self.fc2 = nn.Linear(hidden, n_out)

  def forward(self, x, columns=None):
    """[... i] -> [... o], or its first columns."""
    y = self.norm(F.gelu(self.fc1(x)))
    return F.linear(y, self.fc2.weight[:columns], self.fc2.bias[:columns])


class SaliencyBlock(nn.Module):
  """x + weight * mlp(norm(depthwise 7 x 7(x)))."""

  def __init__(self, width):
    super().__init__()
    self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
    self.norm, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width, 4 * width, width)
    self.weight = nn.Parameter(torch.full((width,), 1e-6))

  def forward(self, x):
    """[n h w c] -> [n h w c]."""
    return x + self.mlp(self.norm(convolved(self.depthwise, x))) * self.weight


class Saliency(nn.Module):
  """A shallow ConvNet over the picture, squashed to a square of its own."""

  def __init__(self, c):
    super().__init__()
    self.size = c.input_size
    self.stem = nn.Conv2d(3, c.width, c.kernel, c.kernel)
    self.norm = nn.LayerNorm(c.width, eps=1e-6)
    self.blocks = nn.ModuleList(SaliencyBlock(c.width) for _ in range(c.depth))
    self.out = nn.Linear(c.width, c.out)

  def forward(self, images):
    """[n 3 H W] -> [n h w o]."""
    x = self.norm(convolved(self.stem, bicubic(images, self.size, self.size).permute(0, 2, 3, 1)))
    for block in self.blocks:
      x = block(x)
    return self.out(x)


class Selection(nn.Module):
  """Scores of the thumbnail's cells for a prompt, or for the learned prior; all in float32, since
  half precision makes nearly all cells tie. As in the original, the map of the first high scale
  serves them all."""

  def __init__(self, c):
    super().__init__()
    self.c = c
    width, scales = c.vision.width, len(c.scales) - 1
    n_in = width * len(c.select_layers)
    self.prior_prompt = nn.Parameter(torch.zeros(width))
    self.proj = ProjectionHead(n_in, n_in, width * scales)
    net = c.saliency
    self.saliency = None if net is None else Saliency(net)
    self.prompt_proj = None if net is None else nn.Linear(width, net.out * scales)

  def features(self, hidden, images):
    """(thumbnail [n t d], detail [n h w o] or None), before anything is asked."""
    in_float32(self)
    low = self.proj(torch.cat(hidden, dim=-1).float(), self.c.vision.width)
    return low, None if self.saliency is None else self.saliency(images.float())

  def forward(self, features, prompt):
    """Probability of every cell of the thumbnail, [n g g]."""
    low, detail = features
    grid = self.c.scales[0] // self.c.vision.patch_size
    prompt = (self.prior_prompt.expand(len(low), -1) if prompt is None else prompt).float()
    cosines = torch.einsum('ntd,nd->nt', unit(low), unit(prompt)).unflatten(1, (grid, grid))
    if detail is not None:
      out = self.c.saliency.out
      asked = F.linear(prompt, self.prompt_proj.weight[:out], self.prompt_proj.bias[:out])
      high = torch.einsum('nhwo,no->nhw', unit(detail), unit(asked))
      cosines = (cosines + F.adaptive_max_pool2d(high, grid)) / 2
    return torch.sigmoid(self.c.cosine_scale * cosines)


def in_float32(module):
  """A part that decides where to look, cast back where the whole model was cast by hand."""
  if next(module.parameters()).dtype != torch.float32:
    module.float()


def unit(x):
  """Vectors of length one."""
  return F.normalize(x, dim=-1, eps=1e-12)


def bicubic(images, height, width):
  """[n c h w] at another size, in float32; the same size is untouched."""
  if images.shape[2:] == (height, width):
    return images
  return F.interpolate(images.float(), size=(height, width), mode='bicubic').to(images.dtype)


@dataclass
class Low:
  """The thumbnail pass: outputs of the layers that are kept, keys and values, features."""

  hidden: dict
  prefix: list
  features: tuple | None


@dataclass
class Encoded:
  """Thumbnail tokens, then all chosen ones by (scale, raster order).

  Attributes:
    hidden: layer -> [n g*g+t d].
    maps: per high scale, 0/1 [n rows columns]: what was chosen.
    probs: per high scale, what the choice was made by.
  """

  hidden: dict
  maps: list
  probs: list


class PS3(nn.Module):
  """Trunk, selection, position residuals, pool (kept for the encoder alone)."""

  def __init__(self, c, config):
    super().__init__()
    self.c, vit = c, c.vision
    self.tower = Tower(vit, config.vision_config, LookLayer)
    self.selection = Selection(c)
    sides = [scale // vit.patch_size for scale in c.scales[1:]]
    self.residual = nn.ParameterList(
      nn.Parameter(torch.zeros(side**2, vit.width)) for side in sides) if c.residual else None
    self.adapter = None if c.adapter is None else Adapter(vit.width, c.adapter)
    self.pool_head = Pool(c.pool, vit, config.vision_config)

  def low(self, images, keep=1, select=True):
    """Normalised pictures [n 3 S S] -> the thumbnail pass.

    Args:
      keep: outputs of so many of the last layers.
      select: also what the selection needs.
    """
    side, depth = self.c.scales[0], self.c.vision.depth
    small = bicubic(images, side, side)
    x, states, prefix = self.tower.embed(small), {}, []
    for number, layer in enumerate(self.tower.encoder.layers):
      x, k, v = layer(x)
      prefix.append((k, v))
      if number in self.c.select_layers or number >= depth - keep:
        states[number] = x
    features = None
    if select:
      features = self.selection.features([states[i] for i in self.c.select_layers], images)
    return Low({i: states[i] for i in range(depth - keep, depth)}, prefix, features)

  def probabilities(self, low, prompt, plan, target=None, smooth=False):
    """Selection probabilities [n rows columns] per high scale.

    Args:
      target: [n S S] of ground truth; what it touches gets probability 1.
      smooth: averaged over a 6 x 6 grid.
    """
    first = self.selection(low.features, prompt)[:, None]
    probs = [F.interpolate(first, size=grid, mode='nearest')[:, 0] for grid in plan.grids[1:]]
    if target is not None:
      touched = (F.adaptive_avg_pool2d(target.float()[:, None], plan.grids[1]) > 0).float()
      probs = [torch.where(F.interpolate(touched, size=p.shape[1:], mode='nearest')[:, 0] > 0,
                           torch.ones_like(p), p) for p in probs]
    if smooth:
      probs = [F.interpolate(F.adaptive_avg_pool2d(p[:, None], 6), size=p.shape[1:],
                             mode='nearest')[:, 0] for p in probs]
    return probs

  def look(self, low, images, probs, plan):
    """The looks, each over the most probable cells that none before it took."""
    batch, cells, kept = len(images), sum(plan.cells), list(low.hidden)
    if not plan.tokens:
      return Encoded(low.hidden, self._maps(probs[0].new_zeros(batch, cells), plan), probs)
    ranked, start = [], 0
    for p, n, total in zip(probs, plan.deepest, plan.cells):
      order = torch.sort(p.detach().flatten(1), dim=1, descending=True, stable=True)[1]
      ranked.append(order[:, :n] + start)
      start += total
    sized = [bicubic(images, *size) if n else None for size, n in zip(plan.sizes[1:], plan.deepest)]
    taken, parts, chosen = [0] * len(ranked), {i: [] for i in kept}, []
    for counts in plan.counts:
      if not sum(counts):
        continue
      own = [r[:, t:t + n] for r, t, n in zip(ranked, taken, counts)]
      taken = [t + n for t, n in zip(taken, counts)]
      own = [part.sort(dim=1)[0] for part in own]
      chosen.append(torch.cat(own, dim=1))
      x = self._embed(sized, own, plan)
      for number, layer in enumerate(self.tower.encoder.layers):
        x = layer(x, low.prefix[number] if self.c.low_context else None)[0]
        if number in parts:
          parts[number].append(x)
    chosen = torch.cat(chosen, dim=1)
    chosen, order = chosen.sort(dim=1)
    hidden = {i: torch.cat([low.hidden[i], torch.cat(x, dim=1).gather(
      1, order[..., None].expand(-1, -1, x[0].shape[-1]))], dim=1) for i, x in parts.items()}
    flat = probs[0].new_zeros(batch, cells).scatter(1, chosen, 1.0)
    return Encoded(hidden, self._maps(flat, plan), probs)

  @staticmethod
  def _maps(flat, plan):
    return [part.unflatten(1, grid)
            for part, grid in zip(flat.split(plan.cells, dim=1), plan.grids[1:])]

  def _embed(self, sized, chosen, plan):
    """Tokens of one look: patches, positions and residuals of the chosen cells alone."""
    conv, patch = self.tower.embeddings.patch_embedding, self.c.vision.patch_size
    parts, first = [], 0
    for number, (cells, grid) in enumerate(zip(chosen, plan.grids[1:])):
      if cells.shape[1]:
        row, column = (cells - first) // grid[1], (cells - first) % grid[1]
        blocks = sized[number].unflatten(3, (grid[1], patch)).unflatten(2, (grid[0], patch))
        rows = torch.arange(len(cells), device=cells.device)[:, None]
        pixels = blocks[rows, :, row, :, column]  # n k c p p
        tokens = F.linear(pixels.flatten(2).to(conv.weight.dtype), conv.weight.flatten(1),
                          conv.bias)
        where = self._positions(grid, row, column)
        if self.residual is not None:
          side = round(len(self.residual[number]) ** 0.5)
          where = where + self.residual[number].float()[row * side + column]
        parts.append(tokens + where.to(tokens.dtype))
      first += plan.cells[number]
    return torch.cat(parts, dim=1)

  def _positions(self, grid, row, column):
    """Rows of the resampled position table, without making it: its weights are separable."""
    embeddings = self.tower.embeddings
    side, target, table = embeddings.side, max(grid), embeddings.position_embedding.weight.float()
    if self.c.vision.position == 'crop' or target == side:
      return table[row * side + column]
    eye = torch.eye(side, device=table.device)[None, None]
    weights = F.interpolate(eye, size=(target, side), mode='bicubic', antialias=True)[0, 0]
    both = weights[row][..., :, None] * weights[column][..., None, :]
    return both.flatten(2) @ table

  def encode(self, pixel_values, prompt=None, **options):
    """The whole way: `Encoded` of what the settings `look`, or the options, ask.

    Raises:
      ValueError: options that are none of them.
    """
    known = vars(self.c.look)
    if unknown := sorted(set(options) - set(known)):
      raise ValueError(f'no settings of a look: {", ".join(unknown)}; they are {sorted(known)}')
    look = known | options
    plan = Plan(self.c, look['looks'] if look['tokens'] is None else None, look['tokens'],
                look['first_scales'])
    images = pixel_values.float()
    low = self.low(images, select=bool(plan.counts))
    if not plan.counts:
      return Encoded(low.hidden, [], [])
    with torch.no_grad():  # the choice of cells has no gradient
      probs = self.probabilities(low, prompt, plan, smooth=look['smooth'])
    return self.look(low, images, probs, plan)

  def forward(self, pixel_values, look=None):
    """[n 3 S S] -> tokens [n t d]: the thumbnail's, then those of the chosen patches.

    Args:
      look: of the processor, in place of the settings of the model.
    """
    options = {} if look is None else unpacked(look.flatten().tolist())
    out = self.encode(pixel_values, **{name: options[name] for name in LOOK if name in options})
    return out.hidden[self.c.vision.depth - 1]

  def pool(self, x):
    """[n t d] of block outputs -> [n o]: last norm or C-RADIO's adapter, then the pool."""
    norm = self.tower.post_layernorm
    x = x if norm is None else norm(x)
    return self.pool_head(x if self.adapter is None else self.adapter(x))


class AdapterBlock(nn.Module):
  """linear(gelu(norm(x)))."""

  def __init__(self, n_in, n_out):
    super().__init__()
    self.norm, self.linear = nn.LayerNorm(n_in, eps=1e-5), nn.Linear(n_in, n_out)

  def forward(self, x):
    """[... i] -> [... o]."""
    return self.linear(F.gelu(self.norm(x)))


class Adapter(nn.Module):
  """C-RADIO's MLP in front of the pool."""

  def __init__(self, width, c):
    super().__init__()
    self.fc1 = nn.Linear(width, c.hidden)
    self.blocks = nn.ModuleList(AdapterBlock(c.hidden, c.hidden) for _ in range(c.depth))
    self.out = AdapterBlock(c.hidden, c.out)

  def forward(self, x):
    """[... d] -> [... o]."""
    y = self.fc1(x)
    for block in self.blocks:
      y = y + block(y)
    return self.out(y)


class ActivatedMlp(Mlp):
  """fc1, the trunk's activation, fc2."""

  def __init__(self, width, hidden, activation):
    super().__init__(width, hidden, width)
    self.approximate = 'tanh' if activation == 'gelu_tanh' else 'none'

  def forward(self, x):
    """[... d] -> [... d]."""
    return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class Pool(nn.Module):
  """One learned query attends to all tokens, then a residual MLP."""

  def __init__(self, c, vit, config):
    super().__init__()
    self.probe = nn.Parameter(torch.zeros(1, 1, c.width))
    self.attn = Attention(c.width, c.heads, config)
    self.norm = nn.LayerNorm(c.width, eps=vit.norm_eps)
    self.mlp = ActivatedMlp(c.width, c.mlp_width, vit.activation)

  def forward(self, x):
    """[n t d] -> [n d]."""
    y = self.attn(self.probe.to(x.dtype).expand(len(x), -1, -1), x)
    return (y + self.mlp(self.norm(y)))[:, 0]

