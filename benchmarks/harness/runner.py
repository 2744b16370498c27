"""Runs a case: both sides as processes, outputs compared first, then calls that alternate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import numpy as np

from benchmarks.harness import contest, forms, isa, measure
from benchmarks.harness.case import Alone, Case, Options
from benchmarks.harness.records import ROOT, backend_of, machine_of
from hrvlm_jax.core import heap
from hrvlm_jax.core.errors import UserError

SLOWER_THAN_BOUND = 1.5
FORMAT = 3  # of the stored weights and inputs
# Seconds between the call of one side and that of the other: threads that wait for more work keep a
# core busy for a while (OpenMP: 0.2 s), which made calls of 0.1 s of the other side half as fast.
_REST = 0.5


@dataclasses.dataclass(frozen=True)
class Settings:
  """How `hrvlm bench` runs its cases.

  Attributes:
    device: 'cpu' or 'cuda'; a GPU runs bfloat16 with fused attention on both sides.
    rounds: measured calls of each side; None: what the case says.
    keep: leave the stored weights for the next run.
    peer_python: interpreter of the environment of scripts/peers.sh.
    ceiling: also measure the matrix-multiply rate at the case's shapes.
    alone: our side only.
    apart: one side in memory at a time, whatever the case says.
    one_core: for a busy machine: every side has one core and its processor time counts, which does
      not depend on what else runs. Wall time is what counts otherwise.
    variants: forms of the peer to try; None: what the case says, as they are best here.
    isa: instruction set that both sides are held to (`isa.check`); '' for none.
  """

  device: str = 'cpu'
  rounds: int | None = None
  keep: bool = False
  peer_python: str | None = None
  ceiling: bool = True
  alone: bool = False
  apart: bool = False
  one_core: bool = False
  variants: tuple[str, ...] | None = None
  isa: str = ''
  note: str = ''

  @property
  def backend(self) -> str:
    """Part of the result's file name."""
    return 'gpu' if self.device == 'cuda' else 'cpu'

  def options(self, variant: str = 'eager', dtype: str = 'float32') -> Options:
    """Of one side."""
    if self.device == 'cuda':
      return Options(device='cuda', dtype='bfloat16', variant=variant, impl='auto')
    return Options(variant=variant, dtype=dtype, one_core=self.one_core)


def scratch() -> pathlib.Path:
  """Where weights stay while a case runs: $HRVLM_BENCH_SCRATCH or .cache/bench."""
  return pathlib.Path(os.environ.get('HRVLM_BENCH_SCRATCH') or ROOT / '.cache' / 'bench')


def peer_python(explicit: str | None = None) -> str:
  """The interpreter of the peers.

  Raises:
    UserError: there is none.
  """
  folder = pathlib.Path(os.environ.get('HRVLM_PEERS') or ROOT / '.cache' / 'peers')
  python = pathlib.Path(explicit or folder / 'bin' / 'python')
  if not python.exists():
    raise UserError(f'{python}: the environment of the PyTorch originals is not there; run '
                    'scripts/peers.sh, or name an interpreter that has torch and transformers '
                    'with --peer-python')
  return str(python)


def _paged(device: str) -> dict[str, str]:
  """What a side is told of its device and, as `hrvlm` itself begins, of huge pages."""
  told = ({'JAX_PLATFORMS': 'cpu'} if device == 'cpu' else
          {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'})  # both sides share the card
  paged = heap.with_huge_pages({**os.environ, **told}) or os.environ
  return told | {name: paged[name] for name in (heap.TUNABLES,) if name in paged}


class Process:
  """A side; answers come one at a time, so nothing runs while another side is timed."""

  def __init__(self, python: str, side: str, case: str, folder: pathlib.Path, options: Options,
               cap: str = ''):
    environment = {**isa.capped(os.environ, cap), 'TOKENIZERS_PARALLELISM': 'false'}
    environment |= forms.environment(options.variant, scratch(), environment.get('LD_PRELOAD', ''))
    if side == 'peer':
      options = contest.side_options(options)
    environment |= _paged(options.device)
    environment.setdefault('TORCHINDUCTOR_CACHE_DIR', str(scratch() / 'inductor'))
    pinned = ['taskset', '-c', str(min(os.sched_getaffinity(0)))] if options.one_core else []
    if options.one_core:
      environment |= {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}
    self._name = f'{case}, {side}'
    self._child = subprocess.Popen(
      [*pinned, python, '-m', 'benchmarks.harness.child', side, case, str(folder),
       json.dumps(dataclasses.asdict(options))],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)

  def __call__(self, do: str, **arguments) -> Any:
    """Sends a command and waits for its answer.

    Raises:
      UserError: the side failed or ended.
    """
    try:
      self._child.stdin.write(json.dumps({'do': do, **arguments}) + '\n')
      self._child.stdin.flush()
      line = self._child.stdout.readline()
    except BrokenPipeError:
      line = ''
    if not line:
      code = self._child.wait()
      raise UserError(f'{self._name}: the process ended during {do!r} with status {code}' + (
        ' (killed: most likely not enough memory)' if code == -9 else ''))
    answer = json.loads(line)
    if 'error' in answer:
      raise UserError(f'{self._name}: {do} failed: {answer["error"]} (details above)')
    return answer['ok']

  def close(self) -> None:
    """Ends the process and gives its memory back."""
    with contextlib.suppress(BrokenPipeError):
      self._child.stdin.close()
    self._child.wait()


def run_case(case: Case, settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
  """Measures one case.

  Returns:
    The result that is kept (`records.save`).

  Raises:
    UserError: a side fails, or the outputs differ by more than the case's tolerance.
  """
  sizes = json.dumps([FORMAT, case.ours, dict(case.settings)], sort_keys=True)
  folder = scratch() / f'{case.name}-{hashlib.sha256(sizes.encode()).hexdigest()[:12]}'
  result: dict[str, Any] = {
    'case': case.name, 'title': case.title, 'peer': case.peer_name, 'device': settings.device,
    'dtype': settings.options(dtype=case.dtype).dtype, 'settings': dict(case.settings),
    'date': measure.today(), 'note': settings.note,
    'machine': measure.machine(settings.isa, settings.one_core),
    'clock': 'processor' if settings.one_core else 'wall',
    'huge_pages': heap.asked_for(_paged(settings.device))}
  start = lambda python, side, variant='eager': Process(
    python, side, case.name, folder, settings.options(variant, case.dtype), settings.isa)
  ours = peer = None
  try:
    if not (folder / 'ready').exists():
      say(f'{case.name}: drawing weights and inputs')
      writer = start(sys.executable, 'ours')
      parameters = writer('prepare')
      writer.close()
      (folder / 'ready').write_text(json.dumps(parameters))
    result |= json.loads((folder / 'ready').read_text())
    if case.apart or settings.apart:
      _apart(case, settings, start, folder, result, say)
      return result
    ours = start(sys.executable, 'ours', _our_form(case, settings))
    result['ours'] = _first(ours, folder / 'ours.npz')
    say(f'{case.name}: first call of ours, compilation included: {result["ours"]["first_s"]} s')
    if case.peer is not None and not settings.alone:
      python = _python(case, settings)
      peer = _best_peer(case, settings, lambda variant: start(python, 'peer', variant), python,
                        folder, result, say)
    _rounds(case, settings, ours, peer, result)
  finally:
    for process in (ours, peer):
      if process is not None:
        process.close()
    if not settings.keep:
      shutil.rmtree(folder, ignore_errors=True)
  return result


def _python(case: Case, settings: Settings) -> str:
  """Interpreter of the peer's side."""
  return sys.executable if case.peer_side == 'ours' else peer_python(settings.peer_python)


def _our_form(case: Case, settings: Settings) -> str:
  """What MKL is told on our side: in JAX nothing, in PyTorch the same as on the peer's."""
  if not case.ours_torch or settings.device != 'cpu':
    return 'eager'
  if settings.variants is not None:
    return 'eager' + (forms.TOLD if all(v.endswith(forms.TOLD) for v in settings.variants) else '')
  products = contest.peer_products(_python(case, settings), str(ROOT), str(scratch()), settings.isa)
  return 'eager' + (forms.TOLD if products['used'] == 'told' else '')


def _forms(case, settings, python, result) -> list[str]:
  """The peer's forms to try; how fast PyTorch multiplies, and how MKL was told, in the result."""
  products = None
  if case.peer_side == 'peer' and settings.device == 'cpu' and settings.variants is None:
    products = contest.peer_products(python, str(ROOT), str(scratch()), settings.isa)
    result['peer_products'] = products
  return contest.choose_forms(case, settings.variants, products, settings.isa, settings.device)


def _apart(case, settings, start, folder, result, say) -> None:
  """Sides that do not fit into memory together: every round starts each anew, one at a time.

  A round of a side is a call that is not measured (it warms up and is compared), then one that is.
  """
  openers = {'ours': lambda: start(sys.executable, 'ours', _our_form(case, settings))}
  if case.peer is not None and not settings.alone:
    python = _python(case, settings)
    names = _forms(case, settings, python, result)
    form = names[0]
    if len(names) > 1:
      with contextlib.closing(openers['ours']()) as process:
        _first(process, folder / 'ours.npz')
      form = _best_form(case, names, lambda name: start(python, 'peer', name), folder, result,
                        say)[0]
    openers['peer'] = lambda: start(python, 'peer', form)
    result['variant'] = form
  measured = {name: Measured() for name in openers}
  rounds = settings.rounds or case.rounds
  for number in range(rounds):
    for name, opener in openers.items():
      process = opener()
      try:
        first = _first(process, folder / f'{name}.npz')
        process('reset_peak')
        measured[name].add(process('run', calls=case.calls), process('peak'))
        if number == rounds - 1:
          measured[name].after = first | process('after')
          if name == 'ours' and settings.ceiling:
            result['cost'] = process('cost')
      finally:
        process.close()
      say(f'{case.name}: {name} {measured[name].times[-1]["seconds"]:.2f} s')
    if 'peer' in openers:
      result['differences'] = compare(folder / 'ours.npz', folder / 'peer.npz', case)
  _report(case, settings, measured, result)


@dataclasses.dataclass
class Measured:
  """What the calls of one side gave."""

  times: list[Mapping[str, float]] = dataclasses.field(default_factory=list)
  peak: dict[str, int] = dataclasses.field(default_factory=dict)
  after: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def add(self, times: Mapping[str, float], peak: Mapping[str, int]) -> None:
    """One call."""
    self.times.append(times)
    self.peak = {key: max(value, self.peak.get(key, 0)) for key, value in peak.items()}


def _first(process: Process, path: pathlib.Path) -> dict[str, Any]:
  loaded = process('load')
  first = process('run')
  process('outputs', path=str(path))
  return {'load_s': round(loaded['seconds'], 2), 'first_s': round(first['seconds'], 2)}


def _best_form(case, names, start, folder, result, say) -> tuple[str, Any]:
  """Tries the peer's forms; (the fastest, its process where it was the only one)."""
  found: dict[str, dict[str, float]] = {}

  def trial(process: Process, form: str) -> dict[str, Any]:
    facts = _first(process, folder / 'peer.npz')
    # Another precision is told of, not compared: its difference is a fact beside its time.
    loose = {'tolerance': float('inf')} if form.startswith(forms.REDUCED) else {}
    found[form] = compare(folder / 'ours.npz', folder / 'peer.npz',
                          dataclasses.replace(case, **loose))
    if loose:
      facts['difference'] = max(found[form].values())
    second = facts['first_s'] if len(names) == 1 else process('run')['seconds']
    return {**facts, 'once_s': round(second, 4)}

  best, tried, process = contest.best(names, start, trial, f'{case.name}: {case.peer_name}', say)
  result['peer_forms'], result['variant'] = tried, best
  result['differences'] = found[best]
  return best, process


def _best_peer(case, settings, start, python, folder, result, say) -> Process:
  """Tries the peer's forms and starts the fastest again."""
  names = _forms(case, settings, python, result)
  best, process = _best_form(case, names, start, folder, result, say)
  if process is None:
    process = start(best)
    _first(process, folder / 'peer.npz')
  return process


def compare(ours: pathlib.Path, peer: pathlib.Path, case: Case) -> dict[str, float]:
  """Largest difference of each output, relative to max(1, largest value).

  Raises:
    UserError: names, shapes or values differ.
  """
  with np.load(ours) as a, np.load(peer) as b:
    if sorted(a.files) != sorted(b.files):
      raise UserError(f'{case.name}: the sides differs in what they return: {a.files}, {b.files}')
    found = {}
    for name in a.files:
      one, other = a[name].astype(np.float64), b[name].astype(np.float64)
      if one.shape != other.shape:
        raise UserError(f'{case.name}: {name} differs in shape: {one.shape}, {other.shape}')
      scale = max(1.0, float(np.abs(other).max(initial=0)))
      found[name] = float(np.abs(one - other).max(initial=0)) / scale
      if not found[name] <= case.tolerance:
        raise UserError(f'{case.name}: {name} differs by {found[name]:.2g} of its largest value, '
                        f'more than {case.tolerance:g}: no time of a wrong answer is kept')
  return {name: float(f'{value:.2g}') for name, value in found.items()}


def _rounds(case, settings, ours, peer, result) -> None:
  """Both sides are loaded: they take turns; each starts with a call that is not measured."""
  result['warm'] = True
  sides = {name: side for name, side in (('ours', ours), ('peer', peer)) if side is not None}
  measured = {name: Measured() for name in sides}
  for side in sides.values():
    side('reset_peak')
  for _ in range(settings.rounds or case.rounds):
    for name, side in sides.items():
      time.sleep(_REST)
      measured[name].add(side('run', calls=case.calls, warm=True), {})
  for name, side in sides.items():
    measured[name].peak, measured[name].after = side('peak'), side('after')
  if settings.ceiling:
    result['cost'] = ours('cost')
  _report(case, settings, measured, result)


def _report(case, settings, measured: Mapping[str, Measured], result) -> None:
  """Times, peaks and ratios into the result, and whether targets are met."""
  result['versions'] = {}
  for name, side in measured.items():
    part = result.setdefault('peer_run' if name == 'peer' else name, {})
    for key in ('seconds', 'cpu_seconds'):
      part[key] = measure.spread([t[key] for t in side.times])
    if settings.one_core:
      part['wall_seconds'], part['seconds'] = part['seconds'], part['cpu_seconds']
    part['peak'] = side.peak
    after = dict(side.after)
    result['versions'] |= after.pop('versions')
    facts = after.pop('facts')
    if accelerator := facts.pop('accelerator', ''):
      result['accelerator'] = accelerator
    part |= facts | after
    if case.work is not None:
      amount, unit = case.work
      part['rate'] = f'{amount / part["seconds"]["median"]:.3g} {unit}'
  if 'peer' in measured:
    pairs = zip(measured['ours'].times, measured['peer'].times, strict=True)
    clock = 'cpu_seconds' if settings.one_core else 'seconds'
    result['ratio'] = measure.spread([b[clock] / a[clock] for a, b in pairs])
    key = 'bytes' if settings.device == 'cpu' else 'device_bytes'
    result['memory_ratio'] = round(
      measured['ours'].peak[key] / measured['peer'].peak[key], 3)
  judge(case, result)


def judge(case: Case, result: dict[str, Any]) -> None:
  """Whether targets are met, from what was measured."""
  met = {}
  target, memory = case.asked(backend_of(result), machine_of(result).effective)
  if target is not None and 'ratio' in result:
    met['time'] = result['ratio']['median'] >= target
  if memory is not None and 'memory_ratio' in result:
    met['memory'] = result['memory_ratio'] <= memory
  if cost := result.get('cost'):
    share = cost['matmul_seconds'] / result['ours']['seconds']['median']
    cost['share_of_ceiling'] = round(share, 3)
    cost['gflops'] = round(cost['flops'] / result['ours']['seconds']['median'] / 1e9, 1)
    if case.bound:
      met['bound'] = share >= 1 / SLOWER_THAN_BOUND
  result['met'] = met


def run_alone(case: Alone, settings: Settings) -> dict[str, Any]:
  """Runs a measurement without a peer in a process of its own."""
  code = ('import json, sys; from benchmarks.harness.case import Options, find_cases, load\n'
          'case = find_cases()[sys.argv[1]]; options = Options(**json.loads(sys.argv[2]))\n'
          'out = load(case.run)(case.settings, options)\n'
          'open(sys.argv[3], "w").write(json.dumps(out))')
  folder = scratch()
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f'{case.name}.json'
  path.unlink(missing_ok=True)
  options = json.dumps(dataclasses.asdict(settings.options()))
  environment = isa.capped(os.environ, settings.isa)
  if settings.device == 'cpu':
    environment['JAX_PLATFORMS'] = 'cpu'
  done = subprocess.run([sys.executable, '-c', code, case.name, options, str(path)], cwd=ROOT,
                        env=environment)
  if done.returncode or not path.exists():
    raise UserError(f'{case.name}: the measurement ended with status {done.returncode} (details '
                    'above)')
  found = json.loads(path.read_text())
  path.unlink()
  return {'case': case.name, 'title': case.title, 'device': settings.device,
          'settings': dict(case.settings), 'date': measure.today(),
          'machine': measure.machine(settings.isa),
          'versions': measure.versions(('jax', 'jaxlib', 'flax', 'hrvlm-jax', 'numpy')),
          'note': settings.note, **found}
