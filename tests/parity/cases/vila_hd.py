"""Golden checks of VILA-HD: preprocess, projector, encode_format, full (text: data)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.checkpoint.rows import import_tensors, prefixed
from hrvlm_jax.core import resample
from hrvlm_jax.core.module import Functional, Module, Rngs
from hrvlm_jax.core.resample import normalise_host
from hrvlm_jax.language.chat import (
  IMAGE,
  encode_prompt,
  get_template,
  prompt_end,
  prompt_end_marker,
  question,
)
from hrvlm_jax.language.config import config_from_hf
from hrvlm_jax.language.conversation import encode_vila, messages_from_llava
from hrvlm_jax.language.generate import Generator, Sampling
from hrvlm_jax.language.prompt import Text, pad_batch
from hrvlm_jax.language.tokenizer import load_tokenizer
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.fusion import TwoPassFusion
from hrvlm_jax.systems.ps3 import weights as ps3_weights
from hrvlm_jax.systems.ps3.data import box_range, target_map
from hrvlm_jax.systems.vila_hd import SYSTEM, format as form, views as host, weights
from hrvlm_jax.systems.vila_hd.config import VilaHDConfig
from hrvlm_jax.systems.vila_hd.prompt_head import PromptHead
from hrvlm_jax.training.losses import token_cross_entropy
from hrvlm_jax.vision.blocks import BlockProjector, block_slots, stack_blocks
from hrvlm_jax.vision.vit import ViTConfig
from hrvlm_jax.vlm import model as vlm
from tests.parity.cases.runner import OPERATOR, WHOLE_MODEL, Case, check
from tests.parity.cases.training import train_step

CHAT = 'vila_qwen2'


class _Parts(Module):
  """What the folder mm_projector/ holds."""

  def __init__(self, kind, n_in, n_out, *, grid, scales, head, rngs: Rngs):
    self.projector = BlockProjector(kind, n_in, n_out, grid=grid, scales=scales, rngs=rngs)
    self.prompt_head = None if head is None else PromptHead(head, n_out, n_in, rngs=rngs)


def _parts(tensors: dict[str, np.ndarray], prefix: str, kind: str, cfg, head: str | None, *,
           grid: int, scales: int) -> _Parts:
  own = {k: v for k, v in tensors.items() if k.startswith(prefix)}
  positions = f'{prefix}high_res_pos_embed' in own
  fn = Functional(lambda rngs: _Parts(
    kind, cfg['mm_hidden_size'], cfg['hidden_size'], grid=grid if positions else None,
    scales=scales, head=head, rngs=rngs))
  table = prefixed(weights.projector_table(kind, positions=positions, prompt_head=head),
                   theirs=prefix)
  return fn.bind(import_tensors(own, table, fn.abstract))


@check('vila_hd', 'projector')
def projector(case: Case) -> None:
  """Every projector type on every grid, the prompt heads, the position table at every size."""
  cfg = case.config
  case.expect_json(('layer_norm_eps',), 1e-5)
  case.expect_json(('gelu',), 'exact erf')
  tensors = case.weights()
  side = round(cfg['low_res_tokens']**0.5)
  heads = {kind: text.split(':')[0] for kind, text in cfg['prompt_head'].plain().items()}
  kinds = sorted({key.split('.')[0] for key in case.keys if '.grid' in key})
  table = None
  for kind in kinds:
    parts = _parts(tensors, f'{kind}.', kind, cfg, heads.get(kind), grid=side,
                   scales=cfg['num_scales'])
    for grid in cfg['grids'].plain():
      name = f'{kind}.grid{grid}'
      x = jnp.asarray(case.input(f'{name}.input'))
      case.expect(f'{name}.output', jax.jit(parts.projector)(x), tol=OPERATOR)
      if case.has(f'{name}.unshuffled'):
        case.exact(f'{name}.unshuffled', stack_blocks(x, parts.projector.side))
    if case.has(f'{kind}.prompt_head.input'):
      state = jnp.asarray(case.input(f'{kind}.prompt_head.input'))
      case.expect(f'{kind}.prompt_head.output', jax.jit(parts.prompt_head)(state), tol=OPERATOR)
    if parts.projector.pos_embed is not None and (table is None or kind == 'mlp_downsample'):
      table = parts.projector
  for key in case.keys:
    if key.startswith('pos_embed_area.'):
      size = int(key.split('.')[1])
      case.expect(key, table.position_table(size)[None], tol=OPERATOR)
      # The form that gathers single places must agree with the table.
      every = jnp.arange(size * size)[None]
      gathered = table.positions(0, size, every) - table.scale_embedding[...][0]
      case.expect(key, gathered, tol=OPERATOR)


@check('vila_hd', 'encode_format')
def encode_format(case: Case) -> None:
  """Features and selections -> tokens: complete, cut and empty selections."""
  cfg = case.config
  case.expect_json(('layer_norm_eps',), 1e-5)
  grids, low_grid = cfg['high_res_grids'].plain(), cfg['low_res_grid']
  parts = _parts(case.weights(), '', cfg['projector'], cfg, cfg['prompt_head'], grid=low_grid,
                 scales=len(grids) + 1)
  features = jnp.asarray(case.input('tower.features'))
  maps = [jnp.asarray(case.input(f'selection_map.scale{i}')) for i in range(len(grids))]
  side, first = parts.projector.side, low_grid**2
  slots = [block_slots(grid, int(m.sum(axis=(1, 2)).max()), side)
           for grid, m in zip(grids, maps, strict=True)]

  def run(features, maps):
    low = form.low_tokens(parts.projector, features[:, :first])
    return low, *form.high_tokens(parts.projector, features, low, maps, slots, thumbnail=first)

  low, high, valid = jax.jit(run)(features, maps)
  case.expect('tokens_low_res_only', low)
  tokens = [np.concatenate([low[b], high[b][valid[b]]]) for b in range(len(low))]
  for b, value in enumerate(tokens):
    case.expect(f'tokens.{b}', value)
  case.expect_json(('token_counts',), [len(value) for value in tokens])
  for i, m in enumerate(maps):
    blocks = -(-grids[i] // side)
    case.expect(f'block_fraction.scale{i}', resample.area(m, blocks, blocks), tol=OPERATOR)
    whole = case.input(f'block_fraction.scale{i}') == 1
    assert np.array_equal(form.complete_blocks(m, side), whole), f'complete blocks of scale {i}'


@check('vila_hd', 'preprocess')
def preprocess(case: Case) -> None:
  """Squashed bytes, normalised values, grounding images, boxes and maps."""
  cfg = case.config
  side, mean, std = cfg['target'], tuple(cfg['mean'].plain()), tuple(cfg['std'].plain())
  values_of = lambda pixels: normalise_host(
    pixels, mean, std, rescale='quotient').transpose(2, 0, 1)
  for number, spec in enumerate(cfg['images']):
    image, name = case.image(spec['file']), spec['file'].split('.')[0]
    case.expect_json(('images', number, 'size_wh'), list(image.size))
    pixels = host.squash(image, side)
    case.exact(f'{name}.resized_uint8', pixels)
    values = values_of(pixels)
    case.expect(f'{name}.pixel_values', values, tol=1e-6)
    case.expect(f'{name}.pixel_values_half', values.astype(np.float16), tol=2**-11)
    if 'box_xyxy' not in spec:
      continue
    box = host.resize_box(spec['box_xyxy'].plain(), *image.size, side)
    case.expect(f'{name}.box_resized', box.astype(np.float32), tol=1e-6)
    case.expect_json(('images', number, 'box_resized'), box.astype(float).tolist(), tol=1e-5)
    case.exact(f'{name}.gt_map', target_map([box], side, side))
    ends = jnp.asarray(box_range(box, side, side))[None]
    case.exact(f'{name}.gt_map', form.target_maps(ends, side)[0])
    grounded = values_of(host.squash(image, side, grounded=True))
    case.expect(f'{name}.pixel_values_with_box', grounded, tol=1e-6)
    case.expect_json(('images', number, 'max_abs_diff_box_vs_plain'),
                     float(np.abs(grounded - values).max()), tol=1e-5)


def _model(case: Case) -> ModelConfig:
  cfg, vit = case.config, case.config['vit']
  for path, value in ((('vit', 'qkv_bias'), True), (('llm', 'qkv_bias'), True),
                      (('select_feature',), 'cls_patch')):
    case.expect_json(path, value)
  width, ratio = vit['embed_dim'], vit['mlp_ratio']
  scales = cfg['ps3']['ps3_scales'].plain()
  trunk = ViTConfig(
    image_size=scales[0], patch_size=vit['patch_size'], width=width, depth=vit['depth'],
    heads=vit['num_heads'], mlp_width=int(width * ratio), activation='gelu',
    norm_eps=cfg['layer_norm_eps_vit'])
  tower = ps3_weights.vision_from_hf(cfg['ps3'].plain(), trunk=trunk)
  if cfg.get('max_select_num_each_scale') is not None:
    tower = dataclasses.replace(tower, budgets=tuple(cfg['max_select_num_each_scale'].plain()))
  text = config_from_hf({'model_type': 'qwen2', **cfg['llm'].plain()})
  return ModelConfig(
    system='vila_hd', text=text, chat=CHAT, after_image='\n', fusion=TwoPassFusion(),
    encoder=VilaHDConfig(
      tower=tower, width=text.width, projector=cfg['projector'],
      prompt_head=cfg['top_down_prompt_head_type'], positions=cfg['high_res_pos_embed'],
      select_layer=cfg['select_layer']))


def _text(case: Case) -> Text:
  """The case's tokenizer; every id it states is held against it."""
  tokenizer = load_tokenizer(case.folder)
  case.waive('tokenizer.json:*', 'loaded as the tokenizer')
  text = Text(tokenizer=tokenizer, chat=CHAT, image_token=IMAGE, after_image='\n')
  for key, value in (
    ('image_token_id', text.image_id), ('video_token_id', tokenizer.special('<vila/video>')),
    ('pad_token_id', tokenizer.special('[PAD]')), ('newline_ids', text.after()),
    ('im_end_id', tokenizer.special('<|im_end|>')), ('stop_token_ids', list(text.stop_ids())),
    ('user_prompt_end_ids', prompt_end_marker(get_template(CHAT), tokenizer)[1])):
    case.expect_json((key,), value)
  return text


def _pixels(case: Case, names) -> np.ndarray:
  return np.stack([case.input(f'pixel_values.{name}').transpose(1, 2, 0) for name in names])


def _views(config: VilaHDConfig, per_row: list[int], pixels: np.ndarray, boxes=None):
  """Packed views of rows with so many images each."""
  each, start, examples = config.low_tokens + config.high_tokens, 0, []
  for n in per_row:
    part = slice(start, start + n)
    examples.append({
      'pixels': np.zeros((n, config.side, config.side, 3), np.uint8),
      'tokens': np.full(n, each, np.int32), 'first': np.zeros(n, np.int32),
      'boxes': np.zeros((n, 4), np.int32) if boxes is None else boxes[part]})
    start += n
  packed = SYSTEM.batch(examples, config, slots=max(start, 1))
  return packed | {'pixels': pixels.astype(np.float32)}


@check('vila_hd', 'full')
def full(case: Case) -> None:
  """Every run: pass 1, prompt, selection, tokens, greedy answer; training with both losses."""
  config, text = _model(case), _text(case)
  tensors = {key.replace('.', '/', 1): value for key, value in case.weights().items()}
  params = import_tensors(tensors, weights.table(config), vlm.build(config).abstract)
  for name, spec in case.config['runs'].items():
    if 'conversations' in spec:
      _train(case, name, spec, config, params, text)
    else:
      _answer(case, name, spec, config, params, text)


def _knobs(config: ModelConfig, spec, **options) -> ModelConfig:
  if 'num_look_close' in spec or 'num_token' not in spec:
    options |= {'looks': spec.get('num_look_close', 1)}
  if 'num_token' in spec:
    options |= {'tokens': spec['num_token']}
  if 'select_each' in spec:  # SELECT_NUM_EACH_SCALE
    options |= {'budgets': tuple(spec['select_each'].plain())}
  if 'mode' in spec:
    options |= {'mode': spec['mode']}
  if 'smooth_selection_prob' in spec:
    options |= {'smooth': spec['smooth_selection_prob']}
  return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, **options))


def _answer(case: Case, name: str, spec, config, params, text: Text) -> None:
  config = _knobs(config, spec)
  encoder, template = config.encoder, get_template(CHAT)
  images = spec['images'].plain()
  like = lambda key, value: np.asarray(value).astype(case.input(f'{name}.{key}').dtype)
  expect_json = lambda key, value, **more: case.expect_json(('runs', name, key), value, **more)
  asked = encode_prompt([question(template, spec['question'], len(images))], template,
                        text.tokenizer, image_id=text.image_id)
  expect_json('prompt_text', asked.text)
  expect_json('n_images', len(images))
  case.exact(f'{name}.input_ids', like('input_ids', [asked.ids]))
  case.exact(f'{name}.prompt_end_position',
             like('prompt_end_position', [prompt_end(asked.ids, template, text.tokenizer)]))
  views = _views(encoder, [len(images)], _pixels(case, images))
  each = encoder.low_tokens + encoder.high_tokens
  row = text.prompt(spec['question'], [each] * len(images))
  batch = pad_batch([row], len(row['tokens']), 'left') | {'views': views}
  fn = vlm.build(config, unrolled=True)
  asks = case.has(f'{name}.top_down.prompt')

  def run(params, batch):
    module = fn.bind(params)
    visual, first, prompt = module.look(batch, keep_cache=True)
    embeds, valid = module.embed(batch, visual)
    seen = module.vision.low(batch['views'])
    start = module.second_pass(batch, visual, first)
    if first is None and asks:  # without looks the original asks all the same
      first = module.first_pass(batch, seen)
      prompt = module.vision.prompt_head(first.state)
    return visual, first, prompt, embeds, valid, seen.tokens, start

  held = vlm.unroll(config, params)
  visual, first, prompt, embeds, valid, low, start = jax.jit(run)(held, batch)
  if first is not None:
    case.expect(f'{name}.pass1.low_res_tokens', low)
    case.expect(f'{name}.top_down.hidden_state', first.state)
    case.expect(f'{name}.top_down.prompt', prompt)
  info = visual.info
  case.expect(f'{name}.tower.features', info['features'])
  for i, (m, p) in enumerate(zip(info['maps'], info['probs'], strict=True)):
    case.exact(f'{name}.selection_map.scale{i}', like(f'selection_map.scale{i}', m))
    case.expect(f'{name}.selection_prob.scale{i}', p)
  expect_json('selected_per_scale',
              [m.sum(axis=(1, 2)).astype(int).tolist() for m in map(np.asarray, info['maps'])])
  real, values = np.asarray(visual.valid[0]), np.asarray(visual.values[0])
  counts = []
  for i in range(len(images)):
    own = slice(i * each, (i + 1) * each)
    tokens = values[own][real[own]]
    counts.append(len(tokens))
    case.expect(f'{name}.image_tokens.{i}', tokens)
  expect_json('tokens_per_image', counts)
  sequence = np.asarray(embeds[0])[np.asarray(valid[0])][None]
  case.expect(f'{name}.inputs_embeds', sequence)
  case.exact(f'{name}.attention_mask', like('attention_mask', np.ones(sequence.shape[:2])))
  wanted = case.input(f'{name}.generate.new_tokens')
  generator = Generator(fn, held)
  sampling = Sampling(max_new_tokens=wanted.shape[1], stop_ids=text.stop_ids())
  out = generator.generate(*start[:2], sampling, keep_logits=True, extras=start[2])
  case.exact(f'{name}.generate.new_tokens', out.tokens.astype(wanted.dtype))
  case.expect(f'{name}.generate.step_logits', out.logits)
  case.expect(f'{name}.prefill_last_logits', out.logits[:, 0])
  ranked = np.sort(out.logits, axis=-1)
  bound = 2 * WHOLE_MODEL * max(1.0, float(np.abs(ranked).max()))
  expect_json('min_top1_top2_gap', float((ranked[..., -1] - ranked[..., -2]).min()), tol=bound)


def _train(case: Case, name: str, spec, config, params, text: Text) -> None:
  config = _knobs(config, spec)
  template, encoder = get_template(CHAT), config.encoder
  case.waive(f'config.json:runs/{name}/token_selection', 'a sentence about the loss')
  like = lambda key, value: np.asarray(value).astype(case.input(f'{name}.{key}').dtype)
  messages = [messages_from_llava(c.plain()) for c in spec['conversations']]
  encoded = [encode_vila(m, template, text.tokenizer, image_id=text.image_id) for m in messages]
  per_row = [row.ids.count(text.image_id) for row in encoded]
  width = case.input(f'{name}.input_ids').shape[1]
  pad = lambda values, fill: [v + [fill] * (width - len(v)) for v in values]
  case.exact(f'{name}.input_ids', like('input_ids', pad(
    [row.ids for row in encoded], text.tokenizer.special('[PAD]'))))
  case.exact(f'{name}.labels', like('labels', pad([row.labels for row in encoded], -100)))
  case.exact(f'{name}.attention_mask', like('attention_mask', pad(
    [[1] * len(row.ids) for row in encoded], 0)))
  pictured = [i for i, n in enumerate(per_row) if n]
  case.exact(f'{name}.prompt_positions', like('prompt_positions', [
    prompt_end(encoded[i].ids, template, text.tokenizer) for i in pictured]))

  each = encoder.low_tokens + encoder.high_tokens
  rows = [text.conversation(m, [each] * n) for m, n in zip(messages, per_row, strict=True)]
  box = np.asarray(spec['gt_box_xyxy_pixels'].plain(), np.float64)
  ends = box_range(box, encoder.side, encoder.side)
  target = target_map([box], encoder.side, encoder.side)[None]
  case.exact(f'{name}.gt_map', target)
  views = _views(encoder, per_row, _pixels(case, spec['images'].plain()),
                 np.repeat(ends[None], sum(per_row), axis=0))
  length = max(len(row['tokens']) for row in rows)
  batch = pad_batch(rows, length, 'right') | {'views': views}
  guided = _knobs(config, spec, select_target=True)

  def run(params, batch):
    module = vlm.build(config).bind(params)
    visual, _, prompt = module.look(batch, gradient=True)
    embeds, valid = module.embed(batch, visual)
    hidden = module.language(embeds, valid)
    loss, count = form.selection_loss(visual.info['probs'], form.target_maps(
      batch['views']['boxes'], encoder.side))
    by_target = vlm.build(guided).bind(params).look(batch)[0].info
    return (visual.info, prompt, embeds, valid, module.logits(hidden), loss, count,
            (by_target['maps'], by_target['probs']))

  info, prompt, embeds, valid, logits, loss, count, by_target = jax.jit(run)(params, batch)
  case.expect(f'{name}.top_down_prompt', np.asarray(prompt)[pictured])
  size = case.input(f'{name}.expanded_labels').shape[1]
  packed = lambda x, fill: _packed(x, np.asarray(valid), size, fill)
  labels = packed(batch['labels'], -100)
  case.expect(f'{name}.inputs_embeds', packed(embeds, 0))
  case.exact(f'{name}.expanded_labels', like('expanded_labels', labels))
  case.exact(f'{name}.expanded_mask', like('expanded_mask', packed(valid, 0)))
  scores = packed(logits, 0)
  at = np.argwhere(labels[:, 1:] != -100)
  case.exact(f'{name}.target_positions', like('target_positions', at))
  case.expect(f'{name}.logits_at_targets', scores[at[:, 0], at[:, 1]])
  total, number = token_cross_entropy(jnp.asarray(scores), jnp.asarray(labels))
  case.expect(f'{name}.loss_text', np.reshape(total / number, (1,)))
  case.expect(f'{name}.loss_selection', np.reshape(loss, (1,)))
  # The train step adds the two with its weight; 1 here, the case has none.
  weighed = dataclasses.replace(config, fusion=TwoPassFusion(selection_weight=1.0))
  step = train_step(weighed, objective='two_pass')(params, batch)
  wanted = sum(float(case.input(f'{name}.loss_{kind}').item()) for kind in ('text', 'selection'))
  assert abs(step.loss - wanted) <= 1e-4 * max(1, abs(wanted)), (
    f'{name}: the train step has {step.loss}, the two losses make {wanted}')
  assert int(count) == sum(per_row)
  for prefix, (maps, probs) in ((name, (info['maps'], info['probs'])),
                                (f'{name}.gt_guided', by_target)):
    for i, (m, p) in enumerate(zip(maps, probs, strict=True)):
      key = f'{prefix}.selection_map.scale{i}'
      case.exact(key, np.asarray(m).astype(case.input(key).dtype))
      case.expect(f'{prefix}.selection_prob.scale{i}', p)


def _packed(x: Any, valid: np.ndarray, size: int, fill) -> np.ndarray:
  """[b size ...]: the valid places of each row moved together, `fill` behind them."""
  x = np.asarray(x)
  out = np.full((len(x), size, *x.shape[2:]), fill, x.dtype)
  for row, mask in enumerate(valid):
    out[row, :mask.sum()] = x[row][mask]
  return out
