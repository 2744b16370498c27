"""`hrvlm export`: see `vlm.export.export`."""

from hrvlm_jax.cli.arguments import Parser


def main(argv: list[str]) -> int:
  """Writes a checkpoint as a folder in the original's own layout; complete or not at all."""
  parser = Parser('export', main.__doc__)
  parser.add_argument('--checkpoint', required=True, help='checkpoint or work directory of a run')
  parser.add_argument('--to', required=True, metavar='FOLDER', help='absent or empty')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'),
                      help='of the written tensors; default: as stored')
  parser.add_argument('--merge-lora', action='store_true',
                      help='add LoRA sets to the kernels; default: an adapter folder beside them')
  arguments = parser.parse(argv)

  import jax.numpy as jnp

  from hrvlm_jax.interop.export import export

  dtype = None if arguments.dtype is None else jnp.dtype(arguments.dtype)
  export(arguments.checkpoint, arguments.to, dtype=dtype, merge_lora=arguments.merge_lora)
  print(f'exported {arguments.checkpoint} to {arguments.to}')
  return 0
