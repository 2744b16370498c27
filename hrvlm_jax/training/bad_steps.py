"""Steps after which nothing may be kept: a loss, gradient or parameter that is not a finite number.

A step is judged from its metrics, one step late and always before a checkpoint is written, so that
no checkpoint holds the state after a bad step and none is removed for one that does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import pathlib
from typing import Any

import jax
import numpy as np

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError, shortened

SKIPPED = 'skipped_steps'  # in the saved position of the data
INTERNAL = ('leaves', 'skipped')  # metrics of a step that are for this module alone


class Judge:
  """Says of every step whether the run may go on; counts the steps that were left out.

  Args:
    training: the `TrainingConfig`.
    names: of the trained leaves (`step.trained_paths`).
    workdir: gets the batch of a bad step.
    checkpoints: the run's store: what can be gone back to.
    log: says what was left out.
    skipped: steps that earlier starts left out.
    source: the checkpoint the parameters of this start come from, if any.

  Attributes:
    skipped: steps left out since the run began, over all its starts.
    start: step that this start of the run began at.
  """

  def __init__(self, training: Any, names: Sequence[str], workdir: pathlib.Path,
               checkpoints: store.TrainStore, log: Callable[[str], None], *, skipped: int = 0,
               source: Any = None):
    self._training, self._names, self._workdir = training, names, workdir
    self._checkpoints, self._log = checkpoints, log
    self.skipped, self._source = skipped, source
    self.start = self._targets = 0

  def see(self, step: int, metrics: Mapping[str, Any], batch: Any) -> None:
    """Judges a step that has ended.

    Raises:
      UserError: it is bad and may not be left out, with what can be done.
    """
    loss, gradient, parameters = (
      float(metrics[name]) for name in ('loss', 'grad_norm', 'param_norm'))
    self._targets += int(metrics['targets'])
    limit = self._training.spike_norm
    spike = limit is not None and np.isfinite(gradient) and gradient > limit
    if np.isfinite([loss, gradient, parameters]).all() and not spike:
      return
    found = f'the loss is {loss:.6g}, the gradient norm {gradient:.6g}' + (
      f' (training.spike_norm={limit:g})' if spike else '')
    # With a bad gradient everything after it is bad as well: the cause is what is named.
    cause = 'parameter' if np.isfinite([loss, gradient]).all() else 'gradient'
    if cause == 'parameter' and not np.isfinite(parameters):
      found += f', the norm of the parameters after it {parameters:.6g}'
    found += self._leaves(metrics, cause)
    if step == self.start + 1 and self._source is not None and not np.isfinite(loss):
      self._refuse_source(found)
    path = _save_batch(self._workdir, step, batch)
    if self._training.on_bad_step == 'skip' and np.isfinite(parameters):
      self.skipped += 1
      if self.skipped <= self._training.bad_steps:
        self._log(f'step {step} is left out ({self.skipped} of at most '
                  f'{self._training.bad_steps}): {found}; its batch is saved as {path}')
        return
      raise UserError(
        f'step {step} is not left out as {self.skipped - 1} before it were, which is all that '
        f'training.bad_steps allows: {found}; {self._advice(skip=False)}')
    before = (f'steps {self.start + 1} to {step - 1} of this start were finite'
              if step > self.start + 1 else 'it is the first step of this start')
    raise UserError(f'step {step} is bad: {found} ({before}); its batch is saved as {path}; '
                    + self._advice(skip=cause == 'gradient' or spike))

  def ended(self, step: int) -> None:
    """Refuses a run in which nothing was learned from.

    Raises:
      UserError: no step of this start had a target.
    """
    if step > self.start and not self._targets:
      raise UserError(f'no row of steps {self.start + 1} to {step} had a target: nothing was '
                      'learned; look at the data with hrvlm data check, and at data.max_length')

  def _leaves(self, metrics: Mapping[str, Any], kind: str) -> str:
    finite = np.isfinite(jax.device_get(metrics['leaves'][kind]))
    bad = [name for name, good in zip(self._names, finite, strict=True) if not good]
    return '' if not bad else (
      f'; not finite: the {kind} of {len(bad)} of {len(self._names)} tensors ({shortened(bad)})')

  def _refuse_source(self, found: str) -> None:
    """Where the parameters themselves are the cause, they are named and nothing else."""
    bad = not_finite(self._source)
    if not bad:
      return
    text = (f'the first step of this start is bad ({found}), because {self._source} holds NaN or '
            f'infinity in {len(bad)} tensors ({shortened(bad)})')
    folder = self._checkpoints.folder
    steps = self._checkpoints.steps()
    if self._source not in map(folder, steps):
      raise UserError(f'{text}; mend it, or set training.init_from to another checkpoint')
    good = next((step for step in reversed(steps) if not not_finite(folder(step))), None)
    raise UserError(text + (f'; go back with --resume-from {good}' if good is not None else
                            '; so do all other checkpoints of the run'))

  def _advice(self, *, skip: bool) -> str:
    steps = self._checkpoints.steps()
    ways = ['look at the batch', 'lower training.optimizer.learning_rate']
    if skip:
      ways.append('leave such steps out with --config.training.on_bad_step=skip')
    if len(steps) > 1:
      ways.append(f'go back one checkpoint with --resume-from {steps[-2]}')
    kept = (f'; the last checkpoint, of step {steps[-1]}, is from before it: the same command goes '
            'on from there' if steps else '; there is no checkpoint yet')
    return ', '.join(ways[:-1]) + f', or {ways[-1]}' + kept


def not_finite(source: Any) -> list[str]:
  """The parameters of a checkpoint that hold NaN or infinity; all of them are read."""
  return [name for name, leaf in store.load_leaves(source)
          if not np.isfinite(np.asarray(leaf, np.float64)).all()]


def _save_batch(workdir: pathlib.Path, step: int, batch: Any) -> pathlib.Path:
  process = f'_{jax.process_index()}' if jax.process_count() > 1 else ''
  path = workdir / f'bad_batch_{step}{process}.npz'
  np.savez_compressed(path, **{k: np.asarray(v) for k, v in paths.flatten(batch).items()})
  return path
