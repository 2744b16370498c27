"""`hrvlm convert` and `hrvlm export`: see `interop` (convert, starts, certificate, export)."""

import os

from hrvlm_jax.cli.arguments import Parser, add_weights
from hrvlm_jax.core.errors import UserError, shortened


def main(argv: list[str]) -> int:
  """Turns the weights of an original release into a checkpoint; complete or not at all.

  With --from, a whole release. With --config and --part, parts of a model from releases of their
  own, for training.init_from.
  """
  parser = Parser('convert', main.__doc__, config=True, config_required=False)
  parser.add_argument('--from', dest='source', metavar='FOLDER',
                      help='folder of the original weights with its config.json, or a name on the '
                           'Hugging Face hub, owner/name or owner/name@commit')
  parser.add_argument('--revision', metavar='COMMIT', help='the commit of a name on the hub')
  parser.add_argument('--adapter', metavar='FOLDER',
                      help='a LoRA adapter of peft for the language model, kept as a set')
  parser.add_argument('--part', action='append', default=[], metavar='PATH=SOURCE',
                      help='with --config: language=FOLDER, vision/tower=FOLDER, '
                           'projector=mm_projector.bin, lora=FOLDER, ... (several)')
  parser.add_argument('--to', required=True, metavar='DIR', help='absent or empty')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'),
                      help='of the stored parameters; default: that of the file')
  parser.add_argument('--check', nargs='?', const='', metavar='FOLDER',
                      help='compare with the original (or with FOLDER, another copy of it) and '
                           'write parity.json into DIR: every tensor, projector and coordinates; '
                           'with PyTorch also language model, towers and prompts beside '
                           'transformers; status 1 unless something was compared and all passed')
  arguments = parser.parse(argv)
  if (arguments.source is None) == (not arguments.part):
    raise UserError('give either --from FOLDER, or --config RUN.py with --part PATH=SOURCE')
  if arguments.part and (arguments.config is None or arguments.check is not None
                         or arguments.adapter or arguments.revision):
    raise UserError('--part needs --config and takes none of --check, --adapter, --revision '
                    '(a part may be lora=FOLDER, and owner/name@commit)')
  if arguments.source is not None and arguments.config is not None:
    raise UserError('--config belongs to --part; a whole release is recognised by its config.json')
  if arguments.check and not os.path.isdir(arguments.check):
    raise UserError(f'--check {arguments.check}: no such folder')
  if arguments.check and not os.path.isfile(os.path.join(arguments.check, 'config.json')):
    raise UserError(f'--check {arguments.check}: no config.json; expected the folder of a released '
                    'model')

  import jax.numpy as jnp

  dtype = None if arguments.dtype is None else jnp.dtype(arguments.dtype)
  if arguments.part:
    return _parts(arguments, dtype)
  from hrvlm_jax.interop.convert import convert

  config = convert(arguments.source, arguments.to, dtype=dtype, revision=arguments.revision,
                   adapter=arguments.adapter, say=print)
  print(f'converted {arguments.source} ({config.system}) to {arguments.to}', flush=True)
  return 0 if arguments.check is None else _check(arguments)


def _parts(arguments, dtype) -> int:
  from hrvlm_jax.interop.starts import assemble
  from hrvlm_jax.training import run_config
  from hrvlm_jax.training.config import RunConfig

  config = run_config.load(RunConfig, arguments.config, arguments.overrides)
  fresh = assemble(config.model, arguments.part, arguments.to, dtype=dtype, say=print)
  if fresh:
    print(f'{len(fresh)} parameters are in no part and start fresh: {shortened(fresh)}')
  print(f'wrote {arguments.to}; train with --config.training.init_from={arguments.to} and name '
        'what starts fresh in training.init_allow')
  return 0


def _check(arguments) -> int:
  import jax

  from hrvlm_jax.interop.certificate import FILE, certify

  jax.config.update('jax_default_matmul_precision', 'highest')
  other = bool(arguments.check)
  result = certify(arguments.to, arguments.check or arguments.source,
                   revision=None if other else arguments.revision, adapter=arguments.adapter)
  for line in result.lines():
    print(line)
  if not result.compared:
    print('parity NOT CHECKED: nothing was compared')
  else:
    verdict = 'passed' if result.passed else 'FAILED'
    print(f'parity check {verdict}; the certificate is {arguments.to}/{FILE}')
  return 0 if result.passed else 1


def export(argv: list[str]) -> int:
  """Writes a checkpoint as a folder in the original's own layout, or as one that transformers
  opens; complete or not at all."""
  parser = Parser('export', export.__doc__)
  parser.add_argument('--checkpoint', required=True, help='checkpoint or work directory of a run')
  parser.add_argument('--to', required=True, metavar='FOLDER', help='absent or empty')
  parser.add_argument('--for', dest='layout', choices=('original', 'transformers'),
                      default='original',
                      help="original: the original's own names and files (default); transformers: "
                           'with model code of ours, for AutoModelForImageTextToText, '
                           'AutoProcessor and pipeline')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'),
                      help='of the written tensors; default: as stored')
  parser.add_argument('--merge-lora', action='store_true',
                      help='add LoRA sets to the kernels; default: an adapter folder beside them')
  add_weights(parser)
  arguments = parser.parse(argv)

  import jax.numpy as jnp

  from hrvlm_jax.interop import export as exporting

  dtype = None if arguments.dtype is None else jnp.dtype(arguments.dtype)
  exporting.export(arguments.checkpoint, arguments.to, dtype=dtype,
                   merge_lora=arguments.merge_lora, layout=arguments.layout, say=print,
                   weights=arguments.weights)
  print(f'exported {arguments.checkpoint} to {arguments.to}')
  return 0
