"""An exported LLaVA-HR of unusual sizes in PyTorch: transformers' CLIP and LLaMA, the rest anew."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from hrvlm_jax.checkpoint.rows import export_tensors
from hrvlm_jax.core import paths
from hrvlm_jax.core.resample import normalise_host
from hrvlm_jax.language import config as language
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.llava_hr import weights
from hrvlm_jax.systems.llava_hr.config import LlavaHRConfig, model
from hrvlm_jax.vision.convnext import ConvNeXtConfig
from hrvlm_jax.vision.vit import ViTConfig
from hrvlm_jax.vlm import model as vlm
from tests import levels

FAST = ViTConfig(image_size=140, patch_size=28, width=60, depth=4, heads=3, mlp_width=44,
                 activation='quick_gelu', norm_eps=1e-5, class_token=True, patch_bias=False,
                 pre_norm=True)
TEXT = language.llama(vocab_size=70, width=48, depth=2, heads=4, mlp_width=36, max_positions=256)
LONG = 'model.vision_tower.'


def slow(depths=(1, 2, 1, 1), widths=(6, 10, 14, 22)) -> ConvNeXtConfig:
  """No `pre_logits`, as in XXL."""
  return ConvNeXtConfig(depths=depths, widths=widths, norm_eps=1e-5, classes=4, head_width=None)


def pair(state, name):
  return (state[f'{name}.{leaf}'] for leaf in ('weight', 'bias'))


def channel_norm(state, x, name):
  y = F.layer_norm(x.movedim(1, -1), x.shape[1:2], *pair(state, name), eps=1e-5)
  return y.movedim(-1, 1)


def convnext(state, x, config):
  """Last map [n c h w]; names as in the release."""
  x = channel_norm(state, F.conv2d(x, *pair(state, 'stem.0'), stride=4), 'stem.1')
  for stage, depth in enumerate(config.depths):
    if stage:
      x = channel_norm(state, x, f'stages.{stage}.downsample.0')
      x = F.conv2d(x, *pair(state, f'stages.{stage}.downsample.1'), stride=2)
    for number in range(depth):
      name = f'stages.{stage}.blocks.{number}'
      y = F.conv2d(x, *pair(state, f'{name}.conv_dw'), padding=3, groups=x.shape[1])
      y = channel_norm(state, y, f'{name}.norm').movedim(1, -1)
      y = F.linear(F.gelu(F.linear(y, *pair(state, f'{name}.mlp.fc1'))),
                   *pair(state, f'{name}.mlp.fc2'))
      x = x + (state[f'{name}.weight'] * y).movedim(-1, 1)
  return x


def on_grid(x, side):
  if x.shape[-1] > side:
    return F.avg_pool2d(x, x.shape[-1] // side)
  return F.interpolate(x, (side, side), mode='bilinear', align_corners=True)


def adapter(state, name, y, s):
  u = F.conv2d(F.gelu(F.conv2d(s, *pair(state, f'{name}.slow_conv'))),
               *pair(state, f'{name}.slow_proj'))
  u = on_grid(u, y.shape[-1])
  inner = F.conv2d(y, *pair(state, f'{name}.fast_conv'), padding=3, groups=y.shape[1])
  f = y + F.conv2d(F.gelu(inner), *pair(state, f'{name}.fast_proj'))
  pooled = torch.cat([f, u], 1).mean((2, 3))
  gate = F.linear(F.gelu(F.linear(pooled, *pair(state, f'{name}.gate.0'))),
                  *pair(state, f'{name}.gate.2'))
  return f + torch.tanh(gate)[..., None, None] * u


def tower(state, images, config):
  """Visual tokens [n t d] of normalised square images [n 3 s s]."""
  state = {key.removeprefix(LONG): value for key, value in state.items() if key.startswith(LONG)}
  part = lambda prefix: {key.removeprefix(prefix): value for key, value in state.items()
                         if key.startswith(prefix)}
  s = convnext(part('slow_vision_tower.vision_tower.'), images, config.slow)
  own = part('fast_vision_tower.vision_tower.vision_model.')
  clip = CLIPVisionModel(CLIPVisionConfig(
    hidden_size=FAST.width, intermediate_size=FAST.mlp_width, hidden_act='quick_gelu',
    num_hidden_layers=FAST.depth, num_attention_heads=FAST.heads, image_size=FAST.image_size,
    patch_size=FAST.patch_size))
  clip = getattr(clip, 'vision_model', clip)
  clip.load_state_dict(own, strict=True)
  side = 336 // FAST.patch_size
  small = F.interpolate(images, (336, 336), mode='bilinear', align_corners=True)
  patches = F.conv2d(small, own['embeddings.patch_embedding.weight'], stride=FAST.patch_size)
  table = own['embeddings.position_embedding.weight'][1:].T.view(1, FAST.width, FAST.grid, -1)
  table = F.interpolate(table, (side, side), mode='bicubic', antialias=True)
  y = clip.pre_layrnorm((patches + table).flatten(2).transpose(1, 2))
  grid = lambda y: y.transpose(1, 2).unflatten(-1, (side, side))
  for number, layer in enumerate(clip.encoder.layers):
    out = layer(y, attention_mask=None)
    y = out[0] if isinstance(out, tuple) else out
    if config.adapters and number < 3:  # four layers: a quarter is one
      y = adapter(state, f'align_stages_latent.{number}', grid(y), s).flatten(2).transpose(1, 2)
  injected = on_grid(s, side).flatten(2).transpose(1, 2)
  return F.linear(y, *pair(state, 'align_stages.0.fast_proj')) \
    + F.linear(injected, *pair(state, 'align_stages.0.slow_proj'))


def reference(state, images, ids, visual_index, valid, config):
  """Logits [b l v]."""
  vis = tower(state, images, config)
  for name in ('model.mm_projector.0', 'model.mm_projector.2'):
    vis = F.linear(vis if name.endswith('0') else F.gelu(vis), *pair(state, name))
  llama = LlamaForCausalLM(LlamaConfig(
    vocab_size=TEXT.vocab_size, hidden_size=TEXT.width, intermediate_size=TEXT.mlp_width,
    num_hidden_layers=TEXT.depth, num_attention_heads=TEXT.heads, rms_norm_eps=1e-5,
    attn_implementation='eager'))
  llama.load_state_dict({key: value for key, value in state.items() if not key.startswith(
    (LONG, 'model.mm_projector'))}, strict=True)
  x = llama.model.embed_tokens(ids)
  rows = torch.arange(len(ids))[:, None]
  x = torch.where(visual_index[..., None] >= 0, vis[rows, visual_index.clamp(min=0)], x)
  return llama.eval()(inputs_embeds=x, attention_mask=valid.long()).logits


@pytest.mark.parametrize('size, adapters', levels.rows(
  'systems', [(192, True), (384, False), (768, True)], first=[(768, True)]))
def test_logits_of_an_exported_model(size, adapters):
  """Slow grids of 6, 12 and 24 on a fast grid of 12; with adapters and as in stage 1."""
  encoder = LlavaHRConfig(image_size=size, fast=FAST, slow=slow(), aspect='pad',
                          **({} if adapters else {'adapters': None}))
  config, system, rng = model(encoder, TEXT), registry.get('llava_hr'), np.random.default_rng(1)
  draw = lambda path, leaf: jnp.asarray(
    float(path.endswith('/scale')) + 0.15 * rng.normal(size=leaf.shape), leaf.dtype)
  params = paths.map_with_path(draw, vlm.build(config).abstract)
  views = system.batch([
    system.views([Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8))], encoder)
    for shape in ((70, 33), (20, 90))], encoder)
  count, length = 144, 152
  index = np.full((2, length), -1, np.int32)
  index[:, 3:3 + count] = np.arange(count)
  ids = np.where(index < 0, rng.integers(0, 70, (2, length)), 0).astype(np.int32)
  valid = np.arange(length) < np.array([[length], [length - 3]])
  fn = vlm.build(config)

  @jax.jit
  def logits(params, batch):
    module = fn.bind(params)
    return module.logits(module(batch))

  ours = logits(params, {'tokens': ids, 'visual_index': index, 'valid': valid, 'views': views})
  state = {name: torch.from_numpy(np.array(value))
           for name, value in export_tensors(params, weights.table(config))}
  images = torch.from_numpy(np.moveaxis(
    normalise_host(views['pixels'], encoder.mean, encoder.std), -1, 1).copy())
  tensors = (torch.from_numpy(x) for x in (ids.astype(np.int64), index.astype(np.int64), valid))
  with torch.no_grad():
    theirs = reference(state, images, *tensors, encoder).numpy()
  gap = np.abs(np.asarray(ours) - theirs)[valid].max()
  assert gap <= 1e-4 * max(1.0, np.abs(theirs).max()), (gap, np.abs(theirs).max())
