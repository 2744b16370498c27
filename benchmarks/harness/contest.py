"""Which form of the peer is compared: every form is tried, one in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import subprocess
from typing import Any

from benchmarks.harness import forms, isa
from benchmarks.harness.case import Case, Options
from hrvlm_jax.core import machine as cpu
from hrvlm_jax.core.errors import UserError

FASTER = 1.05  # telling MKL pays from here on


@functools.cache
def peer_products(python: str, root: str, folder: str, cap: str) -> dict[str, Any]:
  """PyTorch's product rates as it comes and with MKL told to take its best kernels.

  Args:
    python: of the peers. root: working directory. folder: for the shared object.
    cap: instruction set that both are held to.

  Returns:
    'as it comes', 'told': {'gflops' by shape, 'mkl': MKL's words}; 'used', which of them multiplies
    faster; 'skipped': why it was not told.
  """
  def ask(form: str) -> dict[str, Any]:
    environment = isa.capped(os.environ, cap)
    environment |= {'MKL_VERBOSE': '1'} | forms.environment(
      form, pathlib.Path(folder), environment.get('LD_PRELOAD', ''))
    done = subprocess.run([python, '-m', 'benchmarks.peers.products'], cwd=root, env=environment,
                          capture_output=True, text=True)
    if done.returncode:
      raise forms.Skipped(f'products of the peer were not measured: {done.stderr.strip()[-300:]}')
    words = re.search(r'for Intel\(R\) 64 architecture (.*?) processors', done.stdout)
    return {'gflops': json.loads(done.stdout.splitlines()[-1]), 'mkl': words[1] if words else ''}

  found: dict[str, Any] = {'used': 'as it comes'}
  machine = dataclasses.replace(cpu.here(), capped=cap)
  try:
    found['as it comes'] = ask('eager')
    if not forms.telling_helps(machine):
      return found | {'skipped': f'MKL takes its best kernels by itself on {machine.title}'}
    found['told'] = ask('eager' + forms.TOLD)
  except forms.Skipped as reason:
    return found | {'skipped': str(reason)}
  one, other = found['as it comes']['gflops'], found['told']['gflops']
  gain = math.prod(other[shape] / one[shape] for shape in one) ** (1 / len(one))
  return found | {'gain': round(gain, 3), 'used': 'told' if gain > FASTER else 'as it comes'}


def choose_forms(case: Case, asked: tuple[str, ...] | None, products: Mapping[str, Any] | None,
                 cap: str, device: str) -> list[str]:
  """The forms to try: those asked for, or the case's, as they are best on this machine.

  Raises:
    UserError: an unknown form.
  """
  chosen = list(asked or case.variants)
  for form in chosen:
    forms.base(form)
  if asked:
    if all(form.startswith(forms.REDUCED) for form in chosen):
      raise UserError(f'{", ".join(chosen)}: told of beside a form in float32, not compared; name '
                      'one as well, such as --variant eager')
    return chosen
  if device == 'cuda':  # runs bfloat16 anyway
    return [form for form in chosen if not form.startswith((forms.REDUCED, 'onednn'))]
  machine = dataclasses.replace(cpu.here(), capped=cap)
  return forms.tried(chosen, machine, told_is_faster=bool(products) and products['used'] == 'told')


def side_options(options: Options) -> Options:
  """What the peer's process is told of a form: what stands for its environment is left out, and a
  reduced precision is its dtype."""
  plain = forms.base(options.variant)
  if not plain.startswith(forms.REDUCED):
    return dataclasses.replace(options, variant=plain)
  how = plain.partition('-')[2] or 'eager'
  return dataclasses.replace(options, variant=how, dtype='bfloat16')


def best(names: list[str], start: Callable[[str], Any], trial: Callable[[Any, str], dict[str, Any]],
         what: str, say: Callable[[str], None]) -> tuple[str, dict[str, Any], Any]:
  """Tries forms; returns (the fastest, facts of each, its process where it was the only one).

  Args:
    start: form -> process. trial: (process, form) -> its facts with `once_s`, seconds of a call.

  Raises:
    UserError: no form ran, or one gave a wrong answer.
  """
  fastest, tried = None, {}
  for form in names:
    process = None
    try:
      process = start(form)
      tried[form] = trial(process, form)
    except forms.Skipped as reason:
      tried[form] = {'skipped': str(reason)}
      say(f'{what} {form}: {reason}')
      continue
    except UserError as error:
      if process is not None:
        process.close()
      # A form of the peer that does not run is a fact about the peer; a wrong answer is not.
      if len(names) == 1 or 'differs' in str(error):
        raise
      tried[form] = {'failed': str(error)[:300]}
      say(f'{what} {form}: {error}')
      continue
    say(f'{what} {form}: {tried[form]["once_s"]:.3f} s')
    if len(names) == 1:
      return form, tried, process
    process.close()
    if not form.startswith(forms.REDUCED) and (
        fastest is None or tried[form]['once_s'] < tried[fastest]['once_s']):
      fastest = form
  if fastest is None:
    raise UserError(f'{what}: no form ran: {tried}')
  return fastest, tried, None
