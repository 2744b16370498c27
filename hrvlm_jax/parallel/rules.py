"""Which dimension of which array lies on which mesh axis: one table for parameters and optimizer.

A rule is a pattern over parameter paths and the axes of the LAST dimensions, so that the leading
depth axis of stacked layers needs no rule of its own. The first rule that matches wins: the
system's (`System.rules`), then `RULES`. Every named dimension must divide, or one error lists all
offenders. Leaves of 1 MB and more stay whole only by a rule that says why; smaller ones stay whole
where their sizes do not divide, because tiny models should run on any mesh. A leaf without a rule
is placed by its shape alone (`GENERAL`) and named in the log. On one device nothing is asked.

Form after google-research/big_vision: big_vision/sharding.py (ordered path rules, one table for
parameters and optimizer state).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import functools
import logging
import math
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import raise_all

# Below this size sharding saves nothing worth a message between devices.
SMALL_BYTES = 1 << 20

_log = logging.getLogger(__name__)

Axis = str | tuple[str, ...] | None
Axes = tuple[Axis, ...]


class Rule(NamedTuple):
  """One row of the table.

  Attributes:
    pattern: regular expression over the whole path.
    axes: mesh axes of the last dimensions; () keeps the leaf whole.
    otherwise: tried in turn where `axes` does not divide the leaf.
    why: the reason, for leaves that stay whole although they may be large.
  """

  pattern: str
  axes: Axes
  otherwise: tuple[Axes, ...] = ()
  why: str = ''


WHOLE_VECTORS = 'vectors: read whole by every device, a thousandth of the matrices beside them'
DEPTHWISE = 'depthwise: 49 numbers a channel, at most a few MB in all'

RULES: tuple[Rule, ...] = (
  # A look-up in a table cut by rows ends in a copy of all its results on every device before they
  # find their places; cut by width it is one exchange of pieces.
  Rule(r'.*embed/embedding', (None, ('fsdp', 'tensor')), ((None, 'fsdp'),)),
  # Columns over tensor, so that the loss works on a part of the logits. Some released vocabularies
  # have odd sizes; then the width takes both axes.
  Rule(r'language/head/kernel', ('fsdp', 'tensor'), ((('fsdp', 'tensor'), None),)),
  Rule(r'language/head/bias', ('tensor',), ((),)),
  # Low rank: the long side over fsdp.
  Rule(r'.*/patch_embed/lora_a\w*', ()),
  Rule(r'.*/lora_a\w*', ('fsdp', None)),
  Rule(r'.*/lora_b\w*', (None, 'fsdp')),
  # Matrices into heads or hidden features, then those out of them: one all-reduce per pair.
  Rule(r'.*/(q|k|v|fc1|gate|up|qkv|in_proj)/kernel', ('fsdp', 'tensor')),
  Rule(r'.*/(out|fc2|down|out_proj)/kernel', ('tensor', 'fsdp')),
  # Convolutions. Depthwise ones hold k x k numbers a channel.
  Rule(r'.*/conv_dw/kernel', (), why=DEPTHWISE),
  Rule(r'.*/patch_embed/kernel', ('fsdp',)),
  Rule(r'.*/stem/.*kernel', ('fsdp',), ((),)),
  Rule(r'.*/(downsample/conv|conv\w*)/kernel', ('fsdp',)),
  # Position tables [places, width].
  Rule(r'.*/\w*(pos_embed|embedding|position\w*)', ('fsdp',)),
  # Every other matrix (in, out).
  Rule(r'.*/kernel', ('fsdp', None)),
  Rule(r'(.*/)?(bias|scale|weight|layer_scale|class_token|probe)', (), why=WHOLE_VECTORS),
)

# What no rule names: its largest dimension that divides, over fsdp; vectors and small leaves whole.
GENERAL = Rule('(no rule)', ('fsdp',), ((),), why='no rule names it and no dimension divides')


class Placement(NamedTuple):
  """Where one leaf goes: its sharding, the rule that said so, and its size."""

  spec: P
  rule: Rule
  shape: tuple[int, ...]
  dtype: Any


def _sizes(mesh: Any) -> dict[str, int]:
  """Sizes of the axes of a mesh (also an abstract one), or the sizes themselves."""
  return dict(getattr(mesh, 'shape', mesh))


def _axis_size(axis: Axis, mesh: Mapping[str, int]) -> int:
  if axis is None:
    return 1
  return math.prod(mesh[name] for name in ((axis,) if isinstance(axis, str) else axis))


def _fit(shape: Sequence[int], axes: Axes, mesh: Mapping[str, int]) -> tuple[list[Axis], list[str]]:
  """(axis of every dimension, what does not divide); short leaves take the last axes."""
  aligned = [None] * (len(shape) - len(axes)) + list(axes)[max(0, len(axes) - len(shape)):]
  problems = []
  for i, (size, axis) in enumerate(zip(shape, aligned)):
    parts = _axis_size(axis, mesh)
    if parts == 1:
      aligned[i] = None
    elif size % parts:
      name = axis if isinstance(axis, str) else '*'.join(axis)
      problems.append(f'dim {size} not divisible by {name}={parts}')
      aligned[i] = None
  return aligned, problems


def _bytes(leaf) -> int:
  return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def placements(leaves: Mapping[str, Any], mesh: Mesh | Mapping[str, int], *,
               rules: Sequence[Rule] = RULES, small: int = SMALL_BYTES) -> dict[str, Placement]:
  """The placement of every leaf of a flat dict path -> array (or ShapeDtypeStruct).

  Args:
    mesh: a mesh, or the sizes of its axes.
    small: leaves below that many bytes stay whole where they do not divide.

  Raises:
    UserError: dimensions that do not divide, large leaves that stay whole without a reason; all of
      them in one message.
  """
  sizes = _sizes(mesh)
  if math.prod(sizes.values()) == 1:
    return {path: Placement(P(), GENERAL, tuple(leaf.shape), leaf.dtype)
            for path, leaf in leaves.items()}
  compiled = [(re.compile(rule.pattern), rule) for rule in rules]
  result, problems, unnamed = {}, [], []
  for path, leaf in leaves.items():
    if not leaf.shape:
      result[path] = Placement(P(), GENERAL, (), leaf.dtype)
      continue
    rule = next((rule for pattern, rule in compiled if pattern.fullmatch(path)), None)
    if rule is None:
      result[path] = Placement(_by_shape(leaf, sizes), GENERAL, tuple(leaf.shape), leaf.dtype)
      unnamed.append(path.rpartition(':')[2])
      continue
    first_problems = None
    for axes in (rule.axes, *rule.otherwise):
      aligned, wrong = _fit(leaf.shape, axes, sizes)
      first_problems = wrong if first_problems is None else first_problems
      if not wrong:
        break
    shape = tuple(leaf.shape)
    if wrong and _bytes(leaf) >= small:
      problems += [f'{path} {shape}: {problem}' for problem in first_problems]
    spread = any(axis is not None for axis in aligned)
    wanted = any(_axis_size(axis, sizes) > 1 for axis in rule.axes)
    kept_whole = not spread and not wrong and (wanted or not rule.axes)
    if kept_whole and not rule.why and _bytes(leaf) >= SMALL_BYTES:
      problems.append(f'{path} {shape}: {_bytes(leaf) / 1e6:.1f} MB stay whole on every device, '
                      f'and rule {rule.pattern!r} gives no reason')
    result[path] = Placement(P(*_trim(aligned)), rule, shape, leaf.dtype)
  raise_all('cannot shard', problems)
  if unnamed:
    _say_unnamed(tuple(sorted(set(unnamed))))
  return result


def _by_shape(leaf, sizes: Mapping[str, int]) -> P:
  """`GENERAL`, for one leaf."""
  parts = sizes.get('fsdp', 1)
  dims = [i for i, size in enumerate(leaf.shape) if parts > 1 and size % parts == 0]
  if len(leaf.shape) < 2 or _bytes(leaf) < SMALL_BYTES or not dims:
    return P()
  best = max(dims, key=lambda i: leaf.shape[i])
  return P(*_trim(['fsdp' if i == best else None for i in range(len(leaf.shape))]))


@functools.lru_cache(maxsize=64)
def _say_unnamed(names: tuple[str, ...]) -> None:
  """One line per set of parameters, however often their shardings are asked for."""
  _log.info('no sharding rule names %s: placed by shape alone; rows of a system are its `rules`',
            ', '.join(names))


def _trim(aligned: list[Axis]) -> list[Axis]:
  while aligned and aligned[-1] is None:
    aligned = aligned[:-1]
  return aligned


def param_shardings(params: Mapping[str, Any], mesh: Mesh, *,
                    rules: Sequence[Rule] = RULES, small: int = SMALL_BYTES) -> dict[str, Any]:
  """Nested parameters (or their shapes) -> the same structure of NamedSharding.

  Raises:
    UserError: see `placements`.
  """
  placed = placements(paths.flatten(params), mesh, rules=rules, small=small)
  return paths.map_with_path(lambda path, _: NamedSharding(mesh, placed[path].spec), params)


def state_shardings(state: Any, mesh: Mesh, *, rules: Sequence[Rule] = RULES,
                    small: int = SMALL_BYTES) -> Any:
  """Shardings of a whole train state: parameters, optimizer state, averages, counters.

  Optimizer state is found by the parameter path that its leaves carry as dictionary keys (flat or
  nested, at any depth of the optimizer's own tuples), so moments lie where their parameter lies.
  Scalars and leaves without a path (step counters, random keys) stay whole.

  Raises:
    UserError: see `placements`; offenders in the optimizer state are listed, too.
  """
  flat, structure = jax.tree_util.tree_flatten_with_path(state)
  leaves, names = {}, []
  known = {name for path, leaf in flat if (name := _param_path(path)) and leaf.ndim
           and _section(path) == 'params'}
  for path, leaf in flat:
    name = _param_path(path)
    if not leaf.shape or (known and name not in known):
      names.append(None)
      continue
    key = name if _section(path) == 'params' else f'{_section(path)}:{name}'
    leaves[key] = leaf
    names.append(key)
  # The table speaks of parameter paths; the section is only for messages.
  sectioned = [rule._replace(pattern=rf'(?:\w+:)?(?:{rule.pattern})') for rule in rules]
  placed = placements(leaves, mesh, rules=sectioned, small=small)
  whole = NamedSharding(mesh, P())
  shardings = [whole if name is None else NamedSharding(mesh, placed[name].spec) for name in names]
  return jax.tree_util.tree_unflatten(structure, shardings)


def _section(path) -> str:
  """First key of a state leaf: params, opt, ema."""
  return path[0].key if path and isinstance(path[0], jax.tree_util.DictKey) else 'state'


def _param_path(path) -> str:
  """`state['opt'][1].mu['a/b/kernel']` -> 'a/b/kernel'; `state['params']['a']['b']` -> 'a/b'."""
  keys = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
  return '/'.join(keys[1:])


def describe(placed: Mapping[str, Placement], mesh: Mesh | Mapping[str, int]) -> str:
  """The table of a model for people: path, shape, axes, bytes on one device."""
  sizes = _sizes(mesh)
  rows = []
  for path, place in sorted(placed.items()):
    parts = math.prod(_axis_size(axis, sizes) for axis in place.spec)
    size = math.prod(place.shape) * np.dtype(place.dtype).itemsize // parts
    axes = ', '.join('-' if axis is None else axis if isinstance(axis, str) else '*'.join(axis)
                     for axis in place.spec) or 'whole'
    rows.append((path, str(place.shape), axes, f'{size / 1e6:.2f} MB'))
  widths = [max(len(row[i]) for row in rows) for i in range(3)] if rows else [0, 0, 0]
  return '\n'.join('  '.join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]])
                   for row in rows)
