"""Tables for people of what a program spends its time on: by class, by source, the dearest places.

Everything is a range: from the reader's own, optimistic number to the likely one, see `about` in
costs.json. `hrvlm plan --explain FILE` prints them for a stored program.
"""

from __future__ import annotations

import bz2
from collections.abc import Mapping, Sequence
import gzip
import lzma
import pathlib
import re
from typing import Any

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.planning.schedule import Reading, by
from hrvlm_jax.planning.sources import Place, operation

_OPENERS = {'.gz': gzip.open, '.xz': lzma.open, '.bz2': bz2.open}


def load(path: pathlib.Path) -> str:
  """The text of a stored program, compressed or not (.gz, .xz, .bz2).

  Raises:
    UserError: the file cannot be read.
  """
  try:
    with _OPENERS.get(path.suffix, open)(path, 'rt', errors='replace') as file:
      return file.read()
  except (OSError, EOFError, lzma.LZMAError) as error:
    raise UserError(f'{path}: cannot be read as a program text: {error}') from error


def slim(text: str) -> str:
  """A program without what no reader needs: folders of this machine, machine code of kernels."""
  text = re.sub(r'"/[^"\n]*?/(hrvlm_jax|site-packages)/', r'"\1/', text)
  text = re.sub(r'"/[^"\n]*/([^"/\n]+\.py")', r'"\1', text)
  return re.sub(r'("body":\s*)"[^"\n]*"', r'\1""', text)


def store(path: pathlib.Path, text: str) -> None:
  """Writes a program (`slim`), compressed where the suffix says so (.gz, .xz, .bz2).

  Raises:
    UserError: the file cannot be written.
  """
  try:
    with _OPENERS.get(path.suffix, open)(path, 'wt') as file:
      file.write(slim(text))
  except OSError as error:
    raise UserError(f'{path}: cannot be written: {error}') from error


def assumptions(reading: Reading) -> list[str]:
  """What the numbers rest on, one sentence each."""
  c = reading.costs
  own = sum(1 for charge in reading.charges if charge.cost.estimated)
  products = (f"{own} products by the compiler's own cycles, others" if own else 'products')
  lines = [
    f'no chip was used: {products} padded to the matrix unit at {c.product_efficiency:.0%} of the '
    f'peak, memory at {c.hbm_efficiency:.0%} of {c.rates.hbm / 1e9:.0f} GB/s, '
    f'{c.vector_slots} vector operations a cycle',
    f'messages are rings along one axis, {c.rates.ring / 1e9:.0f} GB/s per device, '
    f'{c.latency * 1e6:g} us and {c.hop * 1e6:g} us a hop; between slices '
    f'{c.between / 1e9:.2f} GB/s per device and the same latency',
    f"likely: what is not the compiler's own estimate takes {c.likely:g} times as long",
    'of a conditional the dearest branch counts; queues do not slow the work beside them, but a '
    'call takes no less than its memory traffic',
  ]
  if c.source:
    lines.append(c.source)
  if reading.unknown_loops:
    lines.append(f'{reading.unknown_loops} loop(s) of unknown length counted once: TOO LOW')
  if reading.guessed:
    names = ', '.join(f'{name} ({times} x)' for name, times in sorted(reading.guessed.items()))
    lines.append(f'kernels that state no operations, counted by their traffic alone: {names}')
  return lines


def summary(reading: Reading, *, dearest: int = 10) -> dict[str, Any]:
  """The tables as JSON values.

  Returns:
    seconds, likely_seconds, flops, peak_share, memory_bytes, synchronous_bytes (of messages that
    block), groups, classes and sources (name -> seconds, share, flops, bytes; groups are those of
    `cycles.GROUPS`), beyond_products (share of the time outside of products), places (the dearest:
    seconds, times, class, file, line, function, operation, instruction), messages (kind, group,
    how -> times, wire_bytes, seconds), assumptions.
  """
  clock, total = reading.costs.rates.clock, max(reading.cycles, 1e-9)

  def rows(key):
    return {str(name): {'seconds': cycles / clock, 'share': cycles / total, 'flops': flops,
                        'bytes': moved} for name, cycles, flops, moved in by(reading, key)}

  messages: dict[tuple, dict[str, Any]] = {}
  for message in reading.messages:
    row = messages.setdefault((message.kind, message.group, message.how), {
      'kind': message.kind, 'group': message.group, 'how': message.how, 'times': 0,
      'bytes': 0, 'wire_bytes': 0.0, 'seconds': 0.0})
    row['times'] += message.times
    for field, value in (('bytes', message.bytes), ('wire_bytes', message.wire_bytes),
                         ('seconds', message.seconds)):
      row[field] += value * message.times
  places = [
    {'seconds': charge.cycles / clock, 'share': charge.cycles / total, 'times': charge.times,
     'class': str(charge.cost.kind), 'file': charge.cost.place.file,
     'line': charge.cost.place.line, 'function': charge.cost.place.function,
     'operation': _operation(charge), 'instruction': charge.instruction.name}
    for charge in sorted(reading.charges, key=lambda charge: -charge.cycles)[:dearest]]
  return {
    'chip': reading.costs.chip, 'seconds': reading.seconds,
    'likely_seconds': reading.likely_seconds, 'flops': reading.flops,
    'peak_share': reading.flops / reading.costs.rates.flops_per_cycle / total,
    'memory_bytes': reading.memory_bytes, 'memory_seconds': reading.memory_bound,
    'synchronous_bytes': sum(row['bytes'] for row in messages.values()
                             if row['how'] == 'synchronous'),
    'groups': rows(lambda charge: charge.cost.kind.group),
    'beyond_products': 1 - rows(lambda charge: charge.cost.kind.group).get(
      'products', {'share': 0.0})['share'],
    'classes': rows(lambda charge: charge.cost.kind),
    'sources': rows(lambda charge: _function(charge.cost.place)),
    'places': places,
    'messages': sorted(messages.values(), key=lambda row: -row['seconds']),
    'assumptions': assumptions(reading),
  }


def describe(reading: Reading, *, dearest: int = 10) -> str:
  """The tables as text."""
  found = summary(reading, dearest=dearest)
  return '\n'.join([
    f'one call on {found["chip"]}: {_time(found["seconds"])} (optimistic) to '
    f'{_time(found["likely_seconds"])} (likely)',
    *tables(found), 'assumed:', *(f'  {text}' for text in found['assumptions'])])


def tables(found: Mapping[str, Any], *, dearest: bool = True) -> list[str]:
  """The tables of a `summary`, line by line; `dearest`: also by source, and the dearest places."""
  lines = [
    f'products: {found["flops"] / 1e12:.3f} TFLOP executed, {found["peak_share"]:.1%} of the peak; '
    f'memory traffic {found["memory_bytes"] / 1e9:.3f} GB, which alone takes '
    f'{_time(found["memory_seconds"])}',
    *_table('by class', found['classes'].items())]
  if dearest:
    lines += _table('by source function', list(found['sources'].items())[:20])
  if found['messages']:
    lines.append(f'messages, hidden or not ({found["synchronous_bytes"] / 1e9:.3f} GB block):')
    lines += [f'  {row["kind"]:20s}of {row["group"]:4d} {row["how"]:13s}{row["times"]:8d} x '
              f'{row["wire_bytes"] / 1e9:10.3f} GB sent {_time(row["seconds"]):>12s}'
              for row in found['messages'][:None if dearest else 10]]
  if not dearest:
    return lines
  lines.append(f'the {len(found["places"])} dearest places:')
  for row in found['places']:
    where = str(Place(row['file'], row['function'], row['line']))
    lines.append(f'  {_time(row["seconds"]):>11s} {row["share"]:6.1%}  {row["times"]:6d} x  '
                 f'{row["class"]}: {where}')
    lines.append(f'{"":22s}{row["instruction"]}  {row["operation"]}'.rstrip())
  return lines


def _table(title: str, rows: Sequence) -> list[str]:
  lines = [f'{title}:']
  for name, row in rows:
    tail = f'{row["bytes"] / 1e9:10.3f} GB'
    if row['flops']:
      tail += f'{row["flops"] / 1e12:10.3f} TFLOP'
    lines.append(f'  {name:48s}{_time(row["seconds"]):>11s} {row["share"]:6.1%}{tail}')
  return lines


def _time(seconds: float) -> str:
  return f'{seconds:.3f} s' if seconds >= 1 else f'{seconds * 1e3:.3f} ms'


def _function(place) -> str:
  return f'{place.file.removeprefix("hrvlm_jax/")} {place.function}' if place.file else '(none)'


def _operation(charge) -> str:
  """The end of JAX's name of an operation, which says most."""
  return operation(charge.instruction)[-90:]
