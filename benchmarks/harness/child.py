"""One side of a case as a process of its own: reads commands, answers in JSON, one line each.

    python -m benchmarks.harness.child SIDE CASE FOLDER OPTIONS

SIDE is `ours` or `peer`; OPTIONS the JSON of `case.Options`. The parent (runner.py) decides what
happens when, so that both sides alternate and neither ever computes while the other is timed.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
import traceback

from benchmarks.harness import measure
from benchmarks.harness.case import Case, Options, find_cases, load


class Commands:
  """What a parent can ask for; every method returns a JSON value."""

  def __init__(self, side: str, case: Case, folder: pathlib.Path, options: Options):
    self.side, self.case, self.folder, self.options = side, case, folder, options
    self.program, self.result = None, None

  def prepare(self):
    """Draws weights and inputs and writes them in the original's layout (our side)."""
    return load(self.case.ours)(self.case.settings, self.folder, self.options).prepare()

  def load(self):
    """Reads the weights."""
    start = time.perf_counter()
    if self.side == 'ours' or self.case.peer_side == 'ours':
      address = self.case.ours if self.side == 'ours' else self.case.peer
      self.program = load(address)(self.case.settings, self.folder, self.options).load()
    else:
      self.program = load(self.case.peer)(self.case.settings, self.folder, self.options)
    return {'seconds': time.perf_counter() - start}

  def run(self, calls: int = 1, warm: bool = False):
    """Wall seconds and processor seconds of a call (of several in a row: see `Case.calls`).

    Args:
      warm: a call that is not measured goes before: memory that a process does not use for some
        seconds can be far away (benchmarks/findings.md: after a rest).
    """
    if warm:
      self.result = self.program.run()
    cpu, start = measure.cpu_seconds(), time.perf_counter()
    for _ in range(calls):
      self.result = None  # the last result's memory is free before the next call
      self.result = self.program.run()
    seconds = time.perf_counter() - start
    return {'seconds': seconds / calls, 'cpu_seconds': (measure.cpu_seconds() - cpu) / calls}

  def outputs(self, path: str):
    """Writes the last result."""
    import numpy as np

    arrays = {name: np.asarray(x) for name, x in self.program.outputs(self.result).items()}
    np.savez(path, **arrays)
    return sorted(arrays)

  def reset_peak(self):
    """See `measure.reset_peak`; on a GPU its allocator's counter too."""
    if self.options.device == 'cuda' and self.side == 'peer':
      import torch

      torch.cuda.reset_peak_memory_stats()
    return measure.reset_peak()

  def peak(self):
    """Peaks in bytes: since the reset, and of the whole life of the process."""
    found = {'bytes': measure.peak_bytes(), 'lifetime': measure.lifetime_peak_bytes()}
    if self.options.device == 'cuda':
      if self.side == 'peer':
        import torch

        found['device_bytes'] = torch.cuda.max_memory_allocated()
      else:
        import jax

        found['device_bytes'] = jax.devices()[0].memory_stats()['peak_bytes_in_use']
    return found

  def cost(self):
    """FLOPs of a call and the seconds they would take at our matrix-multiply rate (our side)."""
    if self.program.trace is None:
      return {}
    from benchmarks.harness.ceiling import cost

    clock = time.process_time if self.options.one_core else time.perf_counter
    return cost(*self.program.trace, dtype=self.options.dtype, clock=clock)

  def after(self):
    """Facts the program collected, and the versions it ran with."""
    packages = ('jax', 'jaxlib', 'flax', 'hrvlm-jax', 'numpy') if self.side == 'ours' else (
      'torch', 'transformers', 'timm', 'ps3-torch', 'numpy', 'jax', 'jaxlib')
    if self.side == 'ours' and 'torch' in sys.modules:  # the model code of an export
      packages += ('torch', 'transformers')
    facts = dict(self.program.after())
    if self.options.device == 'cuda' and self.side == 'ours':
      import jax

      facts['accelerator'] = jax.devices()[0].device_kind
    return {'facts': facts, 'versions': measure.versions(packages)}


def main(argv: list[str]) -> None:
  """The loop; ends with the parent's pipe."""
  side, name, folder, options = argv
  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)  # what libraries print goes to standard error, never between two answers
  commands = Commands(side, find_cases()[name], pathlib.Path(folder), Options(
    **json.loads(options)))
  for line in sys.stdin:
    request = json.loads(line)
    try:
      answer = {'ok': getattr(commands, request.pop('do'))(**request)}
    except Exception as error:  # noqa: BLE001 - the parent reports it with the case's name
      traceback.print_exc()
      answer = {'error': f'{type(error).__name__}: {error}'}
    answers.write(json.dumps(answer) + '\n')


if __name__ == '__main__':
  main(sys.argv[1:])
