"""Benchmarks: readers of the official files, scorers, submission files.

`MODULES` have a tuple `BENCHMARKS` each; `known` maps names to `Benchmark`; `get` finds one and
says what is known otherwise.
"""

import functools
import importlib

from hrvlm_jax.core.errors import UserError, unknown
from hrvlm_jax.evaluation.benchmarks.base import Benchmark, ImageSource, Sample, Scores, Submission

# Imported when a benchmark is asked for. A new module is one line here.
MODULES = [f'hrvlm_jax.evaluation.benchmarks.{name}'
           for name in ('vqa', 'documents', 'yesno', 'choice', 'tsv', 'captions', 'judged')]
MODULES.append('hrvlm_jax.lab.needle.benchmark')


@functools.cache
def known() -> dict[str, Benchmark]:
  """All benchmarks by name."""
  return {benchmark.name: benchmark for module in MODULES
          for benchmark in importlib.import_module(module).BENCHMARKS}


def get(name: str) -> Benchmark:
  """The benchmark of a name; `<captions>_ptb` is scored with the PTB tokeniser, `own` asks one's
  own questions (see `benchmarks.own`).

  Raises:
    UserError: unknown name, with the nearest known one.
  """
  from hrvlm_jax.evaluation.benchmarks import captions, own

  if name == own.NAME:
    return own.own()
  base = name.removesuffix('_ptb')
  if base != name and base in {benchmark.name for benchmark in captions.BENCHMARKS}:
    return captions.with_ptb(known()[base])
  if name not in known():
    raise UserError(f'{unknown(name, known(), what="benchmark")}; '
                    f'all: {", ".join(sorted([*known(), own.NAME]))}')
  return known()[name]


__all__ = ['MODULES', 'Benchmark', 'ImageSource', 'Sample', 'Scores', 'Submission', 'get', 'known']
