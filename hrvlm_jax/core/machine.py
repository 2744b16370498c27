"""Which kind of CPU this is: vendor, family, model, widest instructions, cores. No JAX, no NumPy.

Times and their ratios belong to a kind of machine: two CPUs of the same number of cores differ by a
factor of eight in products. Records of `hrvlm bench` are kept by kind, and `hrvlm doctor` names it.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import os
import pathlib
import platform
import re

# Instruction sets of x86 and the flags of Linux that they need, narrowest first.
INSTRUCTIONS = {
  'sse': ('sse2',), 'avx': ('avx',), 'avx2': ('avx2', 'fma'),
  'avx512': ('avx512f', 'avx512bw', 'avx512dq', 'avx512vl'), 'amx': ('amx_tile', 'amx_bf16')}
ARM = {'neon': ('asimd',), 'sve': ('sve',)}
BFLOAT16 = ('avx512_bf16', 'amx_bf16', 'bf16')  # any of them multiplies in bfloat16
_VENDORS = {'AuthenticAMD': 'AMD', 'GenuineIntel': 'Intel', '0x41': 'Arm', '0xc0': 'Ampere',
            '0x61': 'Apple', '0x4e': 'NVIDIA'}
_WORDS = {'sse': 'SSE', 'avx': 'AVX', 'avx2': 'AVX2', 'avx512': 'AVX-512', 'amx': 'AMX',
          'neon': 'NEON', 'sve': 'SVE'}


@dataclasses.dataclass(frozen=True)
class Machine:
  """A kind of CPU, and how much of it this process may use.

  Attributes:
    vendor: 'AMD', 'Intel', 'Arm', ...; what the system says where it is none of these.
    family, model: numbers of the CPU as the system gives them; 0 where it gives none.
    isa: widest instruction set, one of `INSTRUCTIONS` or `ARM`; 'unknown' where none is told.
    cores: that this process may use.
    capped: instruction set that programs were held to, below `isa`; '' if they were not.
    bfloat16: whether it multiplies in bfloat16; None where that is not known.
  """

  vendor: str
  family: int = 0
  model: int = 0
  isa: str = 'unknown'
  cores: int = 1
  capped: str = ''
  bfloat16: bool | None = None

  @property
  def kind(self) -> str:
    """A name for files: 'amd-26-2-avx512-2c', with '-as-avx2' where it was capped."""
    parts = (self.vendor, self.family, self.model, self.isa, f'{self.cores}c')
    name = '-'.join(re.sub(r'[^a-z0-9]+', '_', str(part).lower()) for part in parts)
    return f'{name}-as-{self.capped}' if self.capped else name

  @property
  def title(self) -> str:
    """A name for readers: 'AMD family 26 model 2, AVX-512, 2 cores'."""
    isa = _WORDS.get(self.isa, f'{self.isa} instructions')
    if self.capped:
      isa = f'{isa} held to {_WORDS[self.capped]}'
    number = f' family {self.family} model {self.model}' if self.family else ''
    return f'{self.vendor}{number}, {isa}, {self.cores} core{"s" * (self.cores != 1)}'

  @property
  def effective(self) -> str:
    """The instruction set that programs could take."""
    return self.capped or self.isa


def read(info: Mapping[str, str], cores: int) -> Machine:
  """From the fields of one processor in /proc/cpuinfo (x86 or Arm)."""
  flags = set((info.get('flags') or info.get('Features') or '').split())
  isa = 'unknown'
  for name, needed in (INSTRUCTIONS | ARM).items():
    if flags.issuperset(needed):
      isa = name
  vendor = info.get('vendor_id') or info.get('CPU implementer') or platform.machine() or 'unknown'
  number = lambda *keys: next((int(info[key], 0) for key in keys if info.get(key)), 0)
  return Machine(vendor=_VENDORS.get(vendor, vendor), family=number('cpu family',
                                                                    'CPU architecture'),
                 model=number('model', 'CPU part'), isa=isa, cores=cores,
                 bfloat16=bool(flags & set(BFLOAT16)) if flags else None)


def processor() -> dict[str, str]:
  """The fields of the first processor in /proc/cpuinfo; {} where there is no such file."""
  path = pathlib.Path('/proc/cpuinfo')
  if not path.exists():
    return {}
  first = path.read_text().split('\n\n')[0]
  pairs = (line.split(':', 1) for line in first.splitlines() if ':' in line)
  return {key.strip(): value.strip() for key, value in pairs}


def cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def here() -> Machine:
  """The machine this process runs on."""
  return read(processor(), cores())
