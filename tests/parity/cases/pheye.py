"""Golden checks of Pheye."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.checkpoint.rows import entries, export_tensors, import_tensors
from hrvlm_jax.core import lora, paths
from hrvlm_jax.core.layers import LoRA
from hrvlm_jax.core.module import Functional, depth_of
from hrvlm_jax.core.resample import normalise, normalise_host
from hrvlm_jax.evaluation.analysis.attention import global_share
from hrvlm_jax.language import config as language
from hrvlm_jax.language.decoder import by_head
from hrvlm_jax.language.generate import Generator, Sampling
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.fusion import CrossAttentionFusion
from hrvlm_jax.systems.pheye import SYSTEM, views as host, weights
from hrvlm_jax.systems.pheye.config import PheyeConfig, model
from hrvlm_jax.systems.pheye.encoder import Encoder
from hrvlm_jax.training.losses import token_cross_entropy
from hrvlm_jax.vision.vit import ViT
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.cross_attention import HEAD_WIDTH, CrossBlock
from tests.parity.cases.runner import OPERATOR, Case, check
from tests.parity.cases.training import Step, train_step

_TARGETS = ['q_proj', 'k_proj', 'v_proj', 'out_proj', 'patch_embedding', 'fc1', 'fc2']


def _encoder(case: Case, **options) -> PheyeConfig:
  """The encoder of a case: tower sizes and LoRA sets."""
  case.waive('config.json:seed', 'seed of the weights, which are stored')
  cfg, sets = case.config, {}
  for name in ('first', 'second'):
    if name in cfg['lora']:
      spec = cfg['lora'][name]
      sets[name] = LoRA(rank=spec['r'], alpha=float(spec['lora_alpha']), name=name,
                        dropout=cfg.get('lora_dropout', 0.0))
      case.expect_json(('lora', name, 'scaling'), sets[name].scale)
  assert sorted(cfg['lora']['target_modules'].plain()) == sorted(_TARGETS), 'lora/target_modules'
  if 'level' in cfg:
    options['level'] = cfg['level']
  if 'norm_lvl_eps' in cfg:
    options['norm_eps'] = cfg['norm_lvl_eps']
  config = PheyeConfig(vision=weights.vision_from_hf(cfg['vision'].plain()),
                       first=sets.get('first'), second=sets['second'], **options)
  if 'n_sub_images' in cfg:
    case.expect_json(('n_sub_images',), config.sub_images)
  return config


def _model(case: Case) -> ModelConfig:
  cfg = case.config
  text = language.config_from_hf({'model_type': 'phi', **cfg['text'].plain()})
  config = model(_encoder(case), text, interval=cfg['cross_attn_every_n_layers'],
                 from_layer=cfg['from_layer'], reduce=cfg['reduce_factor'])
  case.expect_json(('cross_attn_layer_indices',), list(config.fusion.layers(text.depth)))
  return config


def _views(case: Case, config: PheyeConfig):
  """Views of the case's images, whose size and mode are compared."""
  examples = []
  for index, spec in enumerate(case.config['images']):
    image = case.image(spec['file'])
    case.expect_json(('images', index, 'width'), image.width)
    case.expect_json(('images', index, 'height'), image.height)
    case.expect_json(('images', index, 'mode'), image.mode)
    examples.append(host.views([image], config))
  return SYSTEM.batch(examples, config)


def _pixels(views, config: PheyeConfig):
  """(global [b c s s], tiles [b*n c s s]) normalised as the original, and [b n+1 s s c]."""
  values = normalise_host(views['pixels'], config.mean, config.std)
  gap = np.abs(np.asarray(normalise(views['pixels'], config.mean, config.std)) - values).max()
  assert gap <= 3e-7, f'device normalisation differs by {gap}'
  first = np.moveaxis(values, -1, -3)
  return first[:, 0], first[:, 1:].reshape(-1, *first.shape[2:]), values


@check('pheye', 'preprocess')
def preprocess(case: Case) -> None:
  """Global view, tiles and boxes of every level, bit for bit."""
  cfg = case.config
  size = cfg['image_size']
  case.expect_json(('tile_order',), 'x outer, y inner')
  case.waive('config.json:resize', 'a description; the pixels are compared')
  case.waive('config.json:pillow', 'how the reference ran; the pixels are compared')
  for level in cfg['levels']:
    config = PheyeConfig(
      vision=dataclasses.replace(PheyeConfig().vision, image_size=size, patch_size=size),
      level=level, mean=tuple(cfg['mean'].plain()), std=tuple(cfg['std'].plain()))
    views = _views(case, config)
    first, tiles, _ = _pixels(views, config)
    case.exact('global', first)
    case.exact(f'level{level}.tiles', tiles)
    boxes = host.tile_boxes(size, level)
    case.exact(f'level{level}.boxes', np.array(boxes, np.int64))
    for index, pixels in enumerate(views['pixels']):
      if case.has(f'img{index}.resized_u8.x{level}'):
        whole = np.zeros((config.side, config.side, 3), np.uint8)
        for (x0, y0, x1, y1), tile in zip(boxes, pixels[1:], strict=True):
          whole[y0:y1, x0:x1] = tile
        case.exact(f'img{index}.resized_u8.x{level}', whole)


@check('pheye', 'vision_two_adapters')
def vision_two_adapters(case: Case) -> None:
  """Both passes of the tower block by block, run as one; the joined tokens."""
  config = _encoder(case)
  fn = Functional(lambda rngs: Encoder(config, rngs=rngs))
  params = import_tensors(case.weights(), weights.vision_table(config), fn.abstract)
  first, tiles, pixels = _pixels(_views(case, config), config)
  case.exact('pixels.global', first)
  case.exact('pixels.tiles', tiles)

  def states(params, pixels):
    # The sum of patch, class and position embedding is seen only without the norm after it.
    bare = dataclasses.replace(config.tower, pre_norm=False)
    tower = {k: v for k, v in params['tower'].items() if k != 'pre_norm'}
    summed = Functional(lambda rngs: ViT(bare, rngs=rngs)).apply(
      tower, pixels, adapter=config.adapters, method='embed')
    module = fn.bind(params)
    embedded = module.tower.embed(pixels, adapter=config.adapters)
    out = module.tower.run(embedded, adapter=config.adapters, taps=range(config.vision.depth))
    found = {'embeddings': summed, 'pre_ln': embedded}
    found |= {f'layer{i}': tap for i, tap in out.taps.items()}
    joined = module.join(module.states(pixels))
    return found, module.norm1(out.x[:, 0]), module.norm2(out.x[:, 1:]), joined

  found, norm1, norm2, joined = jax.jit(states)(params, pixels)
  for name, value in found.items():
    case.expect(f'global.{name}', value[:, 0])
    case.expect(f'tiles.{name}', value[:, 1:].reshape(-1, *value.shape[2:]))
  case.expect('norm1', norm1)
  case.expect('norm2', norm2.reshape(norm2.shape[0], -1, norm2.shape[-1]))
  case.expect('out', joined)
  without = dataclasses.replace(config, first=None)
  bare = Functional(lambda rngs: Encoder(without, rngs=rngs))
  tensors = {name: value for name, value in case.weights().items() if '.first.' not in name}
  params = import_tensors(tensors, weights.vision_table(without), bare.abstract)
  module = bare.bind(params)
  tokens = module.join(module.states(pixels))
  case.expect('out_without_first', tokens[:, :config.vision.tokens])


@check('pheye', 'lora_merge')
def lora_merge(case: Case) -> None:
  """Every folded kernel, the tower with and without folding, and folding taken back."""
  config = _encoder(case)
  fn = Functional(lambda rngs: ViT(config.tower, rngs=rngs))
  table = weights.prefixed(weights.tower_table(config), theirs='vision_model.base_model.model.')
  params = import_tensors(case.weights(), table, fn.abstract)
  pixels = jnp.asarray(case.input('pixels').transpose(0, 2, 3, 1))
  run = jax.jit(lambda params, adapter: fn.apply(params, pixels, adapter=adapter),
                static_argnums=1)
  case.expect('hidden.base', run(params, None))
  for spec in config.tower.lora:
    case.expect(f'hidden.{spec.name}', run(params, spec.name))
    merged = lora.merge(params, spec)
    case.expect(f'hidden.{spec.name}_merged', run(merged, None))
    names = dict(export_tensors(merged, table))
    prefix = f'merged.{spec.name}.'
    for key in case.keys:
      if key.startswith(prefix):
        module = key.removeprefix(prefix).removesuffix('.weight')
        case.expect(key, names[f'vision_model.base_model.model.{module}.base_layer.weight'],
                    tol=OPERATOR)
    back = lora.unmerge(merged, spec)
    gap = max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), back, params)))
    assert gap <= 1e-6, f'un-merging {spec.name} leaves a difference of {gap}'


@check('pheye', 'xattn_block')
def xattn_block(case: Case) -> None:
  """One cross-attention block, operator by operator."""
  cfg = case.config
  case.waive('config.json:seed', 'seed of the weights, which are stored')
  case.expect_json(('activation',), 'gelu_erf')
  case.expect_json(('dim_head',), HEAD_WIDTH)
  case.expect_json(('scale',), HEAD_WIDTH**-0.5, tol=1e-12)
  fusion = CrossAttentionFusion(width=cfg['dim_visual'], interval=1, reduce=cfg['reduce_factor'])
  text = language.phi(vocab_size=8, width=cfg['dim_text'], depth=1, heads=1, mlp_width=8,
                      rotary_dim=2)  # of the decoder only the width counts here
  fn = Functional(lambda rngs: CrossBlock(text, fusion, rngs=rngs))
  block = fn.bind(import_tensors(case.weights(), weights.block_table(), fn.abstract))
  x, media = jnp.asarray(case.input('x')), jnp.asarray(case.input('media'))
  case.expect_json(('batch',), x.shape[0])
  case.expect_json(('T',), x.shape[1])
  case.expect_json(('M',), media.shape[1])
  case.expect_json(('heads',), block.attn.heads)
  case.expect_json(('ff_inner',), block.mlp.fc1.kernel.shape[1])
  case.expect_json(('eps',), block.norm1.eps, tol=1e-12)
  normed, q = block.norm1(x), block.attn.q(block.norm1(x))
  case.expect_json(('inner_dim',), q.shape[-1])
  keys, values = block.attn.keys_values(media)
  valid = jnp.ones(media.shape[:2], bool)
  case.expect('norm_x', normed, tol=OPERATOR)
  case.expect('q', q, tol=OPERATOR)
  for name, held in (('k', keys), ('v', values)):
    case.expect(name, by_head(held).reshape(*media.shape[:2], -1), tol=OPERATOR)
  case.expect('probs', block.attn.weights(normed, keys, valid), tol=OPERATOR)
  y = block.attn(normed, keys, values, valid)
  case.expect('attn_out', y, tol=OPERATOR)
  case.expect('x_after_attn', x + y, tol=OPERATOR)
  case.expect('ff_out', block.mlp(block.norm2(x + y)), tol=OPERATOR)
  case.expect('out', block(x, keys, values, valid), tol=OPERATOR)


@check('pheye', 'full_model')
def full_model(case: Case) -> None:
  """Images to logits, states of every layer and block, attention shares, all generations."""
  config = _model(case)
  fn, table = vlm.build(config), weights.table(config)
  params = import_tensors(case.weights(), table, fn.abstract)
  shapes = {name: list(entry.shape) for entry in entries(table, fn.abstract)
            for name in entry.names}
  case.expect_json((), shapes, file='state_dict_keys.json')
  views = _views(case, config.encoder)
  first, tiles, _ = _pixels(views, config.encoder)
  case.exact('vision.pixels.global', first)
  case.exact('vision.pixels.tiles', tiles)
  ids, mask = case.input('input_ids'), case.input('attention_mask') > 0
  real = mask[..., None]
  batch = {'tokens': ids.astype(np.int32), 'valid': mask, 'views': views}
  lengths = mask.sum(axis=1)
  case.expect_json(('lens',), lengths)
  held, apart = vlm.build(config, unrolled=True), vlm.unroll(config, params)

  @jax.jit
  def forward(params, apart):
    module = fn.bind(params)
    visual = module.encode(views)
    embeds, valid = module.embed(batch)
    return (visual.values, embeds, module.logits(module(batch)),
            held.bind(apart).logits(held.apply(apart, batch)), module.attention(batch))

  visual, embeds, logits, logits_apart, probs = forward(params, apart)
  case.expect('vision.out', visual)
  case.expect('embed', embeds)
  case.expect('logits', logits, mask=real)
  case.expect('logits', logits_apart, mask=real)
  states = jax.jit(lambda params: _states(held.bind(params), batch))(apart)
  probs = np.asarray(probs)
  start, per_view = case.config['prompt_len'], config.encoder.vision.tokens
  for key in case.keys:
    if re.fullmatch(r'(xattn|decoder)\d+\.out', key):
      case.expect(key, states[key], mask=real)
  shares = np.stack([
    global_share(probs[:, row, :, :n], first_row=start, global_tokens=per_view)
    for row, n in enumerate(lengths)])
  for index, layer in enumerate(config.fusion.layers(config.text.depth)):
    case.expect(f'xattn{layer}.probs', probs[index], mask=mask[:, None, :, None])
    case.expect(f'xattn{layer}.global_share', shares[:, index])
  _generation(case, Generator(held, apart), batch)


def _states(module, batch) -> dict[str, jax.Array]:
  """Residual stream after every block and every decoder layer."""
  embeds, valid = module.embed(batch)
  hooks = module.fusion.hooks(module.language, module.fusion.media(module.encode(batch['views'])))
  context = module.language.context(jnp.asarray(valid))
  x, found = embeds, {}
  for layer in range(depth_of(module.language.blocks)):
    x = hooks['before'](hooks['extras'][layer], x)
    if hooks['extras'][layer] is not None:
      found[f'xattn{layer}.out'] = x
    x = module.language.blocks[layer](x, context)[0]
    found[f'decoder{layer}.out'] = x
  return found


def _generation(case: Case, generator: Generator, batch) -> None:
  cfg = case.config
  budget, start = cfg['max_new_tokens'], cfg['prompt_len']
  assert not cfg['early_stopping'], 'early_stopping: only False is implemented'
  eos, pad = cfg['eos_token_id'], cfg['pad_token_id']
  greedy = Sampling(max_new_tokens=budget, stop_ids=(eos,), pad_id=pad)
  left, mask = case.input('gen_left.input_ids'), case.input('gen_left.attention_mask') > 0
  case.expect_json(('left_lens',), mask.sum(axis=1))

  def generate(name, ids, valid, sampling, **options):
    reference = case.input(f'{name}.sequences')
    row_views = {'pixels': batch['views']['pixels'][:len(ids)]}
    prompt = {'tokens': ids.astype(np.int32), 'valid': valid, 'views': row_views}
    embeds, valid, extras = generator.prompt(prompt)
    out = generator.generate(embeds, valid, sampling, extras=extras, **options)
    new = reference.shape[1] - ids.shape[1]
    whole = np.concatenate([ids, out.tokens[:, :new]], axis=1)
    case.exact(f'{name}.sequences', whole.astype(reference.dtype))
    assert (out.tokens[:, new:] == pad).all(), f'{name}: tokens beyond the end of the reference'
    return out, new

  single = batch['tokens'][:1, :start]
  ones = np.ones(single.shape, bool)
  for name, ids, valid in (('gen_single', single, ones), ('gen_left', left, mask)):
    out, new = generate(name, ids, valid, greedy, keep_logits=True)
    scores = np.swapaxes(out.logits[:, :new], 0, 1)
    case.expect(f'{name}.scores', scores)
    ranked = np.sort(scores, axis=-1)
    case.expect(f'{name}.margin', ranked[..., -1] - ranked[..., -2])
  stop = int(case.input('gen_eos.eos_token_id').reshape(-1)[0])
  generate('gen_eos', left, mask, dataclasses.replace(greedy, stop_ids=(stop,)))
  beams = dataclasses.replace(greedy, beams=cfg['num_beams'],
                              length_penalty=cfg['length_penalty'])
  name, = {key.split('.')[0] for key in case.keys if key.startswith('gen_beam')}
  out, _ = generate(name, single, ones, beams)
  case.expect(f'{name}.sequences_scores', out.scores)


@check('pheye', 'train_loss')
def train_loss(case: Case) -> None:
  """Loss sums, counts and the gradient of every trained parameter; single samples add up."""
  cfg = case.config
  config = _model(case)
  table = weights.table(config)
  fn = vlm.build(config)
  params = import_tensors(case.weights(), table, fn.abstract)
  views = _views(case, config.encoder)
  ids, labels = case.input('input_ids').astype(np.int32), case.input('labels').astype(np.int32)
  mask = case.input('attention_mask') > 0
  case.expect_json(('lens',), mask.sum(axis=1))
  case.expect_json(('prompt_lens',), (labels != -100).argmax(axis=1))
  assert (ids[~mask] == cfg['pad_token_id']).all(), 'pad_token_id fills the rows'
  case.waive('config.json:eos_token_id', 'stands in input_ids and labels, which are stored')
  batch = {'tokens': ids, 'valid': mask, 'labels': labels, 'views': views}

  run = train_step(config)
  step = run(params, batch)
  _loss(case, '', step)
  logits = jax.jit(lambda p: fn.bind(p).logits(fn.apply(p, batch)))(params)
  case.expect('logits', logits, mask=mask[..., None])
  case.expect('nll', _nll(logits, labels))
  names = dict(export_tensors(step.gradients, table))
  for key in case.keys:
    if key.startswith('grad.'):
      case.expect(key, names[key.removeprefix('grad.')])
  for row in range(len(ids)):
    one = jax.tree.map(lambda x: x[row:row + 1], batch)  # noqa: B023
    _loss(case, f'micro{row}.', run(params, one))
  # The published classes give the first set no gradient: the switch does the same.
  switched = dataclasses.replace(config.encoder, train_first_adapter=False)
  off = train_step(dataclasses.replace(config, encoder=switched))(params, batch)
  first = [g for path, g in paths.flatten(off.gradients).items() if path.endswith('_first')]
  missing = bool(first) and not any(map(np.any, first))
  key = 'first_adapter_grad_missing_in_reference'
  case.exact(key, np.full(case.input(key).shape, missing, case.input(key).dtype))


def _loss(case: Case, prefix: str, step: Step) -> None:
  case.expect(f'{prefix}loss_sum', np.float32(step.loss * step.targets))
  case.exact(f'{prefix}n_tokens', np.asarray(step.targets, np.int64))
  case.expect(f'{prefix}loss_mean_hf', np.float32(step.loss))


def _nll(logits, labels: Sequence) -> jax.Array:
  """Loss of every place alone, [b t-1], from labels that keep one target each."""
  length = labels.shape[1]
  one = jnp.where(jnp.eye(length, dtype=bool)[1:], labels[:, None], -100)  # [b t-1 t]
  single = lambda row, wanted: token_cross_entropy(row[None], wanted[None])[0]
  return jax.vmap(jax.vmap(single, (None, 0)))(logits, one)
