"""Packing for systems that see an image as one array with a fixed number of tokens.

Axis letters: b rows, t places of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.systems.contract import Views


def pack(examples: Sequence[Views], arrays: Mapping[str, tuple[tuple[int, ...], type]], *,
         each: int = 1, slots: int | None = None, tokens: int | None = None) -> Views:
  """Puts the images of several examples into `slots` places that all rows share.

  Args:
    examples: `pixels` and the other `arrays`, one entry per image.
    arrays: shape of one image's entry and dtype by name; empty slots hold zeros.
    each: tokens of an image; 1 where the encoder's index counts images.
    slots: images of the whole batch; default: rows times the largest number of images of a row (at
      least one).
    tokens: places per row; default: enough for that number of images.

  Returns:
    the arrays with a leading axis of slots, index int32 [b t] into the flattened (slots x each),
    valid bool [b t].

  Raises:
    UserError: the images or tokens do not fit.
  """
  counts = [len(example['pixels']) for example in examples]
  most = max([1, *counts])
  slots = max(len(examples) * most, 1) if slots is None else slots
  tokens = most * each if tokens is None else tokens
  longest = max(counts, default=0) * each
  if sum(counts) > slots or longest > tokens:
    raise UserError(f'a batch of {sum(counts)} images and {longest} tokens in one row does not fit '
                    f'{slots} image slots and {tokens} places')
  out = {name: np.zeros((slots, *shape), dtype) for name, (shape, dtype) in arrays.items()}
  out |= {'index': np.zeros((len(examples), tokens), np.int32),
          'valid': np.zeros((len(examples), tokens), bool)}
  start = 0
  for row, (example, n) in enumerate(zip(examples, counts, strict=True)):
    for name in arrays:
      out[name][start:start + n] = example[name]
    out['index'][row, :n * each] = start * each + np.arange(n * each)
    out['valid'][row, :n * each] = True
    start += n
  return out


def shift(views: Views, slots: int, *, each: int = 1) -> Views:
  """A batch's views whose indices count `slots` more image slots before them."""
  return views | {'index': views['index'] + np.int32(slots * each)}
