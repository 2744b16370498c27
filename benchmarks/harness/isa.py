"""Holding both sides to narrower instructions than the CPU has, by each library's own variable.

Every library reads its variable once, when it starts: the sides are processes, and get theirs
before Python does. What a user has set is never overwritten; a run under it would be kept as
that of a machine that it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
import re

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.machine import INSTRUCTIONS, Machine

FLAG = '--'  # names of XLA's flags begin with it; they stand in XLA_FLAGS
_ISA, _YNN = '--xla_cpu_max_isa', '--xla_cpu_experimental_ynn_fusion_type'
# Set -> the value of each variable and flag. ATen: PyTorch's element-wise code; MKL: PyTorch's
# products (on a CPU not of Intel MKL heeds it only where it was told, see `forms`). _ISA holds
# the code that XLA compiles; its products are a library's. Measured with jaxlib 0.10.2 on AMD
# family 25 (AVX2), products of 729 x 1152 x 4304 on one core: YNN, held to SSE, heeds neither _ISA
# nor any variable (83 GFLOP/s, as without); oneDNN, which takes its place where YNN is off, heeds
# its own (29). So a machine that is held multiplies by oneDNN, one that has no more by YNN.
CAPS: dict[str, dict[str, str]] = {
  'avx2': {_ISA: 'AVX2', _YNN: '', 'ONEDNN_MAX_CPU_ISA': 'AVX2', 'ATEN_CPU_CAPABILITY': 'avx2',
           'MKL_ENABLE_INSTRUCTIONS': 'AVX2'},
  'avx512': {_ISA: 'AVX512', _YNN: '', 'ONEDNN_MAX_CPU_ISA': 'AVX512_CORE',
             'ATEN_CPU_CAPABILITY': 'avx512', 'MKL_ENABLE_INSTRUCTIONS': 'AVX512'}}
VARIABLES = ('ONEDNN_MAX_CPU_ISA', 'DNNL_MAX_CPU_ISA', 'ATEN_CPU_CAPABILITY',
             'MKL_ENABLE_INSTRUCTIONS', 'MKL_CBWR')


def chosen(environment: Mapping[str, str], cap: str = '') -> dict[str, str]:
  """What an environment says already of instruction sets, by variable or flag.

  Args:
    cap: also what it says of anything that this cap sets.
  """
  found = {name: environment[name] for name in VARIABLES if environment.get(name)}
  for flag in (name for name in CAPS.get(cap, (_ISA,)) if name.startswith(FLAG)):
    if said := re.findall(rf'(?:^|\s){flag}=(\S*)', environment.get('XLA_FLAGS', '')):
      found[flag] = said[-1]  # the last one counts
  return found


def capped(environment: Mapping[str, str], cap: str) -> dict[str, str]:
  """The environment of a process that is held to `cap` ('' for none).

  Raises:
    UserError: the environment says something else already.
  """
  wanted, own = CAPS.get(cap, {}), chosen(environment, cap)
  wrong = {key: value for key, value in own.items()
           if key not in wanted or wanted[key].lower() != value.lower()}
  if wrong:
    says = ', '.join(f'{key}={value}' for key, value in wrong.items())
    wants = (f'--isa {cap} sets {" ".join(f"{key}={value}" for key, value in wanted.items())}'
             if cap else 'without --isa both sides take what the CPU has, and --isa avx2 or avx512 '
             'holds both')
    places = ['XLA_FLAGS' if key.startswith(FLAG) else key for key in wrong]
    raise UserError(f'the environment chooses instructions itself: {says}; {wants}. A result is '
                    'kept under the instructions that both sides took: unset '
                    f'{", ".join(dict.fromkeys(places))}')
  added = {key: value for key, value in wanted.items() if not key.startswith(FLAG)}
  flags = [f'{key}={value}' for key, value in wanted.items()
           if key.startswith(FLAG) and key not in own]
  if flags:
    added['XLA_FLAGS'] = ' '.join(filter(None, (environment.get('XLA_FLAGS'), *flags)))
  return {**environment, **added}


def check(cap: str, machine: Machine) -> str:
  """The cap that a record carries: '' where it is what the machine has anyway.

  Raises:
    UserError: the machine has not these instructions.
  """
  order = list(INSTRUCTIONS)
  if not cap:
    return ''
  if machine.isa not in order or order.index(machine.isa) < order.index(cap):
    raise UserError(f'--isa {cap}: this machine ({machine.title}) has not these instructions')
  return '' if machine.isa == cap else cap
