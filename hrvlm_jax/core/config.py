"""The strict border between plain dictionaries (run configs, `config.json`) and dataclasses.

A model config is a frozen dataclass that validates itself in `__post_init__`. `from_dict` builds
it from nested plain values and reports every unknown, missing or mistyped key in one error, with
the key's path; `to_dict` is its inverse and gives only values that JSON can hold.

Supported field types: bool, int, float, str, None, Any, Literal, Enum, nested dataclasses,
`tuple[X, ...]`, `tuple[X, Y]`, `list[X]`, `dict[str, X]`, `X | None` and unions, also of
dataclasses. A union of dataclasses is told apart by a field in which they differ (Literals, or
strings with different defaults), else by the key `type` holding the class name (written by
`to_dict`), else by which class the keys fit.

Bounds of numbers stand in a class' `BOUNDS` (see `core.bounds`).

A class whose field types depend on its values (the encoder's class follows from the system's
name) defines the classmethod `field_types(values) -> dict[str, type]` to override its hints.
"""

from collections.abc import Mapping
import dataclasses
import enum
import types
import typing
from typing import Any, Literal, TypeVar, Union

from hrvlm_jax.core import bounds
from hrvlm_jax.core.errors import UserError, raise_all, unknown

T = TypeVar('T')

TYPE_KEY = 'type'
_FAILED = object()


def from_dict(cls: type[T], values: Any, *, path: str = '', title: str | None = None) -> T:
  """Builds the dataclass `cls` from nested plain values.

  Args:
    cls: a dataclass type.
    values: a mapping (or an ml_collections ConfigDict) of field names to plain values.
    path: prefix of the key paths in error messages, as in `config.model`.
    title: first words of the error message; default: the class name.

  Raises:
    UserError: all unknown, missing and mistyped keys, and what `__post_init__` refused.
  """
  problems: list[str] = []
  result = _build(cls, values, path, problems)
  raise_all(title or cls.__name__, problems)
  return result


def to_dict(config: Any) -> dict[str, Any]:
  """Nested plain values of a dataclass: dicts, lists, numbers, strings, booleans and None.

  `from_dict(type(config), to_dict(config)) == config`.
  """
  if not dataclasses.is_dataclass(config) or isinstance(config, type):
    raise TypeError(f'to_dict expects a dataclass instance, got {config!r}')
  hints = field_types(type(config), {f.name: getattr(config, f.name) for f in _fields(config)})
  return {f.name: _plain(getattr(config, f.name), hints[f.name]) for f in _fields(config)}


def field_types(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
  """Type of every field of the dataclass `cls`, given the (plain) values it will be built from."""
  hints = typing.get_type_hints(cls)
  override = getattr(cls, 'field_types', None)
  return {**hints, **override(values)} if override else hints


def _fields(cls: Any) -> tuple[dataclasses.Field, ...]:
  return tuple(f for f in dataclasses.fields(cls) if f.init)


def _required(field: dataclasses.Field) -> bool:
  missing = dataclasses.MISSING
  return field.default is missing and field.default_factory is missing


def _join(path: str, key: Any) -> str:
  return f'{path}.{key}' if path else str(key)


def _as_mapping(values: Any) -> Mapping[str, Any] | None:
  if isinstance(values, Mapping):
    return values
  to_plain = getattr(values, 'to_dict', None)  # ml_collections, without importing it
  return to_plain() if callable(to_plain) else None


def _build(cls: type, values: Any, path: str, problems: list[str]) -> Any:
  if isinstance(values, cls):
    return values
  mapping = _as_mapping(values)
  if mapping is None:
    problems.append(_mistyped(path, values, f'a mapping with the fields of {cls.__name__}'))
    return _FAILED
  fields = {f.name: f for f in _fields(cls)}
  before = len(problems)
  for key in mapping:
    if key not in fields and not (key == TYPE_KEY and mapping[key] == cls.__name__):
      problems.append(unknown(_join(path, key), fields))
  for name, field in fields.items():
    if _required(field) and name not in mapping:
      problems.append(f'missing key {_join(path, name)}')
  try:
    hints = field_types(cls, mapping)
  except UserError as error:
    problems.append(f'{path}: {error}' if path else str(error))
    return _FAILED
  built = {
      name: _value(hints[name], mapping[name], _join(path, name), problems)
      for name in fields if name in mapping
  }
  if len(problems) > before:
    # The class cannot judge itself; its numbers can be judged all the same.
    good = {name: value for name, value in built.items() if value is not _FAILED}
    problems.extend(f'{_join(path, name)} {text}' for name, text in bounds.outside(cls, good))
    return _FAILED
  try:
    return cls(**built)
  except ValueError as error:
    problems.append(f'{path}: {error}' if path else str(error))
    return _FAILED


def _value(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
  """`value` as `hint` asks for it; appends to `problems` and returns `_FAILED` otherwise."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is Any:
    return value
  if dataclasses.is_dataclass(hint):
    return _build(hint, value, path, problems)
  if origin in (Union, types.UnionType):
    return _union(args, value, path, problems)
  if origin is Literal:
    for known in args:
      if value == known and isinstance(value, bool) == isinstance(known, bool):
        return known
    problems.append(_mistyped(path, value, f'one of {", ".join(map(repr, args))}'))
    return _FAILED
  if isinstance(hint, type) and issubclass(hint, enum.Enum):
    try:
      return hint(value)
    except ValueError:
      problems.append(_mistyped(path, value, f'one of {", ".join(repr(e.value) for e in hint)}'))
      return _FAILED
  if hint is tuple or origin is tuple:
    return _sequence(tuple, args, value, path, problems)
  if hint is list or origin is list:
    return _sequence(list, (*args, ...) if args else (), value, path, problems)
  if hint in (dict, Mapping) or origin in (dict, Mapping):
    return _dictionary(args, value, path, problems)
  if isinstance(origin, type):  # collections.abc.Mapping[...] and the like
    if issubclass(origin, Mapping):
      return _dictionary(args, value, path, problems)
    return _sequence(tuple, (*args, ...) if args else (), value, path, problems)
  return _scalar(hint, value, path, problems)


def _scalar(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
  if hint in (None, type(None)):
    fits = value is None
  elif hint is bool:
    fits = isinstance(value, bool)
  elif hint is int:
    fits = isinstance(value, int) and not isinstance(value, bool)
  elif hint is float:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    value = float(value) if fits else value
  else:
    fits = isinstance(value, hint)
  if fits:
    return value
  problems.append(_mistyped(path, value, describe(hint)))
  return _FAILED


def _sequence(kind: type, args: tuple, value: Any, path: str, problems: list[str]) -> Any:
  if not isinstance(value, (list, tuple)):
    problems.append(_mistyped(path, value, 'a list'))
    return _FAILED
  if len(args) == 2 and args[1] is ...:
    hints = [args[0]] * len(value)
  elif args:
    hints = list(args)
  else:
    hints = [Any] * len(value)
  if len(hints) != len(value):
    problems.append(_mistyped(path, value, f'a list of {len(hints)} values'))
    return _FAILED
  items = [_value(h, v, f'{path}[{i}]', problems) for i, (h, v) in enumerate(zip(hints, value))]
  return _FAILED if any(item is _FAILED for item in items) else kind(items)


def _dictionary(args: tuple, value: Any, path: str, problems: list[str]) -> Any:
  mapping = _as_mapping(value)
  if mapping is None:
    problems.append(_mistyped(path, value, 'a mapping'))
    return _FAILED
  key_hint, value_hint = args or (Any, Any)
  items = {
      # JSON has only string keys; integer keys come back as digits.
      (int(k) if key_hint is int and isinstance(k, str) and k.isdigit() else k):
          _value(value_hint, v, _join(path, k), problems)
      for k, v in mapping.items()
  }
  return _FAILED if any(item is _FAILED for item in items.values()) else items


def _union(args: tuple, value: Any, path: str, problems: list[str]) -> Any:
  if value is None and type(None) in args:
    return None
  classes = [a for a in args if dataclasses.is_dataclass(a)]
  others = [a for a in args if not dataclasses.is_dataclass(a) and a is not type(None)]
  if any(isinstance(value, c) for c in classes):
    return value
  mapping = _as_mapping(value)
  if classes and (mapping is not None or not others):
    if mapping is None:
      problems.append(_mistyped(path, value, ' or '.join(describe(a) for a in args)))
      return _FAILED
    cls = _choose(classes, mapping, path, problems)
    return _FAILED if cls is None else _build(cls, mapping, path, problems)
  # bool before int before float before the rest, so that no value is widened without need.
  for hint in sorted(others, key=lambda a: [bool, int, float].index(a) if a in (bool, int, float)
                     else 3):
    trial: list[str] = []
    result = _value(hint, value, path, trial)
    if not trial:
      return result
    if len(others) == 1:
      problems.extend(trial)
      return _FAILED
  problems.append(_mistyped(path, value, ' or '.join(describe(a) for a in args)))
  return _FAILED


def _tags(classes: list[type]) -> tuple[str, dict[str, type]] | None:
  """A field whose values tell the classes of a union apart, and value -> class."""
  for field in _fields(classes[0]):
    values = [_tag_values(cls, field.name) for cls in classes]
    tags = {tag: cls for cls, own in zip(classes, values) for tag in own}
    if all(values) and len(tags) == sum(map(len, values)):
      return field.name, tags
  return None


def _tag_values(cls: type, name: str) -> tuple[Any, ...]:
  """The values of a Literal field, or the default of a string field; () for other fields."""
  hint = typing.get_type_hints(cls).get(name)
  if typing.get_origin(hint) is Literal:
    return typing.get_args(hint)
  default = {f.name: f.default for f in _fields(cls)}.get(name)
  return (default,) if hint is str and isinstance(default, str) else ()


def _choose(classes: list[type], mapping: Mapping, path: str, problems: list[str]) -> type | None:
  """The member of a union of dataclasses that a mapping describes."""
  if len(classes) == 1:
    return classes[0]
  if (tags := _tags(classes)) and tags[0] in mapping:
    name, table = tags
    if mapping[name] in table:
      return table[mapping[name]]
    expected = f'one of {", ".join(map(repr, table))}'
    problems.append(_mistyped(_join(path, name), mapping[name], expected))
    return None
  names = {cls.__name__: cls for cls in classes}
  if isinstance(mapping.get(TYPE_KEY), str) and mapping[TYPE_KEY] in names:
    return names[mapping[TYPE_KEY]]
  keys = set(mapping)
  fitting = [
      cls for cls in classes
      if keys <= {f.name for f in _fields(cls)}
      and {f.name for f in _fields(cls) if _required(f)} <= keys
  ]
  if len(fitting) == 1:
    return fitting[0]
  found = f'keys {sorted(map(str, keys))} fit {len(fitting)} of the classes'
  problems.append(f'{path}: {found} {", ".join(names)}; set {_join(path, TYPE_KEY)} to one of them')
  return None


def _plain(value: Any, hint: Any) -> Any:
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    plain = to_dict(value)
    members = [a for a in typing.get_args(hint) if dataclasses.is_dataclass(a)]
    if len(members) > 1 and _tags(members) is None:
      plain = {TYPE_KEY: type(value).__name__, **plain}
    return plain
  if isinstance(value, enum.Enum):
    return value.value
  args = [a for a in typing.get_args(hint) if a is not ...]
  if typing.get_origin(hint) in (Union, types.UnionType):
    kinds = {tuple: (tuple, list), list: (tuple, list), dict: (dict,)}
    for arg in args:  # the member that describes this container
      origin = typing.get_origin(arg) or arg
      if isinstance(value, kinds.get(origin, ())):
        return _plain(value, arg)
    return value if not isinstance(value, (tuple, list, dict)) else _plain(value, Any)
  if isinstance(value, (tuple, list)):
    hints = args if len(args) == len(value) and len(args) > 1 else args[:1] * len(value)
    return [_plain(v, h) for v, h in zip(value, hints or [Any] * len(value))]
  if isinstance(value, Mapping):
    return {k: _plain(v, args[1] if len(args) == 2 else Any) for k, v in value.items()}
  return value


def describe(hint: Any) -> str:
  """A type in words for an error message: `an integer`, `a list`, ..."""
  words = {bool: 'true or false', int: 'an integer', float: 'a number', str: 'a string',
           type(None): 'none', tuple: 'a list', list: 'a list', dict: 'a mapping'}
  origin = typing.get_origin(hint)
  if hint in words or origin in words:
    return words.get(hint) or words[origin]
  if origin is Literal:
    return f'one of {", ".join(map(repr, typing.get_args(hint)))}'
  if origin in (Union, types.UnionType):
    return ' or '.join(describe(a) for a in typing.get_args(hint))
  return getattr(hint, '__name__', str(hint))


def _mistyped(path: str, value: Any, expected: str) -> str:
  shown = repr(value)
  shown = shown if len(shown) <= 60 else f'{shown[:57]}...'
  return f'{path or "value"}: found {shown} ({type(value).__name__}), expected {expected}'
