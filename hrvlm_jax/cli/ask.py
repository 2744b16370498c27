"""`hrvlm ask` and `hrvlm encode`: see `vlm.answer.Answerer` and `vlm.encode.ImageEncoder`."""

import ast
from collections.abc import Sequence
import contextlib
import json
import pathlib
import re
import sys
from typing import Any

from hrvlm_jax.cli import questions
from hrvlm_jax.cli.arguments import (
  Parser,
  add_penalties,
  add_reading,
  add_weights,
  penalties_of,
  reading_of,
  say_weights,
)
from hrvlm_jax.core.errors import UserError

KNOBS = (
  '--encoder.KEY=VALUE sets a knob of the system (max_crops, num_tokens, ...). --vicrop looks '
  'again at a crop that the attention chose (--vicrop.layer=14); --fastv drops visual tokens after '
  'some layers (--fastv.layer=2 --fastv.ratio=0.5); --prune merges or selects visual tokens '
  '(--prune.method=tome --prune.keep=0.5); --shrink scales every image to --shrink.side=224 first; '
  'see vlm/vicrop.py, fastv.py, prune.py and shrink.py.')
NAMES = ('encoder', 'fastv', 'prune', 'vicrop', 'shrink')


def main(argv: list[str]) -> int:
  """Answers a question about one image or several, about each of a folder, or a file of them."""
  argv, knobs = take_knobs(argv)
  parser = Parser('ask', f'{main.__doc__} {KNOBS}')
  parser.add_argument('--checkpoint', required=True,
                      help="checkpoint, work directory of a run, folder in an original's layout, "
                      'or a name on the hub (owner/name@revision)')
  parser.add_argument('words', nargs='*', metavar='IMAGE ... "QUESTION"',
                      help='images in the order of the question (files, - for standard input, '
                      'addresses with --urls), none for a question of text, and the question last; '
                      "a folder or a quoted pattern ('*.png') asks about each of its images")
  parser.add_argument('--questions', metavar='FILE.jsonl',
                      help='a JSON object per line, {"image": ..., "question": ...} or '
                      '{"messages": [...]}; - for standard input')
  parser.add_argument('--images', metavar='DIR',
                      help='with --questions: where its images are; default: beside the file')
  parser.add_argument('--json', action='store_true', help='print one JSON object per answer')
  parser.add_argument('--out', metavar='FILE.jsonl',
                      help='also keep the answers there; run again, what is there stays')
  parser.add_argument('--batch-size', type=int, default=8,
                      help='of many questions, so many at a time')
  questions.add_urls(parser)
  parser.add_argument('--overlay', metavar='OUT.png',
                      help='also draw what the model looked at on the (first) image')
  parser.add_argument('--max-new-tokens', type=int, default=128)
  parser.add_argument('--temperature', type=float, default=0.0, help='0 is greedy')
  parser.add_argument('--top-k', type=int, default=0)
  parser.add_argument('--top-p', type=float, default=1.0)
  add_penalties(parser)
  parser.add_argument('--beams', type=int, default=1)
  parser.add_argument('--seed', type=int, default=0, help='for a temperature above 0')
  add_reading(parser, exif=True)
  add_weights(parser)
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  parser.add_mesh()
  parser.add_processes()
  arguments = parser.parse(argv)
  questions.words_of(arguments)
  check_overlay(arguments.overlay)
  if arguments.overlay and not arguments.image:
    raise UserError('--overlay draws on an image; there is none')
  sampling = dict(max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature,
                  top_k=arguments.top_k, top_p=arguments.top_p, beams=arguments.beams,
                  seed=arguments.seed, **penalties_of(arguments))
  from hrvlm_jax.parallel import distributed, fate

  several = distributed.initialize(
    arguments.distributed, coordinator=arguments.coordinator,
    num_processes=arguments.num_processes, process_id=arguments.process_id)
  with fate.shared(parser.prog):
    if questions.is_many(arguments):
      if several:
        raise UserError('several processes answer one question (ask) or a benchmark (eval); ask '
                        'many questions in one process')
      return questions.main(arguments, knobs, sampling)
    quiet = several and not distributed.is_main()
    with contextlib.redirect_stdout(None) if quiet else contextlib.nullcontext():
      return _one(arguments, knobs, sampling, write=not quiet)


def _one(arguments, knobs, sampling, *, write: bool) -> int:
  """Answers one question; on several processes all compute and one writes."""
  # Images first: a bad file is known before a large checkpoint is read.
  reading = reading_of(arguments)
  images = [questions.picture_of(word, urls=questions.urls_of(arguments), **reading)
            for word in arguments.image]
  import hrvlm_jax

  say_weights(arguments.checkpoint, arguments.weights)
  model = hrvlm_jax.load(arguments.checkpoint, dtype=arguments.dtype, **reading,
                         encoder=knobs.pop('encoder', None), methods=knobs, mesh=arguments.mesh,
                         weights=arguments.weights)
  answer = ''
  if arguments.beams > 1 or arguments.json:
    answer = model.ask(images, arguments.question, **sampling)
    print(json.dumps({'question': arguments.question, 'answer': answer}, ensure_ascii=False)
          if arguments.json else answer)
  else:
    for piece in model.stream(images, arguments.question, **sampling):
      answer += piece
      print(piece, end='', flush=True)
    print()
  if write and not answer.strip():
    print('the answer is empty: the model ended at once', file=sys.stderr)
  if arguments.overlay:
    picture = model.overlay(images[0], arguments.question)
    if write:
      save_picture(picture, arguments.overlay)
      print(f'drawn: {arguments.overlay}', file=sys.stderr)
  return 0


def encode(argv: list[str]) -> int:
  """Runs a vision encoder alone on one image and prints the shape of its tokens."""
  argv, knobs = take_knobs(argv, ('encoder',))
  parser = Parser('encode', encode.__doc__ + ' --encoder.KEY=VALUE sets a knob of the system, for '
                  "example --encoder.look=\"{'looks': 2}\".")
  parser.add_argument('--checkpoint', required=True, help='checkpoint or work directory of a run')
  parser.add_argument('image', help='image file')
  parser.add_argument('--prompt', help='text that says where to look (PS3); default: by saliency')
  parser.add_argument('--overlay', metavar='OUT.png', help='draw what was looked at, per scale')
  parser.add_argument('--out', metavar='OUT.npy', help='write the tokens, float32 [n d]')
  add_reading(parser, exif=True)
  add_weights(parser)
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  arguments = parser.parse(argv)
  check_overlay(arguments.overlay)
  if arguments.out is not None:
    out = pathlib.Path(arguments.out)
    if out.suffix != '.npy' or not out.parent.is_dir():
      raise UserError(f'--out {out}: expected a name that ends in .npy in an existing folder')

  from hrvlm_jax.core.images import open_image

  image = open_image(arguments.image, **reading_of(arguments))  # before a checkpoint is read
  import numpy as np

  from hrvlm_jax.core.execution import Execution
  from hrvlm_jax.vlm.encode import ImageEncoder

  say_weights(arguments.checkpoint, arguments.weights)
  encoder = ImageEncoder.load(arguments.checkpoint, prompted=arguments.prompt is not None,
                              encoder_options=knobs.get('encoder'), weights=arguments.weights)
  tokens = encoder(image, arguments.prompt, ex=Execution(dtype=arguments.dtype))
  values = np.asarray(tokens.values[0], np.float32)[np.asarray(tokens.valid[0])]
  print(f'{values.shape[0]} tokens of width {values.shape[1]}')
  if arguments.out is not None:
    from hrvlm_jax.checkpoint.files import whole_file

    with whole_file(arguments.out) as part:
      np.save(part, values)
    print(f'written: {arguments.out}')
  if arguments.overlay:
    save_picture(encoder.overlay(image, tokens), arguments.overlay)
    print(f'drawn: {arguments.overlay}')
  return 0


def take_knobs(argv: Sequence[str], names: Sequence[str] = NAMES
               ) -> tuple[list[str], dict[str, dict[str, Any]]]:
  """Takes `--NAME` and `--NAME.KEY=VALUE` out of the arguments, for the names of `names`.

  Returns:
    The other arguments, and name -> settings, of the names that were given; values are Python
    literals or texts.

  Raises:
    UserError: a key without a value.
  """
  rest: list[str] = []
  knobs: dict[str, dict[str, Any]] = {}
  for argument in argv:
    name, dot, setting = argument.removeprefix('--').partition('.')
    if not argument.startswith('--') or name not in names or (name == 'encoder' and not dot):
      rest.append(argument)
      continue
    options = knobs.setdefault(name, {})
    if not dot:
      continue
    key, equals, text = setting.partition('=')
    if not equals or not key:
      raise UserError(f'{argument}: expected --{name}.KEY=VALUE')
    if re.fullmatch(r'\d+(\+\d+)+', text):  # as VILA-HD's SELECT_NUM_EACH_SCALE is written
      options[key] = tuple(map(int, text.split('+')))
      continue
    try:
      options[key] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      options[key] = {'true': True, 'false': False, 'none': None}.get(text.lower(), text)
  return rest, knobs


def save_picture(picture, path: str) -> None:
  """Writes a picture, whole or not at all."""
  from hrvlm_jax.checkpoint.files import whole_file

  with whole_file(path) as part:
    picture.save(part)


def check_overlay(path: str | None) -> None:
  """Refuses an overlay file that could not be written, before any work is done."""
  if path is None:
    return
  target = pathlib.Path(path)
  if target.suffix.lower() not in ('.png', '.jpg', '.jpeg', '.webp'):
    raise UserError(f'--overlay {path}: expected a name that ends in .png, .jpg or .webp')
  if not target.parent.is_dir():
    raise UserError(f'--overlay {path}: the folder {target.parent} does not exist')
