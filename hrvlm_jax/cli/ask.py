"""`hrvlm ask`: see `vlm.answer.Answerer`."""

import ast
from collections.abc import Sequence
import pathlib
import sys
from typing import Any

from hrvlm_jax.cli.arguments import Parser
from hrvlm_jax.core.errors import UserError

_PREFIX = '--encoder.'


def main(argv: list[str]) -> int:
  """Answers a question about one image or several."""
  argv, options = encoder_options(argv)
  parser = Parser('ask', main.__doc__ + ' --encoder.KEY=VALUE sets a knob of the system '
                  '(max_crops, num_tokens, ...).')
  parser.add_argument('--checkpoint', required=True, help='checkpoint or work directory of a run')
  parser.add_argument('image', nargs='+', help='image files, in the order of the question')
  parser.add_argument('question')
  parser.add_argument('--overlay', metavar='OUT.png',
                      help='also draw what the model looked at on the (first) image')
  parser.add_argument('--max-new-tokens', type=int, default=128)
  parser.add_argument('--temperature', type=float, default=0.0, help='0 is greedy')
  parser.add_argument('--top-k', type=int, default=0)
  parser.add_argument('--top-p', type=float, default=1.0)
  parser.add_argument('--beams', type=int, default=1)
  parser.add_argument('--seed', type=int, default=0, help='for a temperature above 0')
  parser.add_argument('--exif', choices=('apply', 'ignore'), default='apply',
                      help='turn photographs upright as their EXIF block says, or not')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  arguments = parser.parse(argv)
  if not arguments.question.strip():
    raise UserError('the question is empty; write it in quotes after the image')
  check_overlay(arguments.overlay)

  from hrvlm_jax.core.images import open_image

  # Images first: a bad file is known before a large checkpoint is read.
  images = [open_image(path, exif=arguments.exif) for path in arguments.image]
  import jax

  from hrvlm_jax.vlm.answer import Answerer

  answerer = Answerer.load(arguments.checkpoint, dtype=jax.numpy.dtype(arguments.dtype),
                           exif=arguments.exif, encoder_options=options)
  sampling = dict(max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature,
                  top_k=arguments.top_k, top_p=arguments.top_p, beams=arguments.beams)
  try:
    if arguments.temperature or arguments.beams > 1:
      print(answerer.answer([(images, arguments.question)], key=jax.random.key(arguments.seed),
                            **sampling)[0])
    else:
      for piece in answerer.stream(images, arguments.question, **sampling):
        print(piece, end='', flush=True)
      print()
  except ValueError as error:  # settings that contradict each other
    raise UserError(str(error)) from error
  if arguments.overlay:
    answerer.overlay(images[0], arguments.question).save(arguments.overlay)
    print(f'drawn: {arguments.overlay}', file=sys.stderr)
  return 0


def encoder_options(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
  """Takes `--encoder.KEY=VALUE` out of the arguments; values are Python literals or texts."""
  rest, options = [], {}
  for argument in argv:
    if not argument.startswith(_PREFIX):
      rest.append(argument)
      continue
    key, equals, text = argument.removeprefix(_PREFIX).partition('=')
    if not equals or not key:
      raise UserError(f'{argument}: expected {_PREFIX}KEY=VALUE')
    try:
      options[key] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      options[key] = {'true': True, 'false': False, 'none': None}.get(text.lower(), text)
  return rest, options


def check_overlay(path: str | None) -> None:
  """Refuses an overlay file that could not be written, before any work is done."""
  if path is None:
    return
  target = pathlib.Path(path)
  if target.suffix.lower() not in ('.png', '.jpg', '.jpeg', '.webp'):
    raise UserError(f'--overlay {path}: expected a name that ends in .png, .jpg or .webp')
  if not target.parent.is_dir():
    raise UserError(f'--overlay {path}: the folder {target.parent} does not exist')
