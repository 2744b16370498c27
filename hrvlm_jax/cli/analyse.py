"""`hrvlm analyse NAME`: see `evaluation.analysis`."""

import argparse
import importlib
import inspect
import typing

from hrvlm_jax.cli.arguments import Parser
from hrvlm_jax.core.errors import UserError, unknown
from hrvlm_jax.evaluation.analysis import ANALYSES


def main(argv: list[str]) -> int:
  """Runs an analysis of the papers; `hrvlm analyse NAME --help` lists its options."""
  names = '\n'.join(f'  {name:<11} {what}' for name, (_, what) in ANALYSES.items())
  outer = Parser('analyse', f'{main.__doc__}\n\n{names}')
  outer.formatter_class = argparse.RawDescriptionHelpFormatter
  outer.add_argument('name')
  outer.add_argument('options', nargs=argparse.REMAINDER, help='of the analysis')
  arguments = outer.parse(argv)
  name, rest = arguments.name, arguments.options
  if name not in ANALYSES:
    raise UserError(f'{unknown(name, ANALYSES, what="analysis")}; hrvlm analyse --help lists them')
  module, function = ANALYSES[name][0].split(':')
  run = getattr(importlib.import_module(f'hrvlm_jax.evaluation.analysis.{module}'), function)
  options = vars(parser(name, run).parse(rest))
  try:
    print('\n'.join(run(**options)))
  except ValueError as error:  # numbers that an analysis cannot work with
    raise UserError(str(error)) from error
  return 0


def parser(name: str, run: typing.Callable) -> Parser:
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
