"""Golden checks of MC-LLaVA: preprocess, vision, full (conversation and merge: data)."""

from __future__ import annotations

import dataclasses
import re

import jax.numpy as jnp
import numpy as np

from hrvlm_jax.checkpoint.rows import Table, export_tensors, import_tensors
from hrvlm_jax.core.module import Functional
from hrvlm_jax.core.resample import normalise, normalise_host
from hrvlm_jax.language.config import config_from_hf
from hrvlm_jax.language.decoder import default_positions
from hrvlm_jax.language.generate import Generator, Sampling, bucket
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.systems.mc_llava import SYSTEM, encoder as host
from hrvlm_jax.systems.mc_llava.encoder import MCLlavaConfig
from hrvlm_jax.systems.mc_llava.weights import table, vision_from_hf
from hrvlm_jax.vision.vit import ViTConfig
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.model import Projector
from tests.parity.cases.runner import OPERATOR, Case, check
from tests.parity.cases.training import train_step

SUMS = 0.01  # float32 sums of about 1.5e5 terms, as the case's README states


def _encoder(vision: ViTConfig, **options) -> MCLlavaConfig:
  return MCLlavaConfig(vision=vision, quirks='reference', **options)


def _model(case: Case, encoder: MCLlavaConfig) -> ModelConfig:
  text = config_from_hf({'model_type': 'phi', **case.config['text'].plain()})
  case.expect_json(('coord_mlp_act',), 'gelu (erf)')
  case.expect_json(('projector_act',), 'gelu (erf)')
  case.expect_json(('ignore_index',), -100)
  case.expect_json(('num_tokens_default',), encoder.view_tokens)
  case.waive('config.json:dtype', 'float32, as everything here')
  case.waive('config.json:text/vocab_size', 'checked by the shapes of the weights')
  return ModelConfig(
    system='mc_llava', encoder=encoder, text=text,
    projector=ProjectorConfig(n_in=encoder.vision.width, n_out=text.width))


@check('mc_llava', 'preprocess')
def preprocess(case: Case) -> None:
  """Boxes and coordinates of every size, pixels of every image."""
  cfg = case.config
  grid = 5  # the crop arithmetic does not read the tower's sizes
  base = dict(window=cfg['crop_size'], growth=cfg['crop_growth'],
              mean=tuple(cfg['image_mean'].plain()), std=tuple(cfg['image_std'].plain()))
  case.expect_json(('resample',), 'bicubic (PIL 3)')

  def config(size, max_crops):
    return _encoder(ViTConfig(image_size=size, patch_size=max(size // grid, 1), width=8, depth=1,
                              heads=1, mlp_width=8), max_crops=max_crops, **base)

  for index, row in enumerate(cfg['tables']):
    width, height, crops = row['width'], row['height'], row['max_crops']
    boxes = host.crop_boxes(width, height, config(cfg['processor_size_small'], crops))
    name = f'{width}x{height}/mc{crops}'
    case.exact(f'boxes/{name}', np.array(boxes, np.int32))
    case.exact(f'coords/{name}', host.centres(boxes, width, height))
    case.expect_json(('tables', index, 'views'), len(boxes))
  for name, spec in cfg['images'].items():
    image = case.image(spec['file'])
    case.expect_json(('images', name, 'width'), image.width)
    case.expect_json(('images', name, 'height'), image.height)
    for crops in spec['max_crops']:
      conf = config(cfg['processor_size_small'], crops)
      boxes = host.crop_boxes(*image.size, conf)
      pixels = host.view_pixels(image, boxes, conf.vision.image_size)
      values = normalise_host(pixels, conf.mean, conf.std)
      case.exact(f'pixel_values/{name}/mc{crops}', values.transpose(0, 3, 1, 2))
      case.exact(f'pixel_boxes/{name}/mc{crops}', np.array(boxes, np.int32))
      case.exact(f'pixel_coords/{name}/mc{crops}', host.centres(boxes, *image.size))
  full = cfg['full384']
  conf = config(384, full['max_crops'])
  image = case.image(cfg['images'][full['image']]['file'])
  boxes = host.crop_boxes(*image.size, conf)
  pixels = host.view_pixels(image, boxes, 384)
  values = normalise_host(pixels, conf.mean, conf.std).transpose(0, 3, 1, 2)
  prefix, step = f'full384/{full["image"]}/mc{full["max_crops"]}', full['stride']
  case.exact(f'{prefix}/strided', values[:, :, ::step, ::step])
  case.exact(f'{prefix}/view{full["u8_view"]}_u8_rows4', pixels[full['u8_view'], ::4])
  sums = values.sum(axis=(2, 3), dtype=np.float64).astype(np.float32)
  reference = case.input(f'{prefix}/sums')
  case.expect(f'{prefix}/sums', sums, tol=SUMS / max(1.0, float(np.abs(reference).max())))


@check('mc_llava', 'vision')
def vision(case: Case) -> None:
  """Every tower state, coordinate embedding, selection for all crop counts, projector."""
  config = _model(case, _encoder(vision_from_hf(case.config['vision'])))
  system = vlm.registry.get('mc_llava')
  fn = Functional(lambda rngs: system.encoder(config.encoder, rngs=rngs))
  head = Functional(lambda rngs: Projector(config.projector, rngs=rngs))
  abstract = {'vision': fn.abstract, 'projector': head.abstract}
  rows = tuple(row for row in table(config).rows if not row.our_paths[0].startswith('language/'))
  params = import_tensors(case.weights(), Table(rows), abstract)
  module, projector = fn.bind(params['vision']), head.bind(params['projector'])
  case.waive('config.json:image_token_index', 'no text in this case')
  case.waive('config.json:toy_tokenizer/*', 'no text in this case')

  pixels = jnp.asarray(case.input('pixel_values').transpose(0, 2, 3, 1))
  coords = jnp.asarray(case.input('coords'))
  state = module.tower.embed(pixels)
  case.expect('tower/hidden_0', state)
  depth = config.encoder.vision.depth
  out = module.tower.run(state, taps=range(depth))
  for layer in range(depth):
    case.expect(f'tower/hidden_{layer + 1}', out.taps[layer])
  normed = module.tower.post_norm(out.x)
  case.expect('tower/post_layernorm_unused', normed)
  case.expect('tower/pooler_unused', module.tower.pool(normed))
  case.expect('coord_embed_out', module.coord_embed(coords), tol=OPERATOR)
  for number, row in enumerate(case.config['cases']):
    crops, total = row['crops'], row['num_tokens']
    conf = dataclasses.replace(
      config.encoder, num_tokens=config.encoder.view_tokens if total is None else total)
    gather = host.gather_index(crops, conf)
    index = gather[:, 0] * out.x.shape[1] + gather[:, 1]
    features = module.select(out.x[:crops], coords[:crops], jnp.asarray(index)[None])
    name = f'select/M{crops}_N{"default" if total is None else total}'
    case.expect(f'{name}/features', features)
    case.expect(f'{name}/projected', projector(features))
    case.expect_json(('cases', number, 'out_tokens'), len(gather))


@check('mc_llava', 'full')
def full(case: Case) -> None:
  """Image to logits, greedy tokens, training loss and gradients."""
  cfg = case.config
  infer, train = cfg['infer'], cfg['train']
  encoder = _encoder(vision_from_hf(cfg['vision']), max_crops=infer['max_crops'],
                     num_tokens=infer['num_tokens'])
  config = _model(case, encoder)
  fn = vlm.build(config)
  params = import_tensors(case.weights(), table(config), fn.abstract)
  image_id = cfg['image_token_index']
  specials = cfg['toy_tokenizer']['specials'].plain()
  case.expect_json(('toy_tokenizer', 'bytes'), 'id = byte value 0..255')
  _infer(case, config, fn, params, image_id, specials)
  _textonly(case, fn, params, specials)
  _train(case, config, fn, params, image_id, train, specials)


def _tokenise(text: str, specials: dict[str, int]) -> list[int]:
  """The toy tokenizer of the case: one id per UTF-8 byte, specials whole."""
  pattern = '|'.join(re.escape(s) for s in specials)
  ids = []
  for part in re.split(f'({pattern})', text):
    ids += [specials[part]] if part in specials else list(part.encode())
  return ids


def _expand(ids: np.ndarray, valid: np.ndarray, labels, image_id: int, tokens: int):
  """Rows of one image each: the placeholder becomes `tokens` visual places."""
  rows = []
  for row_ids, row_valid, row_labels in zip(ids, valid, labels, strict=True):
    at = int(np.flatnonzero(row_ids == image_id)[0])
    put = lambda row, fill: np.concatenate([row[:at], fill, row[at + 1:]])  # noqa: B023
    rows.append((put(row_ids, np.zeros(tokens, ids.dtype)),
                 put(np.full(len(row_ids), -1), np.arange(tokens)),
                 put(row_valid, np.ones(tokens, bool)),
                 put(row_labels, np.full(tokens, -100))))
  stack = lambda i, dtype: np.stack([row[i] for row in rows]).astype(dtype)
  return {'tokens': stack(0, np.int32), 'visual_index': stack(1, np.int32),
          'valid': stack(2, bool), 'labels': stack(3, np.int32)}


def _infer(case, config, fn, params, image_id, specials):
  infer = case.config['infer']
  example = host.views([case.image(infer['image'])], config.encoder)
  mean, std = config.encoder.mean, config.encoder.std
  pixels = normalise_host(example['pixels'], mean, std).transpose(0, 3, 1, 2)
  case.exact('infer/pixel_values', pixels)
  gap = np.abs(np.asarray(normalise(example['pixels'], mean, std)).transpose(0, 3, 1, 2) - pixels)
  assert gap.max() <= 3e-7, f'device normalisation differs by {gap.max()}'
  case.exact('infer/coords', example['coords'])
  ids = case.input('infer/input_ids')
  case.exact('infer/input_ids', np.array([_tokenise(infer['prompt'], specials)], ids.dtype))
  views = SYSTEM.batch([example], config.encoder, tokens=int(example['tokens'].sum()))
  batch = _expand(ids, np.ones(ids.shape, bool), np.full(ids.shape, -100), image_id,
                  views['index'].shape[1]) | {'views': views}
  module = fn.bind(params)
  visual = module.encode(views)
  case.expect('infer/image_features', visual.values)
  embeds, valid = module.embed(batch, visual)
  case.expect('infer/merged_embeds', embeds)
  case.exact('infer/merged_mask', np.asarray(valid).astype(case.input('infer/merged_mask').dtype))
  positions = np.cumsum(np.asarray(valid), axis=1) - 1
  case.exact('infer/merged_position_ids',
             positions.astype(case.input('infer/merged_position_ids').dtype))
  states = module.language.hidden_states(embeds, valid)
  for index, state in enumerate([*states[:-2], states[-1]]):
    case.expect(f'infer/lm_hidden_{index}', state)
  case.expect('infer/logits', module.logits(states[-1]))
  held = vlm.build(config, unrolled=True)
  generator = Generator(held, vlm.unroll(config, params))
  room = bucket(embeds.shape[1]) - embeds.shape[1]
  padded = jnp.pad(embeds, ((0, 0), (0, room), (0, 0)))
  sampling = Sampling(max_new_tokens=infer['max_new_tokens'], stop_ids=(infer['eos_token_id'],))
  out = generator.generate(padded, np.pad(np.asarray(valid), ((0, 0), (0, room))), sampling,
                           keep_logits=True)
  reference = case.input('infer/generated_ids')
  case.exact('infer/generated_ids', out.tokens[:, :reference.shape[1]].astype(reference.dtype))
  case.expect('infer/step_logits', out.logits[:, :reference.shape[1]])


def _textonly(case, fn, params, specials):
  ids = case.input('textonly/input_ids')
  prompt = case.config['textonly']['prompt']
  case.exact('textonly/input_ids', np.array([_tokenise(prompt, specials)], ids.dtype))
  module = fn.bind(params)
  hidden = module.language(module.language.embed(ids), jnp.ones(ids.shape, bool))
  case.expect('textonly/logits', module.logits(hidden))


def _train(case, config, fn, params, image_id, train, specials):
  crops = train['max_crops'].plain()
  encoder = dataclasses.replace(config.encoder, num_tokens=train['num_tokens'])
  config = dataclasses.replace(config, encoder=encoder)
  examples = [host.views([case.image(name)], dataclasses.replace(encoder, max_crops=k))
              for name, k in zip(train['images'].plain(), crops, strict=True)]
  views = SYSTEM.batch(examples, encoder)
  ids, labels = case.input('train/input_ids'), case.input('train/labels')
  mask = case.input('train/attention_mask') > 0
  case.exact('train/attention_mask',
             (ids != specials['<pad>']).astype(case.input('train/attention_mask').dtype))
  assert ids.shape[1] == train['max_length']
  for row, messages in enumerate(train['messages'].plain()):
    text = ''.join(
      f'<|im_start|>{("user", "assistant")[i % 2]}\n{message}<|im_end|>'
      for i, message in enumerate(messages))
    wanted = _tokenise(text, specials)[:ids.shape[1]]
    assert ids[row, :len(wanted)].tolist() == wanted, f'train/input_ids row {row}'
  batch = _expand(ids, mask, labels, image_id, views['index'].shape[1]) | {'views': views}
  for number, example in enumerate(examples):
    case.exact(f'train/coords_{number}', example['coords'])
    values = normalise_host(example['pixels'], encoder.mean, encoder.std)
    case.exact(f'train/pixel_values_{number}', values.transpose(0, 3, 1, 2))
  like = lambda name, value: np.asarray(value).astype(case.input(name).dtype)
  case.exact('train/merged_labels', like('train/merged_labels', batch['labels']))
  case.exact('train/merged_mask', like('train/merged_mask', batch['valid']))
  case.exact('train/merged_position_ids', like(
    'train/merged_position_ids', default_positions(jnp.asarray(batch['valid']))))

  step = train_step(config)(params, batch)
  grads = step.gradients
  case.expect('train/loss', np.reshape(step.loss, (1,)))
  module = fn.bind(params)
  case.expect('train/image_features', module.encode(views).values)
  logits = np.asarray(module.logits(module(batch)))
  targets = np.concatenate([batch['labels'][:, 1:], np.full((len(ids), 1), -100)], axis=1)
  case.exact('train/targets', targets[targets != -100].astype(case.input('train/targets').dtype))
  case.expect('train/target_logits', logits[targets != -100])
  names = dict(export_tensors(grads, table(config)))
  for key in case.keys:
    if key.startswith('train/grad/'):
      case.expect(key, names[key.removeprefix('train/grad/')])
  unreached = sorted(name for name, value in names.items() if not np.any(value))
  case.expect_json(('params_without_grad',), [
    name for name in case.config['params_without_grad'] if name in unreached])
