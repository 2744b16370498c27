"""Objectives by name: what `training.objective` of a run can say.

    training.objective = 'next_token'                                # a name,
    training.objective = {'name': 'ps3_pretrain', 'contrast': {...}} # or with its options

One of your own is a subclass of `systems.objective.Objective` (or of `next_token.NextToken`) and
one line: `register('mine', 'my_module:Mine')` in a config file or a test, or
`HRVLM_OBJECTIVES=mine=my_module:Mine` in the environment.
"""

from __future__ import annotations

from typing import Any

from hrvlm_jax.core.registry import Registry
from hrvlm_jax.systems.objective import Objective

OBJECTIVES = Registry('objective', {
  'next_token': 'hrvlm_jax.training.next_token:NextToken',
  'two_pass': 'hrvlm_jax.training.two_pass:TwoPass',
  'ps3_pretrain': 'hrvlm_jax.systems.ps3.pretrain:Pretrain',
}, variable='HRVLM_OBJECTIVES')
register = OBJECTIVES.register


def objective_of(training: Any) -> Objective:
  """The objective of a `TrainingConfig`."""
  return OBJECTIVES.get(training.objective.name)(training.objective)
