"""Golden check of PS3's pre-training step: features, losses, gradients, learning rates."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from hrvlm_jax.checkpoint.rows import export_tensors, import_tensors
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.ps3 import data, model, weights
from hrvlm_jax.systems.ps3.losses import ContrastiveConfig, pretrain_losses
from hrvlm_jax.systems.ps3.pretrain import PretrainOptions
from hrvlm_jax.systems.ps3.selection import maps_of
from hrvlm_jax.training.optimizer import learning_rate
from tests.parity.cases.ps3.common import (
  Run,
  boundaries,
  compiled,
  nhwc,
  numbered,
  vision_config,
  waive_notes,
)
from tests.parity.cases.runner import OPERATOR, Case, check
from tests.parity.cases.training import train_step


@check('ps3', 'pretrain_loss')
def pretrain_loss(case: Case) -> None:
  """Features, logits, the three losses, gradients by training name, learning rates."""
  waive_notes(case)
  cfg = case.config
  text = weights.text_from_hf(cfg['text_config'].plain())
  vision = vision_config(case)
  text = dataclasses.replace(text, prompt_width=vision.vision.width)
  config = dataclasses.replace(vision, text=text)
  fn = model.build(config)
  table = weights.model_table(config, layout='training')
  params = import_tensors(case.weights(), table, fn.abstract)
  images = nhwc(case.input('pixel_values'))
  target = case.input('gt_selection_maps')
  if 'boxes_xyxy' in cfg:
    side = target.shape[1:]
    made = [data.target_map([box], *side) for box in cfg['boxes_xyxy'].plain()]
    case.expect('gt_selection_maps', np.stack(made))
  program = functools.cache(lambda use_target: _program(fn, use_target))
  for name in cfg['runs']:
    _pretrain_run(case, name, config, program, params, table, images, jnp.asarray(target))
  if 'lr_schedule' in cfg:
    rates = cfg['lr_schedule']
    rate = learning_rate('cosine', peak=rates['base'], total_steps=rates['total'],
                         warmup_steps=rates['warmup'], warmup_from=1)
    for step in rates['samples']:
      stated = rates['samples'][step]
      gap = abs(float(rate(int(step))) - stated)
      case.expect_json(('lr_schedule', 'samples', step),
                       stated if gap <= OPERATOR * rates['base'] else float(rate(int(step))))


def _program(fn, use_target: bool):
  """Named values, the pooled forward and the losses of a batch; one program for several runs."""

  def features(p, batch, weights):
    module = fn.bind(p)
    image, text, out = module(batch, select_target=use_target, pool_target=use_target)
    scale = jnp.exp(module.logit_scale[...])
    values = {'image_features': image, 'text_features': text, 'prompt': module.text.prompt(text),
              'logit_scale_exp': scale, 'low.pooled': out.low, 'look0.pooled': out.high,
              'logits': scale * image @ text.T + module.logit_bias[...]}
    targets = [(m > 0).astype(jnp.float32) for m in model.target_maps(batch['target'], out.plan)]
    for key, maps in (('prior_probs', out.prior), ('posterior_probs', out.posterior),
                      ('selection_maps', maps_of(out.cells, out.plan)), ('gt_target', targets)):
      values |= numbered(key, maps)
    return values, out, pretrain_losses(fn, p, batch, _losses(use_target, *weights))

  return compiled(features)


def _losses(use_target: bool, prior, posterior) -> ContrastiveConfig:
  return ContrastiveConfig(prior_weight=prior, posterior_weight=posterior,
                           select_target=use_target, pool_target=use_target)


def _pretrain_run(case, name, config, program, params, table, images, target):
  cfg = case.config['runs'][name]
  prior, posterior = cfg['weights'].plain()
  ids = jnp.asarray(case.input('input_ids').astype(np.int32))
  is_global = jnp.asarray(case.input('is_global_text'))
  use_target = _uses_target(name)
  if name == 'allglobal':
    is_global = jnp.ones_like(is_global)
  batch = {'images': images, 'tokens': ids, 'target': target, 'is_global': is_global}
  values, out, results = program(use_target)(params, batch, (prior, posterior))
  for key, value in values.items():
    if case.has(f'{name}.{key}'):
      case.expect(f'{name}.{key}', value)
  for key, ours in (('total', 'total'), ('contrastive_loss', 'contrastive'),
                    ('prior_box_supervision_loss', 'prior'),
                    ('posterior_box_supervision_loss', 'posterior')):
    # The stated parts carry their weights.
    value = results[ours] * {'prior': prior, 'posterior': posterior}.get(ours, 1.0)
    case.expect(f'{name}.loss.{key}', value, tol=OPERATOR)
    case.expect_json(('runs', name, 'losses', key), float(value), tol=OPERATOR)
  run = _PretrainBoundary(case, name, images)
  boundaries(run, out.used, out.plan)
  if any(key.startswith(f'{name}.grad') for key in case.keys):
    _gradients(case, name, config, params, table, batch, _losses(use_target, prior, posterior))


def _uses_target(name: str) -> bool:
  """Runs are told apart by their names alone: README of the case."""
  return name != 'nogt'


class _PretrainBoundary(Run):
  """The part of a run that `boundaries` reads."""

  def __init__(self, case, name, images):
    self.case, self.name, self.images = case, name, images
    self.spec = case.config['runs'][name]


def _gradients(case, name, config, params, table, batch, losses):
  whole = ModelConfig(system='ps3', encoder=config, text=None, image_token=None)
  step = train_step(whole, objective=PretrainOptions(contrast=losses),
                    compile=compiled)(params, batch)
  case.expect(f'{name}.loss.total', np.reshape(step.loss, case.input(f'{name}.loss.total').shape),
              tol=OPERATOR)
  names = dict(export_tensors(step.gradients, table))
  for key in case.keys:
    if key.startswith(f'{name}.grad.'):
      case.expect(key, names[key.removeprefix(f'{name}.grad.')])
  if case.has(f'{name}.grad_global_norm'):
    squares = sum(float(np.square(g.astype(np.float64)).sum()) for g in names.values())
    case.expect(f'{name}.grad_global_norm', np.float32(np.sqrt(squares)))
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
