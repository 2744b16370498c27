"""transformers' Phi, alone and with Pheye's cross-attention blocks between its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.harness.case import Options
from benchmarks.harness.program import Program, read_inputs
from benchmarks.peers.common import compile_mode, fill, place, program, sizes, tensors, to_tensor


def phi_model(text: dict[str, Any]) -> nn.Module:
  """`PhiForCausalLM` with sdpa attention."""
  from transformers import PhiConfig, PhiForCausalLM

  return PhiForCausalLM(PhiConfig(
    vocab_size=text['vocab_size'], hidden_size=text['width'], num_hidden_layers=text['depth'],
    num_attention_heads=text['heads'], intermediate_size=text['mlp_width'],
    partial_rotary_factor=text['rotary_dim'] / text['head_dim'], hidden_act='gelu_new',
    layer_norm_eps=text['norm_eps'], max_position_embeddings=text['max_positions'],
    attn_implementation='sdpa', bos_token_id=None, eos_token_id=None))


def phi(settings, folder, options: Options) -> Program:
  """Greedy generation with a cache. Compiled: a static cache, a compiled step, frozen weights."""
  model = phi_model(sizes(folder))
  fill(model, tensors(folder))
  model = place(model, options)
  ids = torch.from_numpy(read_inputs(folder)['ids']).long().to(options.device)
  new, length = settings['new'], ids.shape[1]
  if options.variant in ('eager', 'onednn'):
    call = lambda: {'tokens': model.generate(
      ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
      do_sample=False, pad_token_id=0)[:, length:]}
    return program(call, options=options)
  return _compiled_phi(model, ids, new, options)


def _compiled_phi(model, ids, new: int, options: Options) -> Program:
  import torch._inductor.config as inductor
  from transformers import StaticCache

  length = ids.shape[1]
  cache = StaticCache(config=model.config, max_batch_size=1, max_cache_len=length + new,
                      device=options.device, dtype=model.dtype)
  inductor.freezing = options.device == 'cpu'
  step = torch.compile(
    lambda token, place: model(token, past_key_values=cache, cache_position=place).logits[:, -1],
    mode=compile_mode(options.variant), dynamic=False)

  def call():
    cache.reset()
    at = torch.arange(length, device=ids.device)
    token = model(ids, past_key_values=cache, cache_position=at).logits[:, -1].argmax(-1)
    found = [token]
    for i in range(new - 1):
      token = step(token[:, None], torch.tensor([length + i], device=ids.device)).argmax(-1)
      found.append(token)
    return {'tokens': torch.stack(found, dim=1)}

  return program(call, options=Options(options.device, options.dtype, 'eager'))


class CrossBlock(nn.Module):
  """x + attention to the visual tokens, x + feed-forward; see `vlm.cross_attention` for the form.

  Keys and values are computed from the visual tokens in every call, as the original does.
  """

  def __init__(self, width: int, media: int, reduce: int):
    super().__init__()
    inner = max(width, media) // reduce
    self.heads = max(width, media) // 64
    attn = nn.Module()
    attn.norm, attn.to_q = nn.LayerNorm(width), nn.Linear(width, inner)
    attn.to_kv, attn.to_out = nn.Linear(media, 2 * inner), nn.Linear(inner, width)
    ff = nn.Module()
    hidden = 4 * width // reduce
    ff.norm, ff.fc1, ff.fc2 = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden,
                                                                                       width)
    self.attn, self.ff = attn, ff

  def forward(self, x, media):
    split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
    k, v = self.attn.to_kv(media).chunk(2, dim=-1)
    y = F.scaled_dot_product_attention(split(self.attn.to_q(self.attn.norm(x))), split(k),
                                       split(v), scale=64**-0.5)
    x = x + self.attn.to_out(y.transpose(1, 2).flatten(2))
    return x + self.ff.fc2(F.gelu(self.ff.fc1(self.ff.norm(x))))


def cross_blocks(text: dict[str, Any], fusion: dict[str, Any]) -> nn.ModuleDict:
  """Blocks by the layer they stand before."""
  at = [i for i in range(fusion['from_layer'], text['depth'])
        if (i + 1) % fusion['interval'] == 0]
  return nn.ModuleDict({
    str(i): CrossBlock(text['width'], fusion['width'], fusion['reduce']) for i in at})


def hook(model: nn.Module, blocks: nn.ModuleDict, media: dict[str, torch.Tensor]) -> None:
  """Puts every block in front of its layer; `media['x']` is read at call time."""
  for number, block in blocks.items():
    model.model.layers[int(number)].register_forward_pre_hook(
      lambda _, args, kwargs, block=block: (
        (block(args[0], media['x']), *args[1:]), kwargs) if args else (
        args, kwargs | {'hidden_states': block(kwargs['hidden_states'], media['x'])}),
      with_kwargs=True)


def pheye(settings, folder, options: Options) -> Program:
  """Greedy generation: own keys and values cached, those of the image recomputed at each step."""
  config = sizes(folder)
  model, blocks = phi_model(config['text']), cross_blocks(config['text'], config['fusion'])
  state = tensors(folder)
  fill(blocks, state, prefix='cross_attn_layers.')
  fill(model, state)
  model, blocks = place(model, options), place(blocks, options)
  inputs = read_inputs(folder)
  ids = torch.from_numpy(inputs['ids']).long().to(options.device)
  hook(model, blocks, {'x': to_tensor(inputs['visual'], options)})
  new = settings['new']
  call = lambda: {'tokens': model.generate(
    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
    do_sample=False, pad_token_id=0)[:, ids.shape[1]:]}
  return program(call, options=Options(options.device, options.dtype, 'eager'))
