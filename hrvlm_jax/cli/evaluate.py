"""`hrvlm eval` and `hrvlm analyse`: see `evaluation.runner.evaluate` and `evaluation.analysis`."""

import argparse
import ast
import importlib
import inspect
import itertools
import os
import pathlib
import sys
import typing

from hrvlm_jax.cli.arguments import (
  Parser,
  add_penalties,
  add_reading,
  add_weights,
  penalties_of,
  say_weights,
)
from hrvlm_jax.cli.ask import KNOBS, NAMES, take_knobs
from hrvlm_jax.core.errors import UserError, unknown
from hrvlm_jax.evaluation.analysis import ANALYSES


def main(argv: list[str]) -> int:
  """Runs benchmarks and writes score, answers and provenance; resumes by itself."""
  argv, knobs = take_knobs(argv)
  parser = Parser('eval', f'{main.__doc__} {KNOBS}')
  parser.add_argument('--checkpoint', help='checkpoint or work directory of a run')
  parser.add_argument('--predictions', metavar='FILE',
                      help='score these answers (JSON lines with sample_id and text) instead')
  parser.add_argument('--list', action='store_true', help='say which benchmarks there are')
  parser.add_argument('--benchmark', metavar='NAME,...',
                      help="one or several, or 'own' for questions of your own (--metric)")
  parser.add_argument('--data', help='folder with the official files; of several benchmarks, the '
                      "folder with theirs by name; of 'own', the file or folder of questions")
  parser.add_argument('--out', help='result folder')
  parser.add_argument('--metric', help="of 'own': plain (equal but for case), exact, contains, "
                      'anls, relaxed, vqa, letter, ... (an unknown one lists all), module:function')
  parser.add_argument('--images', help="of 'own': where its images are; default: beside the file")
  parser.add_argument('--sweep', action='append', default=[], metavar='encoder.KEY=A,B,...',
                      help='every value in turn, several --sweep their product; a table and a '
                      'picture in --out')
  parser.add_argument('--split', help="default: the benchmark's first")
  parser.add_argument('--prompt', metavar='FILE', help='own prompt template')
  parser.add_argument('--batch-size', type=int, default=8, help='questions at a time')
  parser.add_argument('--limit', type=int, help='only the first samples')
  parser.add_argument('--max-new-tokens', type=int, help="default: the benchmark's convention")
  add_penalties(parser, drawn=False)
  add_reading(parser)
  add_weights(parser)
  parser.add_argument('--bad-images', choices=('wrong', 'stop'), default='wrong',
                      help='a sample whose image cannot be used counts as wrong and is listed, or '
                           'all images are decoded first and a bad one ends the run')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  parser.add_argument('--quiet', action='store_true', help='no progress bar')
  parser.add_mesh()
  parser.add_processes()
  arguments = parser.parse(argv)

  if arguments.list:
    print('\n'.join(listed()))
    return 0
  missing = [f'--{name}' for name in ('benchmark', 'data', 'out')
             if getattr(arguments, name) is None]
  if missing:
    raise UserError(f'{", ".join(missing)}: missing; hrvlm eval --list names the benchmarks')
  check_settings(arguments)
  chosen = [_benchmark(name, arguments) for name in arguments.benchmark.split(',')]
  if arguments.metric and all(benchmark.name != 'own' for benchmark in chosen):
    raise UserError('--metric belongs to --benchmark own; the others have their own metrics')
  combinations = swept(arguments.sweep)
  if (arguments.checkpoint is None) == (arguments.predictions is None):
    raise UserError('expected either --checkpoint (a model answers) or --predictions (answers that '
                    'exist are scored)')
  if arguments.predictions is not None:
    if len(chosen) > 1 or combinations != [{}]:
      raise UserError('--predictions are the answers to one benchmark, made already; give one, and '
                      'no --sweep')
    return _score(chosen[0], arguments, knobs)
  from hrvlm_jax.parallel import distributed, fate

  several = distributed.initialize(
    arguments.distributed, coordinator=arguments.coordinator,
    num_processes=arguments.num_processes, process_id=arguments.process_id)
  with fate.shared(parser.prog):
    return _answer_all(arguments, knobs, chosen, combinations, several=several)


def check_settings(arguments) -> None:
  """Refuses settings of answers that cannot be, before anything is read.

  Raises:
    UserError: all of them.
  """
  from hrvlm_jax.language.sampling import Sampling

  problems = [f'--{name.replace("_", "-")} {value}: expected at least 1'
              for name in ('batch_size', 'limit')
              if (value := getattr(arguments, name)) is not None and value < 1]
  if problems:
    raise UserError('; '.join(problems))
  tokens = 1 if arguments.max_new_tokens is None else arguments.max_new_tokens
  try:
    Sampling(max_new_tokens=tokens, **penalties_of(arguments))
  except ValueError as error:
    raise UserError(str(error)) from error


def _answer_all(arguments, knobs, chosen, combinations, *, several: bool) -> int:
  """A model answers every benchmark under every combination of settings."""
  from hrvlm_jax.evaluation.model import EvaluatedModel
  from hrvlm_jax.front import evaluating
  from hrvlm_jax.parallel import distributed

  longest = arguments.max_new_tokens or max(b.max_new_tokens for b in chosen)
  held: dict[str, typing.Any] = {}  # the model of the settings at hand, for all benchmarks

  def run(benchmark, knobs, out):
    if repr(knobs) not in held:
      held.clear()
      held[repr(knobs)] = EvaluatedModel(_answerer(arguments, dict(knobs), longest),
                                         sampling=penalties_of(arguments), max_new_tokens=longest)
    asked = held[repr(knobs)].with_longest(arguments.max_new_tokens or benchmark.max_new_tokens)
    return _ask(asked, benchmark, arguments, _data(benchmark, arguments, len(chosen)), out)

  cells, failed = [], 0
  names = [benchmark.name for benchmark in chosen]
  for values in combinations:
    laid = {name: dict(options) for name, options in knobs.items()}
    for key, value in values.items():
      group, _, name = key.partition('.')
      laid.setdefault(group, {})[name] = value
    folder = pathlib.Path(arguments.out, evaluating.folder_of(values))
    for benchmark in chosen:
      try:
        result = run(benchmark, laid, folder / benchmark.name if len(chosen) > 1 else folder)
        cells.append(evaluating.Cell(values, benchmark.name, result))
      except UserError as error:
        if several or (combinations == [{}] and len(chosen) == 1):
          raise  # of several processes all must do the same
        failed += 1
        print(f'{folder.name if values else benchmark.name}: {error}', file=sys.stderr, flush=True)
        cells.append(evaluating.Cell(values, benchmark.name, None, str(error)))
  if len(cells) > 1 and cells[0].first and distributed.is_main():
    print(evaluating.write(cells, names, arguments.out))
  if failed:
    raise UserError(f'{failed} of {len(cells)} evaluations failed (above); run again, the others '
                    'are kept')
  return 0


def _benchmark(name: str, arguments):
  from hrvlm_jax.evaluation import benchmarks
  from hrvlm_jax.evaluation.benchmarks.own import own

  if name == 'own':
    return own(arguments.metric, images=arguments.images)
  return benchmarks.get(name)


def _data(benchmark, arguments, count: int) -> str:
  """The folder of a benchmark: of several, the one of its name where there is one."""
  inside = os.path.join(arguments.data, benchmark.name)
  return inside if count > 1 and os.path.isdir(inside) else arguments.data


def listed() -> list[str]:
  """A line per benchmark: name, what it is, its splits with their numbers, its files."""
  from hrvlm_jax.evaluation import benchmarks

  found = benchmarks.known() | {'own': benchmarks.get('own')}
  width = max(map(len, found))
  splits = lambda b: ', '.join(name if n is None else f'{name} ({n:,})'
                               for name, n in b.splits.items())
  return [f'{name:<{width}}  {b.title}; splits: {splits(b)}; files: {b.files}'
          for name, b in sorted(found.items())]


def swept(texts: typing.Sequence[str]) -> list[dict[str, typing.Any]]:
  """Settings of every combination of `--sweep` options; [{}] without one.

  Raises:
    UserError: another form, one key twice.
  """
  axes: dict[str, list] = {}
  for text in texts:
    key, equals, values = text.partition('=')
    group, dot, name = key.partition('.')
    if not (equals and values and dot and name) or group not in NAMES:
      raise UserError(f'--sweep {text}: expected {" or ".join(NAMES)}, a key and its values, such '
                      'as encoder.max_crops=25,100')
    if key in axes:
      raise UserError(f'--sweep {key} is there twice; list its values in one')
    try:
      read = ast.literal_eval(f'[{values}]')
    except (ValueError, SyntaxError):
      read = values.split(',')
    axes[key] = list(dict.fromkeys(map(_hashable, read)))
  return [dict(zip(axes, chosen)) for chosen in itertools.product(*axes.values())]


def _hashable(value):
  return tuple(value) if isinstance(value, list) else value


def _answerer(arguments, knobs, longest):
  """The model under the settings of the command line, laid over the devices that hold it."""
  import jax

  from hrvlm_jax.checkpoint import layout
  from hrvlm_jax.core.execution import Execution
  from hrvlm_jax.parallel import distributed
  from hrvlm_jax.vlm import where
  from hrvlm_jax.vlm.answer import Answerer, model_config

  # The originals ignored EXIF orientation in evaluation; so do the published numbers.
  folder = os.fspath(layout.resolve(arguments.checkpoint))
  encoder = knobs.pop('encoder', None)
  one = bool(knobs)  # methods answer on one device
  lies, choice = where.layout_for(
    model_config(folder, encoder), mesh=arguments.mesh, rows=arguments.batch_size,
    new_tokens=longest, dtype=arguments.dtype, devices=jax.local_devices()[:1] if one else None,
    least=1 if one else jax.local_device_count())
  if distributed.is_main():
    print(where.told(lies, choice), flush=True)
    say_weights(folder, arguments.weights)
  return Answerer.load(folder, ex=Execution(dtype=arguments.dtype), exif='ignore',
                       encoder_options=encoder, methods=knobs, layout=lies,
                       weights=arguments.weights)


def _ask(model, benchmark, arguments, data, out):
  """A model answers; returns the result, None on processes other than the first."""
  import jax

  from hrvlm_jax.checkpoint import averages, layout
  from hrvlm_jax.evaluation import provenance
  from hrvlm_jax.evaluation.runner import Options, evaluate
  from hrvlm_jax.parallel import distributed

  folder = os.fspath(layout.resolve(arguments.checkpoint))
  lies = model.answerer.layout
  asked = model.described(
    name=os.path.basename(os.path.abspath(arguments.checkpoint)), checkpoint=arguments.checkpoint,
    checkpoint_hash=provenance.folder_hash(folder)
    + ('' if averages.which(folder, arguments.weights)[0] == 'raw' else ':ema'))
  result = evaluate(
    benchmark, asked, data=data, out=out,
    options=Options(
      split=arguments.split, prompt_file=arguments.prompt, batch_size=arguments.batch_size,
      limit=arguments.limit, alpha=arguments.alpha, max_pixels=arguments.max_pixels,
      bad_images=arguments.bad_images, process_index=jax.process_index(),
      process_count=jax.process_count(), barrier=lambda: distributed.barrier('eval'),
      progress=not arguments.quiet,
      together=None if lies is None or lies.own else distributed.from_first))
  if result is not None:
    print(result.summary())
    print(f'written: {out}', flush=True)
  return result


def _score(benchmark, arguments, knobs) -> int:
  """Answers that exist: no model is loaded, nothing about one can be set."""
  from hrvlm_jax.evaluation.runner import score_predictions

  given = [name for name in ('limit', 'max_new_tokens', 'prompt')
           if getattr(arguments, name) is not None] + [*penalties_of(arguments), *knobs]
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
  options.pop('no_verify', None)  # the parser's own, which has acted
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
