"""Golden checks of LLaVA-HR (data and scorers: data, evaluation)."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.checkpoint.rows import Table, export_tensors, import_tensors
from hrvlm_jax.core import resample
from hrvlm_jax.core.module import Functional, layer_at
from hrvlm_jax.core.resample import normalise, normalise_host
from hrvlm_jax.language import config as language
from hrvlm_jax.language.chat import encode_prompt, get_template, question
from hrvlm_jax.language.conversation import SENTINEL, encode_llava, messages_from_llava, prepare
from hrvlm_jax.language.generate import Generator, Sampling, bucket
from hrvlm_jax.language.prompt import IGNORE, expand, pad_batch
from hrvlm_jax.language.tokenizer import tokenizer_from_files
from hrvlm_jax.systems import pictures
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.llava_hr import SYSTEM, views as host
from hrvlm_jax.systems.llava_hr.adapter import AlignModule, MRAdapter, align
from hrvlm_jax.systems.llava_hr.config import (
  RELEASED_ADAPTERS,
  LlavaHRConfig,
  low_resolution,
  model,
)
from hrvlm_jax.systems.llava_hr.encoder import Encoder, embed_patches
from hrvlm_jax.systems.llava_hr.weights import adapter_rows, align_rows, table, vision_table
from hrvlm_jax.training.losses import token_cross_entropy
from hrvlm_jax.vision import convnext
from hrvlm_jax.vision.convnext import ConvNeXt, ConvNeXtConfig
from hrvlm_jax.vision.vit import ViTConfig
from hrvlm_jax.vlm import model as vlm
from tests.parity.cases.runner import OPERATOR, Case, check
from tests.parity.cases.training import train_step

_TEMPLATES = {'v1': 'vicuna_v1', 'plain': 'plain'}


def _nhwc(x: np.ndarray) -> np.ndarray:
  return np.moveaxis(x, 1, -1)


def _nchw(x) -> np.ndarray:
  return np.moveaxis(np.asarray(x), -1, 1)


def _image(case: Case, key: str) -> jax.Array:
  return jnp.asarray(_nhwc(case.input(key).astype(np.float32) * case.config['image_scale']))


def _vit(c) -> ViTConfig:
  return ViTConfig(
    image_size=c['pos_image_size'], patch_size=c['patch'], width=c['hidden'], depth=c['layers'],
    heads=c['heads'], mlp_width=c['mlp'], activation=c['act'], norm_eps=c['eps'],
    class_token=True, patch_bias=False, pre_norm=True)


def _convnext(c) -> ConvNeXtConfig:
  return ConvNeXtConfig(
    depths=tuple(c['depths']), widths=tuple(c['dims']), norm_eps=c['norm_eps'],
    classes=c['num_classes'], head_width=c['head_hidden_size'])


@check('llava_hr', 'convnext_trunk')
def convnext_trunk(case: Case) -> None:
  """Stem, parts of blocks, downsampling and every stage; single operators."""
  cfg = case.config
  config = _convnext(cfg)
  case.expect_json(('act',), 'gelu_exact')
  case.expect_json(('layout',), 'NCHW')
  fn = Functional(lambda rngs: ConvNeXt(config, rngs=rngs))
  params = import_tensors(case.weights(), convnext.table(config), fn.abstract)
  image = _image(case, 'image_q8')
  case.expect_json(('image_hw',), image.shape[1:3])
  wanted = [m for key in case.keys if (m := re.match(r'stage(\d+)\.block(\d+)\.', key))]
  depths = {}
  for match in wanted:
    depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]) + 1)

  @jax.jit
  def run(params):
    module, out = fn.bind(params), {}
    out['stem_conv'] = module.stem.conv(image)
    x = out['stem'] = module.stem(image)
    for index, stage in enumerate(module.stages):
      before = x
      if stage.downsample is not None:
        before = out[f'stage{index}.downsample'] = stage.downsample(x)
      y = before
      for number in range(depths.get(index, 0)):
        block, name = layer_at(stage.blocks, number), f'stage{index}.block{number}'
        out[f'{name}.conv_dw'] = block.conv_dw(y)
        out[f'{name}.norm_nhwc'] = block.norm(out[f'{name}.conv_dw'])
        out[f'{name}.mlp_nhwc'] = block.mlp(out[f'{name}.norm_nhwc'])
        y = out[f'{name}.out'] = block(y)
      x = out[f'stage{index}'] = stage(x)
    return out

  for name, value in run(params).items():
    if case.has(name):
      case.expect(name, value if name.endswith('_nhwc') else _nchw(value), tol=OPERATOR)


@check('llava_hr', 'clip_vit_posemb')
def clip_vit_posemb(case: Case) -> None:
  """The ViT with and without class token on several grids, position tables of each."""
  cfg = case.config
  vit = _vit(cfg)
  case.expect_json(('grid_table',), vit.grid)
  case.expect_json(('select_feature',), 'patch')
  alone = lambda size: LlavaHRConfig(image_size=size, fast=vit, slow=None, adapters=None,
                                     select_layer=cfg['select_layer'])
  abstract = Functional(lambda rngs: Encoder(alone(vit.image_size), rngs=rngs)).abstract
  params = import_tensors(case.weights(), vision_table(alone(vit.image_size)), abstract)
  for size in cfg['sizes']:
    fn = Functional(lambda rngs, size=size: Encoder(alone(size), rngs=rngs))
    image = _image(case, f's{size}.image_q8')

    @jax.jit
    def run(params, image, fn=fn, size=size):
      encoder, out = fn.bind(params), {}
      tower, grid = encoder.fast, (size // vit.patch_size,) * 2
      x = tower.patch_embed(image)
      first = jnp.broadcast_to(tower.class_token[...], (len(x), 1, vit.width))
      out['pos_embed'] = tower.positions(grid)[None]
      out['embeddings'] = jnp.concatenate([first, x], axis=1) + out['pos_embed']
      state = out['with_cls.hidden0'] = tower.embed(image)
      taps = tower.run(state, taps=range(vit.depth)).taps
      out |= {f'with_cls.hidden{layer + 1}': tap for layer, tap in taps.items()}
      out['with_cls.selected'], _ = encoder.tower(image)
      out['no_cls.hidden0'] = embed_patches(tower, image)[1]
      out['no_cls.last'] = tower.run(out['no_cls.hidden0']).x
      return out

    for name, value in run(params, image).items():
      case.expect(f's{size}.{name}', value)


@check('llava_hr', 'mr_adapter')
def mr_adapter(case: Case) -> None:
  """One adapter and the align module, apart and whole, on every slow grid; single operators."""
  cfg = case.config
  slow, fast, grid = cfg['slow_dim'], cfg['fast_dim'], cfg['fast_grid']
  make = {'adapter': lambda rngs: MRAdapter(slow, fast, RELEASED_ADAPTERS, rngs=rngs),
          'align': lambda rngs: AlignModule(slow, fast, rngs=rngs)}
  fns = {name: Functional(fn) for name, fn in make.items()}
  rows = adapter_rows(RELEASED_ADAPTERS, 'adapter/', 'adapter.') + align_rows('align/', 'align.')
  params = import_tensors(case.weights(), Table(tuple(rows)),
                          {name: fn.abstract for name, fn in fns.items()})
  tokens = case.input('fast')
  y = jnp.asarray(tokens).reshape(len(tokens), grid, grid, fast)
  flat = lambda x: x.reshape(x.shape[0], -1, x.shape[-1])

  @jax.jit
  def run(params, s):
    module, final = fns['adapter'].bind(params['adapter']), fns['align'].bind(params['align'])
    u = module.map_slow(s)
    aligned, f = align(u, grid), y + module.map_fast(y)
    pooled = module.pool(f, aligned)
    out, gate, _ = module(y, s)
    return {
      'slow_mlp': flat(u), 'slow_aligned': flat(aligned), 'fast_after_conv': flat(f),
      'gate_input': pooled, 'gate_logit': module.gate(pooled), 'gate_tanh': gate,
      'adapter_out': flat(out), 'align_out': flat(final(y, s))}

  for side in cfg['slow_grids']:
    s = _nhwc(case.input(f'g{side}.slow'))
    for name, value in run(params, s).items():
      case.expect(f'g{side}.{name}', value, tol=OPERATOR)


@check('llava_hr', 'preprocess')
def preprocess(case: Case) -> None:
  """Geometry and pixels of both aspect modes, normalisation, the low-resolution image."""
  cfg = case.config
  size, small = cfg['image_size'], cfg['fast_image_size']
  mean, std = tuple(cfg['image_mean']), tuple(cfg['image_std'])
  case.expect_json(('fast_image_size',), low_resolution(size))
  case.expect_json(('rescale',), 1 / 255, tol=1e-15)
  case.expect_json(('resample',), 'PIL bicubic (antialiased), uint8 output')
  pixels = {'pad': [], 'square': []}
  for number in range(len(cfg['geometry'])):
    image = case.image(f'img{number}.png')
    leaf = lambda name, value, number=number: case.expect_json(('geometry', number, name), value)
    side, place = pictures.pad_geometry(*image.size)
    resized, corner = host.square_geometry(*image.size, size)
    leaf('size_wh', image.size)
    leaf('pad_square', side)
    leaf('paste_xy', place)
    leaf('pad_rgb', pictures.background(mean))
    leaf('square_mode_resized_wh', resized)
    leaf('square_mode_crop_left_top', corner)
    for aspect, stack in pixels.items():
      stack.append(np.asarray(host.to_square(image, size, aspect=aspect, mean=mean)))
  values = {}
  for aspect, stack in pixels.items():
    case.exact(f'{aspect}.resized_u8', np.stack(stack))
    values[aspect] = normalise_host(np.stack(stack), mean, std)
    device = np.asarray(normalise(np.stack(stack), mean, std))
    assert np.abs(device - values[aspect]).max() <= 5e-7, 'normalisation on the device differs'
  for key in case.keys:
    if match := re.fullmatch(r'(pad|square)\.pixel_values(?:_img(\d+))?', key):
      chosen = values[match[1]]
      case.exact(key, _nchw(chosen) if match[2] is None else np.moveaxis(
        chosen[int(match[2])], -1, 0))
    elif match := re.fullmatch(r'(pad|square)\.fast_input_sub(\d+)', key):
      matrix = resample.bilinear_corners_matrix(size, small)
      low = _nchw(resample.resize(jnp.asarray(values[match[1]]), matrix, matrix))
      case.expect(key, low[..., ::int(match[2]), ::int(match[2])], tol=OPERATOR)


@check('llava_hr', 'dual_path_tower')
def dual_path_tower(case: Case) -> None:
  """The whole tower at every resolution of the case, with whatever intermediates it holds."""
  cfg = case.config
  case.expect_json(('freeze_vision',), not cfg['has_adapters'])
  base = LlavaHRConfig(fast=_vit(cfg['clip']), slow=_convnext(cfg['convnext']),
                       image_size=cfg['runs'][0]['input_image_size'],
                       adapters=RELEASED_ADAPTERS if cfg['has_adapters'] else None)
  case.expect_json(('num_slow_stages',), len(base.slow.depths))
  abstract = Functional(lambda rngs: Encoder(base, rngs=rngs)).abstract
  params = import_tensors(case.weights(), vision_table(base), abstract)
  stride = cfg['fast_input_stride']
  for number, run in enumerate(cfg['runs']):
    size, repeat = run['input_image_size'], run['repeat']
    config = dataclasses.replace(base, image_size=size)
    leaf = lambda name, value, number=number: case.expect_json(('runs', number, name), value)
    leaf('fast_image_size', config.fast_image_size)
    leaf('fast_grid', config.fast_grid)
    leaf('slow_grid', config.slow_grid)
    fn = Functional(lambda rngs, config=config: Encoder(config, rngs=rngs))
    small = _image(case, f's{size}.image_q8')
    images = small.repeat(repeat, axis=1).repeat(repeat, axis=2)
    assert images.shape[1:3] == (size, size), images.shape
    tokens, info = jax.jit(
      lambda p, x, fn=fn: fn.apply(p, x, method='tower', keep=True))(params, images)
    out = dict(info['states'], out=tokens)
    wanted = any(key.startswith(f's{size}.fast_quarter') for key in case.keys)
    if wanted and not cfg['has_adapters']:  # one scan runs all layers: cut it open
      out |= jax.jit(lambda p, x, fn=fn: _quarters(fn.bind(p).fast, x))(
        params, out['fast_pre_ln'])
    low = np.asarray(out.pop('fast_input'), np.float64)
    out['fast_input_sub'] = _nchw(low)[..., ::stride, ::stride]
    each = low.reshape(len(low), -1)
    out['fast_input_stats'] = np.stack(
      [each.mean(axis=1), each.std(axis=1, ddof=1), np.abs(each).max(axis=1)], axis=1)
    out['slow_out'] = _nchw(out['slow_out'])
    for index in range(len(out) if 'gates' in info else 0):
      if f'adapter{index}_out' in out:
        out[f'adapter{index}_gate_tanh'] = info['gates'][:, index]
        out[f'adapter{index}_out'] = out[f'adapter{index}_out'].reshape(
          len(low), -1, config.fast.width)
    for name, value in out.items():
      if case.has(f's{size}.{name}'):
        case.expect(f's{size}.{name}', value)


def _quarters(vit, x):
  """States after each quarter of the layers."""
  quarter = vit.config.depth // 4
  taps = vit.run(x, taps=[number * quarter - 1 for number in range(1, 5)]).taps
  return {f'fast_quarter{number}': taps[number * quarter - 1] for number in range(1, 5)}


def _full_model(case: Case) -> ModelConfig:
  cfg = case.config
  llm = cfg['llm']
  text = language.llama(
    vocab_size=llm['vocab'], width=llm['hidden'], depth=llm['layers'], heads=llm['heads'],
    kv_heads=llm['kv_heads'], mlp_width=llm['mlp'], norm_eps=llm['rms_norm_eps'],
    rope_theta=llm['rope_theta'], max_positions=llm['max_pos'], tie_embeddings=llm['tie'],
    activation=llm['act'])
  case.expect_json(('projector',), 'mlp2x_gelu')
  encoder = LlavaHRConfig(image_size=cfg['input_image_size'], fast=_vit(cfg['clip']),
                          slow=_convnext(cfg['convnext']), aspect=cfg['image_aspect_ratio'])
  case.expect_json(('fast_image_size',), encoder.fast_image_size)
  return model(encoder, text)


@check('llava_hr', 'llava_hr_full')
def full(case: Case) -> None:
  """Image and text to logits, greedy tokens, three training batches, gradients."""
  cfg = case.config
  config = _full_model(case)
  fn = vlm.build(config)
  params = import_tensors(case.weights(), table(config), fn.abstract)
  tokenizer = tokenizer_from_files(
    {'tokenizer.model': (case.folder / 'tokenizer.model').read_bytes()})
  case.expect_json(('image_token_index',), SENTINEL)
  case.expect_json(('ignore_index',), IGNORE)
  for role in ('pad', 'bos', 'eos'):
    case.expect_json((role,), {'pad': 0, 'bos': tokenizer.bos_id, 'eos': tokenizer.eos_id}[role])
  examples = {name: host.views([case.image(name)], config.encoder) for name in cfg['images']}
  for key in case.keys:
    if match := re.fullmatch(r'img(\d+)_u8', key):
      case.exact(key, examples[cfg['images'][int(match[1])]]['pixels'][0])
  used = {index for indices in cfg['batches'].plain().values() for index in indices}
  for index in set(range(len(case.json('samples.json')))) - used:
    case.waive(f'samples.json:{index}/*', 'no batch of the case uses it')
  batches = {name: _batch(case, name, tokenizer, examples, config) for name in cfg['batches']}
  run = _forward(fn, batches.values())
  _prompt(case, config, run, params, tokenizer, examples[cfg['images'][0]])
  for name, batch in batches.items():
    out = run(params, batch)
    case.expect(f'{name}.token_nll', out['nll'])
    case.expect(f'{name}.loss', out['loss'])
    if case.has(f'{name}.expanded_embeds'):
      case.expect(f'{name}.expanded_embeds', out['embeds'])
  _gradients(case, config, fn, params, batches)


def _forward(fn, batches):
  """(params, batch) -> every state of the model; all batches are padded to one shape, so that one
  program serves them, and the results cut back."""
  rows = max(len(batch['tokens']) for batch in batches)
  length = max(batch['tokens'].shape[1] for batch in batches)

  @jax.jit
  def states(params, batch):
    module, labels = fn.bind(params), batch['labels']
    visual = module.vision(batch['views'])
    projected = module.projector(visual.values)
    embeds, valid = module.embed(batch, dataclasses.replace(visual, values=projected))
    hidden = module.language(embeds, valid)
    logits = module.logits(hidden)
    targets = jnp.maximum(labels[:, 1:], 0)[..., None]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), targets, axis=-1)[..., 0]
    return {'tower': visual.values, 'projected': projected, 'embeds': embeds, 'hidden': hidden,
            'logits': logits, 'nll': jnp.where(labels[:, 1:] == IGNORE, 0, nll)}

  def run(params, batch):
    n, t = batch['tokens'].shape
    fill = {'tokens': 0, 'visual_index': -1, 'valid': False, 'labels': IGNORE}
    grown = {key: np.pad(batch[key], ((0, rows - n), (0, max(length - t, 0))),
                         constant_values=value) for key, value in fill.items()}
    views = {key: np.pad(value, [(0, rows - n)] + [(0, 0)] * (value.ndim - 1))
             for key, value in batch['views'].items()}
    out = {key: np.asarray(value)[:n] for key, value in states(
      params, grown | {'views': views}).items()}
    cut = {key: out[key][:, :t] for key in ('embeds', 'hidden', 'logits')}
    total, count = token_cross_entropy(cut['logits'], batch['labels'])
    return out | cut | {'nll': out['nll'][:, :t - 1], 'loss': total / count}

  return run


def _prompt(case, config, run, params, tokenizer, example):
  template = get_template(config.chat)
  encoded = encode_prompt([question(template, case.config['question'], 1)], template, tokenizer,
                          image_id=SENTINEL)
  case.expect_json(('prompt',), encoded.text)
  case.exact('prompt.input_ids', np.array([encoded.ids]))
  row = expand(encoded.ids, None, SENTINEL, example['tokens'].tolist())
  length = len(row['tokens'])
  batch = pad_batch([row], length) | {'views': SYSTEM.batch([example], config.encoder)}
  out = run(params, batch)
  case.expect('prompt.tower', out['tower'])
  case.expect('prompt.projected', out['projected'])
  case.expect('prompt.inputs_embeds', out['embeds'])
  case.expect('prompt.hidden_last_norm', out['hidden'])
  case.expect('prompt.logits', out['logits'][:, -case.input('prompt.logits').shape[1]:])
  generator = Generator(vlm.build(config, unrolled=True), vlm.unroll(config, params))
  reference = case.input('generate.output_ids')
  sampling = Sampling(max_new_tokens=reference.shape[1], stop_ids=(tokenizer.eos_id,))
  room = bucket(length) - length
  embeds = np.pad(out['embeds'], ((0, 0), (0, room), (0, 0)))
  new = generator.generate(embeds, np.pad(batch['valid'], ((0, 0), (0, room))), sampling,
                           keep_logits=True)
  case.exact('generate.output_ids', np.array(new.rows(), reference.dtype))
  case.expect('generate.step_logits', new.logits[0, :int(new.lengths[0])])


def _batch(case, name, tokenizer, examples, config):
  """The training batch of a case, every step of it compared."""
  cfg, samples = case.config, case.json('samples.json')
  template = get_template(_TEMPLATES[cfg['template_of'][name]])
  rows, encoded, views = [], [], []
  for index in cfg['batches'][name]:
    sample = samples[index]
    images = [sample['image']] if 'image' in sample else []
    messages = prepare(messages_from_llava(sample['conversations'].plain()), template, len(images))
    one = encode_llava(messages, template, tokenizer, image_id=SENTINEL if images else None)
    view = examples[images[0]] if images else host.views([], config.encoder)
    rows.append(expand(one.ids, one.labels, SENTINEL, view['tokens'].tolist()))
    encoded.append(one)
    views.append(view)
    _ = sample['id']
  longest = max(len(one.ids) for one in encoded)
  fill = lambda values, pad: np.array([v + [pad] * (longest - len(v)) for v in values])
  case.exact(f'{name}.input_ids', fill([one.ids for one in encoded], 0))
  case.exact(f'{name}.labels', fill([one.labels for one in encoded], IGNORE))
  case.exact(f'{name}.attention_mask', fill([[True] * len(one.ids) for one in encoded], False))
  batch = pad_batch(rows, case.input(f'{name}.expanded_labels').shape[1])
  case.exact(f'{name}.expanded_labels', batch['labels'].astype(np.int64))
  case.exact(f'{name}.expanded_mask', batch['valid'])
  return batch | {'views': SYSTEM.batch(views, config.encoder)}


def _gradients(case, config, fn, params, batches):
  keys = {match[1] for key in case.keys if (match := re.fullmatch(r'(\w+)\.expanded_embeds', key))}
  batch = batches[keys.pop() if len(keys) == 1 else 'two_images']

  step = train_step(config)(params, batch)
  grads = dict(export_tensors(step.gradients, table(config)))
  case.expect_json(('loss',), step.loss, file='grads.json', tol=1e-4)
  expected = case.json('grads.json')
  for name in expected['grad_norms']:
    norm = float(np.linalg.norm(grads[name].astype(np.float64)))
    case.expect_json(('grad_norms', name), norm, file='grads.json', tol=1e-4)
  total = np.sqrt(sum(float(np.square(g.astype(np.float64)).sum()) for g in grads.values()))
  case.expect_json(('total_norm',), float(total), file='grads.json', tol=1e-4)
  missing = [name for name in expected['no_grad'] if not np.any(grads[name])]
  case.expect_json(('no_grad',), missing, file='grads.json')
  for name in case.config['grad_keys']:
    case.expect(f'grad.{name}', grads[name])
