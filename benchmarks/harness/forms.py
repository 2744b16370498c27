"""Forms of a peer: what a user who knows PyTorch would try. No JAX, no PyTorch.

A form is BASE, BASE-HOW or either with +mkl: `eager`, `compile` (frozen weights), `autotune` (and
max-autotune), `onednn` (linear layers by oneDNN); HOW is a case's own (`merged`, `channels`).
`bfloat16` and `bfloat16-compile` are told of beside a float32 row, never compared in it.

MKL takes its best kernels on Intel's CPUs alone: it asks `mkl_serv_intel_cpu_true`, and as it comes
it runs at most AVX2 on others. `+mkl` answers that question with yes, by a shared object that is
compiled on the spot and loaded before PyTorch's own library.
"""

from __future__ import annotations

from collections.abc import Sequence
import hashlib
import os
import pathlib
import shutil
import subprocess

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.machine import Machine

BASES = ('eager', 'compile', 'autotune', 'onednn', 'bfloat16')
TOLD = '+mkl'
REDUCED = 'bfloat16'  # another precision
_SOURCE = """int mkl_serv_intel_cpu_true(void) { return 1; }
int mkl_serv_intel_cpu(void) { return 1; }
"""
# Compilers in the order they are asked for; $CC first.
_COMPILERS = ('cc', 'gcc', 'clang')


class Skipped(UserError):
  """A form that cannot be tried here; the reason is kept in the result."""


def compiler() -> str | None:
  """The system's C compiler."""
  names = [*filter(None, [os.environ.get('CC', '').split(' ')[0]]), *_COMPILERS]
  return next((found for name in names if (found := shutil.which(name))), None)


def preload(folder: pathlib.Path) -> pathlib.Path:
  """The shared object that tells MKL to take its best kernels; compiled once into `folder`.

  Raises:
    Skipped: there is no C compiler, or it fails.
  """
  folder = folder.resolve()
  target = folder / f'mkl-{hashlib.sha256(_SOURCE.encode()).hexdigest()[:12]}.so'
  if ' ' in str(target) or ':' in str(target):
    raise Skipped(f'MKL was not told to take its best kernels: {target} cannot be preloaded, '
                  'because blanks and colons part the names there; set HRVLM_BENCH_SCRATCH to a '
                  'folder without them')
  if target.exists():
    return target
  if (found := compiler()) is None:
    raise Skipped(f'MKL was not told to take its best kernels: no C compiler here (looked for '
                  f'$CC, {", ".join(_COMPILERS)}); install one, for example gcc')
  folder.mkdir(parents=True, exist_ok=True)
  source, made = folder / f'{target.stem}.c', folder / f'{target.stem}.{os.getpid()}.so'
  source.write_text(_SOURCE)
  done = subprocess.run([found, '-shared', '-fPIC', '-O2', '-o', str(made), str(source)],
                        capture_output=True, text=True)
  if done.returncode:
    raise Skipped(f'MKL was not told to take its best kernels: {found} failed: '
                  f'{done.stderr.strip()[:200]}')
  made.replace(target)  # whole or not there
  return target


def environment(form: str, folder: pathlib.Path, given: str = '') -> dict[str, str]:
  """Variables of a peer's process in this form; `given`: LD_PRELOAD as the user has it.

  Raises:
    Skipped: see `preload`.
  """
  if not form.endswith(TOLD):
    return {}
  return {'LD_PRELOAD': ' '.join(filter(None, [str(preload(folder)), given]))}


def base(form: str) -> str:
  """The form as the peer's code knows it.

  Raises:
    UserError: an unknown form.
  """
  plain = form.removesuffix(TOLD)
  if plain.split('-')[0] not in BASES or '+' in plain:
    raise UserError(f'unknown form {form}: one of {", ".join(BASES)}, with -merged or -channels '
                    f'where the case has it, and {TOLD} behind')
  return plain


def telling_helps(machine: Machine) -> bool:
  """Whether MKL has kernels that it does not take by itself: on an x86 CPU not of Intel."""
  return machine.vendor != 'Intel' and machine.effective in ('avx2', 'avx512', 'amx')


def tried(forms: Sequence[str], machine: Machine, *, told_is_faster: bool) -> list[str]:
  """The forms to try here: told where that multiplies faster; bfloat16 where the CPU has it."""
  wide = machine.bfloat16 and machine.effective not in ('sse', 'avx', 'avx2')
  kept = [form for form in forms if wide or not form.startswith(REDUCED)]
  suffix = TOLD if told_is_faster else ''
  return [form if form.endswith(TOLD) else form + suffix for form in kept]
