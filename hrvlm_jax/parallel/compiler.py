"""Options of the compiler by chip, as data: `compiler.json`."""

from __future__ import annotations

import functools
import importlib.resources
from typing import Any

from hrvlm_jax.core import json_text
from hrvlm_jax.parallel.topology import chips


def compiler_options(chip: str) -> dict[str, Any]:
  """Options for `jax.jit(..., compiler_options=)`, for large sharded steps.

  Args:
    chip: a name of topologies.json, or a platform, whose options all its chips have.

  Returns:
    The options of its platform and its own; none where the file names none.
  """
  table = _file()
  known = chips().get(chip)
  names = (known.platform, chip) if known else (chip,)
  return {option: row['value'] for name in names for option, row in table.get(name, {}).items()}


@functools.cache
def _file() -> dict[str, dict[str, dict[str, Any]]]:
  text = importlib.resources.files(__package__).joinpath('compiler.json').read_text()
  return json_text.loads(text)['options']
