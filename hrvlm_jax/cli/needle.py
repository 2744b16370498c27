"""`hrvlm needle`: see `lab.needle.write`."""

import pathlib

from hrvlm_jax.cli.arguments import Parser, read_seed
from hrvlm_jax.core.errors import UserError

PRESETS = ('tiny', 'panorama', 'square', 'one_k', 'four_k')


def main(argv: list[str]) -> int:
  """Writes the built-in reading task: OUT/train and OUT/eval, each LLaVA JSON with its images."""
  parser = Parser('needle', main.__doc__)
  parser.add_argument('--preset', choices=PRESETS, default='panorama')
  parser.add_argument('--out', default='runs/needle', help='folder of both parts')
  parser.add_argument('--train', type=int, default=4000, help='training images')
  parser.add_argument('--eval', type=int, default=500, help='evaluation images')
  parser.add_argument('--turns', type=int, default=3, help='questions per training image')
  parser.add_argument('--photographs', metavar='FOLDER', help='your pictures as backgrounds')
  parser.add_argument('--seed', type=read_seed, default=0)
  arguments = parser.parse(argv)

  from hrvlm_jax.lab.needle import NeedleConfig, write

  if arguments.photographs and not pathlib.Path(arguments.photographs).is_dir():
    raise UserError(f'--photographs {arguments.photographs}: no such folder')
  preset = getattr(NeedleConfig, arguments.preset)
  options = {'photographs': arguments.photographs} if arguments.photographs else {}
  out = pathlib.Path(arguments.out)
  parts = (('train', arguments.train, arguments.turns, arguments.seed),
           ('eval', arguments.eval, 1, arguments.seed + 1))
  for name, count, turns, seed in parts:
    path = write(preset(turns=turns, **options), out / name, count, seed=seed)
    print(f'written: {path}')
  return 0
