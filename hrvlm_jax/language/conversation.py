"""Conversations to token ids and label masks.

The mask follows from the rendered segments: every token knows the character at which it starts, so
it belongs to a segment, and the segment says whether it is trained. Nothing is tokenised a second
time to find answers. Where an original's own method gives something else on odd input (a question
that contains the separator, a line break inside an answer) its result is reproduced from the
segments as well, because released models were trained with it; each such rule has a name here.

Sources: luogen1996/LLaVA-HR: llava_hr/train/train.py (`preprocess_v1`, `preprocess_plain`,
`preprocess_multimodal`); visheratin/mc-llava: dataset.py; NVlabs/VILA: llava/utils/tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language.chat import (
  ASSISTANT,
  IGNORE,
  IMAGE,
  USER,
  Encoded,
  Message,
  Segment,
  Template,
  encode_text,
  render,
  rendered_text,
)
from hrvlm_jax.language.tokenizer import Tokenizer

SENTINEL = -200  # LLaVA's image placeholder; no embedding row belongs to it


def prepare(
  messages: Sequence[Message], template: Template, images: int, *, insert: bool = True
) -> list[Message]:
  """Messages of a data set with their image placeholders where the template wants them.

  A leading answer is dropped, as LLaVA does. With `template.image_leads` a placeholder inside a
  message moves to its beginning (several of one message are one, unless the example has several
  images). A template without placeholders loses them. Without images the text stays as it is.

  The number of placeholders is checked where images take their positions (`prompt.expand`).

  Args:
    images: how many images the example has.
    insert: put placeholders in front of the first question when there are images and no
      placeholder at all; the originals do not, and the model then never sees the image.
  """
  messages = list(messages)
  if messages and messages[0].role == ASSISTANT:
    messages = messages[1:]
  if not images or not messages:
    return messages
  if not template.image:
    return [Message(m.role, _without(m.text)) for m in messages]
  if insert and not any(IMAGE in m.text for m in messages):
    first = messages[0]
    messages[0] = Message(first.role, template.image * images + first.text)
  if template.image_leads:
    messages = [_lead(m, template.image, images) for m in messages]
  return messages


def with_system(messages: Sequence[Message], template: Template, system: str | None
                ) -> tuple[list[Message], str | None]:
  """(messages, system text to render): a template without one gets it before the first question."""
  messages = list(messages)
  if not system or template.system_format or not messages or messages[0].role != USER:
    return messages, system
  return [Message(USER, f'{system}\n{messages[0].text}'), *messages[1:]], None


def _without(text: str) -> str:
  return text.replace(f'{IMAGE}\n', '').replace(IMAGE, '').strip()


def _lead(message: Message, image: str, images: int) -> Message:
  if IMAGE not in message.text:
    return message
  count = message.text.count(IMAGE) if images > 1 else 1
  return Message(message.role, (image * count + message.text.replace(IMAGE, '').strip()).strip())


def encode_conversation(
  messages: Sequence[Message],
  template: Template,
  tokenizer: Tokenizer,
  *,
  image_id: int | None,
  system: str | None = None,
  max_length: int | None = None,
) -> Encoded:
  """Ids and labels of a finished conversation.

  Args:
    messages: of `prepare`.
    template: see `language.chat`.
    tokenizer: that of the model.
    image_id: what stands for an image: the id of the tokenizer's own `<image>` token, the
      sentinel -200 (the text around it is then tokenised in pieces), or None for an example
      without images, whose text is left alone.
    system: replaces the template's system text.
    max_length: cut after so many ids (before images take their slots).

  Raises:
    UserError: messages that do not alternate.
  """
  segments = render(template, messages, system=system)
  if template.unit == 'message':
    ids, labels = _by_message(segments, template, tokenizer, image_id)
  else:
    ids, labels, _ = _by_place(segments, tokenizer, image_id)
  return Encoded(ids, labels, rendered_text(segments)).cut(max_length)


def encode_training(
  messages: Sequence[Message],
  template: Template,
  tokenizer: Tokenizer,
  *,
  image_id: int | None,
  system: str | None = None,
  max_length: int | None = None,
) -> Encoded:
  """Ids and labels as the template's original makes them (`Template.masks`).

  Args: see `encode_conversation`, `encode_llava`, `encode_vila`.

  Raises:
    UserError: messages that do not alternate.
  """
  if template.masks == 'rounds':
    unknown = tokenizer.unk_id  # what LLaVA pads with
    return encode_llava(messages, template, tokenizer, image_id=image_id, system=system,
                        max_length=max_length,
                        pad_id=0 if unknown is None else unknown)
  if template.masks == 'comparison':
    return encode_vila(messages, template, tokenizer, image_id=image_id, system=system
                       ).cut(max_length)
  return encode_conversation(messages, template, tokenizer, image_id=image_id, system=system,
                             max_length=max_length)


def _by_place(
  segments: Sequence[Segment], tokenizer: Tokenizer, image_id: int | None
) -> tuple[list[int], list[int], list[int]]:
  """Ids, labels and starts; a token is trained when it starts inside a trained segment."""
  text = rendered_text(segments)
  ids, starts = encode_text(text, tokenizer, image_id)
  trained, place = [], 0
  for segment in segments:
    if segment.trained:
      trained.append((place, place + len(segment.text)))
    place += len(segment.text)
  return ids, _labels(ids, starts, trained, image_id), starts


def _labels(
  ids: Sequence[int], starts: Sequence[int], spans: Sequence[tuple[int, int]], image_id: int | None
) -> list[int]:
  """The ids that start inside one of the ascending (from, to) character spans, else -100."""
  labels, at = [], 0
  for index, start in zip(ids, starts, strict=True):
    while at < len(spans) and start >= spans[at][1]:
      at += 1
    inside = at < len(spans) and start >= spans[at][0] and index != image_id
    labels.append(index if inside else IGNORE)
  return labels


def _by_message(
  segments: Sequence[Segment], template: Template, tokenizer: Tokenizer, image_id: int | None
) -> tuple[list[int], list[int]]:
  """Every message tokenised alone; in an answer the first h ids are not trained.

  h is the number of ids of the header alone. Byte-level BPE may join the header's line break with
  white space at the beginning of an answer; the count stays.
  """
  ids, labels = [], []
  for message in sorted({segment.message for segment in segments}):
    own = [segment for segment in segments if segment.message == message]
    part, begins = encode_text(rendered_text(own), tokenizer, image_id)
    if any(segment.trained for segment in own):
      if template.border == 'count':
        first = len(tokenizer.encode(template.header))
      else:
        first = sum(begin < len(template.header) for begin in begins)
      labels += [IGNORE] * min(first, len(part)) + part[first:]
    else:
      labels += [IGNORE] * len(part)
    ids += part
  return ids, labels


def encode_llava(
  messages: Sequence[Message],
  template: Template,
  tokenizer: Tokenizer,
  *,
  image_id: int | None = SENTINEL,
  system: str | None = None,
  max_length: int | None = None,
  pad_id: int = 0,
) -> Encoded:
  """LLaVA's masks: `encode_conversation`, and what its check of the lengths leaves of them.

  The original walks over the rounds of a conversation and compares lengths at the end. A message
  that contains a separator of the template, or a token with the pad id (the unknown token), makes
  the comparison fail: then nothing of the example is trained, unless the rounds walked over so far
  already fill `max_length` ids. Both are reproduced.

  Args:
    image_id: None for an example without images.
    system: replaces the template's system text.
    max_length: model_max_length of the recipe.
    pad_id: the id that the original does not count.
  """
  segments = render(template, messages, system=system)
  ids, labels, starts = _by_place(segments, tokenizer, image_id)
  text = rendered_text(segments)
  if not template.drop_question:  # the captioning template has no rounds
    labels = _walk_rounds(text, ids, starts, template, image_id, max_length, pad_id)
  return Encoded(ids, labels, text).cut(max_length)


def _walk_rounds(text, ids, starts, template, image_id, max_length, pad_id):
  """Labels round by round, up to the first one that does not have exactly one separator."""
  before, end = template.answer.split('{text}')
  separator = template.header + before
  spans, place = [], 0
  for part in text.split(end):
    if not part or part.count(separator) != 1:
      break
    answer = place + part.index(separator) + len(template.header)
    place += len(part) + len(end)
    spans.append((answer, place))
  walked = max(1, sum(start < place for start in starts))
  counted = sum(index != pad_id for index in ids)
  if walked != counted and (max_length is None or walked < max_length):
    return [IGNORE] * len(ids)
  return _labels(ids, starts, spans, image_id)


def encode_vila(
  messages: Sequence[Message],
  template: Template,
  tokenizer: Tokenizer,
  *,
  image_id: int | None,
  system: str | None = None,
  exact: bool = True,
) -> Encoded:
  """VILA's masks.

  `exact` reproduces the original's greedy comparison with a template that has no answers: the first
  token of an answer that equals the next token of the template (the line break after
  `<|im_end|>`) counts as template and is not trained; the line break after the answer, now one too
  many, is. Without it the masks are those of `encode_conversation`: answer and `<|im_end|>`. Both
  agree on answers of one line.
  """
  segments = render(template, messages, system=system)
  ids, labels, _ = _by_place(segments, tokenizer, image_id)
  if exact:
    fixed = [index for index, label in zip(ids, labels, strict=True) if label == IGNORE]
    at = 0
    for place, index in enumerate(ids):
      matches = at < len(fixed) and index == fixed[at]
      at += matches
      labels[place] = IGNORE if matches else index
  return Encoded(ids, labels, rendered_text(segments))


def messages_from_llava(conversations: Sequence[dict]) -> list[Message]:
  """Messages of a LLaVA style list of {'from': 'human' | 'gpt', 'value': text}.

  Raises:
    UserError: an entry of another form; all of them are named.
  """
  roles = {'human': USER, 'user': USER, 'gpt': ASSISTANT, 'assistant': ASSISTANT}
  messages, problems = [], []
  for index, entry in enumerate(conversations):
    if not isinstance(entry, dict):
      problems.append(f'message {index} is {type(entry).__name__}, expected an object')
      continue
    role, value = entry.get('from', entry.get('role')), entry.get('value', entry.get('content'))
    if not isinstance(role, str) or role not in roles:
      problems.append(f"message {index} comes from {role!r}, expected 'human' or 'gpt'")
    elif not isinstance(value, str):
      problems.append(f'message {index} has a value of {type(value).__name__}, expected text')
    else:
      messages.append(Message(roles[role], value))
  if problems:
    raise UserError('; '.join(problems))
  return messages
