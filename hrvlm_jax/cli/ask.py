"""`hrvlm ask`: see `vlm.answer.Answerer`."""

import sys

from hrvlm_jax.cli.answering import KNOBS, check_overlay, take_knobs
from hrvlm_jax.cli.arguments import Parser
from hrvlm_jax.core.errors import UserError


def main(argv: list[str]) -> int:
  """Answers a question about one image or several."""
  argv, knobs = take_knobs(argv)
  parser = Parser('ask', f'{main.__doc__} {KNOBS}')
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

  from hrvlm_jax.core.execution import Execution
  from hrvlm_jax.vlm.answer import Answerer

  answerer = Answerer.load(arguments.checkpoint, ex=Execution(dtype=arguments.dtype),
                           exif=arguments.exif, encoder_options=knobs.pop('encoder', None),
                           methods=knobs)
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
