"""What a program is traced for: platform and number of devices.

Where the best form of an operation depends on the machine, layers ask here instead of asking JAX,
so that a program compiled ahead of time for another machine (parallel/plan.py) gets the form of
that machine.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import contextvars
from typing import NamedTuple

import jax


class Target(NamedTuple):
  """Platform ('cpu', 'gpu', 'tpu') and the number of devices a program is spread over."""

  platform: str
  devices: int


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar('target', default=None)


def target() -> Target:
  """The machine programs are traced for: the one here, unless `compiling_for` says otherwise."""
  return _target.get() or Target(jax.default_backend(), jax.device_count())


def on_one_cpu() -> bool:
  """Whether that is a single CPU device, whose caches decide which form of a product is fast."""
  return target() == Target('cpu', 1)


@contextlib.contextmanager
def compiling_for(platform: str, devices: int) -> Iterator[None]:
  """Programs traced inside are meant for that machine."""
  token = _target.set(Target(platform, devices))
  try:
    yield
  finally:
    _target.reset(token)
