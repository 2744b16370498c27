"""Many questions to one model: lines of a file in, a record for each out, in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.text import whole
from hrvlm_jax.front.images import is_address
from hrvlm_jax.front.model import Item, Model
from hrvlm_jax.language.messages import turns

Record = dict[str, Any]


def read_line(text: str) -> Mapping[str, Any]:
  """A question as JSON: {"question", "image" or "images", "id"} or {"messages", ...}.

  Raises:
    UserError: not JSON, or nothing of these.
  """
  try:
    value = json_text.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f'is not JSON ({error})') from error
  if not isinstance(value, dict):
    raise UserError(f'is {type(value).__name__}, expected an object such as '
                    '{"image": "a.png", "question": "What?"}')
  messages = value.get('messages', value.get('conversations'))
  if (messages is None) == (value.get('question') is None):
    raise UserError('needs either "question" or "messages"' if messages is None else
                    'has both "question" and "messages"; expected one of them')
  return value | {'messages': messages}


def item_of(value: Mapping[str, Any], model: Model, folder: str | os.PathLike) -> Item:
  """What is asked by a line.

  Args:
    folder: paths of images are relative to it.

  Raises:
    UserError: images that cannot be used, messages of another form.
  """
  named = value.get('image', value.get('images'))
  images = [] if named is None else named if isinstance(named, list) else [named]
  inside = lambda image: os.path.join(folder, image) if isinstance(image, str) and not (
      image[:5].lower() == 'data:' or is_address(image)) else image
  images = [inside(image) for image in images]
  if value['messages'] is None:
    if not isinstance(value['question'], str):
      raise UserError(f'"question" is {type(value["question"]).__name__}, expected text')
    return model.item(images, value['question'])
  # The images that messages bring are relative to the same folder.
  said = [{'role': turn.role, 'content': [
    *({'type': 'image', 'image': inside(image)} for image in turn.images),
    {'type': 'text', 'text': turn.text}]} for turn in turns(value['messages'])]
  return model.item(images, said)


def answer_lines(model: Model, lines: Iterable[tuple[int, str]], *, folder: str | os.PathLike = '.',
                 batch_size: int = 8, settings: Mapping[str, Any] | None = None
                 ) -> Iterator[Record]:
  """A record for each line: {'line', 'id', 'question', 'answer'} or {'line', 'error'}.

  Lines are answered `batch_size` at a time, each as soon as another is complete; the records come
  in the order of the lines. A line that cannot be asked has its error and stops no other.

  Args:
    lines: (number, text), read as there is room for them.
    settings: as of `Model.ask`.

  Raises:
    UserError: settings that do not exist.
  """
  settings = dict(settings or {})
  model.check(settings)
  records: deque[Record] = deque()  # those that are not given back yet
  open_: dict[int, Record] = {}

  def asked() -> Iterator[tuple[int, Callable[[], Item]]]:
    for place, (number, text) in enumerate(lines):
      record: Record = {'line': number}
      records.append(record)
      try:
        value = read_line(text)
      except UserError as error:
        record['error'] = str(error)
        continue
      record |= {key: value[key] for key in ('id', 'question') if value.get(key) is not None}
      open_[place] = record
      yield place, functools.partial(item_of, value, model, folder)

  for place, answer in model._each(asked(), batch_size, settings):
    open_.pop(place).update({'error': str(answer)} if isinstance(answer, UserError)
                            else {'answer': answer})
    while records and records[0].keys() & {'answer', 'error'}:
      yield records.popleft()
  yield from records


class Answered:
  """A file of records, one JSON per line, that a run which is started again goes on with.

  Every record carries a `key` of its line and of what decides the answer; a file that holds others
  belongs to another run.

  Args:
    path: the file, made if absent; a last line that was not written to its end is dropped.
    about: what decides an answer beside the line: checkpoint, knobs, settings.

  Raises:
    UserError: a file that holds something else.
  """

  def __init__(self, path: str | os.PathLike, about: Mapping[str, Any]):
    self.path, self._about = pathlib.Path(path), json.dumps(about, sort_keys=True, default=str)
    self.done: dict[str, Record] = {}
    whole = b''
    if self.path.exists():
      data = self.path.read_bytes()
      whole = data[:data.rfind(b'\n') + 1]
      for number, line in enumerate(whole.splitlines(), 1):
        try:
          record = json_text.loads(line)
          self.done[record['key']] = record
        except (ValueError, KeyError, TypeError) as error:
          raise UserError(f'{path}, line {number}: is no record of hrvlm ask; choose another file'
                          ) from error
      if len(whole) < len(data):
        with open(self.path, 'r+b') as file:
          file.truncate(len(whole))
    elif not self.path.parent.is_dir():
      raise UserError(f'{path}: the folder {self.path.parent} does not exist')

  def key(self, number: int, text: str) -> str:
    """The key of a line."""
    # Half a character is refused as a question; here it only needs a name.
    content = f'{number}\n{text}\n{self._about}'.encode(errors='surrogatepass')
    return hashlib.sha256(content).hexdigest()[:16]

  def check(self, keys: Iterable[str]) -> None:
    """Refuses a file with records of other lines, another model or other settings.

    Raises:
      UserError: it holds some.
    """
    strange = self.done.keys() - set(keys)
    if strange:
      raise UserError(f'{self.path}: {len(strange)} of its {len(self.done)} records belong to '
                      'other lines, another model or other settings; choose another file')

  def append(self, record: Record) -> None:
    """Writes one record to its end."""
    with open(self.path, 'a', encoding='utf-8') as file:
      file.write(whole(json.dumps(record, ensure_ascii=False)) + '\n')
