"""The child process of a plan: traces a step, compiles it for chips that are not here.

It runs apart because the compiler of a TPU (libtpu) must be told before JAX starts that there is no
TPU, because it writes to stderr as it likes, and because it is stopped as soon as its schedule is
written: nine tenths of its time go into code that a plan never runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import importlib
import json
import math
import pathlib
import sys
import time
from typing import Any

import jax

from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel.compiler import compiler_options
from hrvlm_jax.parallel.mesh import make_mesh
from hrvlm_jax.parallel.topology import Topology, parse
from hrvlm_jax.planning import memory
from hrvlm_jax.planning.program import MODULE, Program

TRACED, ANSWER = 'traced.json', 'answer.json'


def devices_of(topology: Topology) -> list:
  """The devices of a topology: described ones for TPUs, else fake CPU ones.

  Raises:
    UserError: libtpu does not know it, or too few fake devices.
  """
  from jax.experimental import topologies

  if topology.chip.platform != 'tpu':
    devices = jax.devices('cpu')
    if len(devices) < topology.devices:
      raise UserError(f'{topology.name} needs {topology.devices} fake CPU devices, found '
                      f'{len(devices)}; run it through plan(), which sets them up')
    return devices[:topology.devices]
  options = dict(topology.chip.topology_options)
  if topology.shape == (1, 1):  # else libtpu takes the four chips of a usual host for granted
    options['chips_per_host_bounds'] = (1, 1, 1)
  if topology.slices > 1:
    options['num_slices'] = topology.slices
  try:
    described = topologies.get_topology_desc(topology.name, 'tpu', **options)
  except (RuntimeError, ValueError, NotImplementedError) as error:
    raise UserError(f'topology {topology.name}: libtpu does not describe it: '
                    f'{str(error).splitlines()[0]}') from error
  return list(described.devices)


def traced(program: Program, topology: Topology, mesh, *, seconds: float) -> dict[str, Any]:
  """What is known before anything is compiled, as JSON values."""
  return {
    'topology': topology.name, 'slices': topology.slices, 'chips': topology.chips,
    'devices': topology.devices, 'accelerator_type': topology.accelerator_type,
    'device_kind': topology.chip.device_kinds[0], 'mesh': dict(mesh.shape),
    'examples': program.examples, 'tokens': program.tokens, 'notes': list(program.notes),
    'model_flops': program.model_flops, 'argument_bytes': argument_bytes(program),
    'slice_of': [getattr(d, 'slice_index', 0) or 0 for d in mesh.devices.flat],
    'trace_seconds': round(seconds, 1)}


def argument_bytes(program: Program) -> int:
  """Of all arguments on one device."""
  return sum(_local_bytes(leaf) for leaf in jax.tree.leaves(program.args))


def _local_bytes(leaf) -> int:
  shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
  return math.prod(shape) * getattr(leaf.dtype, 'itemsize', 4)


def compile_step(request: Mapping[str, Any], folder: pathlib.Path) -> dict[str, Any]:
  """Traces and compiles as asked; what is known on the way is left in the folder.

  Returns:
    JSON values: memory (bytes by use) and, where it compiled, text (of the program); the parent
    adds them to what `traced` gave.
  """
  topology = parse(request['topology'], slices=request['slices'])
  mesh = make_mesh(request['mesh'], devices=devices_of(topology))
  module, _, function = request['target'].partition(':')
  # Layers choose their form for the chips of the plan, not for the devices that stand for them.
  options = request['options'] | {'platform': topology.chip.platform}
  started = time.monotonic()
  program = getattr(importlib.import_module(module), function)(mesh, **options)

  def step(*args):
    return program.fn(*args)

  step.__name__ = MODULE  # the name of the module that is waited for
  places = {} if program.out_shardings is None else {'out_shardings': program.out_shardings}
  # What a step does not read, as one of decoding the encoder, lies on its device all the same.
  lowered = jax.jit(step, donate_argnums=program.donate, keep_unused=True, **places).lower(
    *program.args)
  known = traced(program, topology, mesh, seconds=time.monotonic() - started)
  _write(folder / TRACED, known)
  if known['argument_bytes'] > topology.chip.usable_bytes:
    # Minutes of compilation would say the same.
    return {'memory': memory.of_arguments(known['argument_bytes'])}
  # A GPU's options speak to a compiler that is not here.
  wanted = (compiler_options(topology.chip.name)
            if topology.chip.platform == 'tpu' and mesh.size > 1 else {})
  try:
    compiled = lowered.compile(compiler_options=dict(wanted | request['compiler']) or None)
  except RuntimeError as error:
    found = memory.of_refusal(str(error), known['argument_bytes'])
    if found is None:
      raise
    return {'memory': found}
  return {'memory': memory.of_analysis(compiled.memory_analysis()), 'text': compiled.as_text()}


def _write(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  path.with_suffix('.part').write_text(json.dumps(values))
  path.with_suffix('.part').rename(path)


def main(arguments: Sequence[str]) -> int:
  """The child: request as JSON, folder of the answer."""
  request, folder = json_text.loads(arguments[0]), pathlib.Path(arguments[1])
  # JAX notes ten calls of every operation, all of them its own where a kernel is called.
  jax.config.update('jax_traceback_in_locations_limit', 40)
  # The compiler spawns no tool that could help here; its chatter goes to stderr, which the parent
  # shows only when there is no answer.
  with contextlib.suppress(BrokenPipeError):
    try:
      reply = compile_step(request, folder)
    except UserError as error:
      reply = {'error': str(error)}
    _write(folder / ANSWER, reply)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
