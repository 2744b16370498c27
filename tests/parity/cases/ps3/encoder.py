"""Golden checks of PS3's encoder and of its pooled pre-training forward."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hrvlm_jax.checkpoint.rows import import_tensors, prefixed
from hrvlm_jax.core import resample
from hrvlm_jax.core.module import Functional
from hrvlm_jax.systems.ps3 import model, weights
from hrvlm_jax.systems.ps3.config import PS3Config
from hrvlm_jax.systems.ps3.encoder import Encoded, Encoder, feature_maps
from hrvlm_jax.systems.ps3.patches import scaled
from hrvlm_jax.systems.ps3.plan import Plan
from hrvlm_jax.systems.ps3.selection import choose, maps_of, override, smooth
from tests.parity.cases.ps3.common import Run, boundaries, numbered, vision_config, waive_notes
from tests.parity.cases.runner import Case, check


@check('ps3', 'encoder', 'pretrain_pool')
def encoder(case: Case) -> None:
  """Every intermediate of every run: thumbnail, selection, looks, merged output, pooling."""
  waive_notes(case)
  config = vision_config(case)
  fn, params = _encoder(case, config)
  for name in case.config['runs']:
    run = Run(case, name)
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
      boundaries(run, used, plan)


def _encoder(case: Case, config: PS3Config):
  """(functional, parameters) of the case's encoder."""
  fn = Functional(lambda rngs: Encoder(config, rngs=rngs))
  table = prefixed(weights.vision_table(config), theirs='vision_model.')
  return fn, import_tensors(case.weights(), table, fn.abstract)


def _geometry(run: Run, config: PS3Config) -> None:
  plan = run.plan(config)
  run.json('image_hw', list(run.images.shape[1:3]))
  run.json('image_size_each_scale', [list(size) for size in plan.sizes])
  run.json('feature_size_each_scale', [list(grid) for grid in plan.grids])
  batch = run.images.shape[0]
  counts = plan.counts * batch if len(plan.counts) == 1 else plan.counts
  taken = [[sum(look[i] for look in looks) for looks in counts] for i in range(len(plan.cells))]
  run.json('selected_per_scale', taken)


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
  values = numbered('sel.prior_probs', prior)
  used = prior
  if prompt is not None:
    used = module.probabilities(low, prompt, plan)
    values |= numbered('sel.posterior_probs', used)
  if target is not None:
    values['area_scale1'] = resample.area(target, *plan.grids[1])
    used = override(used, target, plan)
  if smoothed:
    used = smooth(used)
  return used, values | numbered('sel.probs', used)


def _hidden(run: Run, module: Encoder, plan: Plan, images, prompt, target):
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
  values |= numbered('out.feature_maps', [jnp.moveaxis(m, -1, 1) for m in maps])
  if plan.looks > 1:  # the other way to run looks
    values['again'] = [_outputs(module.encode_high(low, images, used, plan, at_once=True))]
  return values, used


def _outputs(out: Encoded) -> dict[str, Any]:
  return {'out.last_hidden_state': out.last} | numbered('out.selection_maps', out.maps) | {
    f'out.hidden.{layer}': state for layer, state in out.hidden.items()}


def _looks(module: Encoder, plan: Plan, images, low, used) -> dict[str, Any]:
  """Every look by itself: maps, tokens, pool."""
  values = {}
  sized = scaled(images, plan)
  for number, cells in enumerate(choose(used, plan)):
    tokens = module.embed_high(sized, cells, plan.look(number), plan)
    states = module.tower.run(tokens, prefix=(low.keys, low.values)).x
    values |= numbered(f'look{number}.maps', maps_of(cells, plan)) | {
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
                   **numbered('out.selection_maps', maps_of(out.cells, plan))}, used
