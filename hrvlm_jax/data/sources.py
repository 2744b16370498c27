"""Sources: random access to the rows of a data set.

A source has a length, gives `Row`s by index (or raises `BadRow` for that one row) and can be sent
to worker processes: it holds paths and offsets, and opens its files where it is used. Tables
(parquet, ArrayRecord, TFDS) are in `data/tables.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from hrvlm_jax.core import json_text
from hrvlm_jax.core.config import from_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data import arrow, mixture, tables
from hrvlm_jax.data.rows import (
  BadRow,
  Fields,
  ImageRef,
  Row,
  Source,
  answered,
  check_media,
  conversation,
  image_refs,
  inside,
  named_images,
  system_text,
)
from hrvlm_jax.data.unchanged import Unchanged
from hrvlm_jax.language.chat import ASSISTANT, IMAGE, USER, Message

_SYSTEM = ('system', 'system_prompt')
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.avif')


class InMemory:
  """Rows that are there already."""

  def __init__(self, rows: Iterable[Row]):
    self._rows = tuple(rows)

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index):
    return self._rows[index]


class LlavaJson:
  """LLaVA style conversations: a JSON array, or JSON lines.

  A row is {"id", "image": path or list of paths (optional), "conversations":
  [{"from": "human" | "gpt", "value"}]}, or has "messages" in OpenAI's or Hugging Face's form
  (`rows.conversation`), or "question" and "answer"; a "system" text takes the place of the
  template's. Other fields are kept in `extra`. Only offsets
  are held in memory, so that a file of a gigabyte costs a worker process a few megabytes.

  Args:
    path: the file.
    images: folder that image paths are relative to; default: the folder of the file.

  Raises:
    UserError: missing or empty file, JSON that breaks between rows (with line and column).
  """

  def __init__(self, path: str | os.PathLike, images: str | os.PathLike | None = None):
    self.path = os.fspath(path)
    self.images = os.fspath(images if images is not None else pathlib.Path(path).parent)
    if not os.path.isfile(self.path):
      raise UserError(f'{self.path}: no such file')
    if not os.path.isdir(self.images):
      raise UserError(f'{self.images}: no such image folder')
    self._unchanged = Unchanged([self.path])
    data = pathlib.Path(self.path).read_bytes()
    if data[:2] in (b'\xff\xfe', b'\xfe\xff'):
      raise UserError(f'{self.path}: is UTF-16 text, expected UTF-8')
    start = 3 if data.startswith(b'\xef\xbb\xbf') else 0
    if not data[start:].strip():
      raise UserError(f'{self.path}: the file is empty, expected a JSON array or JSON lines')
    if data[start:].lstrip().startswith(b'['):
      self._spans = _array_spans(data, start, self.path)
    else:
      self._spans = _line_spans(data, start)
    self._opened: dict[str, Any] = {}

  def __len__(self):
    return len(self._spans)

  def where(self, index: int) -> str:
    """File, row and line of a row."""
    return f'{self.path}, row {index} (line {self._spans[index, 2]})'

  def __getitem__(self, index):
    file = self._opened.get(self.path)
    if file is None:
      self._unchanged.check()
      # Kept open, closed with the object. Threads that come here together all keep the first one's:
      # a file that another replaces would be closed while it is read.
      file = self._opened.setdefault(self.path, open(self.path, 'rb'))  # noqa: SIM115
    begin, end, _ = self._spans[index].tolist()
    # No map: a file that is cut while it is mapped ends the process with a bus error.
    data = os.pread(file.fileno(), end - begin, begin)
    self._unchanged.check([self.path], file.fileno())
    return llava_row(data, self.where(index), self.images)

  def __getstate__(self):
    return self.__dict__ | {'_opened': {}}


def llava_row(data: bytes, where: str, images: str) -> Row:
  """The row of one JSON object in LLaVA's form.

  Raises:
    BadRow: of kind 'encoding', 'json', 'form' or 'path'.
  """
  try:
    value = json_text.loads(data.decode('utf-8'))
  except UnicodeDecodeError as error:
    raise BadRow('encoding', where, f'is not UTF-8 text ({error.reason})') from error
  except (ValueError, RecursionError) as error:
    raise BadRow('json', where, f'not valid JSON ({error})') from error
  if not isinstance(value, dict):
    raise BadRow('form', where, f'is {type(value).__name__}, expected an object')
  turns, asked = value.get('conversations') or value.get('messages'), answered(value)
  if turns in (None, []) and asked is not None:
    turns = [{'role': message.role, 'content': message.text} for message in asked]
  if not isinstance(turns, list) or not turns:
    raise BadRow('form', where, "has no 'conversations', expected a list of messages (or "
                 "'messages', or 'question' and 'answer')")
  names = named_images(value)
  try:
    messages, found, system = conversation(turns, names)
    system = system_text(*(value.get(key) for key in _SYSTEM), system)
  except UserError as error:
    raise BadRow('form', where, str(error)) from error
  names = found
  if any(not isinstance(name, str) for name in names):
    raise BadRow('form', where, "has an 'image' that is neither a path nor a list of paths")
  try:
    for name in names:
      if name[:5].lower() != 'data:':
        inside(images, name)
    refs = image_refs(names or None, images, where)
  except UserError as error:
    raise BadRow('path', where, str(error)) from error
  check_media(value, messages, refs, where)
  extra = {key: value[key] for key in value
           if key not in ('id', 'image', 'images', 'conversations', 'messages', *_SYSTEM)
           and (asked is None or key not in ('question', 'answer'))}
  return Row(str(value.get('id', '')), refs, tuple(messages), where, extra, system)


def _array_spans(data: bytes, start: int, path: str) -> np.ndarray:
  """[rows, 3] begin, end, line of the elements of a JSON array.

  JSON's own signs are ASCII, so Latin-1, one character per byte, finds the borders of any file; the
  text of a row is decoded when the row is read.
  """
  text = data.decode('latin-1')
  decoder = json.JSONDecoder()
  place = text.index('[', start) + 1
  spans, line, counted = [], 1, 0

  def skip(place: int) -> int:
    while place < len(text) and text[place] in ' \t\r\n':
      place += 1
    return place

  def fail(place: int, what: str) -> UserError:
    row, column = data.count(b'\n', 0, place) + 1, place - data.rfind(b'\n', 0, place)
    return UserError(f'{path}: line {row} column {column}: {what} (after {len(spans)} rows)')

  place = skip(place)
  if text[place:place + 1] == ']':
    raise UserError(f'{path}: the JSON array has no rows')
  while True:
    try:
      _, end = decoder.raw_decode(text, place)
    except ValueError as error:
      at = getattr(error, 'pos', place)
      raise fail(at, f'not valid JSON ({getattr(error, "msg", error)})') from error
    except RecursionError as error:
      raise fail(place, 'JSON nested too deeply') from error
    line += data.count(b'\n', counted, place)
    counted = place
    spans.append((place, end, line))
    place = skip(end)
    if text[place:place + 1] == ']':
      break
    if text[place:place + 1] != ',':
      raise fail(place, "not valid JSON (expected ',' or ']' after a row)")
    place = skip(place + 1)
  if text[skip(place + 1):]:
    raise fail(place + 1, 'more text after the end of the JSON array')
  return np.array(spans, np.int64)


def _line_spans(data: bytes, start: int) -> np.ndarray:
  """[rows, 3] begin, end, line of the lines that are not blank."""
  spans, place, line = [], start, 1
  while place < len(data):
    end = data.find(b'\n', place)
    end = len(data) if end < 0 else end
    if data[place:end].strip():
      spans.append((place, end, line))
    place, line = end + 1, line + 1
  return np.array(spans, np.int64)


class ImageFolder:
  """Images of a folder and its sub-folders in the order of their names; links out are left out.

  A text file beside an image (`a.jpg`, `a.txt`) is its caption: the answer to `prompt`, or to the
  image alone.

  Args:
    folder: where the images are.
    prompt: question of every row; '' gives images without a caption no messages (to encode, to ask
      about).

  Raises:
    UserError: no such folder, or no image in it.
  """

  def __init__(self, folder: str | os.PathLike, *, prompt: str = ''):
    self.folder, self.prompt = os.fspath(folder), prompt
    if not os.path.isdir(self.folder):
      raise UserError(f'{self.folder}: no such folder')
    root = pathlib.Path(self.folder)
    self._names = sorted(
      path.relative_to(root).as_posix() for path in root.rglob('*')
      if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    self._names = [name for name in self._names if self._is_inside(name)]
    if not self._names:
      raise UserError(f'{self.folder}: has no images ({", ".join(IMAGE_SUFFIXES)})')

  def _is_inside(self, name: str) -> bool:
    try:
      return bool(inside(self.folder, name))
    except UserError:
      return False

  def __len__(self):
    return len(self._names)

  def __getitem__(self, index):
    name = self._names[index]
    where = os.path.join(self.folder, name)
    messages: Sequence[Message] = (Message(USER, self.prompt),) if self.prompt else ()
    caption = pathlib.Path(where).with_suffix('.txt')
    if caption.is_file():
      try:
        answer = Message(ASSISTANT, caption.read_text('utf-8').strip())
      except UnicodeDecodeError as error:
        raise BadRow('encoding', where, f'{caption.name} is not UTF-8 text') from error
      messages = (Message(USER, self.prompt or IMAGE), answer)
    ref = ImageRef(name, folder=self.folder, path=name)
    return Row(name, (ref,), tuple(messages), where)


def open_source(path: str | os.PathLike, *, images: str | os.PathLike | None = None,
                split: str | None = None, fields: Fields | None = None) -> Source:
  """The data set at a path; what is there decides how it is read.

  | path | source |
  | --- | --- |
  | `*.mixture.json` | the mixture of the data sets it lists (see `open_mixture`) |
  | `*.json`, `*.jsonl` | `LlavaJson` |
  | `*.parquet`, `*.array_record*` (or a pattern) | `Parquet`, `ArrayRecords` |
  | folder with shards of these | the same |
  | folder that `datasets` saved (state.json, dataset_dict.json) | `arrow.Arrow` (split train) |
  | folder with dataset_info.json | `Tfds` (split train) |
  | folder with data/*.parquet (a clone from the hub) | `Parquet` (split train) |
  | folder with one JSON of records (the built-in task writes one) | `LlavaJson` |
  | folder with images | `ImageFolder` |

  Args:
    images: folder that image paths are relative to; default: the folder of the file.
    split: of a data set that has several (TFDS: also 'train[:10%]'); default: train.
    fields: which column of a table is what; default: by the usual names.

  Raises:
    UserError: nothing there, or nothing of these kinds; a split or fields of a set without.
  """
  path = os.fspath(path)
  options = {name: value for name, value in (('split', split), ('fields', fields))
             if value is not None}
  source = _opened(path, images, options)
  if options:  # nobody has taken them
    known = 'TFDS, a folder that datasets saved, a clone from the hub'
    raise UserError(f'{path}: {" and ".join(options)} belong to tables (split: {known}; fields: '
                    'those and parquet); leave them out')
  return source


def _opened(path: str, images, options: dict[str, Any]) -> Source:
  """See `open_source`; the options that a source has taken are removed."""
  taken = lambda *names: {name: options.pop(name) for name in names if name in options}
  if path.endswith('.mixture.json'):
    return open_mixture(path, images=images)
  if path.endswith(('.json', '.jsonl', '.ndjson')):
    return LlavaJson(path, images)
  if '.parquet' in os.path.basename(path):
    return tables.Parquet(path, images=images, **taken('fields'))
  if '.array_record' in os.path.basename(path):
    return tables.ArrayRecords(path)
  if not os.path.exists(path):
    raise UserError(f'{path}: no such file or folder; expected LLaVA JSON, parquet, ArrayRecord, a '
                    'TFDS data set or a folder of images')
  if not os.path.isdir(path):
    raise UserError(f'{path}: is of no known kind; expected a name with .json, .jsonl, .parquet or '
                    '.array_record')
  names = sorted(os.listdir(path))
  if arrow.is_saved(path):
    return arrow.Arrow(path, images=images, **taken('split', 'fields'))
  if (pattern := arrow.cloned(path, options.get('split'))) is not None:
    taken('split')
    return tables.Parquet(pattern, images=images, **taken('fields'))
  if 'dataset_info.json' in names:
    return tables.Tfds(path, **taken('split', 'fields'))
  if any('.array_record' in name for name in names):
    return tables.ArrayRecords(path)
  if any('.parquet' in name for name in names):
    return tables.Parquet(path, images=images, **taken('fields'))
  records = [name for name in names if name.endswith(('.json', '.jsonl')) and name != 'task.json']
  if len(records) > 1:
    raise UserError(f'{path}: has several record files {records}; name one of them')
  if records:
    return LlavaJson(os.path.join(path, records[0]), images)
  return ImageFolder(path)


def open_mixture(path: str | os.PathLike, *, images: str | os.PathLike | None = None) -> Source:
  """A mixture described by a JSON file.

  {"parts": [{"path": "a.json", "images": "folder", "amount": 1000, "weight": null,
  "format": {"suffix": "...", "turns": 1, "prompts": []}, "split": "train",
  "fields": {"answer": "caption"}}], "size": null, "seed": 0}; only "path"
  is needed. With "published": a name of `mixture.MIXTURES`, "parts" gives {"name", "path",
  "images"} of its data sets. Paths are relative to the file.

  Raises:
    UserError: an unknown or mistyped key (with its path), or a data set that cannot be opened.
  """
  path = pathlib.Path(path)
  try:
    values = json_text.loads(path.read_text('utf-8'))
  except OSError as error:
    raise UserError(f'{path}: no such file') from error
  except ValueError as error:
    raise UserError(f'{path}: not valid JSON ({error})') from error
  file = from_dict(mixture.MixtureFile, values, title=str(path))
  shares = [dataclasses.replace(part, name=part.name or str(index))
            for index, part in enumerate(file.parts)]
  sources = {part.name: open_source(path.parent / part.path,
                                    images=path.parent / part.images if part.images else images,
                                    split=part.split, fields=part.fields)
             for part in shares}
  if file.published:
    return mixture.published_mixture(file.published, sources, seed=file.seed)
  return mixture.mix(shares, sources, size=file.size, seed=file.seed)
