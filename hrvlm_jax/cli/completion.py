"""`hrvlm completion bash | zsh`: a script that completes verbs, options, choices and files.

The script is written out whole, from the parsers of the verbs: completing starts no Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import importlib
import shlex

from hrvlm_jax.cli.arguments import PROBE, Parser, Probed
from hrvlm_jax.core.errors import UserError, unknown

# Verbs whose first word chooses one of several parsers.
PARTS = {'data': ('check', 'show', 'build', 'questions')}
_ANSWERS = '--encoder. --vicrop --fastv --prune --shrink'
KNOBS = {'ask': _ANSWERS, 'chat': _ANSWERS, 'eval': _ANSWERS, 'encode': '--encoder.',
         'finetune': '--encoder.'}


def main(argv: list[str]) -> int:
  """Prints the completion script of a shell.

  bash: source <(hrvlm completion bash), in ~/.bashrc. zsh: source <(hrvlm completion zsh), in
  ~/.zshrc after compinit.
  """
  parser = Parser('completion', main.__doc__)
  parser.add_argument('shell', help='bash or zsh')
  arguments = parser.parse(argv)
  shells = {'bash': bash, 'zsh': zsh}
  if arguments.shell not in shells:
    raise UserError(f'{unknown(arguments.shell, shells, what="shell")}; expected bash or zsh')
  print(shells[arguments.shell](options()))
  return 0


def options() -> dict[str, dict[str, tuple[str, ...]]]:
  """verb (or verb and part) -> option -> its choices, () where any text will do."""
  from hrvlm_jax.cli.main import VERBS

  found = {}
  for verb, (where, _) in VERBS.items():
    for words in ([(verb, part) for part in PARTS[verb]] if verb in PARTS else [(verb,)]):
      parser = parser_of(where, words[1:])
      if parser is None:
        continue
      found[' '.join(words)] = {
        name: tuple(map(str, action.choices or ()))
        for action in parser._actions for name in action.option_strings
        if name.startswith('--') and action.help is not argparse.SUPPRESS}
      found[' '.join(words)] |= dict.fromkeys(KNOBS.get(verb, '').split(), ())
  return found


def parser_of(where: str, words: Sequence[str] = ()) -> argparse.ArgumentParser | None:
  """The parser of a verb (`module:function`); None where the verb cannot make one here."""
  module, function = where.split(':')
  try:
    getattr(importlib.import_module(module), function)([*words, PROBE])
  except Probed as probed:
    return probed.parser
  except UserError:  # bench, outside a checkout
    return None
  return None


def bash(found: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
  """The script for bash."""
  cases = []
  for verb, known in found.items():
    cases += [f'    {shlex.quote(f"{verb} {name}")}) COMPREPLY=($(compgen -W '
              f'{shlex.quote(" ".join(choices))} -- "$cur")); return ;;'
              for name, choices in known.items() if choices]
  listed = [f'    {shlex.quote(verb)}) words={shlex.quote(" ".join(known))} ;;'
            for verb, known in found.items()]
  parts = [f'    {verb}) [[ $COMP_CWORD -eq 2 ]] && {{ COMPREPLY=($(compgen -W '
           f'{shlex.quote(" ".join(names))} -- "$cur")); return; }}; '
           'verb="$verb ${COMP_WORDS[2]}" ;;'
           for verb, names in PARTS.items()]
  return '\n'.join([
    '_hrvlm() {',
    '  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}',
    '  local verb=${COMP_WORDS[1]} words=',
    '  COMPREPLY=()',
    '  if [[ $COMP_CWORD -eq 1 ]]; then',
    f'    COMPREPLY=($(compgen -W {shlex.quote(" ".join(_verbs()))} -- "$cur")); return',
    '  fi',
    '  case $verb in', *parts, '  esac',
    '  case "$verb $prev" in', *cases, '  esac',
    '  case $verb in', *listed, '  esac',
    '  if [[ $cur == -* ]]; then',
    '    COMPREPLY=($(compgen -W "$words" -- "$cur"))',
    '    [[ ${COMPREPLY[0]} == *. ]] && compopt -o nospace 2>/dev/null',
    '  else',
    '    COMPREPLY=($(compgen -f -- "$cur"))',
    '  fi',
    '}',
    'complete -o filenames -F _hrvlm hrvlm'])


def zsh(found: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
  """The script for zsh."""
  from hrvlm_jax.cli.main import VERBS

  told = [f'    {shlex.quote(f"{verb}:{text}")}' for verb, (_, text) in VERBS.items()]
  listed = [f'    {shlex.quote(verb)}) options=({" ".join(map(shlex.quote, known))}) ;;'
            for verb, known in found.items()]
  cases = [f'    {shlex.quote(f"{verb} {name}")}) compadd -- '
           f'{" ".join(map(shlex.quote, choices))}; return ;;'
           for verb, known in found.items() for name, choices in known.items() if choices]
  parts = [f'    {verb}) if (( CURRENT == 3 )); then compadd -- {" ".join(names)}; return; fi; '
           'verb="$verb $words[3]" ;;' for verb, names in PARTS.items()]
  return '\n'.join([
    '_hrvlm() {',
    '  local -a verbs options',
    '  local verb=$words[2]',
    '  verbs=(', *told, '  )',
    '  if (( CURRENT == 2 )); then _describe verb verbs; return; fi',
    '  case $verb in', *parts, '  esac',
    '  case "$verb $words[CURRENT-1]" in', *cases, '  esac',
    '  case $verb in', *listed, '  esac',
    '  if [[ $PREFIX == -* ]]; then compadd -- $options; else _files; fi',
    '}',
    'compdef _hrvlm hrvlm'])


def _verbs() -> list[str]:
  from hrvlm_jax.cli.main import VERBS

  return [*VERBS, '--help', '--version']
