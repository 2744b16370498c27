"""`hrvlm encode`: see `vlm.encode.ImageEncoder`."""

import pathlib

from hrvlm_jax.cli.answering import check_overlay, take_knobs
from hrvlm_jax.cli.arguments import Parser
from hrvlm_jax.core.errors import UserError


def main(argv: list[str]) -> int:
  """Runs a vision encoder alone on one image and prints the shape of its tokens."""
  argv, knobs = take_knobs(argv, ('encoder',))
  parser = Parser('encode', main.__doc__ + ' --encoder.KEY=VALUE sets a knob of the system, for '
                  "example --encoder.look=\"{'looks': 2}\".")
  parser.add_argument('--checkpoint', required=True, help='checkpoint or work directory of a run')
  parser.add_argument('image', help='image file')
  parser.add_argument('--prompt', help='text that says where to look (PS3); default: by saliency')
  parser.add_argument('--overlay', metavar='OUT.png', help='draw what was looked at, per scale')
  parser.add_argument('--out', metavar='OUT.npy', help='write the tokens, float32 [n d]')
  parser.add_argument('--exif', choices=('apply', 'ignore'), default='apply',
                      help='turn photographs upright as their EXIF block says, or not')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  arguments = parser.parse(argv)
  check_overlay(arguments.overlay)
  if arguments.out is not None:
    out = pathlib.Path(arguments.out)
    if out.suffix != '.npy' or not out.parent.is_dir():
      raise UserError(f'--out {out}: expected a name that ends in .npy in an existing folder')

  from hrvlm_jax.core.images import open_image

  image = open_image(arguments.image, exif=arguments.exif)  # before a large checkpoint is read
  import numpy as np

  from hrvlm_jax.core.execution import Execution
  from hrvlm_jax.vlm.encode import ImageEncoder

  encoder = ImageEncoder.load(arguments.checkpoint, prompted=arguments.prompt is not None,
                              encoder_options=knobs.get('encoder'))
  tokens = encoder(image, arguments.prompt, ex=Execution(dtype=arguments.dtype))
  values = np.asarray(tokens.values[0], np.float32)[np.asarray(tokens.valid[0])]
  print(f'{values.shape[0]} tokens of width {values.shape[1]}')
  if arguments.out is not None:
    np.save(arguments.out, values)
    print(f'written: {arguments.out}')
  if arguments.overlay:
    encoder.overlay(image, tokens).save(arguments.overlay)
    print(f'drawn: {arguments.overlay}')
  return 0
