"""One row of a data set, its images not opened yet, and what can be wrong with it.

Every source gives `Row`s. Nothing of a row is trusted: a path must stay inside the data folder
(links followed), an image is decoded under a pixel limit, and whatever is wrong becomes a `BadRow`
that says which row of which file and what kind of fault, so that faults can be counted.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import os
import struct
from typing import Any, Protocol, TypeVar, runtime_checkable
import zlib

from PIL import Image

from hrvlm_jax.core import images, json_text
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.text import has_half
from hrvlm_jax.language.chat import ASSISTANT, IMAGE, USER, Message
from hrvlm_jax.language.conversation import messages_from_llava
from hrvlm_jax.language.messages import SYSTEM, known_role, turns

T = TypeVar('T')

_MAGIC = b'HRV1'


class BadRow(UserError):
  """A row that cannot be used.

  Attributes:
    kind: what is wrong in one or two words, the key of counts: 'json', 'encoding', 'form', 'path',
      'checksum', 'conversation', or a kind of `core.images.ImageError`.
    where: file and row.
  """

  def __init__(self, kind: str, where: str, message: str):
    super().__init__(f'{where}: {message}')
    self.kind, self.where, self.message = kind, where, message

  def __reduce__(self):
    return BadRow, (self.kind, self.where, self.message)


@dataclasses.dataclass(frozen=True)
class ImageRef:
  """An image that is not opened yet: the bytes of its file, or a path inside a folder.

  Attributes:
    name: how errors call it.
    data: content of the file, or None.
    folder: data folder that `path` is relative to and must not leave.
  """

  name: str
  data: bytes | None = None
  folder: str | None = None
  path: str | None = None

  def read(self) -> bytes:
    """The bytes of the image file.

    Raises:
      UserError: outside the data folder, missing, unreadable.
    """
    if self.data is not None:
      return self.data
    return images.read_file(inside(self.folder, self.path), name=self.name)

  def open(
    self, *, exif: images.ExifPolicy = 'apply', alpha: images.AlphaPolicy = 'drop',
    max_pixels: int = images.MAX_PIXELS, inexact: int | None = None,
  ) -> Image.Image:
    """The decoded image in its own mode; see `core.images.open_image`.

    Raises:
      UserError: see `read` and `core.images.open_image`.
    """
    return images.open_image(self.read(), exif=exif, alpha=alpha, max_pixels=max_pixels,
                             name=self.name, inexact=inexact)


@dataclasses.dataclass(frozen=True)
class Row:
  """One example of a data set.

  Attributes:
    id: name of the example, '' when it has none.
    images: in the order of their placeholders in the text; () for text alone.
    messages: questions and answers, as the file has them; () for an image alone.
    where: file and row, for errors.
    system: system text of the row, in place of the template's; None: the template's own.
    extra: other fields of the row (boxes, sizes, ...).
  """

  id: str
  images: tuple[ImageRef, ...]
  messages: tuple[Message, ...]
  where: str = ''
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  system: str | None = None

  def __post_init__(self):
    if any(map(has_half, (self.system or '', *(message.text for message in self.messages)))):
      raise BadRow('encoding', self.where, 'a message holds half a character (a lone surrogate), '
                   'as a text has that was cut inside an emoji; write the text whole')


@runtime_checkable
class Source(Protocol):
  """What pipelines need: a length, and rows by index; a source raises `BadRow` for one row."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Row: ...


def inside(folder: str, path: str) -> str:
  """The real path of `path` in `folder`, all links followed.

  Raises:
    UserError: empty, absolute, or leading out of the folder, by '..' or by a link.
  """
  if not path or '\0' in path:
    raise UserError(f'image path {path!r} is no file name')
  if path[:8].lower().startswith(('http://', 'https://')):
    raise UserError(f'image {path[:100]!r} is an address; data sets read files: download it first')
  if os.path.isabs(path):
    raise UserError(f'image path {path!r} is absolute, expected one relative to the image folder')
  root = os.path.realpath(folder)
  real = os.path.realpath(os.path.join(root, path))
  if real != root and not real.startswith(root.rstrip(os.sep) + os.sep):
    raise UserError(f'image path {path!r} leads out of the image folder {folder}')
  return real


def open_images(
  row: Row, *, exif: images.ExifPolicy = 'apply', alpha: images.AlphaPolicy = 'drop',
  max_pixels: int = images.MAX_PIXELS, inexact: int | None = None,
) -> list[Image.Image]:
  """All images of a row, decoded.

  Raises:
    BadRow: the first image that cannot be used, with its kind of fault.
  """
  return each_image(row, lambda ref: ref.open(exif=exif, alpha=alpha, max_pixels=max_pixels,
                                              inexact=inexact))


def image_sizes(
  row: Row, *, exif: images.ExifPolicy = 'apply', max_pixels: int = images.MAX_PIXELS,
  inexact: int | None = None,
) -> list[tuple[int, int]]:
  """(width, height) of all images of a row as `open_images` would give them, from their headers.

  Raises:
    BadRow: the first image whose header shows that it cannot be used.
  """
  return each_image(row, lambda ref: images.image_size(
    ref.data if ref.data is not None else inside(ref.folder, ref.path), max_pixels=max_pixels,
    name=ref.name, exif=exif, inexact=inexact))


def each_image(row: Row, function: Callable[[ImageRef], T]) -> list[T]:
  """What a function gives for every image of a row.

  Raises:
    BadRow: the first image it refuses, with its kind of fault.
  """
  try:
    return [function(ref) for ref in row.images]
  except images.ImageError as error:
    raise BadRow(error.kind, row.where, str(error)) from error
  except UserError as error:
    raise BadRow('path', row.where, str(error)) from error


def encode_record(row: Row) -> bytes:
  """A row with its image files as one self-contained, checksummed record.

  Layout: magic, CRC-32 of the rest, length of the header, header (JSON), image files.

  Raises:
    UserError: an image that cannot be read.
  """
  files = [ref.read() for ref in row.images]
  header = json.dumps({
    'id': row.id, 'messages': [[m.role, m.text] for m in row.messages],
    'images': [[ref.name, len(data)] for ref, data in zip(row.images, files, strict=True)],
    'extra': dict(row.extra), **({'system': row.system} if row.system else {}),
  }, ensure_ascii=False).encode()
  body = struct.pack('<I', len(header)) + header + b''.join(files)
  return _MAGIC + struct.pack('<I', zlib.crc32(body)) + body


def decode_record(record: bytes, where: str) -> Row:
  """The row of a record of `encode_record`.

  Raises:
    BadRow: not such a record, or its checksum does not fit.
  """
  if record[:4] != _MAGIC or len(record) < 12:
    raise BadRow('form', where, "is no record of this library (expected to begin with 'HRV1')")
  if zlib.crc32(record[8:]) != struct.unpack('<I', record[4:8])[0]:
    raise BadRow('checksum', where, 'the checksum does not fit the record: it is damaged')
  length = struct.unpack('<I', record[8:12])[0]
  header = json_text.loads(record[12:12 + length])
  refs, place = [], 12 + length
  for name, size in header['images']:
    refs.append(ImageRef(name, data=record[place:place + size]))
    place += size
  messages = tuple(Message(role, text) for role, text in header['messages'])
  return Row(header['id'], tuple(refs), messages, where, header['extra'],
             header.get('system'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
  """Which field of a table row is what; None: there is no such field.

  Attributes:
    image: one image or a list of them, as file content, {'bytes': ..., 'path': ...} or path.
    id: name of the example.
    system: system text of the example.
    conversations: LLaVA or OpenAI style list of messages; wins over the fields below.
    question: a text, or a list of them.
    answer: a text, or a list: as many as questions, or several answers to one (the first counts).
    prompt: the question of rows without a `question` field (captions).
  """

  image: str | None = 'image'
  id: str | None = None
  conversations: str | None = None
  question: str | None = None
  answer: str | None = None
  prompt: str = ''
  system: str | None = None

  def check(self, found: Sequence[str], where: str, *, what: str) -> None:
    """Raises:
      UserError: fields that are not among those found.
    """
    wanted = (self.image, self.id, self.conversations, self.question, self.answer,
              self.system)
    if missing := [name for name in wanted if name and name not in found]:
      raise UserError(f'{where}: has no {what} {missing}; found {list(found)}')


def box_of(row: Row) -> Sequence[float] | None:
  """The region of a row, (x0, y0, x1, y1) in pixels of its image; None: it names none.

  Raises:
    BadRow: what it names is no region.
  """
  box = row.extra.get('box')
  if box is None:
    return None
  numbers = isinstance(box, list | tuple) and len(box) == 4 and all(
    isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9 for v in box)
  if not numbers or box[0] > box[2] or box[1] > box[3]:
    raise BadRow('form', row.where, f'box {str(box)[:80]}: expected [x0, y0, x1, y1] in pixels of '
                                    'the image, x0 <= x1 and y0 <= y1')
  return box


def question_answers(questions: Any, answers: Any) -> list[tuple[str, str]]:
  """Pairs of one or several questions and their answers.

  Raises:
    UserError: they do not fit each other.
  """
  questions = [questions] if isinstance(questions, str) else list(questions)
  answers = [answers] if isinstance(answers, str) else list(answers)
  if len(questions) == 1:
    answers = answers[:1]
  if not questions or len(questions) != len(answers):
    raise UserError(f'{len(questions)} questions and {len(answers)} answers do not fit')
  if any(not isinstance(text, str) for text in [*questions, *answers]):
    raise UserError('a question or an answer is not a text')
  return list(zip(questions, answers, strict=True))


def conversation(entries: Any, images: Any) -> tuple[list[Message], list[Any], str | None]:
  """(messages, the images of the row in their order, its system text) of a list of messages in
  LLaVA's, OpenAI's or HF's form.

  Text that names its images with `<image>` is left as it is. Images that are parts of the content
  stand in front of their question, as in LLaVA's data; a bare part takes the next of `images`. An
  empty name is no image.

  Args:
    images: what the row names beside its messages: None, one, or several.

  Raises:
    UserError: entries of another form, all of them named; parts and images of different numbers.
  """
  named = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
  named = [image for image in named if not _is_blank(image)]
  text_alone = lambda entry: not isinstance(entry, Mapping) or (
    isinstance(entry.get('content', entry.get('value')), str)
    and known_role(entry.get('role', entry.get('from'))) != SYSTEM)
  if isinstance(entries, list) and all(map(text_alone, entries)):
    return messages_from_llava(entries), named, None
  found = turns(entries)
  system = '\n'.join(turn.text for turn in found if turn.role == SYSTEM)
  spoken = [turn for turn in found if turn.role != SYSTEM]
  parts = [image for turn in spoken for image in turn.images]
  bare = sum(image is None for image in parts)
  if parts and bare != len(named):
    raise UserError(f'{bare} image parts have no image of their own, but the row names '
                    f'{len(named)}')
  given = iter(named)
  later = any(turn.images for turn in spoken[1:])
  messages = []
  for turn in spoken:
    # Where only the first question has images, the template puts its placeholders.
    messages.append(Message(turn.role, f'{IMAGE}\n' * (len(turn.images) if later else 0)
                            + turn.text))
  found_images = [next(given) if image is None else image for image in parts] if parts else named
  return messages, found_images, system or None


def _is_blank(image: Any) -> bool:
  """Whether it says that there is no image, as rows of text do in mixed data sets."""
  if isinstance(image, Mapping):
    return image.keys() <= {'bytes', 'path', 'url'} and image.get('bytes') is None and not (
      image.get('path') or image.get('url'))
  return image is None or (isinstance(image, str) and not image.strip())


def named_images(values: Mapping[str, Any]) -> Any:
  """What a row says under `image`, or under `images` where that is empty."""
  return next((values[key] for key in ('image', 'images')
               if values.get(key) not in (None, '', [])), None)


def system_text(*texts: Any) -> str | None:
  """The system texts of a row (its own field, its messages) as one; None: there is none.

  Raises:
    UserError: one that is no text.
  """
  if wrong := [text for text in texts if text is not None and not isinstance(text, str)]:
    raise UserError(f'has a system text of {type(wrong[0]).__name__}, expected text')
  return '\n'.join(text for text in texts if text and text.strip()) or None


def check_media(values: Mapping[str, Any], messages: Sequence[Message], images: Sequence[ImageRef],
                where: str) -> None:
  """Text that speaks of a video, of sound or of a missing image is not learned alone.

  Raises:
    BadRow: of kind 'video', 'audio' or 'form'.
  """
  empty = next((key for key in ('image', 'images') if key in values), None)
  if empty and not images and any(IMAGE in m.text for m in messages if m.role == USER):
    raise BadRow('form', where, f'has the placeholder {IMAGE} and an empty {empty!r}; name the '
                 'image, or take the placeholder out')
  for kind in ('video', 'audio'):
    named = next((key for key in (kind, f'{kind}s') if _is_given(values.get(key))), None)
    mark = f'<{kind}>'
    # On a line of its own; a question about HTML closes it again.
    marked = any(mark in map(str.strip, message.text.splitlines())
                 and f'</{kind}>' not in message.text for message in messages
                 if message.role == USER)
    if named or marked:
      raise BadRow(kind, where, f'has {f"a {named!r}" if named else f"the placeholder {mark}"}; '
                   'only images and text are read: give its frames as images, or leave the row out')


def _is_given(value: Any) -> bool:
  """Whether a field names something (also as arrays of a table have it)."""
  if isinstance(value, (list, tuple)):
    return any(item not in (None, '', []) for item in value)
  return bool(value) if isinstance(value, (str, bytes, Mapping)) else value is not None

def answered(value: Mapping[str, Any]) -> list[Message] | None:
  """The messages of {'question', 'answer' or 'answers'}; of several answers the first is taught.

  None where there is no question of this form.
  """
  asked, told = value.get('question'), value.get('answer', value.get('answers'))
  told = told[0] if isinstance(told, list) and told else told
  if not isinstance(asked, str) or isinstance(told, (dict, list)) or told is None:
    return None
  return [Message(USER, asked), Message(ASSISTANT, str(told))]


def image_refs(value: Any, folder: str | None, where: str) -> tuple[ImageRef, ...]:
  """Images of a table's field, in any of the forms that `Fields.image` allows.

  Raises:
    UserError: none of those forms, or a path without an image folder.
  """
  if value is None:
    return ()
  values = value if isinstance(value, Sequence) and not isinstance(
    value, (str, bytes)) else [value]
  refs = []
  for index, item in enumerate(item for item in values if not _is_blank(item)):
    name = f'image {index} of {where}'
    data, path = (item.get('bytes'), item.get('path')) if isinstance(item, Mapping) else (
      (item, None) if isinstance(item, bytes) else (None, item))
    if isinstance(path, str) and path[:5].lower() == 'data:':
      data, path = _decoded(path), None
    if data is not None:
      refs.append(ImageRef(path or name, data=data))
    elif isinstance(path, str) and folder is not None:
      refs.append(ImageRef(path, folder=folder, path=path))
    elif isinstance(path, str):
      raise UserError(f'image {path!r} is a path, but no image folder is given')
    else:
      raise UserError(f'image {index} is {type(item).__name__}, expected a file name or bytes')
  return tuple(refs)


def _decoded(url: str) -> bytes:
  """The bytes of `data:image/png;base64,...`."""
  head, comma, body = url.partition(',')
  try:
    if comma and head.lower().endswith(';base64'):
      return base64.b64decode(''.join(body.split()), validate=True)
  except ValueError as error:
    raise UserError(f'an image is a data URL that is not base64 ({error})') from error
  raise UserError(f'an image is a data URL {head[:40]!r}, expected data:image/...;base64,...')
