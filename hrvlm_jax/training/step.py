"""The loss of a batch and the train step: pure functions of parameters and arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from hrvlm_jax.core import paths
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.core.module import Functional, Params
from hrvlm_jax.training.config import Group, TrainingConfig
from hrvlm_jax.training.objectives import objective_of
from hrvlm_jax.training.optimizer import optimizer, schedule, split

State = dict[str, Any]  # params (nested), opt, step, and ema (flat dict of trained leaves) if kept


def execution_of(config: TrainingConfig, mesh: Mesh | None = None, *,
                 platform: str | None = None) -> Execution:
  """What the train step of a config is traced for, on a mesh (None: one device)."""
  return Execution(
    mesh=mesh, platform=platform, dtype=config.dtype, remat=config.remat,
    attention=config.attention, layers=config.layers, gradients=True,
    deterministic=config.deterministic)


def init_state(config: TrainingConfig, groups: Mapping[str, Group], params: Params) -> State:
  """Parameters with fresh optimizer state; frozen leaves get none."""
  trained, _ = split(paths.flatten(params), groups)
  state = {'params': params, 'opt': optimizer(config, groups).init(trained),
           'step': jnp.zeros((), jnp.int32)}
  if config.optimizer.ema is not None:
    state['ema'] = dict(trained)
  return state


def value_and_grad(
  fn: Functional, config: TrainingConfig, groups: Mapping[str, Group], params: Params, batch, key,
  *, ex: Execution,
):
  """(loss sum, targets, gradients of the trained leaves), gradients being those of the MEAN loss.

  A batch of `accumulate` > 1 carries a leading micro-batch axis on every array.
  """
  trained, frozen = split(paths.flatten(params), groups)
  (total, count), grads = objective_of(config).value_and_grad(
    fn, lambda trained: paths.unflatten(frozen | trained), trained, batch, key, ex=ex,
    parts=config.accumulate, mean=config.loss_average == 'micro_batch', chunk=config.loss_chunk)
  share = 1 / jnp.maximum(count, 1).astype(total.dtype)
  return total, count, jax.tree.map(lambda g: g * share.astype(g.dtype), grads)


def make_train_step(fn: Functional, config: TrainingConfig, groups: Mapping[str, Group], seed: int,
                    *, ex: Execution):
  """`step(state, batch) -> (state, metrics)`, to be jitted with the state donated.

  Random keys are a function of (seed, step), so that a resumed run draws what it would have drawn.
  ex: `execution_of(config, mesh)`.
  metrics: loss (mean per target), targets, grad_norm, learning_rate, param_norm (after the update,
  of what trains), and for whoever looks for the cause of a bad step the squares of both norms by
  leaf, in the order of `trained_paths`. With `on_bad_step='skip'` also skipped: the update was left
  out, and parameters, moments and average are those from before.
  """
  tx, rate = optimizer(config, groups), schedule(config)
  skips = config.on_bad_step == 'skip'
  after_update = objective_of(config).after_update

  def step(state: State, batch) -> tuple[State, dict[str, jax.Array]]:
    key = jax.random.fold_in(jax.random.key(seed), state['step'])
    total, count, grads = value_and_grad(fn, config, groups, state['params'], batch, key,
                                         ex=ex)
    trained, frozen = split(paths.flatten(state['params']), groups)
    before, norm = trained, optax.tree.norm(grads)
    updates, opt = tx.update(grads, state['opt'], trained)
    trained = after_update(optax.apply_updates(trained, updates))
    if skips:
      good = jnp.isfinite(total) & jnp.isfinite(norm)
      if config.spike_norm is not None:
        good &= norm <= config.spike_norm
      keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
      trained, opt = keep(trained, before), keep(opt, state['opt'])
    new = state | {'params': _like(state['params'], frozen | trained), 'opt': opt,
                   'step': state['step'] + 1}
    if config.optimizer.ema is not None:
      decay = config.optimizer.ema
      new['ema'] = jax.tree.map(lambda old, now: decay * old + (1 - decay) * now,
                                state['ema'], trained)
      if skips:
        new['ema'] = keep(new['ema'], state['ema'])
    metrics = {
      'loss': total / jnp.maximum(count, 1), 'targets': count,
      'grad_norm': norm, 'learning_rate': rate(state['step']),
      'param_norm': optax.tree.norm(trained),
      'leaves': {'gradient': _squares(grads), 'parameter': _squares(trained)}}
    return new, metrics | ({'skipped': ~good} if skips else {})

  return step


def trained_paths(groups: Mapping[str, Group]) -> list[str]:
  """The paths of the trained leaves, in the order of their norms among the metrics of a step."""
  return sorted(path for path, group in groups.items() if not group.frozen)


def _squares(leaves: Mapping[str, jax.Array]) -> jax.Array:
  """The squared norm of every leaf, by sorted path."""
  return jnp.stack([optax.tree.norm(leaves[path], squared=True) for path in sorted(leaves)])


def _like(params: Params, flat: Mapping[str, jax.Array]) -> Params:
  """The flat leaves in the structure and order of `params`."""
  return paths.map_with_path(lambda path, _: flat[path], params)
