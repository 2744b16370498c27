"""What a plan reports: memory, time as a range, what it goes into; as JSON values and for people.

A TPU's step is read from its schedule (`schedule.py`): from an optimistic to a likely time. What
was partitioned for fake devices (GPUs, `cpu:8`) has no schedule; a roofline gives the time with
everything overlapping to the time with nothing overlapping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hrvlm_jax.parallel.topology import GIB, Topology
from hrvlm_jax.planning import explain, hlo
from hrvlm_jax.planning.schedule import Reading

# Share of the peak that well-formed large products reach on what no schedule is read for; the rest
# is lost to the compiler and the memory system. Stated in every report.
MATRIX_EFFICIENCY = 0.75


def build(topology: Topology, known: Mapping[str, Any], used: Mapping[str, Any], *,
          text: str | None, reading: Reading | None) -> dict[str, Any]:
  """The report of one compilation.

  Args:
    known: what was known before (`compilation.traced`), and what compiling took.
    used: memory, see `memory.py`.
    text: of the program; None: it does not fit.
    reading: of its schedule; None: it has none.

  Returns:
    JSON values: memory (bytes_per_device, fits), model_flops, mesh, examples, ...; where the
    program fits also step (seconds and mfu, likely_seconds and likely_mfu, method, assumptions,
    executed_flops_per_device), rates, and either account (`explain.summary`) or roofline (seconds
    by resource) and collectives_per_device.
  """
  chip, known, used = topology.chip, dict(known), dict(used)
  slice_of = known.pop('slice_of', None)
  known.pop('argument_bytes', None)
  usable = used.pop('usable', chip.usable_bytes)
  kind = 'estimate (partitioned for fake CPU devices)'
  if chip.platform == 'tpu':
    kind = 'scheduled' if known['effort'] == 'scheduled' else 'compiled'
  found = known | {'memory': {
    'kind': kind, 'bytes_per_device': used, 'hbm_bytes': chip.hbm_bytes, 'usable_bytes': usable,
    'fits': used['total'] <= usable}}
  if text is None:
    return found
  if reading is not None:
    account = explain.summary(reading)
    # Of the whole program, of one device.
    step = _step(topology, known['model_flops'], 'schedule', account['seconds'],
                 account['likely_seconds'], account['flops'], account.pop('assumptions'))
    found |= {'step': step, 'account': account}
  else:
    module = hlo.Module.parse(text)
    messages = collectives(module, slice_of)
    executed = known['model_flops'] / topology.devices
    seconds, assumptions = roofline(topology, executed=executed, memory=used, messages=messages)
    step = _step(topology, known['model_flops'], 'roofline', max(seconds.values()),
                 sum(seconds.values()), executed, assumptions)
    found |= {'step': step, 'roofline': seconds, 'collectives_per_device': messages,
              'loops_of_unknown_length': module.unknown_loops}
  likely = step['likely_seconds']
  return found | {'examples_per_second': known['examples'] / likely,
                  'tokens_per_second_per_chip': known['tokens'] / likely / topology.chips}


def _step(topology, model, method, seconds, likely, executed, assumptions) -> dict[str, Any]:
  ideal = model / (topology.chip.peak_flops * topology.devices)
  return {'method': method, 'seconds': seconds, 'likely_seconds': likely, 'mfu': ideal / seconds,
          'likely_mfu': ideal / likely, 'executed_flops_per_device': executed,
          'assumptions': list(assumptions)}


def collectives(module: hlo.Module, slice_of: Sequence[int] | None = None,
                ) -> dict[str, dict[str, float]]:
  """Messages by kind: how many in a call, their bytes, and what one device sends."""
  found: dict[str, dict[str, float]] = {}
  for message in module.collectives(slice_of):
    name = message.kind + (' between slices' if message.crosses else '')
    row = found.setdefault(name, {'count': 0, 'bytes': 0, 'wire_bytes': 0})
    row['count'] += message.times
    row['bytes'] += message.times * message.bytes
    row['wire_bytes'] += message.times * message.wire_bytes
  return found


def roofline(topology: Topology, *, executed: float, memory: Mapping[str, Any],
             messages: Mapping[str, Mapping[str, float]]) -> tuple[dict[str, float], list[str]]:
  """(seconds of a step by resource, what was assumed), where no schedule can be read.

  Args:
    executed: matrix operations of one device.
  """
  chip = topology.chip
  inside = sum(row['wire_bytes'] for name, row in messages.items() if 'between' not in name)
  between = sum(row['wire_bytes'] for name, row in messages.items() if 'between' in name)
  # A ring along one axis of the torus uses that axis' two links.
  link = chip.link_bandwidth / max(chip.torus, 1)
  moved = memory['arguments'] + memory['outputs_not_donated'] + 2 * (memory['temporaries'] or 0)
  return {
    'matrix': executed / (chip.peak_flops * MATRIX_EFFICIENCY),
    'memory': moved / chip.hbm_bandwidth,
    'links': inside / link,
    'between_slices': between / chip.dcn_bandwidth,
  }, [
    f'products run at {MATRIX_EFFICIENCY:.0%} of the bf16 peak '
    f'({chip.peak_flops / 1e12:.0f} TFLOP/s per device)',
    'optimistic: computation, memory and messages overlap fully; likely: not at all',
    'memory traffic: every argument and result once, every temporary written and read once',
    f'messages are rings along one axis of the network, {link / 1e9:.0f} GB/s per device; '
    f'between slices {chip.dcn_bandwidth / 1e9:.2f} GB/s per device',
    'the input pipeline keeps up; element-wise work hides behind memory traffic',
  ]


# --- for people ----------------------------------------------------------------------------------


def axes_text(mesh: Mapping[str, int]) -> str:
  """`data=2 fsdp=32`."""
  return ' '.join(f'{axis}={size}' for axis, size in mesh.items() if size != 1) or 'one device'


def verdict(report: Mapping[str, Any]) -> str:
  """A report in a line."""
  if 'error' in report:
    return report['error'].splitlines()[0]
  memory = report['memory']
  total = memory['bytes_per_device']['total'] / GIB
  used = f'{total:.1f} of {memory["usable_bytes"] / GIB:.1f} GiB'
  if not memory['fits'] or 'step' not in report:
    return f'does not fit: {used}'
  step = report['step']
  return (f'{used}, {step["seconds"]:.3f} to {step["likely_seconds"]:.3f} s a step, '
          f'MFU {step["mfu"]:.0%} to {step["likely_mfu"]:.0%}')


def describe(report: Mapping[str, Any], *, dearest: bool = False) -> str:
  """A report for people; `dearest`: with the source functions and the dearest places."""
  memory = report['memory']
  gib = lambda n: 'n/a' if n is None else f'{n / GIB:.2f} GiB'
  lines = [
    f'{report["slices"]} x {report["topology"]}: {report["chips"]} chips '
    f'({report["device_kind"]}), mesh {axes_text(report["mesh"])}',
    *report['notes'],
    f'memory per device, {memory["kind"]}:',
    *(f'  {name.replace("_", " "):22s}{gib(size)}'
      for name, size in memory['bytes_per_device'].items()),
    f'  {"of":22s}{gib(memory["usable_bytes"])}: '
    f'{"fits" if memory["fits"] else "DOES NOT FIT"}',
    f'model operations in a step: {report["model_flops"]:.4g}',
  ]
  if 'step' in report:
    lines += _times(report, dearest)
  lines.append(f'compiled in {report["compile_seconds"]} s, {report["compile_cpu_seconds"]} s of '
               f'CPU time, effort {report["effort"]}')
  return '\n'.join(lines)


def _times(report: Mapping[str, Any], dearest: bool) -> list[str]:
  step = report['step']
  if 'account' in report:
    lines = explain.tables(report['account'], dearest=dearest)
  else:
    lines = ['messages per device in a step:'] + [
      f'  {name:34s}{row["count"]:6.0f} x, {row["bytes"] / 1e9:9.3f} GB'
      for name, row in report['collectives_per_device'].items()]
    lines.append('times: ' + ', '.join(
      f'{name} {value:.3f} s' for name, value in report['roofline'].items() if value))
  return [
    *lines,
    f'step: {step["seconds"]:.3f} s (optimistic) to {step["likely_seconds"]:.3f} s (likely), '
    f'predicted MFU {step["mfu"]:.1%} to {step["likely_mfu"]:.1%}',
    f'rate (likely): {report["examples_per_second"]:.1f} examples/s, '
    f'{report["tokens_per_second_per_chip"]:.0f} tokens/s per chip',
    'assumed:', *(f'  {text}' for text in step['assumptions'])]
