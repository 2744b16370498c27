"""Losses and gradients as the train step itself has them, for the golden training cases."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import optax

from hrvlm_jax.core import paths
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.training.config import Group, OptimizerConfig, TrainingConfig
from hrvlm_jax.training.optimizer import groups_of
from hrvlm_jax.training.step import execution_of, init_state, make_train_step
from hrvlm_jax.vlm import model as vlm

# Adam's first moment after one step is (1 - b1) times the gradient: exactly half of it here.
_HALF = 0.5


class Step(NamedTuple):
  """What one train step saw.

  Attributes:
    loss: mean per target.
    targets: number of targets.
    gradients: nested dict, of the mean loss, before the optimizer.
  """

  loss: float
  targets: int
  gradients: dict[str, Any]


def train_step(config: ModelConfig, *, objective: Any = 'next_token',
               compile: Callable = jax.jit, **options: Any) -> Callable[[Any, Any], Step]:
  """`run(params, batch)`: the real train step, once, at learning rate 0 and without dropout.

  The gradients are read off the optimizer's first moments, so that nothing of the step is copied.

  Args:
    compile: makes the program.
    options: further fields of `TrainingConfig`.
  """
  fn = vlm.build(without_dropout(config))
  settings = TrainingConfig(
    steps=1, batch_size=1, groups=(Group(pattern='.*'),), objective=objective,
    optimizer=OptimizerConfig(learning_rate=0.0, b1=_HALF, clip_norm=None), **options)
  groups = groups_of(settings, fn.abstract)
  program = compile(make_train_step(fn, settings, groups, 0, ex=execution_of(settings)))

  def run(params: Any, batch: Any) -> Step:
    state, metrics = program(init_state(settings, groups, params), batch)
    moments = jax.device_get(optax.tree.get(state['opt'], 'mu'))
    gradients = paths.unflatten({path: leaf / (1 - _HALF) for path, leaf in moments.items()})
    return Step(float(metrics['loss']), int(metrics['targets']), gradients)

  return run


def without_dropout(config: Any) -> Any:
  """A config whose dropout rates, at any depth, are 0: golden losses were made without."""
  changes: dict[str, Any] = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.name == 'dropout' or field.name.endswith('_dropout'):
      changes[field.name] = 0.0
    elif dataclasses.is_dataclass(value):
      changes[field.name] = without_dropout(value)
    elif isinstance(value, tuple) and value and all(map(dataclasses.is_dataclass, value)):
      changes[field.name] = tuple(map(without_dropout, value))
  return dataclasses.replace(config, **changes)
