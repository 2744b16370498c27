"""What the verbs share that let a model answer: settings of its encoder and of its methods."""

import ast
from collections.abc import Sequence
import pathlib
from typing import Any

from hrvlm_jax.core.errors import UserError

KNOBS = (
  '--encoder.KEY=VALUE sets a knob of the system (max_crops, num_tokens, ...). --vicrop looks '
  'again at a crop that the attention chose (--vicrop.layer=14); --fastv drops visual tokens after '
  'some layers (--fastv.layer=2 --fastv.ratio=0.5); see vlm/vicrop.py and vlm/fastv.py.')
NAMES = ('encoder', 'fastv', 'vicrop')


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
    try:
      options[key] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      options[key] = {'true': True, 'false': False, 'none': None}.get(text.lower(), text)
  return rest, knobs


def check_overlay(path: str | None) -> None:
  """Refuses an overlay file that could not be written, before any work is done."""
  if path is None:
    return
  target = pathlib.Path(path)
  if target.suffix.lower() not in ('.png', '.jpg', '.jpeg', '.webp'):
    raise UserError(f'--overlay {path}: expected a name that ends in .png, .jpg or .webp')
  if not target.parent.is_dir():
    raise UserError(f'--overlay {path}: the folder {target.parent} does not exist')
