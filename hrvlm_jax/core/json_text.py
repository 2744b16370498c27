"""JSON of others: what cannot be read is a ValueError, whatever is wrong with it."""

import json
from typing import Any


def loads(text: str | bytes, **options: Any) -> Any:
  """`json.loads`, where brackets that nest too deeply are bad JSON too, and no RecursionError.

  Args:
    options: of `json.loads`.

  Raises:
    ValueError: `text` is no JSON, or no UTF-8.
  """
  try:
    return json.loads(text, **options)
  except RecursionError:
    raise ValueError('its brackets nest too deeply') from None
