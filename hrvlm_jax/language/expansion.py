"""From token ids with image placeholders to the arrays of a batch.

`expand` gives every image its visual slots, `pad_batch` stacks rows of one bucket length.
`merge_rows` is the same for rows that are already padded, with the positions of MC-LLaVA's
released code, for comparison with it. All of it is index arithmetic on the host: the device only
gathers.

Axis letters: b rows, t text ids before, l slots after expansion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from jaxtyping import Bool, Int
import numpy as np

from hrvlm_jax.core.errors import UserError

IGNORE = -100
TEXT = -1  # visual_index of a slot that holds text


def expand(
  ids: Sequence[int],
  labels: Sequence[int] | None,
  image_id: int,
  counts: Sequence[int],
  *,
  after: Sequence[int] = (),
) -> dict[str, np.ndarray]:
  """Replaces the k-th placeholder by counts[k] visual slots.

  Example: ids [5 -200 6], image_id -200, counts [2] -> tokens [5 0 0 6],
  visual_index [-1 0 1 -1]: the slot reads visual token 0, then 1 of its row.

  Args:
    ids: [t] token ids with one `image_id` per image.
    labels: [t] targets, -100 where none; None: nothing is trained.
    image_id: the placeholder, a real token or a sentinel such as -200.
    counts: visual tokens of each image, in order.
    after: ids that follow every image (VILA-HD: the newline), never trained.

  Returns:
    tokens [l] int32 (0 in visual slots), visual_index [l] int32 (-1 for text), labels [l] int32.

  Raises:
    UserError: the number of placeholders is not the number of images.
  """
  ids = np.asarray(ids, np.int64)
  labels = np.full(ids.shape, IGNORE) if labels is None else np.asarray(labels, np.int64)
  if labels.shape != ids.shape:
    raise ValueError(f'labels: {labels.shape[0]} of them for {ids.shape[0]} ids')
  places = np.flatnonzero(ids == image_id)
  if len(places) != len(counts):
    raise UserError(f'the text has {len(places)} image placeholders, but {len(counts)} images are '
                    'given; expected one placeholder for each image')
  tokens, visual, targets, start, used = [], [], [], 0, 0
  for place, count in zip(places, counts, strict=True):
    tokens += [ids[start:place], np.zeros(count, np.int64), np.asarray(after, np.int64)]
    visual += [np.full(place - start, TEXT), np.arange(used, used + count),
               np.full(len(after), TEXT)]
    targets += [labels[start:place], np.full(count + len(after), IGNORE)]
    start, used = place + 1, used + count
  tokens.append(ids[start:])
  visual.append(np.full(len(ids) - start, TEXT))
  targets.append(labels[start:])
  return {
    'tokens': np.concatenate(tokens).astype(np.int32),
    'visual_index': np.concatenate(visual).astype(np.int32),
    'labels': np.concatenate(targets).astype(np.int32),
  }


def choose_bucket(length: int, buckets: Sequence[int]) -> int:
  """The smallest bucket that holds `length` slots.

  Raises:
    UserError: longer than the largest bucket.
  """
  for bucket in sorted(buckets):
    if length <= bucket:
      return bucket
  raise UserError(f'a sequence of {length} tokens (text and image) is longer than the largest '
                  f'bucket {max(buckets, default=0)}; shorten the text, lower the number of visual '
                  'tokens or add a bucket')


def pad_batch(
  examples: Sequence[Mapping[str, np.ndarray]],
  length: int,
  side: Literal['left', 'right'] = 'right',
  *,
  truncate: bool = False,
) -> dict[str, np.ndarray]:
  """Stacks expanded examples to [b, length].

  Args:
    examples: dicts of `expand`; `prompt_end` (a place of the row) moves with the padding.
    length: slots per row, usually of `choose_bucket`.
    side: where the padding goes; left for batched generation, right for training.
    truncate: cut longer rows at their end instead of refusing them (VILA does, in training).

  Returns:
    tokens int32 (0 in padding), visual_index int32 (-1), valid bool, labels int32 (-100);
    all [b, length]. prompt_end int32 [b] where the examples have it.

  Raises:
    UserError: rows longer than `length`, all of them named.
  """
  if side not in ('left', 'right'):
    raise ValueError(f"side: expected 'left' or 'right', got {side!r}")
  sizes = [len(example['tokens']) for example in examples]
  if not truncate and (long := [f'row {i}: {n}' for i, n in enumerate(sizes) if n > length]):
    raise UserError(f'tokens per row are limited to {length}, found {", ".join(long)}')
  batch = {
    'tokens': np.zeros((len(examples), length), np.int32),
    'visual_index': np.full((len(examples), length), TEXT, np.int32),
    'valid': np.zeros((len(examples), length), bool),
    'labels': np.full((len(examples), length), IGNORE, np.int32),
  }
  for row, (example, size) in enumerate(zip(examples, sizes, strict=True)):
    size = min(size, length)
    place = slice(0, size) if side == 'right' else slice(length - size, length)
    for key in ('tokens', 'visual_index', 'labels'):
      batch[key][row, place] = example[key][:size]
    batch['valid'][row, place] = True
  if examples and all('prompt_end' in example for example in examples):
    shift = [0 if side == 'right' else length - min(size, length) for size in sizes]
    ends = [min(int(example['prompt_end']), length - 1) for example in examples]
    batch['prompt_end'] = np.array(ends, np.int32) + np.array(shift, np.int32)
  return batch


def merge_rows(
  ids: Int[np.ndarray, 'b t'],
  mask: Bool[np.ndarray, 'b t'],
  labels: Int[np.ndarray, 'b t'],
  image_id: int,
  *,
  tokens_per_image: int,
  images: int,
  pad_id: int = -1,
) -> dict[str, np.ndarray]:
  """Expands rows that are padded already, where MC-LLaVA's released code puts them.

  Rows with fewer images than the fullest one are shorter; they are shifted to the right end unless
  some row ends with `pad_id`, in which case they stay at the left. With the usual pad_id of -1 (the
  released model names none) that is: always to the right end. For valid tokens it makes no
  difference, since positions count valid tokens only.

  Where the original looks for all-zero embedding rows, this is index arithmetic: rows with
  different numbers of images get their own features (spec of the limits: systems/mc_llava/README).

  Source: visheratin/mc-llava: modeling_mc_llava.py, `_merge_input_ids_with_image_features`.

  Args:
    ids: with `image_id` once per image.
    mask: True for real tokens.
    images: how many images there are features for, in row-major order of the placeholders.

  Returns:
    tokens, visual_index (into all images' tokens, [images * tokens_per_image], -1 elsewhere),
    source (index of the text id in its row, -1 elsewhere), valid, labels, positions; all [b l]
    with l = t + most images of a row * (tokens_per_image - 1).

  Raises:
    UserError: placeholders and images differ in number.
  """
  is_image = ids == image_id
  if (found := int(is_image.sum())) != images:
    raise UserError(f'the text has {found} image placeholders, but {images} images are given')
  rows, _ = ids.shape
  ends = np.cumsum(is_image * (tokens_per_image - 1) + 1, axis=1) - 1  # last slot of each id
  most = int(is_image.sum(axis=1).max(initial=0))
  length = ids.shape[1] + most * (tokens_per_image - 1)
  to_right_end = not np.any(ids[:, -1] == pad_id)
  if to_right_end:
    ends = ends + (length - 1 - ends[:, -1:])
  out = {
    'tokens': np.zeros((rows, length), np.int32),
    'visual_index': np.full((rows, length), TEXT, np.int32),
    'source': np.full((rows, length), -1, np.int32),
    'valid': np.zeros((rows, length), bool),
    'labels': np.full((rows, length), IGNORE, np.int32),
  }
  row, column = np.nonzero(~is_image)
  slot = ends[row, column]
  out['tokens'][row, slot] = ids[row, column]
  out['source'][row, slot] = column
  out['valid'][row, slot] = mask[row, column]
  out['labels'][row, slot] = labels[row, column]
  row, column = np.nonzero(is_image)  # row-major, as the features are
  for image, (r, c) in enumerate(zip(row, column, strict=True)):
    slots = np.arange(ends[r, c] - tokens_per_image + 1, ends[r, c] + 1)
    out['visual_index'][r, slots] = image * tokens_per_image + np.arange(tokens_per_image)
    out['valid'][r, slots] = True
  positions = np.cumsum(out['valid'], axis=1, dtype=np.int32) - 1
  out['positions'] = np.where(out['valid'], positions, 1).astype(np.int32)
  return out
