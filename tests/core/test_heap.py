"""Memory of a process: huge pages by a second start, heaps that shrink, freed memory that stays."""

import ctypes
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from hrvlm_jax.cli import main as cli
from hrvlm_jax.core import heap
from hrvlm_jax.training import loop

FREED = """
import ctypes, resource, sys
from hrvlm_jax.core import heap
kept = sys.argv[1] == 'keep' and heap.keep_freed()
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
# Says who it is, starts again, and says what it has then.
STARTED = """
import json, os, sys
from hrvlm_jax.core import heap
print(os.getpid(), flush=True)
heap.start_again_with_huge_pages()
print(json.dumps([os.environ.get('GLIBC_TUNABLES'), sys.argv[1:]]))
"""


@pytest.fixture
def system(monkeypatch, tmp_path):
  """A glibc that has the tunable, a kernel that leaves the choice to programs, no accelerator."""
  def choose(choice='always [madvise] never', version='glibc 2.36', devices=()):
    switch = tmp_path / 'enabled'
    switch.write_text(choice)
    monkeypatch.setattr(heap, '_SWITCH', switch)
    monkeypatch.setattr(heap, '_ACCELERATORS', tuple(devices))
    monkeypatch.setattr(os, 'confstr', lambda name: version, raising=False)

  choose()
  return choose


def test_huge_pages_are_asked_for_on_a_cpu(system, tmp_path):
  assert heap.with_huge_pages({'A': 'b'}) == {'A': 'b', 'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
  # What else the user set there stays.
  made = heap.with_huge_pages({'GLIBC_TUNABLES': 'glibc.malloc.check=1', 'JAX_PLATFORMS': 'cpu'})
  assert made['GLIBC_TUNABLES'] == 'glibc.malloc.check=1:glibc.malloc.hugetlb=1'
  assert heap.asked_for(made) and not heap.asked_for({}) and heap.with_huge_pages(made) is None
  accelerator = tmp_path / 'accel0'
  accelerator.touch()
  system(devices=[str(tmp_path / 'accel*')])
  assert heap.with_huge_pages({}) is None
  assert heap.with_huge_pages({'JAX_PLATFORMS': 'cpu'}) is not None


@pytest.mark.parametrize('environment, changes', [
  ({'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=0'}, {}),  # a choice of the user's
  ({'JAX_PLATFORMS': 'tpu'}, {}),
  ({}, dict(choice='[always] madvise never')), ({}, dict(choice='always madvise [never]')),
  ({}, dict(version='glibc 2.31')), ({}, dict(version=None)), ({}, dict(version='musl'))])
def test_huge_pages_are_left_where_they_would_not_help(environment, changes, system):
  system(**changes)
  assert heap.with_huge_pages(environment) is None


def test_a_command_starts_again_as_it_was_given(tmp_path):
  environment = {name: value for name, value in os.environ.items() if name != 'GLIBC_TUNABLES'}
  environment['JAX_PLATFORMS'] = 'cpu'
  done = subprocess.run([sys.executable, '-c', STARTED, 'a b', '--c'], env=environment, check=True,
                        capture_output=True, text=True).stdout.splitlines()
  wanted = heap.with_huge_pages(environment)
  assert json.loads(done[-1]) == [wanted and wanted['GLIBC_TUNABLES'], ['a b', '--c']]
  assert len(done) == (3 if wanted else 2) and len(set(done[:-1])) == 1  # the same process


@pytest.mark.parametrize('verb, again', [('train', 1), ('serve', 1), ('params', 0), ('doctor', 0)])
def test_verbs_that_compute_start_again(verb, again, system, monkeypatch):
  started = []
  monkeypatch.setattr(os, 'execve', lambda *found: started.append(found))
  monkeypatch.setattr(cli, 'run', lambda argv: 0)
  monkeypatch.setattr(sys, 'argv', ['hrvlm', verb, '--x'])
  monkeypatch.setattr(sys, 'orig_argv', ['python', '/bin/hrvlm', verb, '--x'])
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
  assert cli.main() == 0 and len(started) == again
  if again:
    assert started[0][:2] == (sys.executable, [sys.executable, '/bin/hrvlm', verb, '--x'])
    assert heap.asked_for(started[0][2])
  cli.main([verb])  # from Python the process is the caller's
  assert len(started) == again


def test_what_a_compilation_leaves_goes_back(monkeypatch):
  trims = []
  monkeypatch.setattr(heap, 'trim', lambda: trims.append(1))
  monkeypatch.setattr(heap, '_LONG', 0.0)
  heap.trim_after_compiling()
  heap.trim_after_compiling()  # once is enough
  fn = jax.jit(lambda x: jnp.cumsum(x * 3))
  fn(jnp.ones(7))
  assert trims
  count = len(trims)
  fn(jnp.ones(7))
  assert len(trims) == count
  monkeypatch.setattr(heap, '_LONG', 1e9)
  fn(jnp.ones(8))
  assert len(trims) == count  # short ones leave little


@pytest.mark.parametrize('mode', ['keep', 'give back'])
def test_freed_memory_is_used_again(mode):
  environment = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
  out = subprocess.run([sys.executable, '-c', FREED, mode], check=True, capture_output=True,
                       text=True, env=environment).stdout
  kept, first, again = map(int, out.split())
  assert first > 30  # pages of a huge page at least
  if mode == 'give back' or not kept:  # without glibc nothing is promised
    assert again > first / 2
  else:
    assert again < first / 10


def test_another_c_library_is_no_error(monkeypatch):
  monkeypatch.setattr(ctypes, 'CDLL', lambda name: object())
  assert heap.keep_freed() is False
  heap.trim()


@pytest.mark.parametrize('asked', [True, False, None])
def test_freed_memory_stays_where_a_run_asks_for_it(asked, monkeypatch, tmp_path):
  calls = []
  monkeypatch.setattr(heap, 'keep_freed', lambda: calls.append('kept'))
  monkeypatch.setattr(loop, 'train', lambda *given, **options: calls.append('trained') or
                      loop.Result(step=1, loss=None, interrupted=False, compilations=0))
  assert cli.run(['train', '--config', 'configs/tiny/mc_llava.py', '--workdir', str(tmp_path),
                  f'--config.training.keep_heap={asked}']) == 0
  assert calls == (['kept', 'trained'] if asked else ['trained'])
