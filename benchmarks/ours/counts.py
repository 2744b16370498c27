"""Counted things of compiled tiny programs: operations, bytes, temporaries, compilations.

Counts do not depend on how busy a machine is, so the test suite holds them against stored values
(tests/benchmarks/counts.json). After a change that is meant to alter them:

    python -m benchmarks.ours.counts --write
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile

import jax

from benchmarks.harness.case import Case, Options, find_cases, load
from hrvlm_jax.parallel.flops import count_flops

STORED = pathlib.Path(__file__).parents[2] / 'tests' / 'benchmarks' / 'counts.json'
PROGRAMS = ('tiny_ps3_4k', 'tiny_siglip_13', 'tiny_clip_h_10', 'tiny_llava_hr_1024',
            'tiny_phi_decode', 'train_step_mc_llava_tiny')


def counts(name: str) -> dict[str, int]:
  """Counts of our side of a case.

  Returns:
    flops: of the products in the traced program. compiled_flops, bytes: the compiler's estimate of
    operations and of memory read and written. temporaries, arguments: bytes of the compiled
    program. compilations: programs compiled by two calls.
  """
  case: Case = find_cases()[name]
  with tempfile.TemporaryDirectory() as folder:
    side = load(case.ours)(case.settings, pathlib.Path(folder), Options())
    side.prepare()
    program = side.load()
  program.run()
  program.run()
  function, arguments = program.trace
  compiled = jax.jit(function).lower(*arguments).compile()
  cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
  return {
    'flops': int(count_flops(function, *arguments)), 'compiled_flops': int(cost['flops']),
    'bytes': int(cost['bytes accessed']), 'temporaries': memory.temp_size_in_bytes,
    'arguments': memory.argument_size_in_bytes,
    'compilations': program.after()['compilations']}


def main(argv: list[str]) -> None:
  """Prints all counts, or stores them."""
  found = {'jax': jax.__version__, 'programs': {name: counts(name) for name in PROGRAMS}}
  text = json.dumps(found, indent=1) + '\n'
  if argv == ['--write']:
    STORED.write_text(text)
  print(text, end='')


if __name__ == '__main__':
  main(sys.argv[1:])
