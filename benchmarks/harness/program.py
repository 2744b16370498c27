"""What a side hands to the harness once it is loaded. No JAX, no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
from typing import Any

import numpy as np

INPUTS = 'inputs.npz'


@dataclasses.dataclass
class Program:
  """One measurable call.

  Attributes:
    run: does the work once and returns when the result is there.
    outputs: result of `run` -> named arrays that both sides are compared by.
    trace: (function, arguments) whose products are counted, our side only.
    after: seconds-free facts after the runs (compilations, kept losses), for the result.
  """

  run: Callable[[], Any]
  outputs: Callable[[Any], Mapping[str, np.ndarray]]
  trace: tuple[Callable, tuple] | None = None
  after: Callable[[], Mapping[str, Any]] = dict


def read_inputs(folder: str | pathlib.Path) -> dict[str, np.ndarray]:
  """The inputs both sides share."""
  with np.load(pathlib.Path(folder) / INPUTS) as data:
    return {name: data[name] for name in data.files}
