"""Benchmarks: readers of the official files, scorers, submission files.

`BENCHMARKS` maps names to `Benchmark`; `get` finds one and says what is known otherwise.
"""

from hrvlm_jax.core.errors import UserError, unknown
from hrvlm_jax.evaluation.benchmarks import captions, choice, documents, judged, tsv, vqa, yesno
from hrvlm_jax.evaluation.benchmarks.base import Benchmark, ImageSource, Sample, Scores, Submission
from hrvlm_jax.lab.needle import benchmark as needle

_MODULES = (vqa, documents, yesno, choice, tsv, captions, judged, needle)

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for module in _MODULES for benchmark in module.BENCHMARKS
}


def get(name: str) -> Benchmark:
  """The benchmark of a name; `<captions>_ptb` is scored with the PTB tokeniser.

  Raises:
    UserError: unknown name, with the nearest known one.
  """
  base = name.removesuffix('_ptb')
  if base != name and base in {benchmark.name for benchmark in captions.BENCHMARKS}:
    return captions.with_ptb(BENCHMARKS[base])
  if name not in BENCHMARKS:
    raise UserError(f'{unknown(name, BENCHMARKS, what="benchmark")}; '
                    f'all: {", ".join(sorted(BENCHMARKS))}')
  return BENCHMARKS[name]


__all__ = ['BENCHMARKS', 'Benchmark', 'ImageSource', 'Sample', 'Scores', 'Submission', 'get']
