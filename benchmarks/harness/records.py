"""Kept results: one per case, kind of machine and device; a run elsewhere adds one.

    results/amd-26-2-avx512-2c/ps3_4k_cpu.json

The folder is the kind of machine (`hrvlm_jax.core.machine`), with the accelerator behind it where
one computed. A run on the same kind replaces its record; no other is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

from hrvlm_jax.core.machine import Machine

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / 'benchmarks' / 'results'
_FIELDS = tuple(field.name for field in dataclasses.fields(Machine))
# What a record must say of its machine.
NEEDED = ('vendor', 'family', 'model', 'isa', 'cores', 'capped', 'memory_gb', 'system')


def machine_of(result: Mapping[str, Any]) -> Machine:
  """The kind of machine a record was measured on."""
  return Machine(**{name: result['machine'][name] for name in _FIELDS
                    if name in result['machine']})


def kind_of(result: Mapping[str, Any]) -> str:
  """The folder of a record."""
  kind = machine_of(result).kind
  accelerator = result.get('accelerator', '')
  return f'{kind}-{_slug(accelerator)}' if accelerator else kind


def title_of(result: Mapping[str, Any]) -> str:
  """The machine in words, its accelerator first."""
  return ', '.join(filter(None, (result.get('accelerator'), machine_of(result).title)))


def _slug(text: str) -> str:
  return re.sub(r'[^a-z0-9]+', '_', text.lower()).strip('_')


def backend_of(result: Mapping[str, Any]) -> str:
  """'cpu' or 'gpu'."""
  return 'gpu' if result['device'] == 'cuda' else 'cpu'


def path_of(result: Mapping[str, Any], results: pathlib.Path | None = None) -> pathlib.Path:
  """Where a record is kept."""
  folder = (RESULTS if results is None else results) / kind_of(result)
  return folder / f'{result["case"]}_{backend_of(result)}.json'


def save(result: Mapping[str, Any], results: pathlib.Path | None = None,
         path: str | os.PathLike | None = None) -> pathlib.Path:
  """Writes a result as JSON; by default where docs/benchmarks.md is made from.

  Raises:
    ValueError: it does not say what machine it belongs to.
  """
  if found := problems(result):
    raise ValueError(f'{result.get("case")}: {"; ".join(found)}')
  target = path_of(result, results) if path is None else pathlib.Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  target.write_text(json.dumps(result, indent=1) + '\n')
  return target


def problems(result: Mapping[str, Any]) -> list[str]:
  """What a record does not say and must."""
  machine = result.get('machine', {})
  found = [f'machine.{name} is missing' for name in NEEDED if name not in machine]
  if not found and not machine['isa']:
    found.append('machine.isa is empty: the instruction set is not known')
  return found + [f'{name} is missing' for name in ('case', 'device', 'date', 'versions')
                  if not result.get(name)]


def kept(results: pathlib.Path | None = None) -> Iterator[tuple[pathlib.Path, dict[str, Any]]]:
  """(file, record) of all kinds of machines, in order of their names."""
  for path in sorted((RESULTS if results is None else results).glob('*/*.json')):
    yield path, json.loads(path.read_text())


def of_case(records: Sequence[Mapping[str, Any]], case: str, backend: str
            ) -> dict[str, Mapping[str, Any]]:
  """Title of the machine -> its record of a case."""
  return {title_of(record): record for record in records
          if record['case'] == case and backend_of(record) == backend}
