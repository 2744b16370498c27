"""The loss of a batch and the train step: pure functions of parameters and arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from hrvlm_jax.core import paths
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.module import Functional, Params
from hrvlm_jax.systems.ps3 import losses as contrastive
from hrvlm_jax.training.config import Group, TrainingConfig
from hrvlm_jax.training.losses import chunked_cross_entropy
from hrvlm_jax.training.optimizer import optimizer, schedule, split
from hrvlm_jax.training.two_pass import micro_batches, two_pass_loss

State = dict[str, Any]  # params (nested), opt, step, and ema (flat dict of trained leaves) if kept
Objective = Callable[..., tuple[jax.Array, jax.Array]]


def execution_of(config: TrainingConfig, mesh: Mesh | None = None, *,
                 platform: str | None = None) -> Execution:
  """What the train step of a config is traced for, on a mesh (None: one device)."""
  return Execution(
    mesh=mesh, platform=platform, dtype=config.dtype, remat=config.remat,
    attention=config.attention, layers=config.layers, gradients=True,
    deterministic=config.deterministic)


def loss_sum(fn: Functional, params, batch: Mapping[str, Any], *, key=None, ex: Execution = HERE,
             chunk: int = 1024) -> tuple[jax.Array, jax.Array]:
  """(sum of the next-token losses, number of targets) of one batch.

  Sums and counts add up over devices and micro-batches; divide once, by the global count.
  """
  module = fn.bind(params)
  hidden = module(batch, key=key, ex=ex)
  return chunked_cross_entropy(hidden, batch['labels'], module.logits, chunk=chunk, ex=ex)


OBJECTIVES: dict[str, Objective] = {
  'next_token': loss_sum, 'two_pass': two_pass_loss, 'ps3_pretrain': contrastive.objective}


# Objectives that join all rows of a step: their micro-batches cannot be summed one by one.
JOINED = {'ps3_pretrain': contrastive.accumulated}

# What an objective does to the trained leaves (a flat dict) after every update.
AFTER_UPDATE = {'ps3_pretrain': contrastive.clamp_logit_scale}


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
  objective = OBJECTIVES[config.objective]
  options = dict(ex=ex, chunk=config.loss_chunk)
  if config.objective == 'ps3_pretrain':
    options['config'] = config.contrast
  merge = lambda trained: paths.unflatten(frozen | trained)

  def sums(trained, micro, key):
    total, count = objective(fn, merge(trained), micro, key=key, **options)
    if config.loss_average == 'micro_batch':
      total, count = total / jnp.maximum(count, 1), jnp.ones_like(count)
    return total, count

  grad = jax.value_and_grad(sums, has_aux=True)
  if config.accumulate == 1:
    (total, count), grads = grad(trained, batch, key)
  elif config.objective in JOINED and config.loss_average != 'micro_batch':
    (total, count), grads = JOINED[config.objective](fn, merge, trained, batch, **options)
  else:
    if config.objective == 'two_pass' and config.loss_average != 'micro_batch':
      batch = micro_batches(batch)

    def body(carry, inputs):
      micro, number = inputs
      (total, count), grads = grad(trained, micro, jax.random.fold_in(key, number))
      return jax.tree.map(jnp.add, carry, (total, count, grads)), None

    shapes = jax.eval_shape(grad, trained, jax.tree.map(lambda x: x[0], batch), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (*shapes[0], shapes[1]))
    numbers = jnp.arange(config.accumulate)
    (total, count, grads), _ = jax.lax.scan(body, zeros, (batch, numbers))
  share = 1 / jnp.maximum(count, 1).astype(total.dtype)
  return total, count, jax.tree.map(lambda g: g * share.astype(g.dtype), grads)


def make_train_step(fn: Functional, config: TrainingConfig, groups: Mapping[str, Group], seed: int,
                    *, ex: Execution):
  """`step(state, batch) -> (state, metrics)`, to be jitted with the state donated.

  Random keys are a function of (seed, step), so that a resumed run draws what it would have drawn.
  ex: `execution_of(config, mesh)`.
  metrics: loss (mean per target), targets, grad_norm, learning_rate.
  """
  tx, rate = optimizer(config, groups), schedule(config)

  def step(state: State, batch) -> tuple[State, dict[str, jax.Array]]:
    key = jax.random.fold_in(jax.random.key(seed), state['step'])
    total, count, grads = value_and_grad(fn, config, groups, state['params'], batch, key,
                                         ex=ex)
    trained, frozen = split(paths.flatten(state['params']), groups)
    updates, opt = tx.update(grads, state['opt'], trained)
    trained = AFTER_UPDATE.get(config.objective, dict)(optax.apply_updates(trained, updates))
    new = state | {'params': _like(state['params'], frozen | trained), 'opt': opt,
                   'step': state['step'] + 1}
    if config.optimizer.ema is not None:
      decay = config.optimizer.ema
      new['ema'] = jax.tree.map(lambda old, now: decay * old + (1 - decay) * now,
                                state['ema'], trained)
    metrics = {
      'loss': total / jnp.maximum(count, 1), 'targets': count,
      'grad_norm': optax.tree.norm(grads), 'learning_rate': rate(state['step'])}
    return new, metrics

  return step


def _like(params: Params, flat: Mapping[str, jax.Array]) -> Params:
  """The flat leaves in the structure and order of `params`."""
  return paths.map_with_path(lambda path, _: flat[path], params)
