"""Only comparisons with the originals need this: rows padded before their images, texts taken
apart.
"""

from __future__ import annotations

from jaxtyping import Bool, Int
import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language.chat import ASSISTANT, IGNORE, USER, Message, Template
from hrvlm_jax.language.prompt import TEXT


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


def parse(template: Template, text: str) -> tuple[str | None, list[Message]]:
  """The system text and messages of a rendered text: the inverse of `render`.

  Ambiguous when a message contains the template's own separators; `render` of the result then
  still gives the same text.

  Raises:
    UserError: the text does not have the template's form.
  """
  def cut(rest: str, end: str) -> tuple[str, str]:
    head, found, tail = rest.partition(end) if end else (rest, 'x', '')
    if not found:
      raise UserError(f'text is not of the template {template.name}: expected {end!r} '
                      f'in {rest[:40]!r}')
    return head, tail

  before, after = template.user.split('{text}')
  between = after + template.header
  answer_before, answer_after = template.answer.split('{text}')
  messages, system = [], template.system
  start, _, end = template.system_format.partition('{text}')
  if template.system_format and (system is not None or text.startswith(start)):
    # The end of a system text is where the first question begins.
    system, text = cut(text.removeprefix(start), end + before)
  else:
    text = text.removeprefix(before)
  while text:
    asked, text = cut(text, between)
    messages.append(Message(USER, asked))
    if text:
      told, text = cut(text.removeprefix(answer_before), answer_after + template.after)
      messages.append(Message(ASSISTANT, told))
      text = text.removeprefix(before)
  return system, messages
