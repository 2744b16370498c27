"""`hrvlm needle`: see `lab.needle.write`, and `lab.needle.sheet` for contact sheets."""

import argparse
import pathlib

from hrvlm_jax.cli.arguments import Parser, read_seed
from hrvlm_jax.core.errors import UserError

PRESETS = ('tiny', 'panorama', 'square', 'medium', 'one_k', 'four_k')
TASKS = ('needle', 'relate', 'page')


def main(argv: list[str]) -> int:
  """Writes a built-in reading task: OUT/train and OUT/eval, each LLaVA JSON with its images."""
  parser = Parser('needle', main.__doc__)
  parser.add_argument('--task', choices=TASKS, default='needle',
                      help='needle: the text of one sign; relate: signs by where things stand; '
                      'page: words by their order')
  parser.add_argument('--preset', choices=PRESETS, default='panorama')
  parser.add_argument('--out', default='runs/needle', help='folder of both parts')
  parser.add_argument('--train', type=int, default=4000, help='training images')
  parser.add_argument('--eval', type=int, default=500, help='evaluation images')
  parser.add_argument('--turns', type=int, help='questions per training image; default: 3, or as '
                      'many as the task has')
  parser.add_argument('--cues', metavar='NAME,...', help='what may decide between the readings of '
                      'a question: tint,weather,scene (page: tint,scene), or none; default: needle '
                      'none, others all')
  parser.add_argument('--areas', metavar='LOW,HIGH', type=_areas, help='smallest and largest '
                      "area of a text, relative to the canvas; default: the preset's")
  parser.add_argument('--photographs', metavar='FOLDER', help='your pictures as backgrounds')
  parser.add_argument('--documents', metavar='FILE.pdf', help='page: your PDF file, or a folder of '
                      'such, instead of made pages')
  parser.add_argument('--sheet', metavar='FILE.png', help='write only a contact sheet: pictures '
                      'with questions, answers and boxes')
  parser.add_argument('--tables', metavar='FILE.md', help='only put the tables of all tasks '
                      'between the marks of a Markdown file')
  parser.add_argument('--seed', type=read_seed, default=0)
  arguments = parser.parse(argv)

  from hrvlm_jax.lab.needle import NeedleConfig, write

  if arguments.tables:
    return _tables(pathlib.Path(arguments.tables))
  if arguments.photographs and not pathlib.Path(arguments.photographs).is_dir():
    raise UserError(f'--photographs {arguments.photographs}: no such folder')
  if arguments.documents and not pathlib.Path(arguments.documents).exists():
    raise UserError(f'--documents {arguments.documents}: no such file or folder')
  options = {key: value for key in ('photographs', 'documents')
             if (value := getattr(arguments, key))}
  if arguments.areas:
    options['relative_area'] = arguments.areas
  if arguments.cues is not None:
    none = arguments.cues in ('', 'none')
    options['cues'] = () if none else tuple(arguments.cues.split(','))
  preset = lambda turns: getattr(NeedleConfig, arguments.preset)(
    arguments.task, turns=turns, **options)
  out, single = pathlib.Path(arguments.out), preset(1)
  if arguments.sheet:
    return _sheet(pathlib.Path(arguments.sheet), single, arguments.seed)
  turns = min(3, single.most_turns) if arguments.turns is None else arguments.turns
  parts = (('train', arguments.train, turns, arguments.seed),
           ('eval', arguments.eval, 1, arguments.seed + 1))
  for name, count, asked, seed in parts:
    path = write(preset(asked), out / name, count, seed=seed)
    print(f'written: {path}')
  return 0


def _areas(text: str) -> tuple[float, float]:
  """Two numbers, for argparse."""
  try:
    low, high = (float(part) for part in text.split(','))
  except ValueError:
    raise argparse.ArgumentTypeError(
      f'found {text!r}, expected two numbers such as 0.002,0.03') from None
  return low, high


def _sheet(path: pathlib.Path, config, seed: int) -> int:
  from hrvlm_jax.checkpoint.files import whole_file
  from hrvlm_jax.lab.needle.sheet import sheet

  made = sheet(config, seed=seed)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
      part.write_bytes(made)
  except OSError as error:
    raise UserError(f'--sheet {path}: cannot be written ({error.strerror or error})') from error
  print(f'written: {path}')
  return 0


def _tables(path: pathlib.Path) -> int:
  from hrvlm_jax.lab.needle import sheet
  from hrvlm_jax.lab.report import insert, markdown_table

  if not path.is_file():
    raise UserError(f'--tables {path}: no such file')
  for name, (header, *rows) in (('kinds', sheet.table()), ('sizes', sheet.sizes())):
    insert('\n'.join(markdown_table(header, rows)), path, name=name)
  print(f'written: {path}')
  return 0
