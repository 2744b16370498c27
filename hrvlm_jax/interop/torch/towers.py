"""Vision towers: a vision transformer of transformers' own SigLIP layers, with its embeddings.

CLIP, SigLIP and C-RADIO differ in activation, class token, norms and position table alone; the
layers have the same form and the same names.
"""

import torch
from torch import nn
from transformers.models.siglip.modeling_siglip import (
  SiglipEncoderLayer,
  SiglipMultiheadAttentionPoolingHead,
)

# Numbers of the widest array between two products that are made at a time (see `few`): 24 MiB in
# float32. The C library keeps blocks up to 32 MiB for the next layer; it gives larger ones back to
# the system, which clears them before every use.
FEW = 6 * 2**20


def few(x, linear, width=None):
  """Rows at a time through a layer whose widest product is `linear`, or `width`; None: all.

  All where gradients are wanted, on accelerators, in a graph that is compiled or exported, and
  where accelerate brings the weights for every call.
  """
  if (x.device.type != 'cpu' or torch.is_grad_enabled() or torch.compiler.is_compiling()
      or torch.jit.is_tracing() or hasattr(linear, '_hf_hook')):
    return None
  return max(1, FEW // (width or linear.out_features))


def evenly(count, most):
  """Pictures or rows at a time, at least one: 9 of at most 4 go as 3, 3, 3 and not as 4, 4, 1."""
  parts = max(1, -(-count // max(1, most)))
  return max(1, -(-count // parts))


def resize_square(table, side):
  """[n d] of a square grid -> [side*side d], antialiased bicubic in float32."""
  old = round(len(table) ** 0.5)
  if old == side:
    return table
  maps = table.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
  maps = nn.functional.interpolate(maps, size=(side, side), mode='bicubic', antialias=True)
  return maps.permute(0, 2, 3, 1).reshape(side * side, -1).to(table.dtype)


class Embeddings(nn.Module):
  """Patches, learned positions and, in CLIP, a class token in front.

  Args:
    vit: settings of the tower (`ViTConfig` of hrvlm_jax).
  """

  def __init__(self, vit):
    super().__init__()
    self.vit = vit
    self.side = vit.position_grid or vit.image_size // vit.patch_size
    self.class_embedding = nn.Parameter(torch.zeros(vit.width)) if vit.class_token else None
    self.patch_embedding = nn.Conv2d(vit.channels, vit.width, vit.patch_size, vit.patch_size,
                                     bias=vit.patch_bias)
    self.position_embedding = nn.Embedding(self.side**2 + int(vit.class_token), vit.width)

  def positions(self, rows, columns):
    """[t d] of a grid, without the class token's: the top left part of the table ('crop'), or all
    of it resampled to the larger side, then cropped."""
    table = self.position_embedding.weight[int(self.vit.class_token):]
    side = self.side
    if self.vit.position != 'crop' and (rows, columns) != (side, side):
      side = max(rows, columns)
      table = resize_square(table, side)
    return table.reshape(side, side, -1)[:rows, :columns].reshape(rows * columns, -1)

  def patches(self, pixels):
    """[n c h w] -> ([n t d], (rows, columns)), before positions."""
    maps = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
    # Laid out by rows once; sums would keep the other order, and every norm would turn it again.
    return maps.flatten(2).transpose(1, 2).contiguous(), tuple(maps.shape[2:])

  def forward(self, pixels, class_token=True):
    """[n c h w] -> [n t d]."""
    x, grid = self.patches(pixels)
    x = x + self.positions(*grid).to(x.dtype)
    if self.class_embedding is None or not class_token:
      return x
    first = self.class_embedding + self.position_embedding.weight[0]
    return torch.cat([first.to(x.dtype).expand(len(x), 1, -1), x], dim=1)


# The forms of GELU that PyTorch can put in the place of what it reads, by transformers' names.
IN_PLACE = {'gelu': 'none', 'gelu_pytorch_tanh': 'tanh'}


class TowerLayer(SiglipEncoderLayer):
  """transformers' layer; few pictures at a time in the attention, few rows in the MLP (`few`)."""

  def forward(self, x, attention_mask=None):
    """[n t d] -> [n t d]."""
    if few(x, self.mlp.fc1) is None:
      return super().forward(x, attention_mask)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    pictures = self.pictures(x)
    for own, part in zip(x.split(pictures), out.split(pictures)):
      torch.add(own, self.self_attn(self.layer_norm1(own), None)[0], out=part)
    return self.add_mlp(out)

  def pictures(self, x):
    """Pictures of x [n t d] at a time through the attention: queries, keys and values are `few`."""
    wide = 3 * self.self_attn.q_proj.out_features
    return evenly(len(x), few(x, self.mlp.fc1, wide) // x.shape[1])  # asked as `forward` does

  def add_mlp(self, x, *which):
    """x + mlp(norm(x)) of [n t d], in the place of x: nobody else may hold it.

    Args:
      which: what the linear layers ask for beside their rows.
    """
    x, mlp = x.contiguous(), self.mlp
    form = IN_PLACE.get(mlp.config.hidden_act)
    for rows in x.flatten(0, 1).split(evenly(x.shape[0] * x.shape[1], few(x, mlp.fc1))):
      y = mlp.fc1(self.layer_norm2(rows), *which)
      y = mlp.activation_fn(y) if form is None else torch.ops.aten.gelu_(y, approximate=form)
      rows.add_(mlp.fc2(y, *which))
    return x


class Encoder(nn.Module):
  """The layers."""

  def __init__(self, config, layer):
    super().__init__()
    self.layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))


class Tower(nn.Module):
  """A pre-norm vision transformer; last norm and pool are kept and not applied here.

  Args:
    vit: settings of the tower.
    config: the same for transformers' layers, a `SiglipVisionConfig`.
    layer: class of the layers.
  """

  def __init__(self, vit, config, layer=TowerLayer):
    super().__init__()
    self.vit = vit
    norm = lambda: nn.LayerNorm(vit.width, eps=vit.norm_eps)
    self.embeddings = Embeddings(vit)
    self.pre_layrnorm = norm() if vit.pre_norm else None
    self.encoder = Encoder(config, layer)
    self.post_layernorm = norm() if vit.post_norm else None
    self.head = SiglipMultiheadAttentionPoolingHead(config) if vit.pool == 'map' else None

  def embed(self, pixels, class_token=True):
    """Normalised images [n c h w] -> the first layer's input [n t d]."""
    x = self.embeddings(pixels, class_token)
    return x if self.pre_layrnorm is None else self.pre_layrnorm(x)

  def run(self, x, start=0, stop=None):
    """Layers start..stop."""
    for layer in self.encoder.layers[start:stop]:
      x = layer(x, None)
    return x

  def forward(self, pixels, stop=None):
    """[n c h w] -> the output of the last layer (of layer `stop`), before the last norm."""
    return self.run(self.embed(pixels), stop=stop)


class Mlp(nn.Module):
  """fc1, GELU (exact), fc2."""

  def __init__(self, n_in, hidden, n_out):
    super().__init__()
    self.fc1, self.fc2 = nn.Linear(n_in, hidden), nn.Linear(hidden, n_out)

  def forward(self, x):
    """[... i] -> [... o]."""
    return self.fc2(nn.functional.gelu(self.fc1(x)))
