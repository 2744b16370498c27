"""What an API server says of an object under the structural schema of a custom resource."""

import re
from typing import Any

TYPES = {'object': dict, 'array': list, 'string': str, 'boolean': bool, 'integer': int,
         'number': (int, float)}


def problems(value: Any, schema: dict[str, Any], where: str = '') -> list[str]:
  """Sentences; empty: accepted, and no field would be dropped as unknown."""
  if schema.get('x-kubernetes-int-or-string'):
    return [] if isinstance(value, int | str) else [f'{where}: expected a number or text']
  kind = schema.get('type')
  if kind and (not isinstance(value, TYPES[kind]) or (kind != 'boolean' and value is True)):
    return [f'{where}: found {type(value).__name__}, expected {kind}']
  found = []
  if 'enum' in schema and value not in schema['enum']:
    found.append(f'{where}: found {value!r}, expected one of {schema["enum"]}')
  if isinstance(value, str) and not re.search(schema.get('pattern', ''), value):
    found.append(f'{where}: {value!r} does not match {schema["pattern"]}')
  for name, size in (('Length', value if isinstance(value, str) else None),
                     ('Items', value if isinstance(value, list) else None)):
    if size is not None and not (
        schema.get(f'min{name}', 0) <= len(size) <= schema.get(f'max{name}', 1 << 30)):
      found.append(f'{where}: has {len(size)}')
  if isinstance(value, int) and not (
      schema.get('minimum', value) <= value <= schema.get('maximum', value)):
    found.append(f'{where}: {value} is out of bounds')
  if isinstance(value, list):
    for number, item in enumerate(value):
      found += problems(item, schema.get('items', {}), f'{where}[{number}]')
  if isinstance(value, dict):
    known, rest = schema.get('properties', {}), schema.get('additionalProperties')
    free = schema.get('x-kubernetes-preserve-unknown-fields') or (
      kind == 'object' and not known and rest is None)
    found += [f'{where}: {name} is missing' for name in schema.get('required', ())
              if name not in value]
    for name, item in value.items():
      if name in known:
        found += problems(item, known[name], f'{where}.{name}')
      elif isinstance(rest, dict):
        found += problems(item, rest, f'{where}.{name}')
      elif not free and not rest:
        found.append(f'{where}.{name}: unknown')
  return found
