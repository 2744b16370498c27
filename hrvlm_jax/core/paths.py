"""Parameter paths: the one key that sharding, freezing, decay, LoRA and conversion share.

A path is the keys of a nested dict joined by '/', for example `vision/blocks/attn/q/kernel`; a
stacked layer is one leaf with a leading depth axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import re
from typing import Any

from hrvlm_jax.core import errors


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested dict -> {'a/b/kernel': leaf}, in the order of the tree."""
  flat = {}
  for key, value in tree.items():
    path = f'{prefix}{key}'
    if isinstance(value, Mapping):
      flat.update(flatten(value, f'{path}/'))
    else:
      flat[path] = value
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, name = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = value
  return tree


def match_rules(
  rules: Sequence[tuple[str, Any]], paths: Iterable[str], *, what: str
) -> dict[str, Any]:
  """The value of the first rule whose pattern matches the whole path, for every path.

  Args:
    rules: ordered (regular expression, value) pairs; the expression must match the whole path.
    what: names the table in the error ('sharding rule').

  Raises:
    UserError: paths that no rule covers (all of them are listed).

  Example: match_rules([('.*/bias', 0.0), ('.*', 0.1)], ['a/bias'], what='decay') -> {'a/bias': 0.0}
  """
  compiled = [(re.compile(pattern), value) for pattern, value in rules]
  found, uncovered = {}, []
  for path in paths:
    for pattern, value in compiled:
      if pattern.fullmatch(path):
        found[path] = value
        break
    else:
      uncovered.append(f'{path}: no {what}')
  errors.raise_all(f'{what} table does not cover every parameter', uncovered)
  return found


def map_with_path(fn, tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """`fn(path, leaf)` over the leaves of a nested dict, keeping its structure."""
  return {
    key: map_with_path(fn, value, f'{prefix}{key}/')
    if isinstance(value, Mapping)
    else fn(f'{prefix}{key}', value)
    for key, value in tree.items()
  }
