"""What a step would cost on chips that are not here: compiled for them, read, and judged.

`plan` runs in a child process, because the compiler of a TPU (libtpu) must be told before JAX
starts that there is no TPU, and because it writes to stderr as it likes. The step comes by name,
`package.module:function`; the function gets the mesh and the platform and returns a `Program`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel.topology import GIB, Topology, parse

# Share of the peak that well-formed large products reach; the rest is lost to the compiler and the
# memory system. Stated in every report.
MATRIX_EFFICIENCY = 0.75
TIMEOUT = 1800
# How hard the compiler for TPUs tries. Nine tenths of its usual time go into kernels, which a plan
# never runs; with little effort it partitions the same step, but schedules it more simply: memory
# and messages come out a few per cent off (docs/plans.md compares).
EFFORTS = {'quick': 'O1', 'full': None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A step to plan.

  Attributes:
    fn: the function that is compiled.
    args: its arguments as trees of ShapeDtypeStruct WITH shardings.
    donate: numbers of the arguments whose memory the results take.
    out_shardings: as for `jax.jit`.
    model_flops: operations the model needs in one call, recomputation left out (`flops.py`).
    examples, tokens: what one call gets through, for rates.
    notes: sentences for the report (buckets, batch sizes, what is frozen).
  """

  fn: Callable
  args: tuple
  donate: tuple[int, ...] = ()
  out_shardings: Any = None
  model_flops: float
  examples: int
  tokens: int = 0
  notes: tuple[str, ...] = ()


# --- in the child --------------------------------------------------------------------------------


def devices_of(topology: Topology) -> list:
  """The devices of a topology: described ones for TPUs, else fake CPU ones."""
  import jax
  from jax.experimental import topologies

  if topology.chip.platform != 'tpu':
    devices = jax.devices('cpu')
    if len(devices) < topology.devices:
      raise UserError(f'{topology.name} needs {topology.devices} fake CPU devices, found '
                      f'{len(devices)}; run it through plan(), which sets them up')
    return devices[:topology.devices]
  options = dict(topology.chip.topology_options)
  if topology.slices > 1:
    options['num_slices'] = topology.slices
  try:
    described = topologies.get_topology_desc(topology.name, 'tpu', **options)
  except (RuntimeError, ValueError, NotImplementedError) as error:
    raise UserError(f'topology {topology.name}: libtpu does not describe it: '
                    f'{str(error).splitlines()[0]}') from error
  return list(described.devices)


def compile_program(program: Program, topology: Topology, mesh) -> dict[str, Any]:
  """Compiles for the topology and reads the result; see `plan` for the keys."""
  import time

  import jax

  from hrvlm_jax.planning import hlo

  started, worked = time.monotonic(), time.process_time()
  options = {} if program.out_shardings is None else {'out_shardings': program.out_shardings}
  lowered = jax.jit(program.fn, donate_argnums=program.donate, **options).lower(*program.args)
  traced = time.monotonic() - started
  argument_bytes = sum(_local_bytes(leaf) for leaf in jax.tree.leaves(program.args))
  if argument_bytes > topology.chip.hbm_bytes:
    # Minutes of compilation would say the same.
    memory = {'total': argument_bytes, 'arguments': argument_bytes, 'temporaries': None}
    return _report(program, topology, mesh, memory=memory, seconds=time.monotonic() - started,
                   traced=traced, cpu=time.process_time() - worked)
  try:
    compiled = lowered.compile()
  except RuntimeError as error:
    memory = _out_of_memory(str(error), topology)
    if memory is None:
      raise
    # The second message leaves the arguments out.
    memory['total'] += argument_bytes if memory['temporaries'] else 0
    return _report(program, topology, mesh, memory=memory | {'arguments': argument_bytes},
                   seconds=time.monotonic() - started, traced=traced,
                   cpu=time.process_time() - worked)
  cpu = time.process_time() - worked
  module = hlo.Module.parse(compiled.as_text())
  slice_of = [getattr(d, 'slice_index', 0) or 0 for d in mesh.devices.flat]
  stats = compiled.memory_analysis()
  total = (stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
           - stats.alias_size_in_bytes + stats.generated_code_size_in_bytes)
  memory = {
    'arguments': stats.argument_size_in_bytes, 'outputs_not_donated':
      stats.output_size_in_bytes - stats.alias_size_in_bytes,
    'temporaries': stats.temp_size_in_bytes, 'program': stats.generated_code_size_in_bytes,
    'total': total}
  return _report(program, topology, mesh, memory=memory, module=module, slice_of=slice_of,
                 seconds=time.monotonic() - started, traced=traced, cpu=cpu)


def _local_bytes(leaf) -> int:
  shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
  return math.prod(shape) * getattr(leaf.dtype, 'itemsize', 4)


def _out_of_memory(text: str, topology: Topology) -> dict[str, Any] | None:
  """What libtpu says when a program does not fit.

  `Used 20.1G of 15.75G hbm` counts all, `required for HLO temporaries (118.15G) exceeds available
  HBM (15.75G)` the temporaries alone.
  """
  import re

  size = r'([\d.]+)([GMK])'
  unit = {'G': GIB, 'M': 1 << 20, 'K': 1 << 10}
  scale = lambda number, letter: int(float(number) * unit[letter])
  if found := re.search(rf'[Uu]sed {size} of {size} hbm', text):
    return {'total': scale(*found.groups()[:2]), 'temporaries': None,
            'usable': scale(*found.groups()[2:])}
  if found := re.search(rf'temporaries \({size}\) exceeds available HBM \({size}\)', text):
    temporaries = scale(*found.groups()[:2])
    return {'total': temporaries, 'temporaries': temporaries, 'usable': scale(*found.groups()[2:])}
  return None


def _report(program, topology, mesh, *, memory, seconds, traced, cpu, module=None, slice_of=None):
  chip = topology.chip
  capacity = memory.pop('usable', chip.hbm_bytes)
  estimate = chip.platform != 'tpu'
  report = {
    'topology': topology.name, 'slices': topology.slices, 'chips': topology.chips,
    'devices': topology.devices, 'accelerator_type': topology.accelerator_type,
    'device_kind': chip.device_kinds[0], 'mesh': dict(mesh.shape),
    'examples': program.examples, 'tokens': program.tokens, 'notes': list(program.notes),
    'memory': {
      'kind': 'estimate (partitioned for fake CPU devices)' if estimate else 'compiled',
      'bytes_per_device': memory, 'hbm_bytes': chip.hbm_bytes, 'usable_bytes': capacity,
      'fits': memory['total'] <= capacity},
    'model_flops': program.model_flops, 'compile_seconds': round(seconds, 1),
    'trace_seconds': round(traced, 1), 'compile_cpu_seconds': round(cpu, 1),
  }
  if module is None:
    return report
  messages: dict[str, dict[str, float]] = {}
  for message in module.collectives(slice_of):
    name = message.kind + (' between slices' if message.crosses else '')
    row = messages.setdefault(name, {'count': 0, 'bytes': 0, 'wire_bytes': 0})
    row['count'] += message.times
    row['bytes'] += message.times * message.bytes
    row['wire_bytes'] += message.times * message.wire_bytes
  executed = module.matrix_flops() if not estimate else program.model_flops / topology.devices
  report['executed_matrix_flops_per_device'] = executed
  report['collectives_per_device'] = messages
  report['loops_of_unknown_length'] = module.unknown_loops
  report['roofline'] = roofline(
    topology, executed=executed, model=program.model_flops, memory=memory, messages=messages)
  step = report['roofline']['step_seconds']
  report['examples_per_second'] = program.examples / step
  report['tokens_per_second_per_chip'] = program.tokens / step / topology.chips
  return report


def roofline(topology: Topology, *, executed: float, model: float, memory: Mapping[str, Any],
             messages: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
  """Times of a step by each resource, the predicted step time and MFU, and what was assumed.

  Args:
    executed: matrix operations of one device, recomputation included.
    model: operations the model needs, all devices together.
  """
  chip = topology.chip
  inside = sum(row['wire_bytes'] for name, row in messages.items() if 'between' not in name)
  between = sum(row['wire_bytes'] for name, row in messages.items() if 'between' in name)
  # A ring along one axis of the torus uses that axis' two links.
  link = chip.link_bandwidth / max(chip.torus, 1)
  moved = memory['arguments'] + memory['outputs_not_donated'] + 2 * (memory['temporaries'] or 0)
  seconds = {
    'matrix': executed / (chip.peak_flops * MATRIX_EFFICIENCY),
    'memory': moved / chip.hbm_bandwidth,
    'links': inside / link,
    'between_slices': between / chip.dcn_bandwidth,
  }
  step = max(seconds.values())
  ideal = model / (chip.peak_flops * topology.devices)
  return {
    'seconds': seconds, 'step_seconds': step, 'bound_by': max(seconds, key=seconds.get),
    'mfu': ideal / step, 'step_seconds_without_overlap': sum(seconds.values()),
    'mfu_without_overlap': ideal / sum(seconds.values()),
    'assumptions': [
      f'products run at {MATRIX_EFFICIENCY:.0%} of the bf16 peak '
      f'({chip.peak_flops / 1e12:.0f} TFLOP/s per device)',
      'computation, memory and messages overlap fully (the other figures: not at all)',
      'memory traffic: every argument and result once, every temporary written and read once',
      f'messages are rings along one axis of the network, {link / 1e9:.0f} GB/s per device; '
      f'between slices {chip.dcn_bandwidth / 1e9:.2f} GB/s per device',
      'the input pipeline keeps up; element-wise work hides behind memory traffic',
    ],
  }


# --- in the parent -------------------------------------------------------------------------------


def plan(target: str, options: Mapping[str, Any], topology: str, *, mesh: Mapping[str, int],
         slices: int = 1, effort: str = 'quick', timeout: float = TIMEOUT) -> dict[str, Any]:
  """Compiles a step for a topology in a child process and reports what it would cost there.

  Args:
    target: `package.module:function`; called as `function(mesh, platform=, **options)` ->
      Program.
    options: JSON values for it.
    topology: such as `v5e:16x16` or `gpu:8`.
    mesh: sizes of the mesh axes (`mesh.MeshConfig`).
    effort: a key of `EFFORTS`; 'full' compiles as a run on the chips would.

  Returns:
    JSON values: memory (bytes per device, fits or not), model_flops,
    collectives_per_device (count, bytes, wire_bytes by kind), roofline (seconds by resource, step
    time, MFU, assumptions), compile_seconds, ...

  Raises:
    UserError: bad topology or mesh, libtpu missing, time-out, or what the target raised.
  """
  found = parse(topology, slices=slices)
  check_compiler(found)
  request = {'target': target, 'options': dict(options), 'topology': topology, 'slices': slices,
             'mesh': dict(mesh), 'effort': effort}
  with tempfile.TemporaryDirectory() as folder:
    answer = pathlib.Path(folder) / 'answer.json'
    command = [sys.executable, '-m', 'hrvlm_jax.planning.plan', json.dumps(request), str(answer)]
    try:
      done = subprocess.run(command, env=_environment(found, effort), capture_output=True,
                            text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
      raise UserError(f'plan: compiling for {topology} took more than {timeout:g} s') from None
    if not answer.exists():
      raise RuntimeError(f'plan: the child process ended with code {done.returncode}:\n'
                         + '\n'.join(done.stderr.splitlines()[-15:]))
    reply = json.loads(answer.read_text())
  if 'error' in reply:
    raise UserError(reply['error'])
  return _as_allocated(reply, done.stderr)


def _as_allocated(report: dict[str, Any], log: str) -> dict[str, Any]:
  """The memory that libtpu says it gave the program, where its log says so.

  `memory_analysis` counts the gaps between temporaries twice: once within their extent, once as
  fragmentation.
  """
  import re

  size = r'([\d.]+)([GMK])'
  found = re.findall(rf'program HBM usage: {size} / {size}', log)
  memory = report['memory']
  if not found or memory['kind'] != 'compiled':
    return report
  unit = {'G': GIB, 'M': 1 << 20, 'K': 1 << 10}
  used, usable = (int(float(found[-1][i]) * unit[found[-1][i + 1]]) for i in (0, 2))
  parts = memory['bytes_per_device']
  parts = parts | {'temporaries': used - parts['program']}
  parts['total'] = parts['arguments'] + parts['outputs_not_donated'] + used
  return report | {'memory': memory | {
    'bytes_per_device': parts, 'usable_bytes': usable, 'fits': parts['total'] <= usable}}


def check_compiler(topology: Topology) -> None:
  """TPU programs need libtpu, also on a machine without a TPU.

  Raises:
    UserError: it is not installed.
  """
  import importlib.util

  if topology.chip.platform == 'tpu' and importlib.util.find_spec('libtpu') is None:
    raise UserError(f'plan: compiling for {topology.name} needs libtpu, the compiler for TPUs; '
                    "install it with: pip install 'hrvlm-jax[tpu]' (no TPU is needed)")


def _environment(topology: Topology, effort: str) -> dict[str, str]:
  env = dict(os.environ)
  for name in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'JAX_COMPILATION_CACHE_DIR',
               'JAX_OPTIMIZATION_LEVEL'):
    env.pop(name, None)
  env |= {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'TF_CPP_MIN_LOG_LEVEL': '3',
          'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0',
          # The log says how much memory the program was given (`_as_allocated`).
          'TPU_STDERR_LOG_LEVEL': '0', 'TPU_MIN_LOG_LEVEL': '0',
          # There is no chip that two programs could quarrel about.
          'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
          'TPU_ACCELERATOR_TYPE': topology.accelerator_type or ''}
  if topology.chip.platform != 'tpu':
    env['JAX_NUM_CPU_DEVICES'] = str(topology.devices)
  elif EFFORTS[effort]:
    env['JAX_OPTIMIZATION_LEVEL'] = EFFORTS[effort]
  return env


def search(target: str, candidates: Sequence[tuple[Mapping[str, Any], Mapping[str, int]]],
           topology: str, *, slices: int = 1, effort: str = 'quick', timeout: float = TIMEOUT,
           report: Callable[[str], None] = print,
           label: Callable[[Mapping[str, Any]], str] | None = None,
           hopeless: Callable[..., str | None] | None = None,
           ) -> tuple[dict[str, Any] | None, list[dict]]:
  """Plans every (options, mesh) candidate; the best that fits has the most examples per second.

  Args:
    report: gets a line per candidate; `label(options)` says what is special about it.
    hopeless: `hopeless(options, mesh, reports so far)` -> why a candidate need not be compiled.

  Returns:
    (best report or None, all reports; a candidate that cannot run, or need not, has the key
    `error`).
  """
  reports = []
  for number, (options, mesh) in enumerate(candidates, start=1):
    why = None if hopeless is None else hopeless(options, mesh, reports)
    try:
      found = {'error': why, 'mesh': dict(mesh)} if why else plan(
        target, options, topology, mesh=mesh, slices=slices, effort=effort, timeout=timeout)
    except UserError as error:
      found = {'error': str(error), 'mesh': dict(mesh)}
    reports.append(found | {'options': dict(options), 'asked': dict(mesh)})
    name = ' '.join(filter(None, (_axes(mesh), label(options) if label else '')))
    report(f'{number}/{len(candidates)} {name}: {_verdict(found)}')
  good = [r for r in reports if 'error' not in r and r['memory']['fits']]
  return max(good, key=lambda r: r['examples_per_second'], default=None), reports


def mesh_candidates(topology: Topology, *, largest_tensor: int = 4,
                    smallest_fsdp: int = 4) -> list[dict[str, int]]:
  """Meshes worth trying: tensor 1, 2, 4; fsdp the rest, halved step by step in favour of data."""
  devices = topology.devices // topology.slices
  found = []
  tensor = 1
  while tensor <= largest_tensor and devices % tensor == 0:
    fsdp = devices // tensor
    while fsdp >= min(smallest_fsdp, devices // tensor):
      found.append({'data': devices // tensor // fsdp, 'fsdp': fsdp, 'tensor': tensor,
                    'dcn_data': topology.slices})
      if fsdp % 2:
        break
      fsdp //= 2
    tensor *= 2
  return found


def _axes(mesh: Mapping[str, int]) -> str:
  return ' '.join(f'{axis}={size}' for axis, size in mesh.items() if size != 1) or 'one device'


def _verdict(report: Mapping[str, Any]) -> str:
  if 'error' in report:
    return report['error'].splitlines()[0]
  memory = report['memory']
  total = memory['bytes_per_device']['total'] / GIB
  used = f'{total:.1f} of {memory["usable_bytes"] / GIB:.1f} GiB'
  if not memory['fits']:
    return f'does not fit: {used}'
  return (f'{used}, {report["roofline"]["step_seconds"]:.3f} s a step, '
          f'MFU {report["roofline"]["mfu"]:.0%}')


def describe(report: Mapping[str, Any]) -> str:
  """A report for people."""
  memory = report['memory']
  gib = lambda n: 'n/a' if n is None else f'{n / GIB:.2f} GiB'
  lines = [
    f'{report["slices"]} x {report["topology"]}: {report["chips"]} chips '
    f'({report["device_kind"]}), mesh {_axes(report["mesh"])}',
    *report['notes'],
    f'memory per device, {memory["kind"]}:',
    *(f'  {name.replace("_", " "):22s}{gib(size)}'
      for name, size in memory['bytes_per_device'].items()),
    f'  {"of":22s}{gib(memory["usable_bytes"])}: '
    f'{"fits" if memory["fits"] else "DOES NOT FIT"}',
    f'model operations in a step: {report["model_flops"]:.4g}',
  ]
  if 'roofline' in report:
    roof = report['roofline']
    lines.append('messages per device in a step:')
    lines += [f'  {name:34s}{row["count"]:6.0f} x, {row["bytes"] / 1e9:9.3f} GB'
              for name, row in report['collectives_per_device'].items()]
    times = ', '.join(f'{name} {value:.3f} s' for name, value in roof['seconds'].items() if value)
    lines += [
      f'times: {times}',
      f'step: {roof["step_seconds"]:.3f} s (bound by {roof["bound_by"]}), predicted MFU '
      f'{roof["mfu"]:.1%}; without any overlap {roof["step_seconds_without_overlap"]:.3f} s, '
      f'{roof["mfu_without_overlap"]:.1%}',
      f'rate: {report["examples_per_second"]:.1f} examples/s, '
      f'{report["tokens_per_second_per_chip"]:.0f} tokens/s per chip',
      'assumed:', *(f'  {text}' for text in roof['assumptions']),
    ]
  lines.append(f'compiled in {report["compile_seconds"]} s, {report["compile_cpu_seconds"]} s of '
               f'CPU time, effort {report["effort"]}')
  return '\n'.join(lines)


def _child(request: Mapping[str, Any]) -> dict[str, Any]:
  import importlib

  from hrvlm_jax.parallel.mesh import make_mesh

  topology = parse(request['topology'], slices=request['slices'])
  mesh = make_mesh(request['mesh'], devices=devices_of(topology))
  module, _, function = request['target'].partition(':')
  # Layers choose their form for the chips of the plan, not for the devices that stand for them.
  options = request['options'] | {'platform': topology.chip.platform}
  program = getattr(importlib.import_module(module), function)(mesh, **options)
  return compile_program(program, topology, mesh) | {'effort': request['effort']}


def main(arguments: Sequence[str]) -> int:
  """The child: request as JSON, path of the answer."""
  request, answer = arguments
  # The compiler spawns no tool that could help here; its chatter goes to stderr, which the parent
  # shows only when there is no answer.
  with contextlib.suppress(BrokenPipeError):
    try:
      reply = _child(json.loads(request))
    except UserError as error:
      reply = {'error': str(error)}
    path = pathlib.Path(answer)
    path.with_suffix('.part').write_text(json.dumps(reply))
    path.with_suffix('.part').rename(path)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
