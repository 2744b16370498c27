"""Command-line arguments whose mistakes are one sentence, and the `--config` options.

Nothing here imports JAX or reads a config; see `training.run_config` for the latter.
"""

import argparse
from collections.abc import Sequence
import os
import sys
from typing import Any, NoReturn

from hrvlm_jax import __version__
from hrvlm_jax.cli.examples import EXAMPLES
from hrvlm_jax.core.errors import UserError, unknown

_PREFIX = '--config.'
_READERS = ('checkpoint', 'checkpoints', 'workdir')  # options whose files have checksums
PROBE = '--probe\0'  # no user can type it: `cli.completion` asks a verb for its options


class Probed(Exception):
  """The parser of a verb, in answer to `PROBE`."""

  def __init__(self, parser: argparse.ArgumentParser):
    super().__init__(parser.prog)
    self.parser = parser


class _Help(argparse.HelpFormatter):
  """Text that begins with 'example' keeps its lines."""

  def _fill_text(self, text: str, width: int, indent: str) -> str:
    return text if text.startswith('example') else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
  """An argparse parser whose mistakes are `UserError`s and which never guesses abbreviations.

  With `config=True` it also takes `--config FILE.py[:arg]` (or a recipe's name) and
  `--config.a.b=value`: `parse(argv)` then has `config` (the text after `--config`, or None) and
  `overrides` (pairs of key and text), for `training.run_config.load`.
  """

  def __init__(self, verb: str, description: str, *, config: bool = False,
               config_required: bool = True):
    example = EXAMPLES.get(verb)
    super().__init__(prog=f'hrvlm {verb}', description=description, allow_abbrev=False,
                     formatter_class=_Help,
                     epilog=None if example is None else f'example:\n  {example}')
    self.add_argument('--version', action='version', version=f'hrvlm_jax {__version__}',
                      help='say which, and end')
    self._takes_config = config
    if config:
      self.add_argument(
          '--config', metavar='FILE.py[:ARG]', required=config_required,
          help='run config: a Python file with get_config(), or the name of a recipe '
               '(pheye:x2_448,stage1); --config.KEY=VALUE changes a key')

  def add_mesh(self) -> None:
    """Adds `--mesh`: `arguments.mesh` is {axis: size} or None."""
    self.add_argument('--mesh', type=axes, metavar='AXIS=SIZE,...',
                      help='how devices share the work: data (copies), fsdp (parameters spread), '
                      'tensor (heads cut), sequence, dcn_data (slices); such as data=8,fsdp=16. '
                      'What is left goes to data. Default: of the config, else the smallest that '
                      'fits')

  def add_processes(self) -> None:
    """Adds the options by which several processes become one program (`join`)."""
    group = self.add_argument_group('several processes (found out by itself on TPU and Slurm)')
    group.add_argument('--distributed', choices=('auto', 'on', 'off'), default='auto')
    group.add_argument('--coordinator', metavar='HOST:PORT',
                       help='of process 0; on several hosts set the same secret text on all as '
                       'HRVLM_RUN_TOKEN, by which those who are missing can be named')
    group.add_argument('--num-processes', type=int)
    group.add_argument('--process-id', type=int)

  def parse(self, argv: Sequence[str]) -> argparse.Namespace:
    """Parses `argv`.

    Raises:
      UserError: unknown (with the nearest known one) or missing arguments.
    """
    if '--no-verify' not in self._option_string_actions and any(
        action.option_strings and action.dest in _READERS for action in self._actions):
      self.add_argument('--no-verify', action='store_true',
                        help='read checkpoints without checking the checksums of their files')
    if PROBE in argv:
      raise Probed(self)
    self._check_names(argv)
    overrides: list[tuple[str, str]] = []
    if self._takes_config:
      argv, overrides = split_overrides(argv)
    arguments = self.parse_args(list(argv))
    if getattr(arguments, 'no_verify', False):
      os.environ['HRVLM_VERIFY'] = '0'  # for worker processes as well; `checkpoint.manifest`
    if self._takes_config:
      if arguments.config is None and overrides:
        raise UserError(f'--config.{overrides[0][0]} needs a run config; add --config FILE.py')
      arguments.overrides = overrides
    return arguments

  def _check_names(self, argv: Sequence[str]) -> None:
    """Names a misspelt option, before what else is missing because of it."""
    known = self._option_string_actions
    if any(action.nargs == argparse.REMAINDER for action in self._actions):
      return
    for argument in argv:
      if argument == '--':
        return
      name = argument.partition('=')[0]
      if name in known or not name.startswith('--') or any(mark in name for mark in ' \n') or (
          self._takes_config and name.startswith(_PREFIX)):
        continue
      raise UserError(f'{unknown(name, [n for n in known if n.startswith("--")], what="option")}; '
                      f'see {self.prog} --help')

  def error(self, message: str) -> NoReturn:
    raise UserError(f'{message}; see {self.prog} --help')


def axes(text: str) -> dict[str, int]:
  """`data=8,fsdp=16` -> {'data': 8, 'fsdp': 16}."""
  try:
    pairs = [(name.strip(), int(value)) for name, value in
             (part.split('=') for part in text.split(','))]
  except ValueError:
    raise argparse.ArgumentTypeError(
      f"found '{text}', expected AXIS=SIZE,... such as data=8,fsdp=16,tensor=2") from None
  names = [name for name, _ in pairs]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise argparse.ArgumentTypeError(f"found '{text}': {', '.join(twice)} is there twice")
  return dict(pairs)


def add_reading(parser: argparse.ArgumentParser, *, exif: bool = False) -> None:
  """`--alpha`, `--max-pixels` and, where asked, `--exif`: how image files are opened (see
  `core.images.open_image`)."""
  if exif:
    parser.add_argument('--exif', choices=('apply', 'ignore'), default='apply',
                        help='turn photographs upright as their EXIF block says, or not')
  parser.add_argument('--alpha', choices=('drop', 'white'), default='drop',
                      help='put transparent pictures on a white page, or forget transparency')
  parser.add_argument('--max-pixels', type=_positive, default=178_956_970, metavar='N',
                      help='refuse larger images, before they are decoded (default: %(default)s; '
                      'one takes up to 7 bytes a pixel while it is read)')


def reading_of(arguments: argparse.Namespace) -> dict[str, Any]:
  """The options of `add_reading` that were added, for `open_image`."""
  return {key: getattr(arguments, key) for key in ('exif', 'alpha', 'max_pixels')
          if hasattr(arguments, key)}


def add_weights(parser: argparse.ArgumentParser) -> None:
  """`--weights`: which parameters of a training are taken (`checkpoint.averages`)."""
  parser.add_argument(
    '--weights', choices=('raw', 'ema'),
    help='of a training with optimizer.ema: ema, the moving average of the parameters (the default '
         'where there is one, as in-run evaluation judges it), or raw, those of the last step')


def say_weights(checkpoint: str, weights: str | None) -> None:
  """Says on standard error which parameters of a training are taken, where there is a choice."""
  from hrvlm_jax.checkpoint import averages, layout

  folder = layout.to_path(checkpoint)
  ours = folder.is_dir() and ((layout.beside(folder) / layout.MARKER).exists()
                              or (folder / layout.STEPS).is_dir())
  if ours and (said := averages.which(checkpoint, weights)[1]):
    print(said, file=sys.stderr)


def add_penalties(parser: argparse.ArgumentParser, *, drawn: bool = True) -> None:
  """`--repetition-penalty`, `--no-repeat-ngram-size` and, where tokens may be drawn, `--min-p` (see
  `language.sampling`)."""
  if drawn:
    parser.add_argument('--min-p', type=float, metavar='P',
                        help='of a temperature above 0: leave out tokens less likely than this '
                        'share of the likeliest (default: 0)')
  parser.add_argument('--repetition-penalty', type=float, metavar='X',
                      help='logits of tokens that were written are divided by it '
                      "(default: the model's generation_config.json, else 1)")
  parser.add_argument('--no-repeat-ngram-size', type=int, metavar='N',
                      help='no sequence of so many tokens is written twice '
                      "(default: the model's generation_config.json, else 0: off)")


def penalties_of(arguments: argparse.Namespace) -> dict[str, Any]:
  """The options of `add_penalties` that were given, as fields of `Sampling`."""
  names = ('min_p', 'repetition_penalty', 'no_repeat_ngram_size')
  return {name: value for name in names if (value := getattr(arguments, name, None)) is not None}


def read_seed(text: str) -> int:
  """A seed as `RunConfig` takes it."""
  if not text.isdecimal() or int(text[:40]) >= 1 << 32:
    raise argparse.ArgumentTypeError(f'found {text[:40]!r}, expected a whole number from 0 to '
                                     f'{(1 << 32) - 1}')
  return int(text)


def _positive(text: str) -> int:
  number = int(text)
  if number < 1:
    raise argparse.ArgumentTypeError(f'{text}: expected at least 1')
  return number


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
  """Separates `--config.KEY=VALUE` and `--config.KEY VALUE` from the other arguments.

  Returns:
    The remaining arguments, and (key path, text) pairs in order.

  Raises:
    UserError: an override without a value.
  """
  rest, overrides = [], []
  arguments = iter(argv)
  for argument in arguments:
    if argument == '--':
      rest += [argument, *arguments]
    elif not argument.startswith(_PREFIX):
      rest.append(argument)
    else:
      key, equals, text = argument.removeprefix(_PREFIX).partition('=')
      if not equals:
        text = next(arguments, None)
        if text is None:
          raise UserError(f'{argument} has no value; write {argument}=VALUE')
      overrides.append((key, text))
  return rest, overrides
