"""Rows of a table of tests: some in the first level, the others in a part of the second."""

from collections.abc import Iterable
from typing import Any

import pytest


def rows(part: str, values: Iterable[Any], *, first: Iterable[Any]) -> list[Any]:
  """Parameters for `pytest.mark.parametrize`: all but those of `first` are marked full(part).

  A tuple is the values of several arguments.

  Raises:
    ValueError: one of `first` is no row: it was renamed, and its family would have none.
  """
  values, first = list(values), list(first)
  if missing := [value for value in first if value not in values]:
    raise ValueError(f'{missing} are none of the rows {values}')
  mark = pytest.mark.full(part)
  return [value if value in first else
          pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=mark)
          for value in values]
