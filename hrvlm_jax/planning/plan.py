"""What a step would cost on chips that are not here: compiled for them, read, and judged.

`plan` runs the compiler in a child process (`compilation.py`) at its full effort. For a TPU the
child is stopped when the scheduled program is written, before code is generated, and
`schedule.py` reads what it takes. A GPU's compiler is not here: its step is partitioned for fake
CPU devices, and a roofline estimates it. The step comes by name, `package.module:function`; the
function gets the mesh and the platform and returns a `Program`.
"""

from __future__ import annotations

from collections.abc import Mapping
import importlib.util
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

from hrvlm_jax.core import installed, json_text
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel.topology import Topology, parse
from hrvlm_jax.planning import explain, memory, report, schedule
from hrvlm_jax.planning.compilation import ANSWER, TRACED
from hrvlm_jax.planning.costs import Costs, costs
from hrvlm_jax.planning.program import MODULE, Program

__all__ = ['EFFORTS', 'Program', 'plan']

TIMEOUT = 1800
# 'scheduled' stops the compiler before it generates code; 'generated' lets it finish, which takes
# about ten times as long and gives the compiler's own cycles of products and the code's size.
EFFORTS = ('scheduled', 'generated')


def plan(target: str, options: Mapping[str, Any], topology: str, *, mesh: Mapping[str, int],
         slices: int = 1, effort: str = 'scheduled', timeout: float = TIMEOUT,
         constants: pathlib.Path | None = None, keep: pathlib.Path | None = None,
         compiler: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Compiles a step for a topology in a child process and reports what it would cost there.

  Args:
    target: `package.module:function`; called as `function(mesh, platform=, **options)` ->
      Program.
    options: JSON values for it.
    topology: such as `v5e:16x16` or `gpu:8`.
    mesh: sizes of the mesh axes (`mesh.MeshConfig`).
    effort: one of `EFFORTS`, for TPUs.
    constants: a file that replaces values of costs.json (`costs.costs`).
    keep: the program's text goes there (compressed by its suffix, see `explain.store`).
    compiler: options of the compiler beside those of the chip.

  Returns:
    JSON values, see `report.build`.

  Raises:
    UserError: bad topology or mesh, libtpu missing, time-out, or what the target raised.
  """
  found = parse(topology, slices=slices)
  check_compiler(found)
  tpu = found.chip.platform == 'tpu'
  prices = costs(found.chip.name, constants) if tpu else None
  request = {'target': target, 'options': dict(options), 'topology': topology, 'slices': slices,
             'mesh': dict(mesh), 'compiler': dict(compiler or {})}
  with tempfile.TemporaryDirectory() as name:
    child = _Child(request, pathlib.Path(name), found, stop=tpu and effort == 'scheduled')
    return child.run(timeout, effort, prices, keep)


class _Child:
  """One compilation: its process, its folder, and what it left there."""

  def __init__(self, request: Mapping[str, Any], folder: pathlib.Path, topology: Topology, *,
               stop: bool):
    self.request, self.folder, self.topology, self.stop = request, folder, topology, stop
    self.dump = folder / 'dump'

  def run(self, timeout: float, effort: str, prices: Costs | None,
          keep: pathlib.Path | None) -> dict[str, Any]:
    """Waits for the program, or for the answer that there is none, and reports it."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, '-m', 'hrvlm_jax.planning.compilation', json.dumps(self.request),
               str(self.folder)]
    log = self.folder / 'log'
    with log.open('w') as stderr:
      process = subprocess.Popen(command, env=_environment(self.topology, self.dump),
                                 stdout=subprocess.DEVNULL, stderr=stderr)
      try:
        text = self._wait(process, started + timeout)
      finally:
        process.kill()
        process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = {'compile_seconds': round(time.monotonic() - started, 1), 'effort': effort,
             'compile_cpu_seconds': round(after.ru_utime + after.ru_stime - before.ru_utime
                                          - before.ru_stime, 1)}
    words = log.read_text(errors='replace')
    answer = self._answer()
    if text is None and answer is None:
      if time.monotonic() - started >= timeout:
        raise UserError(f'plan: compiling for {self.topology.name} took more than {timeout:g} s; '
                        'give it more with --timeout')
      raise RuntimeError(f'plan: the child process ended with code {process.returncode}:\n'
                         + '\n'.join(words.splitlines()[-15:]))
    if answer and 'error' in answer:
      raise UserError(answer['error'])
    known = json_text.loads((self.folder / TRACED).read_text())
    used, text = self._result(known, answer, text, words)
    if text is not None and keep is not None:
      explain.store(keep, text)
    reading = schedule.read(text, prices) if text is not None and prices else None
    return report.build(self.topology, known | spent, used, text=text, reading=reading)

  def _result(self, known, answer, text, log: str) -> tuple[dict[str, Any], str | None]:
    """(memory, text of the program or None where it does not fit)."""
    if text is not None:
      usage = self._written('memory-usage-report.txt')
      return memory.of_report(usage.read_text(), known['argument_bytes']), text
    return memory.of_log(answer['memory'], log), answer.get('text')

  def _wait(self, process: subprocess.Popen, until: float) -> str | None:
    """The scheduled program as soon as it is written; None: the child ended or has no time left."""
    while time.monotonic() < until:
      ended = process.poll() is not None
      if self.stop and (text := self._scheduled()) is not None:
        return text
      if ended:
        return None
      time.sleep(0.5)
    return None

  def _scheduled(self) -> str | None:
    """The scheduled program, where it is written to the end and its memory, too."""
    path = self._written('after_optimizations_after_buffer_assignment.txt')
    usage = self._written('memory-usage-report.txt')
    if path is None or usage is None or not usage.stat().st_size:
      return None
    with path.open('rb') as file:  # the entry computation comes last and ends with a brace
      file.seek(max(path.stat().st_size - 8, 0))
      if not file.read().strip().endswith(b'}'):
        return None
    text = path.read_text(errors='replace')
    return text if '\nENTRY ' in text and text == path.read_text(errors='replace') else None

  def _written(self, ending: str) -> pathlib.Path | None:
    return next(iter(self.dump.glob(f'*jit_{MODULE}*{ending}')), None)

  def _answer(self) -> dict[str, Any] | None:
    path = self.folder / ANSWER
    return json_text.loads(path.read_text()) if path.exists() else None


def check_compiler(topology: Topology) -> None:
  """TPU programs need libtpu, also on a machine without a TPU.

  Raises:
    UserError: it is not installed.
  """
  if topology.chip.platform == 'tpu' and importlib.util.find_spec('libtpu') is None:
    raise UserError(f'plan: compiling for {topology.name} needs libtpu, the compiler for TPUs; '
                    f'install it with: {installed.add("tpu")} (no TPU is needed)')


def _environment(topology: Topology, dump: pathlib.Path) -> dict[str, str]:
  env = dict(os.environ)
  for name in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'JAX_COMPILATION_CACHE_DIR',
               'JAX_OPTIMIZATION_LEVEL'):
    env.pop(name, None)
  env |= {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'TF_CPP_MIN_LOG_LEVEL': '3',
          'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0',
          # The log says how much memory a generated program was given (`memory.of_log`).
          'TPU_STDERR_LOG_LEVEL': '0', 'TPU_MIN_LOG_LEVEL': '0',
          # There is no chip that two programs could quarrel about.
          'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
          'TPU_ACCELERATOR_TYPE': topology.accelerator_type or ''}
  if topology.chip.platform != 'tpu':
    env['JAX_NUM_CPU_DEVICES'] = str(topology.devices)
  else:
    env['XLA_FLAGS'] = (f'--xla_dump_to={dump} --xla_dump_hlo_as_text '
                        f'--xla_dump_hlo_module_re=jit_{MODULE}')
  return env
