"""Checkpoints of a run that outlives a full disk or a bucket that cannot be reached for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core.errors import UserError

ATTEMPTS = 3
# What TensorStore and Orbax raise for storage that does not answer, beside our own sentences.
_FAULTS = (UserError, OSError, ValueError, RuntimeError)


class Saver:
  """Saves in the background; a failed save is said aloud and the run goes on.

  After three failed saves in a row, or when the last save of a run fails, the run ends with one
  sentence. Whole checkpoints are never touched by a failed save: the last good one stays. With
  several processes the first failure ends the run, as all must do the same.
  """

  def __init__(self, checkpoints: store.TrainStore, log: Callable[[str], None]):
    self.store, self._log = checkpoints, log
    self._failures, self._running = 0, False

  def save(self, step: int, state: Any, data_state: Any) -> None:
    """Begins to save, after the save before it has ended.

    Raises:
      UserError: the third failure in a row.
    """
    self._settle(step)
    try:
      self.store.save(step, state, data_state)
      self._running = True
    except _FAULTS as error:
      self._failed(step, error)

  def finish(self, step: int, state: Any, data_state: Any) -> None:
    """Saves and waits until the checkpoint is whole.

    Raises:
      UserError: it cannot be written.
    """
    self._settle(step)
    try:
      self.store.save(step, state, data_state)
      self.store.wait()
    except _FAULTS as error:
      raise UserError(f'the last checkpoint, of step {step}, could not be written ({error}); '
                      f'{self._last_good()}') from error

  def _settle(self, step: int) -> None:
    running, self._running = self._running, False
    try:
      self.store.wait()
    except _FAULTS as error:
      self._failed(step, error)
      return
    if running:
      self._failures = 0

  def _failed(self, step: int, error: Exception) -> None:
    self._failures += 1
    self._log(f'step {step}: a checkpoint could not be written ({error}); {self._last_good()}')
    if self._failures >= ATTEMPTS or jax.process_count() > 1:
      raise UserError(f'{self._failures} checkpoints in a row could not be written (the last: '
                      f'{error}); the run ends at step {step}, {self._last_good()}') from error

  def _last_good(self) -> str:
    try:
      latest = self.store.latest()
    except _FAULTS:
      return 'its storage cannot be read either'
    return ('there is no earlier one' if latest is None
            else f'the last good checkpoint is that of step {latest}')
