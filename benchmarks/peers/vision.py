"""transformers' SigLIP and CLIP, timm's ConvNeXt, and LLaVA-HR's dual tower composed of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.harness.case import Options
from benchmarks.harness.program import Program, read_inputs
from benchmarks.peers.common import fill, place, program, sizes, tensors, to_tensor

NCHW = (0, 3, 1, 2)


def tower_config(vision: dict[str, Any]) -> dict[str, Any]:
  """Sizes of our ViT in transformers' names."""
  names = {'gelu_tanh': 'gelu_pytorch_tanh'}
  return dict(
    image_size=vision['image_size'], patch_size=vision['patch_size'],
    hidden_size=vision['width'], num_hidden_layers=vision['depth'],
    num_attention_heads=vision['heads'], intermediate_size=vision['mlp_width'],
    hidden_act=names.get(vision['activation'], vision['activation']),
    layer_norm_eps=vision['norm_eps'], attn_implementation='sdpa')


def siglip_tower(vision: dict[str, Any]) -> nn.Module:
  """`SiglipVisionTransformer` with sdpa attention, without its pooling head."""
  from transformers import SiglipVisionConfig
  from transformers.models.siglip.modeling_siglip import SiglipVisionTransformer

  return SiglipVisionTransformer(SiglipVisionConfig(
    vision_use_head=vision.get('pool') is not None, **tower_config(vision)))


def clip_tower(vision: dict[str, Any]) -> nn.Module:
  """`CLIPVisionTransformer` with sdpa attention."""
  from transformers import CLIPVisionConfig
  from transformers.models.clip.modeling_clip import CLIPVisionTransformer

  return CLIPVisionTransformer(CLIPVisionConfig(**tower_config(vision)))


def run_siglip(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
  """Output of the last block, before the final norm."""
  return tower.encoder(tower.embeddings(pixels)).last_hidden_state


def run_clip(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
  """Output of the last block, class token included."""
  return tower.encoder(tower.pre_layrnorm(tower.embeddings(pixels))).last_hidden_state


def siglip(settings, folder, options: Options) -> Program:
  """SO400M/14-384 over a batch of views."""
  tower = siglip_tower(sizes(folder))
  fill(tower, tensors(folder))
  tower = place(tower, options)
  pixels = to_tensor(read_inputs(folder)['images'], options, order=NCHW)
  return program(lambda x: {'tokens': run_siglip(tower, x)}, pixels, options=options)


class Adapted(nn.Module):
  """A linear layer or patch convolution with named low-rank branches, as peft runs them.

  Source: `huggingface/peft: tuners/lora/layer.py` (unmerged forward: base + scale * B(A(x))).
  """

  def __init__(self, base: nn.Module, sets: dict[str, tuple[int, float]]):
    super().__init__()
    self.base_layer, self.scale, self.active = base, {}, None
    self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
    for name, (rank, alpha) in sets.items():
      if isinstance(base, nn.Conv2d):
        self.lora_A[name] = nn.Conv2d(base.in_channels, rank, base.kernel_size, base.stride,
                                      bias=False)
        self.lora_B[name] = nn.Conv2d(rank, base.out_channels, 1, bias=False)
      else:
        self.lora_A[name] = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B[name] = nn.Linear(rank, base.out_features, bias=False)
      self.scale[name] = alpha / rank

  @property
  def weight(self):
    """What the embeddings ask for its dtype."""
    return self.base_layer.weight

  def forward(self, x):
    low = self.lora_B[self.active](self.lora_A[self.active](x))
    return self.base_layer(x) + self.scale[self.active] * low


ADAPTED = ('q_proj', 'k_proj', 'v_proj', 'out_proj', 'fc1', 'fc2', 'patch_embedding')


def adapt(tower: nn.Module, sets: dict[str, tuple[int, float]]) -> nn.Module:
  """Wraps the layers Pheye adapts, in place."""
  for parent in list(tower.modules()):
    for name, child in list(parent.named_children()):
      if name in ADAPTED and isinstance(child, nn.Linear | nn.Conv2d):
        setattr(parent, name, Adapted(child, sets))
  return tower


def switch(tower: nn.Module, name: str) -> None:
  """Makes a set the active one."""
  for module in tower.modules():
    if isinstance(module, Adapted):
      module.active = name


def adapter_sets(config: dict[str, Any]) -> dict[str, tuple[int, float]]:
  """(rank, alpha) of both sets."""
  return {name: (config[name]['rank'], config[name]['alpha']) for name in ('first', 'second')}


def run_pheye(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
  """The tower over the global view with one set, over the tiles with the other, as the original."""
  switch(tower, 'first')
  whole = run_clip(tower, pixels[:1])
  switch(tower, 'second')
  return torch.cat([whole, run_clip(tower, pixels[1:])])


def merged(tower: nn.Module, name: str, build) -> nn.Module:
  """A plain tower whose weights hold one set: faster, for twice the memory."""
  state = {}
  for key, value in tower.state_dict().items():
    if '.lora_' not in key:
      state[key.replace('.base_layer.', '.')] = value.clone()
  for path, module in tower.named_modules():
    if isinstance(module, Adapted):
      a, b = module.lora_A[name].weight, module.lora_B[name].weight
      delta = (b.flatten(1) @ a.flatten(1)).reshape(module.base_layer.weight.shape)
      state[f'{path}.weight'] += module.scale[name] * delta
  plain = build()
  plain.load_state_dict(state, assign=True)
  return plain


def pheye(settings, folder, options: Options) -> Program:
  """CLIP-H over 1 + level^2 views. Forms ending in `-merged` have both sets in copies of the tower.
  """
  form, _, how = options.variant.partition('-')
  config = sizes(folder)
  build = lambda: clip_tower(config['vision'])
  tower = adapt(build(), adapter_sets(config))
  fill(tower, tensors(folder))
  pixels = to_tensor(read_inputs(folder)['images'], options, order=NCHW)
  options = Options(options.device, options.dtype, form)
  if how == 'merged':
    with torch.no_grad():
      first, second = (place(merged(tower, name, build), options) for name in ('first', 'second'))
    del tower
    call = lambda x: {'tokens': torch.cat([run_clip(first, x[:1]), run_clip(second, x[1:])])}
  else:
    tower = place(tower, options)
    call = lambda x: {'tokens': run_pheye(tower, x)}
  return program(call, pixels, options=options)


class MRAdapter(nn.Module):
  """LLaVA-HR's adapter from the ConvNeXt into the ViT, both maps as convolutions.

  Source: arXiv 2403.03003, section 3.3; names of `luogen1996/LLaVA-HR`.
  """

  def __init__(self, slow: int, fast: int):
    super().__init__()
    self.slow_conv, self.slow_proj = nn.Conv2d(slow, slow, 1), nn.Conv2d(slow, fast, 1)
    self.fast_conv = nn.Conv2d(fast, fast, 7, padding=3, groups=fast)
    self.fast_proj = nn.Conv2d(fast, fast, 1)
    self.gate = nn.Sequential(nn.Linear(2 * fast, fast // 2), nn.GELU(), nn.Linear(fast // 2, 1))

  def forward(self, fast, slow):
    f = fast + self.fast_proj(F.gelu(self.fast_conv(fast)))
    u = on_grid(self.slow_proj(F.gelu(self.slow_conv(slow))), fast.shape[-1])
    gate = torch.tanh(self.gate(torch.cat([f, u], dim=1).mean(dim=(2, 3))))
    return f + gate[:, :, None, None] * u


def on_grid(x, side: int):
  """A square map on another grid."""
  if x.shape[-1] == side:
    return x
  if x.shape[-1] > side:
    return F.avg_pool2d(x, x.shape[-1] // side)
  return F.interpolate(x, size=(side, side), mode='bilinear', align_corners=True)


class Align(nn.Module):
  """The last join of both paths."""

  def __init__(self, slow: int, fast: int):
    super().__init__()
    self.fast_proj, self.slow_proj = nn.Linear(fast, fast), nn.Linear(slow, fast)

  def forward(self, fast, slow):
    slow = on_grid(slow, fast.shape[-1]).permute(0, 2, 3, 1)
    return (self.fast_proj(fast.permute(0, 2, 3, 1)) + self.slow_proj(slow)).flatten(1, 2)


class Holder(nn.Module):
  """A level of names."""

  def __init__(self, **parts):
    super().__init__()
    for name, part in parts.items():
      setattr(self, name, part)


class DualTower(nn.Module):
  """transformers' CLIP and timm's ConvNeXt joined by adapters; tensor names of the original."""

  def __init__(self, config: dict[str, Any]):
    super().__init__()
    fast, slow = clip_tower(config['fast']), Trunk(config['slow'])
    widths = config['slow']['widths'][-1], config['fast']['width']
    self.fast_size = config['fast_size'] or max(int(config['image_size'] / 32 * 14), 336)
    self.fast_vision_tower = Holder(vision_tower=Holder(vision_model=fast))
    self.slow_vision_tower = Holder(vision_tower=slow)
    self.align_stages_latent = nn.ModuleList(MRAdapter(*widths) for _ in range(3))
    self.align_stages = nn.ModuleList([Align(*widths)])

  def forward(self, images):
    fast = self.fast_vision_tower.vision_tower.vision_model
    slow = self.slow_vision_tower.vision_tower(images)
    small = F.interpolate(images.float(), size=(self.fast_size,) * 2, mode='bilinear',
                          align_corners=True).to(images.dtype)
    embed = fast.embeddings
    x = embed.patch_embedding(small)
    grid = x.shape[-1]
    x = x.flatten(2).transpose(1, 2) + positions(embed.position_embedding.weight, grid)
    x = fast.pre_layrnorm(x)
    layers = fast.encoder.layers
    quarter = len(layers) // 4
    as_map = lambda x: x.transpose(1, 2).unflatten(2, (grid, grid))
    for number in range(4):
      for layer in layers[number * quarter:(number + 1) * quarter]:
        x = layer(x, None, None)[0]
      if number < 3:
        x = self.align_stages_latent[number](as_map(x), slow).flatten(2).transpose(1, 2)
    return self.align_stages[0](as_map(x), slow)


def positions(table: torch.Tensor, grid: int) -> torch.Tensor:
  """The position table without the class token, resampled to another grid (bicubic)."""
  table = table[1:]
  side = round(table.shape[0] ** 0.5)
  if side == grid:
    return table
  square = table.float().T.reshape(1, -1, side, side)
  square = F.interpolate(square, size=(grid, grid), mode='bicubic', antialias=True,
                         align_corners=False)
  return square.flatten(2)[0].T.to(table.dtype)


class Trunk(nn.Module):
  """Stem and stages of timm's ConvNeXt, without the norm that follows them."""

  def __init__(self, slow: dict[str, Any]):
    super().__init__()
    from timm.models.convnext import ConvNeXt

    whole = ConvNeXt(depths=slow['depths'], dims=slow['widths'], num_classes=0,
                     ls_init_value=1e-6)
    self.stem, self.stages = whole.stem, whole.stages

  def forward(self, x):
    return self.stages(self.stem(x))


def rename_scale(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
  """The original's copy of timm calls the layer scale `weight`."""
  name = lambda key: (key[:-len('weight')] + 'gamma' if 'slow_vision_tower' in key and
                      key.split('.')[-2].isdigit() and '.blocks.' in key and
                      key.endswith('.weight') else key)
  return {name(key): value for key, value in state.items()}


def llava_hr(settings, folder, options: Options) -> Program:
  """The dual tower of LLaVA-HR-7B; settings as `ours.vision.LlavaHR`."""
  tower = DualTower(sizes(folder))
  fill(tower, rename_scale(tensors(folder)))
  tower = place(tower, options).to(memory_format=torch.channels_last)
  pixels = to_tensor(read_inputs(folder)['images'], options, order=NCHW)
  pixels = pixels.contiguous(memory_format=torch.channels_last)
  return program(lambda x: {'tokens': tower(x)}, pixels, options=options)
