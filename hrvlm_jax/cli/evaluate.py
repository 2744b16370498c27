"""`hrvlm eval` and `hrvlm analyse`: see `evaluation.runner.evaluate` and `evaluation.analysis`."""

import argparse
import importlib
import inspect
import os
import typing

from hrvlm_jax.cli.arguments import Parser
from hrvlm_jax.cli.ask import KNOBS, take_knobs
from hrvlm_jax.core.errors import UserError, unknown
from hrvlm_jax.evaluation.analysis import ANALYSES


def main(argv: list[str]) -> int:
  """Runs a benchmark and writes score, answers and provenance; resumes by itself."""
  argv, knobs = take_knobs(argv)
  parser = Parser('eval', f'{main.__doc__} {KNOBS}')
  parser.add_argument('--checkpoint', help='checkpoint or work directory of a run')
  parser.add_argument('--predictions', metavar='FILE',
                      help='score these answers (JSON lines with sample_id and text) instead')
  parser.add_argument('--benchmark', required=True, help='its name; an unknown one lists all')
  parser.add_argument('--data', required=True, help='folder with the official files')
  parser.add_argument('--out', required=True, help='result folder')
  parser.add_argument('--split', help="default: the benchmark's first")
  parser.add_argument('--prompt', metavar='FILE', help='own prompt template')
  parser.add_argument('--batch-size', type=int, default=8)
  parser.add_argument('--limit', type=int, help='only the first samples')
  parser.add_argument('--max-new-tokens', type=int, help="default: the benchmark's convention")
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  parser.add_argument('--quiet', action='store_true', help='no progress bar')
  arguments = parser.parse(argv)

  from hrvlm_jax.evaluation import benchmarks

  benchmark = benchmarks.get(arguments.benchmark)
  if (arguments.checkpoint is None) == (arguments.predictions is None):
    raise UserError('expected either --checkpoint (a model answers) or --predictions (answers that '
                    'exist are scored)')
  if arguments.predictions is not None:
    return _score(benchmark, arguments, knobs)
  import jax

  from hrvlm_jax.checkpoint import layout
  from hrvlm_jax.core.execution import Execution
  from hrvlm_jax.evaluation import provenance
  from hrvlm_jax.evaluation.model import EvaluatedModel
  from hrvlm_jax.evaluation.runner import Options, evaluate
  from hrvlm_jax.parallel import distributed
  from hrvlm_jax.vlm.answer import Answerer

  # The originals ignored EXIF orientation in evaluation; so do the published numbers.
  folder = os.fspath(layout.resolve(arguments.checkpoint))
  answerer = Answerer.load(folder, ex=Execution(dtype=arguments.dtype), exif='ignore',
                           encoder_options=knobs.pop('encoder', None), methods=knobs)
  devices = jax.local_devices()
  if arguments.batch_size % len(devices):
    raise UserError(f'--batch-size {arguments.batch_size} is no multiple of the {len(devices)} '
                    'devices of this machine')
  model = EvaluatedModel(answerer, devices=devices if len(devices) > 1 else None,
                         max_new_tokens=arguments.max_new_tokens or benchmark.max_new_tokens)
  asked = model.described(
    name=os.path.basename(os.path.abspath(arguments.checkpoint)), checkpoint=arguments.checkpoint,
    checkpoint_hash=provenance.folder_hash(folder))
  result = evaluate(
    benchmark, asked, data=arguments.data, out=arguments.out,
    options=Options(
      split=arguments.split, prompt_file=arguments.prompt, batch_size=arguments.batch_size,
      limit=arguments.limit, process_index=jax.process_index(), process_count=jax.process_count(),
      barrier=lambda: distributed.barrier('eval'), progress=not arguments.quiet))
  if result is not None:
    print(result.summary())
    print(f'written: {arguments.out}')
  return 0


def _score(benchmark, arguments, knobs) -> int:
  """Answers that exist: no model is loaded, nothing about one can be set."""
  from hrvlm_jax.evaluation.runner import score_predictions

  given = [name for name in ('limit', 'max_new_tokens', 'prompt')
           if getattr(arguments, name) is not None] + list(knobs)
  if given:
    options = ', '.join('--' + name.replace('_', '-') for name in given)
    raise UserError(f'{options}: decides how a model answers; --predictions scores answers that '
                    'exist')
  result = score_predictions(benchmark, arguments.predictions, data=arguments.data,
                             out=arguments.out, split=arguments.split)
  print(result.summary())
  print(f'written: {arguments.out}')
  return 0


def analyse(argv: list[str]) -> int:
  """Runs an analysis of the papers; `hrvlm analyse NAME --help` lists its options."""
  names = '\n'.join(f'  {name:<11} {what}' for name, (_, what) in ANALYSES.items())
  outer = Parser('analyse', f'{analyse.__doc__}\n\n{names}')
  outer.formatter_class = argparse.RawDescriptionHelpFormatter
  outer.add_argument('name')
  outer.add_argument('options', nargs=argparse.REMAINDER, help='of the analysis')
  arguments = outer.parse(argv)
  name, rest = arguments.name, arguments.options
  if name not in ANALYSES:
    raise UserError(f'{unknown(name, ANALYSES, what="analysis")}; hrvlm analyse --help lists them')
  module, function = ANALYSES[name][0].split(':')
  run = getattr(importlib.import_module(f'hrvlm_jax.evaluation.analysis.{module}'), function)
  options = vars(_analysis_parser(name, run).parse(rest))
  try:
    print('\n'.join(run(**options)))
  except ValueError as error:  # numbers that an analysis cannot work with
    raise UserError(str(error)) from error
  return 0


def _analysis_parser(name: str, run: typing.Callable) -> Parser:
  """Options of an analysis: its keyword arguments, by their types and defaults."""
  made = Parser(f'analyse {name}', inspect.getdoc(run))
  made.formatter_class = argparse.RawDescriptionHelpFormatter
  hints = typing.get_type_hints(run)
  for key, parameter in inspect.signature(run).parameters.items():
    # `X | None` and `Sequence[X]` hold X first.
    kinds = typing.get_args(hints[key]) or (hints[key],)
    required = parameter.default is inspect.Parameter.empty
    several = len(kinds) == 1 and kinds[0] is not hints[key]
    made.add_argument(
      '--' + key.replace('_', '-'), type=kinds[0], required=required,
      default=None if required else parameter.default, nargs='+' if several else None)
  return made
