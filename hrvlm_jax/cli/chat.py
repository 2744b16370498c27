"""`hrvlm chat`: a conversation in the terminal; see `front.model.Chat`."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
import shlex
import sys

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
from hrvlm_jax.cli.ask import KNOBS, check_overlay, save_picture, take_knobs
from hrvlm_jax.core.errors import UserError, unknown

COMMANDS = {
  '/image': 'PATH ...: images of the next question (or write the paths in front of it)',
  '/overlay': '[OUT.png]: draw what the model looked at in the last image (default: overlay.png)',
  '/system': '[TEXT]: another system text, and a new conversation; without a text: the own one',
  '/history': 'what was said so far',
  '/new': 'forget turns and images',
  '/help': 'these lines',
  '/quit': 'end (as do end of file and Ctrl-D)',
}
OVERLAY = 'overlay.png'


def main(argv: list[str]) -> int:
  """A conversation about images; it remembers what was said.

  Every line is a question; image files in front of it belong to it. Lines that begin with / are
  commands, /help lists them. Works with piped lines, too.
  """
  argv, knobs = take_knobs(argv)
  parser = Parser('chat', f'{main.__doc__} {KNOBS}')
  parser.add_argument('--checkpoint', required=True,
                      help="checkpoint, work directory of a run, folder in an original's layout, "
                      'or a name on the hub (owner/name@revision)')
  parser.add_argument('image', nargs='*', help='images of the first question')
  parser.add_argument('--system', metavar='TEXT', help="in place of the template's system text")
  parser.add_argument('--max-new-tokens', type=int, default=512)
  parser.add_argument('--temperature', type=float, default=0.0, help='0 is greedy')
  parser.add_argument('--top-k', type=int, default=0)
  parser.add_argument('--top-p', type=float, default=1.0)
  add_penalties(parser)
  parser.add_argument('--seed', type=int, default=0, help='for a temperature above 0')
  add_reading(parser, exif=True)
  add_weights(parser)
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  questions.add_urls(parser)
  arguments = parser.parse(argv)

  from hrvlm_jax.front.images import as_image

  reading = reading_of(arguments) | dict(urls=questions.urls_of(arguments))
  images = [as_image(word, **reading) for word in arguments.image]
  import hrvlm_jax

  encoder = knobs.pop('encoder', None)
  say_weights(arguments.checkpoint, arguments.weights)
  model = hrvlm_jax.load(arguments.checkpoint, dtype=arguments.dtype, encoder=encoder,
                         methods=knobs, weights=arguments.weights, **reading)
  settings = dict(max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature,
                  top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed,
                  **penalties_of(arguments))
  model.check(settings)
  talk = Terminal(model.chat(system=arguments.system), settings, images,
                  lambda word: as_image(word, **reading))
  by_hand = sys.stdin.isatty()
  if by_hand:
    print(f'{model!r}\n/help lists the commands', file=sys.stderr)
  return talk.run(_lines(by_hand), by_hand=by_hand)


def _lines(by_hand: bool) -> Iterator[str]:
  if not by_hand:
    yield from sys.stdin
    return
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401 - arrow keys and history of `input`
  with contextlib.suppress(EOFError):
    while True:
      yield input('> ')


class Terminal:
  """Lines in, answers out.

  Args:
    chat: `front.model.Chat`.
    images: of the next question.
    opened: path or address -> image.
  """

  def __init__(self, chat, settings, images, opened):
    self.chat, self.settings, self.opened = chat, settings, opened
    self.images = list(images)

  def run(self, lines: Iterator[str], *, by_hand: bool) -> int:
    """Until the lines end or /quit; status 1 when a piped line could not be done."""
    failed = False
    for line in lines:
      line = line.strip()
      if not line:
        continue
      try:
        if line == '/quit':
          break
        if line.startswith('/') and not self._is_image(_first(line)[0]):
          self.command(line)
        else:
          self.ask(line)
      except UserError as error:
        failed = True
        print(f'hrvlm chat: {error}', file=sys.stderr, flush=True)
      except KeyboardInterrupt:
        if not by_hand:
          raise
        print('\n(stopped; this turn is not kept)', file=sys.stderr)
    return 1 if failed and not by_hand else 0

  def ask(self, line: str) -> None:
    """A question, with the images in front of it."""
    named = []
    while line and self._is_image(_first(line)[0]):
      word, line = _first(line)
      named.append(word)
    images = self.images + [self.opened(word) for word in named]
    if not line:
      self.images = images
      print(f'{len(images)} image(s) for the next question', file=sys.stderr)
      return
    said = False
    for piece in self.chat.stream(line, images, **self.settings):
      print(piece, end='', flush=True)
      said = said or bool(piece.strip())
    print(flush=True)
    self.images = []
    if not said:
      print('the answer is empty: the model ended at once', file=sys.stderr)

  def command(self, line: str) -> None:
    """A line that begins with /.

    Raises:
      UserError: unknown, or it cannot be done.
    """
    name, _, rest = line.partition(' ')
    rest = rest.strip()
    if name not in COMMANDS:
      raise UserError(f'{unknown(name, COMMANDS, what="command")}; /help lists them')
    if name == '/help':
      print('\n'.join(f'{command:<9} {what}' for command, what in COMMANDS.items()))
    elif name == '/image':
      try:
        words = shlex.split(rest)
      except ValueError as error:
        raise UserError(f'/image: {error}') from error
      if not words:
        raise UserError('/image: name a file, such as /image photo.png')
      self.images += [self.opened(word) for word in words]
      print(f'{len(self.images)} image(s) for the next question', file=sys.stderr)
    elif name == '/overlay':
      target = rest or OVERLAY
      check_overlay(target)
      save_picture(self.chat.overlay(self.images[-1] if self.images else None), target)
      print(f'drawn: {target}')
    elif name == '/system':
      self.chat.clear()
      self.chat.system = rest or None
    elif name == '/new':
      self.chat.clear()
      self.images = []
    elif name == '/history':
      for message in self.chat.messages:
        parts = message['content']
        if not isinstance(parts, str):
          parts = ' '.join(part.get('text', '[image]') for part in parts)
        print(f'{message["role"]}: {parts}')

  @staticmethod
  def _is_image(word: str) -> bool:
    suffixes = ('.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.avif')
    return word.lower().endswith(suffixes) and (os.path.isfile(word) or '://' in word)


def _first(line: str) -> tuple[str, str]:
  """(first word, the rest); a word may stand in quotes, as a terminal drops a file."""
  for quote in '"\'':
    if line.startswith(quote) and quote in line[1:]:
      word, _, rest = line[1:].partition(quote)
      return word, rest.strip()
  word, _, rest = line.partition(' ')
  return word, rest.strip()
