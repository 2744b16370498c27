"""Golden checks of PS3: encoder, pooled pre-training forward, text tower, losses, preprocessing."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.checkpoint.rows import export_tensors, import_tensors, prefixed
from hrvlm_jax.core import resample
from hrvlm_jax.core.module import Functional
from hrvlm_jax.core.pixels import normalise_host
from hrvlm_jax.language.captions import CLEANERS
from hrvlm_jax.systems.ps3 import data, model, weights
from hrvlm_jax.systems.ps3.config import PoolConfig, PS3Config
from hrvlm_jax.systems.ps3.encoder import Encoded, Encoder, feature_maps
from hrvlm_jax.systems.ps3.patches import scaled
from hrvlm_jax.systems.ps3.plan import Plan, make_plan
from hrvlm_jax.systems.ps3.selection import choose, maps_of, override, smooth
from hrvlm_jax.systems.ps3.text import TextTower, unit
from hrvlm_jax.systems.ps3.views import squash
from hrvlm_jax.training.contrastive import ContrastiveConfig, pretrain_losses
from hrvlm_jax.training.schedules import learning_rate
from hrvlm_jax.verify.runner import OPERATOR, WHOLE_MODEL, Case, Result, check
from hrvlm_jax.vision.vit import ViTConfig

_ACTIVATIONS = {'gelu_exact': 'gelu', 'gelu_tanh': 'gelu_tanh'}
_NOTES = {
  'config.json:seed': 'seed of the weights, which are stored',
  'config.json:topk': 'states the tie rule, which selection maps hold us to',
  'config.json:weights_prefix': 'the weight table names every tensor',
  'config.json:runs/*/torch_topk_gives_same_maps': "about torch's own tie order",
  'config.json:attn_pool/note': 'a remark',
  'config.json:final_norm_note': 'a remark',
}
_SEEDS = 4  # perturbations that measure how well a value is defined in float32
_LOOSE = 1e-2  # what an ill-defined value must still agree to
GAP = 2e-5  # a distance of two probabilities, each within 1e-5


def _waive(case: Case) -> None:
  for pattern, reason in _NOTES.items():
    case.waive(pattern, reason)


def _vision_config(case: Case, text=None) -> PS3Config:
  """The encoder's config from the case's sizes."""
  cfg, trunk = case.config, case.config['trunk']
  case.expect_json(('trunk', 'qkv_bias'), True)
  width, ratio = trunk['embed_dim'], trunk['mlp_ratio']
  patch, side = trunk['patch_size'], trunk['patch_grid']
  case.expect_json(('trunk', 'img_size'), trunk['img_size'])
  if trunk['img_size'] // patch != side:
    raise ValueError(f'trunk.patch_grid {side} is not img_size // patch_size')
  vision = ViTConfig(
    image_size=side * patch, patch_size=patch, width=width, depth=trunk['depth'],
    heads=trunk['num_heads'], mlp_width=int(width * ratio), norm_eps=trunk['ln_eps'],
    activation=_ACTIVATIONS[trunk['act']])
  pool = None
  if 'attn_pool' in cfg:
    spec = cfg['attn_pool']
    pool = PoolConfig(width=spec['dim'], heads=spec['num_heads'],
                      mlp_width=int(spec['dim'] * spec['mlp_ratio']))
  values = cfg['vision_config'].plain()
  base, defaults = weights.vision_from_hf(values, trunk=vision, pool=pool, text=text), (
    cfg['defaults'].plain() if 'defaults' in cfg else {})
  if values.get('radio') and values['radio_adapter_mlp_input_dim'] != width:
    raise ValueError("radio_adapter_mlp_input_dim is not the trunk's width")
  config = base
  if base.saliency is not None and 'highres_selection_input' in defaults:
    config = dataclasses.replace(config, saliency=dataclasses.replace(
      base.saliency, input_size=defaults['highres_selection_input']))
  for key, found in (('separate_pos_emb', config.residual),
                     ('highres_selection_feature', config.saliency is not None)):
    if key not in values and key in defaults and defaults[key] != found:
      raise ValueError(f'defaults.{key} is {defaults[key]}, ours is {found}')
  if 'cosine_scale' in defaults:
    config = dataclasses.replace(config, cosine_scale=defaults['cosine_scale'])
  if 'resolved_max_select_num_each_scale' in cfg:
    case.expect_json(('resolved_max_select_num_each_scale',), list(config.resolved_budgets))
  return config


def _nhwc(x: np.ndarray) -> jax.Array:
  return jnp.asarray(np.moveaxis(x, 1, -1))


def _encoder(case: Case, config: PS3Config):
  """(functional, parameters) of the case's encoder."""
  fn = Functional(lambda rngs: Encoder(config, rngs=rngs))
  table = prefixed(weights.vision_table(config), theirs='vision_model.')
  return fn, import_tensors(case.weights(), table, fn.abstract)


class _Run:
  """One entry of `runs`: its inputs and its tensors under one prefix."""

  def __init__(self, case: Case, name: str):
    self.case, self.name = case, name
    self.spec = case.config['runs'][name]
    self.prefix = f'{name}.' if name else ''
    pixels = f'{self.prefix}pixel_values'
    self.images = _nhwc(case.input(pixels if case.has(pixels) else 'pixel_values'))
    self.prompt = self._named('prompt')
    self.target = self._named('gt_selection_maps')

  def _named(self, key: str):
    return jnp.asarray(self.case.input(self.spec[key])) if key in self.spec else None

  def has(self, key: str) -> bool:
    return self.case.has(self.prefix + key)

  def expect(self, key: str, value, **options) -> None:
    """Compares when the case has the tensor."""
    if self.has(key):
      self.case.expect(self.prefix + key, value, **options)

  def expect_all(self, values: dict[str, Any]) -> None:
    """Compares every value the case has a tensor for."""
    for key, value in values.items():
      exact = key.startswith(('resized', 'area_scale1', 'pool_mask_fraction'))
      self.expect(key, value, tol=OPERATOR if exact else WHOLE_MODEL)

  def json(self, key: str, value, **options) -> None:
    """Compares a leaf of the run's entry when it exists."""
    if key in self.spec:
      self.case.expect_json(('runs', self.name, key), value, **options)

  def plan(self, config: PS3Config) -> Plan:
    first = self.spec.get('only_select_first_n_scale')
    if first is not None and not isinstance(first, int):
      first = first.plain()
    looks = self.spec.get('num_look_close')
    tokens = self.spec.get('num_token_look_close')
    if looks is None and tokens is None:
      looks = 1  # pooled runs take one full look
    return make_plan(*self.images.shape[1:3], config, num_looks=looks, num_tokens=tokens,
                     first_scales=first)


@check('ps3', 'encoder', 'pretrain_pool')
def encoder(case: Case) -> None:
  """Every intermediate of every run: thumbnail, selection, looks, merged output, pooling."""
  _waive(case)
  config = _vision_config(case)
  fn, params = _encoder(case, config)
  for name in case.config['runs']:
    run = _Run(case, name)
    _geometry(run, config)
    plan = run.plan(config)
    # One compiled program per run: hundreds of small ones cost a minute of compilation.
    if run.spec.get('output_hidden_states', True):
      values, used = jax.jit(
        lambda p, x, run=run, plan=plan: _hidden(run, fn.bind(p), plan, *x)
      )(params, (run.images, run.prompt, run.target))
    else:
      case.expect_json(('runs', name, 'output_hidden_states'), False)
      is_global = None
      if 'is_global_text' in run.spec:
        is_global = jnp.asarray(case.input(run.spec['is_global_text']))
      only = run.spec.get('pool_gt_token_only', False)
      values, used = jax.jit(
        lambda p, x, run=run, plan=plan, only=only: _pooled(fn.bind(p), plan, *x, only=only)
      )(params, (run.images, run.prompt, run.target, is_global))
    for variant in values.pop('again', []):
      run.expect_all(variant)
    run.expect_all(values)
    if used is not None:
      _boundaries(run, used, plan)


def _geometry(run: _Run, config: PS3Config) -> None:
  plan = run.plan(config)
  run.json('image_hw', list(run.images.shape[1:3]))
  run.json('image_size_each_scale', [list(size) for size in plan.sizes])
  run.json('feature_size_each_scale', [list(grid) for grid in plan.grids])
  batch = run.images.shape[0]
  counts = plan.counts * batch if len(plan.counts) == 1 else plan.counts
  taken = [[sum(look[i] for look in looks) for looks in counts] for i in range(len(plan.cells))]
  run.json('selected_per_scale', taken)


def _numbered(key: str, values) -> dict[str, Any]:
  return {f'{key}.{i}': value for i, value in enumerate(values)}


def _thumbnail(module: Encoder, images, prompt):
  """The low-res pass and everything the selection computes from it."""
  config = module.config
  depth = config.vision.depth
  low = module.encode_low(images, keep=depth, all_scales=True)
  heads_first = lambda x: jnp.swapaxes(x, 2, 3)
  last = low.hidden[depth - 1]
  cosines = module.selection.cosines(low.features, prompt)
  values = {f'low.hidden.{layer}': state for layer, state in low.hidden.items()} | {
    'low.kv_cache': jnp.stack([heads_first(low.keys), heads_first(low.values)], axis=1),
    'low.pooled': module.pool(last),
    'sel.cos_low': cosines[0],
    'sel.prob_lowgrid': module.selection.low_probabilities(low.features, prompt),
  }
  if config.adapter is not None:
    values['low.siglip_proj'] = module.head(last)
  if cosines[1] is not None:
    values['sel.cos_high_pooled'] = cosines[1]
    values['sel.highres_feat'] = jnp.moveaxis(low.features.detail, -1, 1)[:1]
  return low, values


def _probabilities(module: Encoder, low, plan: Plan, prompt, target, smoothed=False):
  """(the maps used, named values)."""
  prior = module.probabilities(low, None, plan)
  values = _numbered('sel.prior_probs', prior)
  used = prior
  if prompt is not None:
    used = module.probabilities(low, prompt, plan)
    values |= _numbered('sel.posterior_probs', used)
  if target is not None:
    values['area_scale1'] = resample.area(target, *plan.grids[1])
    used = override(used, target, plan)
  if smoothed:
    used = smooth(used)
  return used, values | _numbered('sel.probs', used)


def _boundaries(run: _Run, probs, plan: Plan) -> None:
  """How clear the cuts are: at every cut that refuses a cell, the smallest nonzero distance of a
  taken or refused probability from the last one taken, and whether that one is tied."""
  gaps, tie = [], False
  batch = run.images.shape[0]
  for i, p in enumerate(probs):
    ranked = np.sort(np.asarray(p).reshape(batch, -1), axis=1)[:, ::-1]
    for b in range(batch):
      start = 0
      for look in plan.counts[b if len(plan.counts) > 1 else 0]:
        end = start + look[i]
        if start < end < ranked.shape[1]:
          last = ranked[b, end - 1]
          tie |= bool(last == ranked[b, end])
          distances = np.abs(ranked[b, start:] - last)
          gaps += [float(d) for d in distances[distances > 0]]
        start = end
  run.json('exact_tie_at_selection_boundary', tie)
  stated = run.spec.get('smallest_nonzero_probability_gap_at_boundary')
  run.json('smallest_nonzero_probability_gap_at_boundary', min(gaps, default=stated), tol=GAP)


def _hidden(run: _Run, module: Encoder, plan: Plan, images, prompt, target):
  """(named values of a run that returns hidden states, the probabilities used)."""
  last = module.config.vision.depth - 1
  low, values = _thumbnail(module, images, prompt)
  for i, size in enumerate(plan.sizes):
    if run.has(f'resized.{i}'):
      values[f'resized.{i}'] = jnp.moveaxis(resample.bicubic(images[:1], *size), -1, 1)
  if not plan.looks:
    return values | {'out.last_hidden_state': low.hidden[last],
                     'last_hidden_state': low.hidden[last]}, None
  smoothed = bool(run.spec.get('smooth_selection_prob', False))
  used, more = _probabilities(module, low, plan, prompt, target, smoothed)
  values |= more | _looks(module, plan, images, low, used)
  if not run.has('out.last_hidden_state'):
    return values, used
  out = module.encode_high(low, images, used, plan)
  values |= _outputs(out)
  maps = feature_maps(out.last, out.maps, plan.grids[0][0])
  values |= _numbered('out.feature_maps', [jnp.moveaxis(m, -1, 1) for m in maps])
  if plan.looks > 1:  # the other way to run looks
    values['again'] = [_outputs(module.encode_high(low, images, used, plan, at_once=True))]
  return values, used


def _outputs(out: Encoded) -> dict[str, Any]:
  return {'out.last_hidden_state': out.last} | _numbered('out.selection_maps', out.maps) | {
    f'out.hidden.{layer}': state for layer, state in out.hidden.items()}


def _looks(module: Encoder, plan: Plan, images, low, used) -> dict[str, Any]:
  """Every look by itself: maps, tokens, pool."""
  values = {}
  sized = scaled(images, plan)
  for number, cells in enumerate(choose(used, plan)):
    tokens = module.embed_high(sized, cells, plan.look(number), plan)
    states = module.tower.run(tokens, prefix=(low.keys, low.values)).x
    values |= _numbered(f'look{number}.maps', maps_of(cells, plan)) | {
      f'look{number}.tokens': tokens, f'look{number}.pooled': module.pool(states)}
  return values


def _pooled(module: Encoder, plan: Plan, images, prompt, target, is_global, *, only: bool):
  """(named values of a run that returns pooled vectors, the probabilities used)."""
  low, values = _thumbnail(module, images, prompt)
  used, more = _probabilities(module, low, plan, prompt, target)
  values |= more | _looks(module, plan, images, low, used)
  out = model.pooled_images(module, images, prompt=prompt, target=target, pool_target=only,
                            is_global=is_global)
  if target is not None:
    values['pool_mask_fraction'] = model.covered(target, out.cells, plan)
  return values | {'low.pooled': out.low, 'look0.pooled': out.high, 'out.pooled': out.pooled,
                   **_numbered('out.selection_maps', maps_of(out.cells, plan))}, used


@check('ps3', 'text_tower')
def text_tower(case: Case) -> None:
  """Embeddings, every block, projection, prompt; caption cleaning."""
  _waive(case)
  config = weights.text_from_hf(case.config['text_config'].plain())
  fn = Functional(lambda rngs: TextTower(config, rngs=rngs))
  rows = weights.text_table()
  params = import_tensors(case.weights(), rows, fn.abstract)
  ids = jnp.asarray(case.input('input_ids').astype(np.int32))

  def states(p, ids):
    module = fn.bind(p)
    x = module.embeddings(ids)
    values = {'embeddings': x, 'ln_final': module.norm(module.states(x)),
              'pooled_output': module(ids), 'pooled_normalized': unit(module(ids)),
              'prompt': module.prompt(module.features(ids))}
    return values | {f'hidden.{i}': module.states(x, stop=i + 1) for i in range(config.depth)}

  for key, value in jax.jit(states)(params, ids).items():
    if case.has(key):
      case.expect(key, value)
  case.expect_json(('layer_norm_eps_prompt_proj',), fn.bind(params).prompt_head.norm.eps)
  if 'clean_inputs' in case.config:
    inputs = case.config['clean_inputs'].plain()
    for name in case.config['clean_outputs']:
      case.expect_json(('clean_outputs', name), [CLEANERS[name](text) for text in inputs])


@check('ps3', 'pretrain_loss')
def pretrain_loss(case: Case) -> None:
  """Features, logits, the three losses, gradients by training name, learning rates."""
  _waive(case)
  cfg = case.config
  text = weights.text_from_hf(cfg['text_config'].plain())
  vision = _vision_config(case)
  text = dataclasses.replace(text, prompt_width=vision.vision.width)
  config = dataclasses.replace(vision, text=text)
  fn = model.build(config)
  table = weights.model_table(config, layout='training')
  params = import_tensors(case.weights(), table, fn.abstract)
  images = _nhwc(case.input('pixel_values'))
  target = case.input('gt_selection_maps')
  if 'boxes_xyxy' in cfg:
    side = target.shape[1:]
    made = [data.target_map([box], *side) for box in cfg['boxes_xyxy'].plain()]
    case.expect('gt_selection_maps', np.stack(made))
  for name in cfg['runs']:
    _pretrain_run(case, name, fn, params, table, images, jnp.asarray(target))
  if 'lr_schedule' in cfg:
    rates = cfg['lr_schedule']
    rate = learning_rate('cosine', peak=rates['base'], total_steps=rates['total'],
                         warmup_steps=rates['warmup'], warmup_from=1)
    for step in rates['samples']:
      stated = rates['samples'][step]
      gap = abs(float(rate(int(step))) - stated)
      case.expect_json(('lr_schedule', 'samples', step),
                       stated if gap <= OPERATOR * rates['base'] else float(rate(int(step))))


def _pretrain_run(case, name, fn, params, table, images, target):
  cfg = case.config['runs'][name]
  prior, posterior = cfg['weights'].plain()
  ids = jnp.asarray(case.input('input_ids').astype(np.int32))
  is_global = jnp.asarray(case.input('is_global_text'))
  # Runs are told apart by their names alone: README of the case.
  use_target = name != 'nogt'
  if name == 'allglobal':
    is_global = jnp.ones_like(is_global)
  batch = {'images': images, 'tokens': ids, 'target': target, 'is_global': is_global}
  losses = ContrastiveConfig(prior_weight=prior, posterior_weight=posterior,
                             select_target=use_target, pool_target=use_target)

  def features(p, batch):
    module = fn.bind(p)
    image, text, out = module(batch, select_target=use_target, pool_target=use_target)
    scale = jnp.exp(module.logit_scale[...])
    values = {'image_features': image, 'text_features': text, 'prompt': module.text.prompt(text),
              'logit_scale_exp': scale, 'low.pooled': out.low, 'look0.pooled': out.high,
              'logits': scale * image @ text.T + module.logit_bias[...]}
    targets = [(m > 0).astype(jnp.float32) for m in model.target_maps(batch['target'], out.plan)]
    for key, maps in (('prior_probs', out.prior), ('posterior_probs', out.posterior),
                      ('selection_maps', maps_of(out.cells, out.plan)), ('gt_target', targets)):
      values |= _numbered(key, maps)
    return values, out, pretrain_losses(fn, p, batch, losses)

  features = jax.jit(features)
  values, out, results = features(params, batch)
  noise = _noise(lambda b: features(params, b)[0], batch, values)
  for key, value in values.items():
    if case.has(f'{name}.{key}'):
      _expect_conditioned(case, f'{name}.{key}', value, noise[key])
  for key, ours in (('total', 'total'), ('contrastive_loss', 'contrastive'),
                    ('prior_box_supervision_loss', 'prior'),
                    ('posterior_box_supervision_loss', 'posterior')):
    # The stated parts carry their weights.
    value = results[ours] * {'prior': prior, 'posterior': posterior}.get(ours, 1.0)
    case.expect(f'{name}.loss.{key}', value, tol=OPERATOR)
    case.expect_json(('runs', name, 'losses', key), float(value), tol=OPERATOR)
  run = _PretrainBoundary(case, name, images)
  _boundaries(run, out.used, out.plan)
  if any(key.startswith(f'{name}.grad') for key in case.keys):
    _gradients(case, name, fn, params, table, batch, losses)


class _PretrainBoundary(_Run):
  """The part of a run that `_boundaries` reads."""

  def __init__(self, case, name, images):
    self.case, self.name, self.images = case, name, images
    self.spec = case.config['runs'][name]


def _gradients(case, name, fn, params, table, batch, losses):
  total = jax.jit(jax.grad(lambda p, b: pretrain_losses(fn, p, b, losses)['total']))

  def by_name(batch):
    grads = dict(export_tensors(total(params, batch), table))
    squares = sum(float(np.square(g.astype(np.float64)).sum()) for g in grads.values())
    return grads | {'': np.float32(np.sqrt(squares))}  # the global norm

  names = by_name(batch)
  noise = _noise(by_name, batch, names)
  for key in case.keys:
    if key.startswith(f'{name}.grad.'):
      ours = key.removeprefix(f'{name}.grad.')
      _expect_conditioned(case, key, names[ours], noise[ours])
  norm = names.pop('')
  if case.has(f'{name}.grad_global_norm'):
    _expect_conditioned(case, f'{name}.grad_global_norm', norm, noise[''])
  spec = case.config['runs'][name]
  silent = sorted(n for n, g in names.items() if not np.any(g))
  listed = []
  for key in ('params_without_grad', 'params_with_zero_grad'):
    if key in spec:
      listed += spec[key].plain()
      case.expect_json(('runs', name, key), [n for n in spec[key].plain() if n in silent])
  if set(silent) != set(listed):
    raise ValueError(f'run {name}: parameters without gradient are {silent}, the case lists '
                     f'{listed}')


def _noise(function, batch, values) -> dict[str, float]:
  """How far each value moves when every pixel moves by half a unit in its last place.

  A layer norm over few, nearly equal channels (eps 1e-6) amplifies roundings a thousandfold: a
  value that moves further than its tolerance is not defined to that tolerance in float32, in the
  original no more than here.
  """
  moved = dict.fromkeys(values, 0.0)
  images = batch['images']
  for seed in range(_SEEDS):
    signs = jax.random.rademacher(jax.random.key(seed), images.shape, images.dtype)
    again = function(batch | {'images': images * (1 + signs * jnp.finfo(images.dtype).eps / 2)})
    for key, value in values.items():
      gap = np.abs(np.asarray(again[key], np.float64) - np.asarray(value, np.float64))
      moved[key] = max(moved[key], float(gap.max(initial=0.0)))
  return moved


def _expect_conditioned(case: Case, key: str, value, noise: float) -> None:
  """`case.expect`; where rounding alone moves the value by more than its tolerance, the tolerance
  cannot decide: the tensor is waived, with the numbers, but must still agree to 1 %."""
  reference = case.input(key)
  limit = WHOLE_MODEL * max(1.0, float(np.max(np.abs(reference), initial=0.0)))
  gap = float(np.max(np.abs(np.asarray(value, np.float64) - reference), initial=0.0))
  if gap <= limit or noise <= limit or reference.dtype.kind in 'iub':
    case.expect(key, value)
  elif gap > _LOOSE / WHOLE_MODEL * limit:
    case.expect(key, value)  # records the failure
  else:
    case.results.append(Result(
      key, gap, limit, 'waived',
      f'half a unit in the last place of the pixels alone moves it by {noise:.2g}, more than the '
      f'tolerance; it agrees to {gap:.2g}'))


@check('ps3', 'preprocess')
def preprocess(case: Case) -> None:
  """Image processor, in-encoder resizing, crop with boxes, caption cleaning."""
  cfg = case.config
  side = cfg['image_size']
  stats = {kind: (tuple(cfg[f'mean_{kind}'].plain()), tuple(cfg[f'std_{kind}'].plain()))
           for kind in ('siglip', 'radio')}
  case.waive('config.json:pillow', 'version of the reference; bytes are equal in every version')
  case.waive('config.json:patch_size', 'no patches in this case')
  values = {}
  for key in case.keys:
    kind, _, file = key.partition('.')
    if kind in stats:
      pixels = squash(case.image(f'{file}.png'), side)
      values[key] = normalise_host(pixels, *stats[kind], rescale='quotient')
      case.expect(key, values[key].transpose(2, 0, 1), tol=1e-6)
  image = case.image('rgb.png')
  case.expect_json(('image_hw',), [image.height, image.width])
  for i, size in enumerate(cfg['scales'].plain()):
    small = resample.bicubic(jnp.asarray(values['siglip.rgb'])[None], size, size)[0]
    case.expect(f'scale.{i}', np.asarray(small).transpose(2, 0, 1), tol=OPERATOR)
  spec = cfg['fixed_crop']
  crop = data.Crop(top=spec['top'], left=spec['left'], height=spec['height'], width=spec['width'])
  pixels = normalise_host(data.crop_image(image, crop, side), *stats['siglip'], rescale='quotient')
  case.expect('train.pixel_values', pixels.transpose(2, 0, 1), tol=1e-6)
  for name in cfg['train_boxes']:
    boxes = data.crop_boxes(cfg['train_boxes'][name]['boxes'].plain(), crop, side)
    stated = cfg['train_boxes'][name]['boxes_after'].plain()
    gap = float(np.max(np.abs(np.asarray(boxes, np.float64) - np.asarray(stated)), initial=0.0))
    limit = OPERATOR * max(1.0, float(np.max(np.abs(stated))))
    case.expect_json(('train_boxes', name, 'boxes_after'),
                     stated if gap <= limit else np.asarray(boxes).tolist())
    case.expect(f'train.{name}.gt_selection_map', data.target_map(boxes, side, side))
  _captions(case)


def _captions(case: Case) -> None:
  if 'caption_filter' not in case.config:
    return
  spec = case.config['caption_filter']
  inputs = spec['inputs'].plain()
  cleaned = [data.clean_caption(text) for text in inputs]
  case.expect_json(('caption_filter', 'outputs'), cleaned)
  # The original draws from Python's generator; ours takes the two numbers from any source.
  rng = random.Random(spec['sentence_masking_samples_python_random_seed'])
  rows = [[data.mask_sentences(text, rng.randint) for text in cleaned]
          for _ in spec['sentence_masking_samples']]
  case.expect_json(('caption_filter', 'sentence_masking_samples'), rows)
