"""`hrvlm convert`: see `vlm.convert.convert`."""

from hrvlm_jax.cli.arguments import Parser


def main(argv: list[str]) -> int:
  """Turns the folder of an original release into a checkpoint; complete or not at all."""
  parser = Parser('convert', main.__doc__)
  parser.add_argument('--from', dest='source', required=True, metavar='FOLDER',
                      help='folder of the original weights, with its config.json')
  parser.add_argument('--to', required=True, metavar='DIR', help='absent or empty')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'),
                      help='of the stored parameters; default: that of the file')
  arguments = parser.parse(argv)

  import jax.numpy as jnp

  from hrvlm_jax.vlm.convert import convert

  dtype = None if arguments.dtype is None else jnp.dtype(arguments.dtype)
  config = convert(arguments.source, arguments.to, dtype=dtype)
  print(f'converted {arguments.source} ({config.system}) to {arguments.to}')
  return 0
