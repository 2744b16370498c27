"""The text of a row, from question or conversation to the arrays of a batch.

`Text` is how one model's text is written: template, tokenizer, placeholder. `expand` gives every
image its visual positions, `join_texts` puts several examples into one row, `pad_batch` stacks rows
of one bucket length. All of it is index arithmetic on the host: the device only gathers.

Axis letters: b rows, t text ids before, l positions after expansion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Literal

import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.text import has_half
from hrvlm_jax.language.chat import (
  IGNORE,
  USER,
  Dialogue,
  Encoded,
  Message,
  encode_prompt,
  get_template,
  prompt_end,
)
from hrvlm_jax.language.conversation import encode_training, prepare, with_system
from hrvlm_jax.language.generation import generation_of
from hrvlm_jax.language.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

TEXT = -1  # visual_index of a position that holds text
# What `pad_batch` puts beside a row, by key; the last two are those of `join_texts`.
_PADDING = {'tokens': 0, 'visual_index': TEXT, 'labels': IGNORE, 'segments': 0, 'positions': 1}


def expand(
  ids: Sequence[int],
  labels: Sequence[int] | None,
  image_id: int,
  counts: Sequence[int],
  *,
  after: Sequence[int] = (),
) -> dict[str, np.ndarray]:
  """Replaces the k-th placeholder by counts[k] visual positions.

  Example: ids [5 -200 6], image_id -200, counts [2] -> tokens [5 0 0 6],
  visual_index [-1 0 1 -1]: the positions read visual tokens 0 and 1 of their row.

  Args:
    ids: [t] token ids with one `image_id` per image.
    labels: [t] targets, -100 where none; None: nothing is trained.
    image_id: the placeholder, a real token or a sentinel such as -200.
    counts: visual tokens of each image, in order.
    after: ids that follow every image (VILA-HD: the newline), never trained.

  Returns:
    tokens [l] int32 (0 at visual positions), visual_index [l] int32 (-1 for text), labels [l]
    int32.

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


def join_texts(examples: Sequence[Mapping[str, np.ndarray]], counts: Sequence[int]
               ) -> dict[str, np.ndarray]:
  """Several examples in one row.

  Args:
    examples: arrays of `expand`.
    counts: visual tokens of each example (of all its images).

  Returns:
    tokens, visual_index (counted over the row), labels (the first of each example is -100: its
    target would be the neighbour's), segments int32 (from 1), positions int32 (from 0 in each).
  """
  before = np.cumsum([0, *counts])
  parts = []
  for number, (example, start) in enumerate(zip(examples, before), 1):
    size, index = len(example['tokens']), example['visual_index']
    labels = example['labels'].copy()
    labels[:1] = IGNORE
    parts.append({
      'tokens': example['tokens'], 'labels': labels,
      'visual_index': np.where(index == TEXT, TEXT, index + start).astype(np.int32),
      'segments': np.full(size, number, np.int32), 'positions': np.arange(size, dtype=np.int32)})
  return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def empty_text(*, packed: bool) -> dict[str, np.ndarray]:
  """A row without an example, as `expand` (or, packed, `join_texts`) would give it."""
  return {key: np.zeros(0, np.int32) for key in list(_PADDING)[:5 if packed else 3]}


def choose_bucket(length: int, buckets: Sequence[int]) -> int:
  """The smallest bucket that holds `length` positions.

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
    examples: dicts of `expand`, or all of `join_texts`. `prompt_end` (a position of the row) moves
      with the padding; where only some rows have one, it is 0 in the others.
    length: positions per row, usually of `choose_bucket`.
    side: where the padding goes; left for batched generation, right for training.
    truncate: cut longer rows at their end instead of refusing them (VILA does, in training).

  Returns:
    tokens int32 (0 in padding), visual_index int32 (-1), valid bool, labels int32 (-100), of
    `join_texts` also segments int32 (0) and positions int32 (1); all [b, length]. prompt_end int32
    [b] where examples have it.

  Raises:
    UserError: rows longer than `length`, all of them named.
  """
  if side not in ('left', 'right'):
    raise ValueError(f"side: expected 'left' or 'right', got {side!r}")
  sizes = [len(example['tokens']) for example in examples]
  if not truncate and (long := [f'row {i}: {n}' for i, n in enumerate(sizes) if n > length]):
    raise UserError(f'tokens per row are limited to {length}, found {", ".join(long)}')
  keys = list(_PADDING)[:5 if examples and 'segments' in examples[0] else 3]
  batch = {key: np.full((len(examples), length), _PADDING[key], np.int32) for key in keys}
  batch['valid'] = np.zeros((len(examples), length), bool)
  for row, (example, size) in enumerate(zip(examples, sizes, strict=True)):
    size = min(size, length)
    place = slice(0, size) if side == 'right' else slice(length - size, length)
    for key in keys:
      batch[key][row, place] = example[key][:size]
    batch['valid'][row, place] = True
  if any('prompt_end' in example for example in examples):
    shift = [0 if side == 'right' else length - min(size, length) for size in sizes]
    ends = [min(int(example.get('prompt_end', 0)), length - 1) for example in examples]
    batch['prompt_end'] = np.array(ends, np.int32) + np.array(shift, np.int32)
  return batch


# The tokenizer of tiny models: one id per byte, then the special tokens of all templates.
BYTE_SPECIALS = {'<|im_end|>': 256, '<|im_start|>': 257, '<image>': 258, '<pad>': 259,
                 '<|endoftext|>': 260, '<s>': 261, '</s>': 262, '<unk>': 263}


def tokenizer_of(name: str) -> Tokenizer:
  """The tokenizer a config names: 'byte', or a folder or file.

  Raises:
    UserError: no tokenizer there.
  """
  if name == 'byte':
    return ByteTokenizer(BYTE_SPECIALS, {'pad': '<pad>', 'eos': '<|im_end|>', 'bos': '<s>'})
  return load_tokenizer(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
  """How a model's text is written and tokenised.

  Attributes:
    chat: template of prompts; training uses `<chat>_train` where there is one.
    image_token: the placeholder's own token; None: the template has no placeholder.
    image_sentinel: placeholder id where the vocabulary has no image token (LLaVA: -200).
  """

  tokenizer: Tokenizer
  chat: str
  image_token: str | None
  image_sentinel: int | None = None
  after_image: str = ''

  @property
  def image_id(self) -> int | None:
    """What stands for an image in the ids; None where images are not part of the text."""
    if self.image_sentinel is not None:
      return self.image_sentinel
    return None if self.image_token is None else self.tokenizer.special(self.image_token)

  def after(self) -> list[int]:
    """Ids that follow the visual tokens of every image."""
    return self.tokenizer.encode(self.after_image, bos=False) if self.after_image else []

  def stop_ids(self) -> tuple[int, ...]:
    """Ids at which generation ends: the template's, then those the release names."""
    own = [self.tokenizer.special(s) for s in get_template(self.chat).stop]
    return tuple(dict.fromkeys((*own, *generation_of(self.tokenizer.files).stop_ids)))

  def prompt(self, text: str | Dialogue, counts: Sequence[int]) -> dict[str, np.ndarray]:
    """A question about len(counts) images, or turns that bring as many: arrays of `expand`.

    Raises:
      UserError: the question is empty, turns that bring another number of images, more turns or
        other parts than the template knows.
    """
    asked = Dialogue((Message(USER, text),), (len(counts),)) if isinstance(text, str) else text
    if not asked.messages[-1].text.strip():
      raise UserError('the question is empty; write what you want to know about the image')
    if any(has_half(text) for text in (asked.system or '', *(m.text for m in asked.messages))):
      raise UserError('the question holds half a character (a lone surrogate), as a text has that '
                      'was cut inside an emoji; write it whole')
    if sum(asked.images) != len(counts):
      raise UserError(f'the messages bring {sum(asked.images)} images, but {len(counts)} are given')
    template = get_template(self.chat)
    encoded = encode_prompt(asked.written(template), template, self.tokenizer,
                            image_id=self.image_id if counts else None, system=asked.system)
    return self._expand(encoded, counts, template)

  def asked(self, question: str, images: int, system: str | None) -> str | Dialogue:
    """A question under a system text, where one is given, as training shows it to the model."""
    messages, system = with_system([Message(USER, question)], get_template(self.chat), system)
    if not system:
      return messages[0].text
    return Dialogue(tuple(messages), (images,), system)

  def conversation(self, messages: Sequence[Message], counts: Sequence[int], *,
                   system: str | None = None, max_length: int | None = None
                   ) -> dict[str, np.ndarray]:
    """A finished conversation with its label mask: arrays of `expand`."""
    encoded = self.encode(messages, len(counts), system=system, max_length=max_length)
    return self.expand(encoded, counts)

  def encode(self, messages: Sequence[Message], images: int, *, system: str | None = None,
             max_length: int | None = None) -> Encoded:
    """Ids and labels of a finished conversation about so many images, before they take their slots.

    Args:
      system: in place of the template's system text; before the first question where it has none.
      max_length: cut after so many ids, an image counting one.

    Raises:
      UserError: messages that do not alternate.
    """
    template = self._training_template()
    messages, system = with_system(messages, template, system)
    return encode_training(
      prepare(messages, template, images), template, self.tokenizer, system=system,
      image_id=self.image_id if images else None, max_length=max_length)

  def expand(self, encoded: Encoded, counts: Sequence[int]) -> dict[str, np.ndarray]:
    """Arrays of `expand` of a conversation whose images have so many visual tokens."""
    return self._expand(encoded, counts, self._training_template())

  def _training_template(self):
    try:
      return get_template(f'{self.chat}_train')
    except UserError:
      return get_template(self.chat)

  def _expand(self, encoded, counts, template):
    if self.image_id is None:  # cross-attention: images take no positions in the text
      return expand(encoded.ids, encoded.labels, _NO_IMAGE, ())
    after = self.after()
    arrays = expand(encoded.ids, encoded.labels, self.image_id, counts, after=after)
    if template.steers:
      end = prompt_end(encoded.ids, template, self.tokenizer)
      before = encoded.ids[:end + 1].count(self.image_id)
      end += sum(count + len(after) - 1 for count in list(counts)[:before])
      arrays['prompt_end'] = np.array(end, np.int32)
    return arrays


_NO_IMAGE = -(2**31)
