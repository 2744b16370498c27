"""What a case is, and finding them. Nothing here imports JAX or PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import importlib
import pathlib
from typing import Any

CASES = pathlib.Path(__file__).parents[1] / 'cases'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One comparison: the same weights and inputs through two programs in two processes.

  Attributes:
    title: what is computed, one line.
    ours: 'module:Class' of our side, a subclass of `harness.ours.Side` (module under benchmarks/).
    peer: 'module:function' of the other side, `(settings, folder, options) -> harness.Program`;
      `peer_side` says which interpreter runs it.
    peer_side: 'peer' (PyTorch, the environment of scripts/peers.sh) or 'ours' (another program of
      this library, such as the same answer without a cache).
    peer_name: what the other side is, for the table.
    variants: forms of the peer that are tried (`forms`); the fastest is compared.
    settings: sizes; both sides get them, and they are part of the key of the stored weights.
    target: peer time / our time that was asked for, a number or one for each instruction set that
      both sides may take ('avx2', 'avx512'); None: reported only.
    gpu_target: the same on a GPU.
    memory_target: our peak memory / the peer's that was asked for (CPU).
    tolerance: largest difference of any output relative to max(1, largest value).
    rounds: measured turns of each side, alternating.
    calls: calls in a row that make a turn, of which the mean counts: a call of 0.1 s alone would be
      measured with the caches that the other side left.
    work: (number, unit) done by one call, for a rate such as tokens per second.
    bound: hold our time against 1.5 x (FLOPs / our matrix-multiply rate at these shapes).
    group: cases of a group can be asked for together by its name.
    shown: has a row in docs/benchmarks.md.
    dtype: of weights and activations on a CPU (a GPU always runs bfloat16).
    backends: where it can be measured ('cpu', 'gpu').
    apart: the sides do not fit into memory together: one process at a time, started anew for each
      round; only the first variant is run.
    ours_torch: our side computes in PyTorch too (`runner._our_form`).
  """

  name: str
  title: str
  ours: str
  peer: str | None
  settings: Mapping[str, Any]
  peer_side: str = 'peer'
  peer_name: str = ''
  variants: tuple[str, ...] = ('eager',)
  target: float | Mapping[str, float] | None = None
  gpu_target: float | None = None
  memory_target: float | None = None
  tolerance: float = 1e-3
  rounds: int = 3
  calls: int = 1
  work: tuple[float, str] | None = None
  bound: bool = True
  group: str = ''
  shown: bool = True
  dtype: str = 'float32'
  backends: tuple[str, ...] = ('cpu', 'gpu')
  apart: bool = False
  ours_torch: bool = False

  def asked(self, backend: str, isa: str) -> tuple[float | None, float | None]:
    """(time, memory) that was asked for on 'cpu' or 'gpu', where programs take `isa`."""
    if backend == 'gpu':
      return self.gpu_target, None
    if isinstance(self.target, Mapping):
      # A CPU with wider instructions than these is one of the widest that is named.
      return self.target.get('avx512' if isa == 'amx' else isa), self.memory_target
    return self.target, self.memory_target


def find_cases() -> dict[str, Case | Any]:
  """All cases by name: every module of benchmarks/cases lists its own in `CASES`.

  A module may list objects of its own kind instead: anything with `name`, `title`, `group` and
  `measure(options) -> dict`, the dict being the result that is kept and shown (see `Alone`).
  """
  found: dict[str, Any] = {}
  for path in sorted(CASES.glob('*.py')):
    if path.stem.startswith('_'):
      continue
    for case in importlib.import_module(f'benchmarks.cases.{path.stem}').CASES:
      if case.name in found:
        raise ValueError(f'benchmarks/cases/{path.name}: case {case.name!r} exists already')
      found[case.name] = case
  return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alone:
  """A measurement without a peer (scaling, compilation time, data throughput).

  Attributes:
    run: 'module:function' (module under benchmarks/), `(settings, options) -> dict`, run in a
      process of its own. The dict holds `rows`, a list of dicts with the same keys, and may hold
      `note`.
    columns: (key of a row, heading) of the table.
    backends: where it can be measured ('cpu', 'gpu').
    picture: name of a picture in benchmarks/results that follows the table, without its backend.
  """

  name: str
  title: str
  run: str
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  columns: tuple[tuple[str, str], ...] = ()
  picture: str = ''
  backends: tuple[str, ...] = ('cpu', 'gpu')
  group: str = ''
  shown: bool = True


@dataclasses.dataclass(frozen=True)
class Options:
  """How a side runs.

  Attributes:
    device: 'cpu' or 'cuda'.
    dtype: of activations and weights: 'float32', or 'bfloat16'.
    variant: form of the peer (`forms.base`).
    impl: attention of our side (`core.attention`).
    one_core: the process has one core, and its processor time counts.
  """

  device: str = 'cpu'
  dtype: str = 'float32'
  variant: str = 'eager'
  impl: str = 'xla'
  one_core: bool = False


def load(address: str) -> Any:
  """'module:name' -> the object; the module is one under benchmarks/."""
  module, name = address.split(':')
  return getattr(importlib.import_module(f'benchmarks.{module}'), name)
