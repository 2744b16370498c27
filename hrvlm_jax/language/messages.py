"""Chat messages as other programs write them: OpenAI's and Hugging Face's form, and LLaVA's.

    {'role': 'user', 'content': 'text'}
    {'role': 'user', 'content': [{'type': 'image_url', 'image_url': {'url': ...}},
                                 {'type': 'text', 'text': ...}]}              (OpenAI)
    {'role': 'user', 'content': [{'type': 'image', 'image': ...}, {'type': 'text', ...}]}   (HF)
    {'from': 'human', 'value': 'text'}                                        (LLaVA)

What an image is (a path, a URL, a picture) is not looked at here: `turns` hands it on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from hrvlm_jax.core.errors import UserError, nearest, raise_all
from hrvlm_jax.language.chat import ASSISTANT, IMAGE, USER, Dialogue, Message

SYSTEM = 'system'
ROLES = {'user': USER, 'human': USER, 'assistant': ASSISTANT, 'gpt': ASSISTANT, 'model': ASSISTANT,
         'system': SYSTEM, 'developer': SYSTEM}


def known_role(said: Any) -> str | None:
  """'user', 'assistant' or 'system'; None: no such role, or no text at all."""
  return ROLES.get(said) if isinstance(said, str) else None


_TEXTS = ('text', 'input_text', 'output_text')
# Type of a part -> keys that may hold its image, the first found counts.
_IMAGES = {'image_url': ('image_url',), 'input_image': ('image_url',),
           'image': ('image', 'url', 'path', 'bytes', 'base64', 'image_url', 'source')}


@dataclasses.dataclass(frozen=True)
class Turn:
  """One message: its role ('user', 'assistant' or 'system'), text, and images in their order.

  An image that is None is a bare placeholder (`{'type': 'image'}`): it stands for one that is given
  beside the messages.
  """

  role: str
  text: str
  images: tuple[Any, ...] = ()


def is_messages(value: Any) -> bool:
  """Whether a value looks like a list of messages (and not like several images)."""
  return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value) > 0 \
      and all(isinstance(one, Mapping) and ({'role', 'from'} & one.keys()) for one in value)


def turns(messages: Any) -> list[Turn]:
  """The turns of a list of messages, neighbours of one role joined.

  Raises:
    UserError: every message and part of another form, in one message.
  """
  if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
    found = 'an empty list' if messages in ([], ()) else type(messages).__name__
    raise UserError(f"messages: found {found}, expected a list of {{'role': 'user', 'content': "
                    "'text'}")
  found: list[Turn] = []
  problems: list[str] = []
  for number, message in enumerate(messages):
    turn = _turn(message, f'message {number}', problems)
    if turn is None:
      continue
    if found and found[-1].role == turn.role:
      turn = _joined(found.pop(), turn)
    found.append(turn)
  raise_all('messages', problems)
  return found


def _joined(first: Turn, second: Turn) -> Turn:
  return Turn(first.role, '\n'.join(filter(None, (first.text, second.text))),
              first.images + second.images)


def dialogue(messages: Any, images: Sequence[Any] = ()) -> tuple[list[Any], Dialogue]:
  """(images in order, the turns) of messages that end with a question.

  Args:
    images: what bare placeholders stand for; without placeholders they belong to the first
      question, as in LLaVA's data.

  Raises:
    UserError: messages of another form or order, placeholders and images of different numbers.
  """
  found = turns(messages)
  system = '\n'.join(turn.text for turn in found if turn.role == SYSTEM) or None
  if any(turn.role == SYSTEM for turn in found[1:]):
    raise UserError('messages: a system message stands behind others, expected it first')
  found = [turn for turn in found if turn.role != SYSTEM]
  bare = sum(image is None for turn in found for image in turn.images)
  images = list(images)
  if images and not bare and found:
    first = found[0]
    found[0] = dataclasses.replace(first, images=(*(None for _ in images), *first.images))
    bare = len(images)
  if bare != len(images):
    raise UserError(f'messages: {bare} image placeholders without an image of their own, but '
                    f'{len(images)} images are given beside the messages')
  given = iter(images)
  filled = [[next(given) if image is None else image for image in turn.images] for turn in found]
  spoken = Dialogue(tuple(Message(turn.role, turn.text.replace(IMAGE, '').strip()
                                  if turn.role == USER else turn.text) for turn in found),
                    tuple(map(len, filled)), system)
  return [image for part in filled for image in part], spoken


def _turn(message: Any, where: str, problems: list[str]) -> Turn | None:
  if not isinstance(message, Mapping):
    problems.append(f'{where} is {type(message).__name__}, expected an object')
    return None
  role = message.get('role', message.get('from'))
  content = message.get('content', message.get('value'))
  if known_role(role) is None:
    problems.append(f"{where} comes from {role!r}, expected 'user', 'assistant' or 'system' "
                    "('human' or 'gpt')")
    return None
  if isinstance(content, str):
    return Turn(ROLES[role], content)
  if not isinstance(content, Sequence) or isinstance(content, bytes):
    problems.append(f'{where} has a content of {type(content).__name__}, expected text or a list '
                    'of parts')
    return None
  before = len(problems)
  texts: list[str] = []
  images: list[Any] = []
  for number, part in enumerate(content):
    kind, value = _part(part, f'{where}, part {number}', problems)
    if kind == 'text':
      texts.append(value)
    elif kind == 'image':
      images.append(value)
  if ROLES[role] != USER and images:
    problems.append(f'{where} comes from {role!r} and holds an image; only questions bring images')
  if len(problems) > before:
    return None
  return Turn(ROLES[role], '\n'.join(text for text in texts if text.strip()), tuple(images))


def _part(part: Any, where: str, problems: list[str]) -> tuple[str, Any]:
  """('text', its text), ('image', its image or None), or ('', None) with a problem."""
  if isinstance(part, str):
    return 'text', part
  if not isinstance(part, Mapping):
    problems.append(f'{where} is {type(part).__name__}, expected an object with a type')
    return '', None
  # Tables give every part all keys, those of other types being None.
  part = {key: value for key, value in part.items() if value is not None}
  kind = part.get('type')
  if kind is None:
    kind = next((name for name in ('text', 'image', 'image_url') if name in part), None)
  if kind in _TEXTS:
    text = part.get('text')
    if isinstance(text, str):
      return 'text', text
    problems.append(f'{where} is of type {kind} without a text')
  elif kind in _IMAGES:
    value = next((part[key] for key in _IMAGES[kind] if key in part), None)
    if isinstance(value, Mapping) and ({'url', 'path', 'bytes', 'data'} & value.keys()):
      value = next(value[key] for key in ('bytes', 'url', 'path', 'data') if value.get(key))
    if value is not None and 'base64' in part and value is part['base64']:
      value = f'data:;base64,{value}'
    if value is None and kind != 'image':
      problems.append(f'{where} is of type {kind} without one')
    else:
      return 'image', value
  elif isinstance(kind, str) and any(word in kind for word in ('video', 'audio')):
    problems.append(f'{where} is of type {kind}; only images and text are read')
  else:
    known = (*_TEXTS[:1], *_IMAGES)
    hint = f' (nearest known: {nearest(kind, known)})' if isinstance(kind, str) else ''
    problems.append(f'{where} has type {kind!r}{hint}, expected one of {", ".join(known)}')
  return '', None
