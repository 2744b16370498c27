"""An exported Pheye of unusual sizes in PyTorch: transformers' CLIP and Phi, blocks anew."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import torch
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, PhiConfig, PhiForCausalLM

from hrvlm_jax.checkpoint.rows import export_tensors
from hrvlm_jax.core import paths
from hrvlm_jax.core.resample import normalise_host
from hrvlm_jax.language import config as language
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.pheye import weights
from hrvlm_jax.systems.pheye.config import PheyeConfig, model
from hrvlm_jax.vision.vit import CLIP_H_224
from hrvlm_jax.vlm import model as vlm

VISION = dataclasses.replace(CLIP_H_224, image_size=16, patch_size=5, width=132, depth=2, heads=2,
                             mlp_width=40)
CONFIG = model(
  PheyeConfig(vision=VISION, level=3),
  language.phi(vocab_size=70, width=80, depth=5, heads=4, mlp_width=56, rotary_dim=10),
  interval=2, from_layer=2, reduce=2)
PEFT = 'vision_encoder.vision_model.base_model.model.'


def random_params():
  rng = np.random.default_rng(0)
  draw = lambda path, leaf: jnp.asarray(
    float(path.endswith('/scale')) + 0.15 * rng.normal(size=leaf.shape), leaf.dtype)
  return paths.map_with_path(draw, vlm.build(CONFIG).abstract)


def tower(state, name: str):
  """CLIP with the set `name` folded into its kernels; every tensor must find its place."""
  own = {key.removeprefix(PEFT): value for key, value in state.items() if key.startswith(PEFT)}
  folded = {}
  for key, value in own.items():
    if '.lora_' in key:
      continue
    module, leaf = key.rsplit('.', 1)
    module = module.removesuffix('.base_layer')
    if f'{module}.lora_A.{name}.weight' in own and leaf == 'weight':
      a, b = (own[f'{module}.lora_{x}.{name}.weight'] for x in 'AB')
      value = value + 2 * (b.flatten(1) @ a.flatten(1)).view(value.shape)
    folded[f'{module}.{leaf}'] = value
  clip = CLIPVisionModel(CLIPVisionConfig(
    hidden_size=VISION.width, intermediate_size=VISION.mlp_width, hidden_act='quick_gelu',
    num_hidden_layers=VISION.depth, num_attention_heads=VISION.heads,
    image_size=VISION.image_size, patch_size=VISION.patch_size))
  clip = getattr(clip, 'vision_model', clip)
  clip.load_state_dict(folded, strict=True)
  return lambda pixels: clip(pixels, output_hidden_states=True).hidden_states[-1]


def block(state, layer: int, x, media):
  """One cross-attention block from tensors named as in the release."""
  get = lambda name: (state[f'lang_encoder.cross_attn_layers.{layer}.{name}.{leaf}']
                      for leaf in ('weight', 'bias'))
  heads = 132 // 64
  split = lambda y: y.unflatten(-1, (heads, -1)).transpose(1, 2)
  norm = lambda y, name: F.layer_norm(y, y.shape[-1:], *get(name))
  q = split(F.linear(norm(x, 'attn.norm'), *get('attn.to_q')))
  k, v = (split(part) for part in F.linear(media, *get('attn.to_kv')).chunk(2, dim=-1))
  y = F.scaled_dot_product_attention(q, k, v, scale=0.125)
  x = x + F.linear(y.transpose(1, 2).flatten(2), *get('attn.to_out'))
  hidden = F.gelu(F.linear(norm(x, 'ff.norm'), *get('ff.fc1')))
  return x + F.linear(hidden, *get('ff.fc2'))


def reference(state, pixels, ids, mask):
  """Logits from normalised pixels [b 10 3 s s]."""
  norm = lambda y, i: F.layer_norm(y, y.shape[-1:], *(
    state[f'vision_encoder.norm_lvl_{i}.{leaf}'] for leaf in ('weight', 'bias')))
  first = norm(tower(state, 'first')(pixels[:, 0]), 1)
  tiles = norm(tower(state, 'second')(pixels[:, 1:].flatten(0, 1)), 2)
  tiles = tiles.view(len(pixels), -1, VISION.width)
  where = state['vision_encoder.connector.embedding.weight'][:10]
  media = torch.cat([first, tiles], 1) + where.repeat_interleave(VISION.tokens, 0)
  t = CONFIG.text
  phi = PhiForCausalLM(PhiConfig(
    vocab_size=t.vocab_size, hidden_size=t.width, intermediate_size=t.mlp_width,
    num_hidden_layers=t.depth, num_attention_heads=t.heads, attn_implementation='eager',
    rope_parameters={'rope_type': 'default', 'rope_theta': 1e4, 'partial_rotary_factor': 0.5}))
  text = {key.removeprefix('lang_encoder.').replace('.decoder_layer.', '.'): value
          for key, value in state.items() if key.startswith('lang_encoder.')
          and not any(s in key for s in ('cross_attn_layer', 'old_decoder_blocks'))}
  phi.load_state_dict(text, strict=True)
  for layer in (3,):  # from_layer 2 leaves out layer 1
    phi.model.layers[layer].register_forward_pre_hook(
      lambda _, args, layer=layer: (block(state, layer, args[0], media), *args[1:]))
  return phi.eval()(input_ids=ids, attention_mask=mask).logits


def test_logits_of_an_exported_model():
  params, system = random_params(), registry.get('pheye')
  rng = np.random.default_rng(1)
  views = system.batch([
    system.views([Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))], CONFIG.encoder)
    for size in ((70, 33), (20, 90))], CONFIG.encoder)
  ids = rng.integers(0, 70, (2, 7)).astype(np.int32)
  mask = np.arange(7) < np.array([[7], [5]])
  fn = vlm.build(CONFIG)

  @jax.jit
  def logits(params, batch):
    module = fn.bind(params)
    return module.logits(module(batch))

  ours = logits(params, {'tokens': ids, 'valid': mask, 'views': views})
  state = {name: torch.from_numpy(np.array(value))
           for name, value in export_tensors(params, weights.table(CONFIG))}
  values = normalise_host(views['pixels'], CONFIG.encoder.mean, CONFIG.encoder.std)
  with torch.no_grad():
    theirs = reference(state, torch.from_numpy(np.moveaxis(values, -1, 2)),
                       torch.from_numpy(ids).long(), torch.from_numpy(mask).long()).numpy()
  gap = np.abs(np.asarray(ours) - theirs)[mask].max()
  assert gap <= 1e-4 * max(1.0, np.abs(theirs).max())
