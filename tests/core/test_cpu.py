"""Freed memory stays: seen from the page faults of a process that allocates again and again."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from hrvlm_jax.core import cpu
kept = sys.argv[1] == 'keep' and cpu.keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  block = libc.malloc(2**26)
  ctypes.memset(block, 1, 2**26)
  libc.free(block)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
print(int(kept), first, faults())
"""


def run(mode: str) -> tuple[int, int, int]:
  out = subprocess.run([sys.executable, '-c', PROGRAM, mode], check=True, capture_output=True,
                       text=True).stdout
  return tuple(map(int, out.split()))


@pytest.mark.parametrize('mode', ['keep', 'give back'])
def test_freed_memory_is_used_again(mode):
  kept, first, again = run(mode)
  assert first > 30  # pages of a huge page at least
  if mode == 'give back' or not kept:  # without glibc nothing is promised
    assert again > first / 2
  else:
    assert again < first / 10


def test_another_c_library_is_no_error(monkeypatch):
  import ctypes

  from hrvlm_jax.core import cpu

  monkeypatch.setattr(ctypes, 'CDLL', lambda name: object())
  assert cpu.keep_freed() is False
