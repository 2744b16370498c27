"""`hrvlm ask` with many questions: a file of them, or one about each of several images."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import sys
from typing import Any

from hrvlm_jax.cli.arguments import reading_of, say_weights
from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError


def words_of(arguments) -> None:
  """Splits the words of the command line into `arguments.image` and `arguments.question`.

  Raises:
    UserError: no question, a question beside `--questions`, options that belong to the other form.
  """
  words = arguments.words
  many = arguments.questions is not None
  if many and words:
    raise UserError(f'{words[0]!r}: --questions has its images and questions in the file')
  if many and arguments.overlay:
    raise UserError('--overlay draws for one question; leave --questions or --overlay out')
  if not many and arguments.images is not None:
    raise UserError('--images belongs to --questions FILE')
  arguments.image, arguments.question = words[:-1], words[-1] if words else ''
  if many:
    return
  if not words:
    raise UserError('there is no question; hrvlm ask --checkpoint DIR photo.png "What is this?"')
  if not arguments.question.strip():
    raise UserError('the question is empty; write it in quotes after the image')
  if len(words) == 1 and (os.path.exists(words[0]) or words[0].lower().endswith(
      ('.png', '.jpg', '.jpeg', '.webp'))):
    raise UserError(f'{words[0]}: is an image; write the question in quotes after it')


def is_many(arguments) -> bool:
  """Whether several questions are asked, one after the other."""
  from hrvlm_jax.front.images import spread

  arguments.each = spread(arguments.image) if arguments.image else None
  if arguments.each is None and arguments.out is not None and arguments.questions is None:
    arguments.each = [arguments.image] if arguments.image else [None]
  return arguments.questions is not None or arguments.each is not None


def main(arguments, knobs: dict[str, dict[str, Any]], settings: dict[str, Any]) -> int:
  """Answers all of them; status 1 when some could not be asked."""
  from hrvlm_jax.front.questions import Answered, answer_lines

  if arguments.overlay:
    raise UserError('--overlay draws for one image; give one')
  if arguments.batch_size < 1:
    raise UserError(f'--batch-size {arguments.batch_size}: expected at least 1')
  folder, lines = _lines(arguments)
  about = {'checkpoint': os.path.abspath(arguments.checkpoint), 'knobs': knobs,
           'settings': settings, 'dtype': arguments.dtype, 'exif': arguments.exif,
           'alpha': arguments.alpha, 'weights': arguments.weights}
  kept = None
  if arguments.out is not None:
    kept = Answered(arguments.out, about)
    listed = list(lines)  # a file of answers is held against all of its questions
    kept.check(kept.key(*line) for line in listed)
    lines = iter(listed)

  import hrvlm_jax

  say_weights(arguments.checkpoint, arguments.weights)
  model = hrvlm_jax.load(arguments.checkpoint, dtype=arguments.dtype, **reading_of(arguments),
                         encoder=knobs.get('encoder'), urls=urls_of(arguments), mesh=arguments.mesh,
                         weights=arguments.weights,
                         methods={name: knob for name, knob in knobs.items() if name != 'encoder'})
  counts = {'asked': 0, 'wrong': 0, 'empty': 0, 'before': 0}
  texts: dict[int, str] = {}

  def todo() -> Iterator[tuple[int, str]]:
    for number, text in lines:
      if kept is not None and kept.key(number, text) in kept.done:
        counts['before'] += 1
        continue
      texts[number] = text
      yield number, text

  for record in answer_lines(model, todo(), folder=folder, batch_size=arguments.batch_size,
                             settings=settings):
    text = texts.pop(record['line'])
    counts['asked'] += 1
    counts['wrong'] += 'error' in record
    counts['empty'] += record.get('answer') == ''
    if arguments.questions is None:
      record = {'image': json_text.loads(text)['image']} | record
    if kept is not None:
      kept.append(record | {'key': kept.key(record['line'], text)})
    _show(record, as_json=arguments.json)
  return _told(counts)


def _show(record: dict[str, Any], *, as_json: bool) -> None:
  if as_json:
    print(json.dumps(record, ensure_ascii=False), flush=True)
  elif 'error' in record:
    print(f'hrvlm ask: line {record["line"]}: {record["error"]}', file=sys.stderr, flush=True)
  else:
    image = record.get('image')
    head = f'{" ".join(image) if isinstance(image, list) else image}: ' if image else ''
    print(head + ' '.join(record['answer'].splitlines()), flush=True)


def _told(counts: dict[str, int]) -> int:
  """What is said at the end, on standard error; the exit status."""
  if counts['before']:
    print(f'{counts["before"]} were answered before', file=sys.stderr)
  if counts['empty']:
    print(f'{counts["empty"]} of {counts["asked"]} answers are empty: the model ended at once',
          file=sys.stderr)
  if counts['wrong']:
    print(f'{counts["wrong"]} of {counts["asked"]} lines could not be asked', file=sys.stderr)
  return 1 if counts['wrong'] else 0


def _lines(arguments) -> tuple[str, Iterator[tuple[int, str]]]:
  """(folder of the images, (number, text) of every line that is not blank)."""
  if arguments.questions is None:
    asked = [json.dumps({'image': image, 'question': arguments.question}, ensure_ascii=False)
             for image in arguments.each]
    return '.', iter(list(enumerate(asked, 1)))
  source = arguments.questions
  if source != '-' and not os.path.isfile(source):
    raise UserError(f'--questions {source}: no such file; expected JSON lines such as '
                    '{"image": "a.png", "question": "What?"}, or - for standard input')
  folder = arguments.images or (os.path.dirname(source) if source != '-' else '') or '.'
  if not os.path.isdir(folder):
    raise UserError(f'--images {folder}: no such folder')

  def read() -> Iterator[tuple[int, str]]:
    place = contextlib.nullcontext(sys.stdin) if source == '-' else open(  # noqa: SIM115
      source, encoding='utf-8-sig', errors='replace')
    with place as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          yield number, line.strip()

  return folder, read()


def add_urls(parser) -> None:
  """`--urls` and `--private-urls`."""
  parser.add_argument('--urls', action='store_true',
                      help='images may be http(s) addresses of the public internet')
  parser.add_argument('--private-urls', action='store_true',
                      help='also addresses of this machine and its own network')


def urls_of(arguments) -> bool | str:
  """What `hrvlm_jax.load` takes as `urls`."""
  return 'private' if arguments.private_urls else arguments.urls


def picture_of(word: str, *, urls: bool | str, **reading):
  """The image of a word of the command line; `-` is standard input.

  Raises:
    UserError: no image.
  """
  from hrvlm_jax.front.images import as_image

  if word == '-' and not pathlib.Path('-').exists():
    return as_image(sys.stdin.buffer.read(), name='standard input', **reading)
  return as_image(word, urls=urls, **reading)
