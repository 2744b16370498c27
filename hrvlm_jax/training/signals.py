"""Being told to end: once, after the step at hand; twice, at once."""

from __future__ import annotations

import os
import signal
from typing import Any

import jax
from jax.experimental import multihost_utils


class Signals:
  """Turns SIGTERM and SIGINT into a flag while training runs; the second one ends the process.

  With several processes JAX's preemption service watches SIGTERM instead, because all must stop
  after the same step.
  """

  def __init__(self):
    self.caught = False
    self._old: dict[int, Any] = {}

  def stop(self, step: int) -> bool:
    """Whether to save and end now, the same answer on every process."""
    if jax.process_count() > 1 and not self.caught:
      self.caught = multihost_utils.reached_preemption_sync_point(step)
      if self.caught:
        self._install(_end_now)  # JAX's own handler takes no notice of a second signal
    return self.caught

  def __enter__(self):
    if jax.process_count() > 1:
      return self

    def note(number, frame):
      if self.caught:
        _end_now(number, frame)
      self.caught = True

    self._install(note)
    return self

  def _install(self, handler) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
      try:
        old = signal.signal(number, handler)
      except ValueError:  # not in the main thread (a test): signals stay as they are
        break
      self._old.setdefault(number, old)

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _end_now(number: int, frame: Any) -> None:
  """Ends the process as the signal would have; data workers end with it."""
  del frame
  os.write(2, b'\na second signal: ended at once, what was being saved is lost; the same command '
           b'goes on from the last checkpoint\n')
  signal.signal(number, signal.SIG_DFL)
  os.kill(os.getpid(), number)
