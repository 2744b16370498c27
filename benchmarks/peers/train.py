"""The same train steps in PyTorch: whole models composed of the modules of the other cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.harness.case import Options
from benchmarks.harness.program import Program, read_inputs
from benchmarks.peers import decode, ps3, vision
from benchmarks.peers.common import compile_mode, fill, sizes, tensors


def normalised(pixels: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
  """uint8 [... h w 3] -> float [n 3 h w]."""
  mean, std = (torch.tensor(config[key]) for key in ('mean', 'std'))
  x = (pixels.flatten(0, -4).float() / 255 - mean) / std
  return x.permute(0, 3, 1, 2).contiguous()


def causal_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
  """Mean next-token loss; -100 is ignored."""
  return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def llama_model(text: dict[str, Any]) -> nn.Module:
  """`LlamaForCausalLM` with sdpa attention."""
  from transformers import LlamaConfig, LlamaForCausalLM

  return LlamaForCausalLM(LlamaConfig(
    vocab_size=text['vocab_size'], hidden_size=text['width'], num_hidden_layers=text['depth'],
    num_attention_heads=text['heads'], num_key_value_heads=text['kv_heads'],
    intermediate_size=text['mlp_width'], rms_norm_eps=text['norm_eps'],
    max_position_embeddings=text['max_positions'], rope_theta=text['rope_theta'],
    attn_implementation='sdpa'))


class Prefixed(nn.Module):
  """Visual tokens, projected, in front of the text."""

  def __init__(self, language: nn.Module, projector: nn.Module):
    super().__init__()
    self.language, self.projector = language, projector

  def loss_of(self, visual: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """visual [b n d] stands in the first n places of every row."""
    text = self.language.get_input_embeddings()(batch['tokens'][:, visual.shape[1]:])
    embeds = torch.cat([self.projector(visual), text], dim=1)
    return causal_loss(self.language(inputs_embeds=embeds).logits, batch['labels'])


class McLlava(Prefixed):
  """SigLIP over all crops, coordinate embedding, Phi."""

  def __init__(self, config, state):
    encoder, text = config['encoder'], config['text']
    width = encoder['vision']['width']
    projector = nn.Sequential(nn.Linear(width, text['width']), nn.GELU(),
                              nn.Linear(text['width'], text['width']))
    super().__init__(decode.phi_model(text), projector)
    self.config = encoder
    self.tower = vision.siglip_tower(encoder['vision'])
    self.coord_embed = nn.Sequential(nn.Linear(2, width), nn.GELU(), nn.Linear(width, width))
    fill(self.tower, state, prefix='vision_model.vision_tower.vision_model.')
    fill(self.coord_embed, state, prefix='vision_model.coord_embed.')
    fill(self.language, state, prefix='language_model.')
    for number, layer in ((1, projector[0]), (2, projector[2])):
      fill(layer, state, prefix=f'multi_modal_projector.linear_{number}.')

  def forward(self, batch):
    x = vision.run_siglip(self.tower, normalised(batch['views/pixels'], self.config))
    index = batch['views/index']
    where = self.coord_embed(batch['views/coords'])
    visual = x.flatten(0, 1)[index] + where[index // x.shape[1]]
    return self.loss_of(visual, batch)


class LlavaHR(Prefixed):
  """Dual tower, LLaMA."""

  def __init__(self, config, state):
    encoder, text = config['encoder'], config['text']
    projector = nn.Sequential(nn.Linear(encoder['fast']['width'], text['width']), nn.GELU(),
                              nn.Linear(text['width'], text['width']))
    super().__init__(llama_model(text), projector)
    self.config, self.tower = encoder, vision.DualTower(encoder)
    fill(self.tower, vision.rename_scale({
      name.removeprefix('model.vision_tower.'): state.pop(name)
      for name in list(state) if name.startswith('model.vision_tower.')}))
    fill(projector, state, prefix='model.mm_projector.')
    fill(self.language, state)

  def forward(self, batch):
    x = self.tower(normalised(batch['views/pixels'], self.config))
    return self.loss_of(x.flatten(0, 1)[batch['views/index']], batch)


class Pheye(nn.Module):
  """CLIP with two adapter sets, Phi with cross-attention blocks."""

  def __init__(self, config, state):
    super().__init__()
    encoder, text = config['encoder'], config['text']
    self.config, width = encoder, encoder['vision']['width']
    self.tower = vision.adapt(vision.clip_tower(encoder['vision']), vision.adapter_sets(encoder))
    norm = lambda: nn.LayerNorm(width, eps=encoder['norm_eps'])
    self.norm1, self.norm2 = norm(), norm()
    self.positions = nn.Embedding(encoder['sub_image_rows'], width)
    self.language = decode.phi_model(text)
    self.blocks = decode.cross_blocks(text, config['fusion'])
    self.media: dict[str, torch.Tensor] = {}
    fill(self.tower, state, prefix='vision_encoder.vision_model.base_model.model.')
    fill(self.norm1, state, prefix='vision_encoder.norm_lvl_1.')
    fill(self.norm2, state, prefix='vision_encoder.norm_lvl_2.')
    fill(self.positions, state, prefix='vision_encoder.connector.embedding.')
    fill(self.blocks, state, prefix='lang_encoder.cross_attn_layers.')
    fill(self.language, {
      name.removeprefix('lang_encoder.').replace('.decoder_layer.', '.'): value
      for name, value in state.items() if name.startswith('lang_encoder.')
      and 'old_decoder_blocks' not in name and 'cross_attn_layer' not in name})
    decode.hook(self.language, self.blocks, self.media)

  def forward(self, batch):
    pixels = batch['views/pixels']
    rows, views = pixels.shape[:2]
    x = normalised(pixels, self.config).unflatten(0, (rows, views))
    vision.switch(self.tower, 'first')
    whole = self.norm1(vision.run_clip(self.tower, x[:, 0]))[:, None]
    vision.switch(self.tower, 'second')
    tiles = self.norm2(vision.run_clip(self.tower, x[:, 1:].flatten(0, 1)))
    tokens = torch.cat([whole, tiles.unflatten(0, (rows, views - 1))], dim=1)
    tokens = tokens + self.positions.weight[:views, None]
    self.media['x'] = tokens.flatten(1, 2)
    return causal_loss(self.language(batch['tokens']).logits, batch['labels'])


class PS3(nn.Module):
  """ps3-torch's image-text model and the losses of its training code: sigmoid contrast of pooled
  features, binary cross entropy of the selection maps (bottom-up and top-down) against the box."""

  def __init__(self, config, state):
    super().__init__()
    from ps3 import PS3TextConfig, PS3TextModel

    encoder, text = config['encoder'], config['encoder']['text']
    self.vision = ps3.vision_model(encoder).vision_model
    self.text = PS3TextModel(PS3TextConfig(
      output_dim=text['out'], prompt_proj_dim=text['prompt_width'],
      context_length=text['context'], vocab_size=text['vocab_size'], width=text['width'],
      heads=text['heads'], layers=text['depth'],
      mlp_ratio=(text['mlp_width'] + 0.5) / text['width'], no_causal_mask=True, proj_bias=True,
      pool_type='last', norm_kwargs={'eps': text['norm_eps']})).text_model
    self.logit_scale = nn.Parameter(state.pop('logit_scale'))
    self.logit_bias = nn.Parameter(state.pop('logit_bias'))
    fill(self.vision, state, prefix='vision_model.')
    fill(self.text, state, prefix='text_model.')

  def forward(self, batch):
    out = self.text(batch['tokens'])
    text = F.normalize(out.pooled_output, dim=-1)
    target = batch['target']
    seen = self.vision(batch['images'].permute(0, 3, 1, 2), prompt=out.prompt,
                       gt_selection_maps=target, pool_gt_token_only=True)
    image = F.normalize(seen.pooled_output, dim=-1)
    logits = self.logit_scale.exp() * image @ text.T + self.logit_bias
    sign = 2 * torch.eye(len(logits)) - 1
    loss = -F.logsigmoid(sign * logits).sum() / len(logits)
    for probs in (seen.bottomup_selection_probs, seen.topdown_selection_probs):
      parts = [F.binary_cross_entropy(p, (F.interpolate(
        target[:, None], size=p.shape[-2:], mode='area')[:, 0] > 0).float()) for p in probs]
      loss = loss + sum(parts) / len(parts)
    return loss


MODELS = {'mc_llava': McLlava, 'llava_hr': LlavaHR, 'pheye': Pheye, 'ps3': PS3}


def step(settings, folder, options: Options) -> Program:
  """One AdamW step; settings as `ours.train.TrainStep`."""
  config, state = sizes(folder), tensors(folder)
  # A training model owns its parameters: the files are mapped read-only.
  model = MODELS[settings['system']](config, {k: v.clone() for k, v in state.items()})
  del state
  model = model.to(options.device).train()
  batch = {name: torch.from_numpy(x).to(options.device) for name, x in
           read_inputs(folder).items()}
  batch = {name: x.long() if x.dtype == torch.int32 else x for name, x in batch.items()}
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8,
                                weight_decay=0.0, foreach=True)
  form, _, how = options.variant.partition('-')
  if how == 'channels':  # NHWC for 4-d weights: those of convolutions
    model = model.to(memory_format=torch.channels_last)
  forward = model if form == 'eager' else torch.compile(
    model, mode=compile_mode(form), dynamic=False)
  cast = torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == 'bfloat16')

  def run():
    optimizer.zero_grad(set_to_none=True)
    with cast:
      loss = forward(batch)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if options.device == 'cuda':
      torch.cuda.synchronize()
    return {'loss': loss.detach(), 'grad_norm': norm}

  return Program(run, lambda result: {k: x.float().cpu().numpy() for k, x in result.items()})
