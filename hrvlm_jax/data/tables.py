"""Sources for tables: parquet (Hugging Face style), ArrayRecord shards, TFDS data sets.

`rows.Fields` says which column is what. Files are opened where rows are read, so a source can be
sent to worker processes. TFDS is read through `data_source`, without TensorFlow: images must be
stored encoded, as TFDS does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
import glob
import os
import threading
from typing import Any

import numpy as np

from hrvlm_jax.checkpoint.files import cause, whole_file
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.rows import (
  BadRow,
  Fields,
  Row,
  check_media,
  conversation,
  decode_record,
  image_refs,
  question_answers,
  system_text,
)
from hrvlm_jax.data.unchanged import DataChanged, Unchanged
from hrvlm_jax.language.chat import ASSISTANT, USER, Message

_CACHED_GROUPS = 2  # row groups of a parquet file held decoded, per process


def table_row(values: Mapping[str, Any], fields: Fields, folder: str | None, where: str) -> Row:
  """The row of one entry of a table.

  Raises:
    BadRow: of kind 'encoding', 'form' or 'path'.
  """
  try:
    values = {key: _text(value) if key != fields.image else value for key, value in values.items()}
  except UnicodeDecodeError as error:
    raise BadRow('encoding', where, f'holds text that is not UTF-8 ({error.reason})') from error
  try:
    images = values.get(fields.image) if fields.image else None
    system = values.get(fields.system) if fields.system else None
    if fields.conversations and values.get(fields.conversations):
      messages, images, said = conversation(values[fields.conversations], images)
      system = system_text(system, said)
    elif fields.answer and values.get(fields.answer) is not None:
      asked = values.get(fields.question) if fields.question else fields.prompt
      messages = [Message(role, text) for pair in question_answers(asked, values[fields.answer])
                  for role, text in zip((USER, ASSISTANT), pair)]
    else:
      asked = values.get(fields.question) if fields.question else fields.prompt
      messages = [Message(USER, asked)] if isinstance(asked, str) and asked else []
    refs, system = image_refs(images, folder, where), system_text(system)
  except UserError as error:
    raise BadRow('form', where, str(error)) from error
  check_media(values, messages, refs, where)
  name = values.get(fields.id, '') if fields.id else ''
  known = {fields.image, fields.id, fields.conversations, fields.question, fields.answer,
           fields.system}
  extra = {key: value for key, value in values.items() if key not in known}
  return Row(str(name), refs, tuple(messages), where, extra, system)


def guess_fields(names: Sequence[str]) -> Fields:
  """Fields of a table by the usual names of its columns."""
  first = lambda *known: next((name for name in known if name in names), None)
  return Fields(
    image=first('image', 'images', 'jpg', 'png'), id=first('id', 'question_id', 'image_id'),
    conversations=first('conversations', 'messages', 'conversation'),
    question=first('question', 'questions', 'prompt'),
    answer=first('answer', 'answers', 'caption', 'captions', 'text'),
    prompt='Describe the image.', system=first('system', 'system_prompt'))


def _text(value: Any) -> Any:
  if isinstance(value, bytes):
    return value.decode('utf-8')
  if isinstance(value, np.ndarray):
    return _text(value.tolist())
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, list):
    return [_text(item) for item in value]
  return value


def find_files(pattern: str | os.PathLike, suffix: str) -> list[str]:
  """Files of a path, a folder (its files that contain `suffix`) or a pattern, by name.

  Raises:
    UserError: there is none.
  """
  pattern = os.fspath(pattern)
  if os.path.isdir(pattern):
    found = [os.path.join(pattern, name) for name in sorted(os.listdir(pattern)) if suffix in name]
  else:
    found = sorted(glob.glob(pattern)) or ([pattern] if os.path.isfile(pattern) else [])
  if not found:
    raise UserError(f'{pattern}: no {suffix} file found')
  return found


class Parquet:
  """Rows of parquet files in Hugging Face style (images as {'bytes', 'path'}).

  A row group is read and decoded as a whole; the last ones are kept. Shuffled access to large row
  groups is slow: write such sets as ArrayRecord (`write_records`).

  Args:
    pattern: file, folder or pattern of files.
    fields: which column is what; None: by the usual names (`guess_fields`).
    images: folder for images stored as paths.

  Raises:
    UserError: no file, not parquet, or a named column is missing.
  """

  def __init__(self, pattern: str | os.PathLike, fields: Fields | None = None, *,
               images: str | os.PathLike | None = None):
    self.images = None if images is None else os.fspath(images)
    self.paths = find_files(pattern, '.parquet')
    if fields is None:
      fields = guess_fields(_parquet_file(self.paths[0]).schema_arrow.names)
    self.fields = fields
    self._unchanged = Unchanged(self.paths)
    groups = []  # file, group, first row of the group in the file, first row of the group at all
    total = 0
    for number, path in enumerate(self.paths):
      file = _parquet_file(path)
      self.fields.check(file.schema_arrow.names, path, what='columns')
      first = total
      for group in range(file.num_row_groups):
        groups.append((number, group, total - first, total))
        total += file.metadata.row_group(group).num_rows
      file.close()
    self._groups = np.array(groups, np.int64).reshape(-1, 4)
    self._size = total
    self._reset()

  def _reset(self):
    self._cache: OrderedDict[int, Any] = OrderedDict()
    self._lock = threading.Lock()

  def __len__(self):
    return self._size

  def __getitem__(self, index):
    if not 0 <= index < self._size:
      raise IndexError(index)
    at = int(np.searchsorted(self._groups[:, 3], index, side='right')) - 1
    number, group, offset, first = self._groups[at].tolist()
    where = f'{self.paths[number]}, row {offset + index - first}'
    table = self._read(at, number, group)
    values = {name: table[name][index - first].as_py() for name in table.column_names}
    return table_row(values, self.fields, self.images, where)

  def _read(self, at: int, number: int, group: int):
    import pyarrow.parquet as pq

    with self._lock:
      if at not in self._cache:
        while len(self._cache) >= _CACHED_GROUPS:
          self._cache.popitem(last=False)
        path = self.paths[number]
        self._unchanged.check([path])
        with self._unchanged.reading([path]), pq.ParquetFile(path) as file:
          self._cache[at] = file.read_row_group(group)
      self._cache.move_to_end(at)
      return self._cache[at]

  def __getstate__(self):
    return {key: value for key, value in self.__dict__.items() if key not in ('_cache', '_lock')}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._reset()


def _parquet_file(path: str):
  import pyarrow as pa
  import pyarrow.parquet as pq

  try:
    return pq.ParquetFile(path)
  except (pa.ArrowInvalid, OSError) as error:
    raise UserError(f'{path}: is not a parquet file ({error})') from error


class ArrayRecords:
  """Rows of ArrayRecord shards written by `write_records`: self-contained, checksummed.

  Args:
    pattern: file, folder or pattern of files.

  Raises:
    UserError: no file, or not ArrayRecord.
  """

  def __init__(self, pattern: str | os.PathLike):
    self.paths = find_files(pattern, '.array_record')
    self._reader = None
    self._unchanged = Unchanged(self.paths)
    try:
      self._size = len(self._open())
    except (RuntimeError, ValueError, OSError) as error:
      raise UserError(f'{pattern}: is not ArrayRecord ({str(error).splitlines()[0]})') from error
    self._reader = None

  def _open(self):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    if self._reader is None:
      self._unchanged.check()
      self._reader = ArrayRecordDataSource(self.paths)
    return self._reader

  def __len__(self):
    return self._size

  def __getitem__(self, index):
    where = f'{os.path.dirname(self.paths[0])}, record {index}'
    try:
      with self._unchanged.reading():
        record = self._open()[index]
    except DataChanged:
      raise
    except (RuntimeError, ValueError) as error:
      raise BadRow('checksum', where, f'cannot be read ({error})') from error
    return decode_record(record, where)

  def __getstate__(self):
    return self.__dict__ | {'_reader': None}


class Tfds:
  """Rows of a TFDS data set prepared as ArrayRecord, read without TensorFlow.

  Args:
    folder: the version folder of the data set (with dataset_info.json and features.json).
    split: for example 'train', 'train[:10%]'.
    fields: which feature is what; None: by the usual names (`guess_fields`).

  Raises:
    UserError: not a prepared data set, not ArrayRecord, no such split or feature.
  """

  def __init__(self, folder: str | os.PathLike, fields: Fields | None = None, *,
               split: str = 'train'):
    self.folder, self.split, self.fields = os.fspath(folder), split, fields
    self._source = None
    try:
      self._size = len(self._open())
    except UserError:
      raise
    except Exception as error:  # TFDS raises many kinds
      raise UserError(f'{self.folder}: cannot be read as a TFDS data set with split {split!r} '
                      f'({str(error).splitlines()[0] if str(error) else type(error).__name__})'
                      ) from error
    self._source = None

  def _open(self):
    if self._source is None:
      import tensorflow_datasets as tfds

      builder = tfds.builder_from_directory(self.folder)
      if self.fields is None:
        self.fields = guess_fields(list(builder.info.features))
      fields = self.fields
      fields.check(sorted(builder.info.features), self.folder, what='features')
      decoders = {fields.image: tfds.decode.SkipDecoding()} if fields.image else None
      self._source = builder.as_data_source(self.split, decoders=decoders)
    return self._source

  def __len__(self):
    return self._size

  def __getitem__(self, index):
    where = f'{self.folder}, {self.split}, record {index}'
    values = dict(self._open()[index])
    name = self.fields.conversations
    if name and isinstance(values.get(name), Mapping):
      # TFDS gives a sequence of objects as an object of sequences.
      columns = values[name]
      values[name] = [dict(zip(columns, item)) for item in zip(*map(_text, columns.values()))]
    return table_row(values, self.fields, None, where)

  def __getstate__(self):
    return self.__dict__ | {'_source': None}


def write_records(path: str | os.PathLike, records: Sequence[bytes]) -> None:
  """Writes records (of `rows.encode_record`) as one ArrayRecord file, readable one by one.

  The file appears under its name only when it is complete.

  Raises:
    UserError: it cannot be written (a full disk, a missing permission).
  """
  from array_record.python.array_record_module import ArrayRecordWriter

  with whole_file(path) as part:
    try:
      writer = ArrayRecordWriter(os.fspath(part), 'group_size:1')
      for record in records:
        writer.write(record)
      writer.close()
    except RuntimeError as error:  # of its native code, with the words of the operating system
      said = cause(error) or ' '.join(str(error).split())[:200]
      raise UserError(f'cannot write {os.fspath(path)}: {said}') from error
