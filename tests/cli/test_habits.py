"""Habits of a command line: an example in every help, the nearest option, versions, completion."""

import importlib
import shlex
import subprocess

import pytest

from hrvlm_jax import __version__
from hrvlm_jax.cli import completion, main as cli
from hrvlm_jax.cli.examples import EXAMPLES

FOUND = completion.options()


def test_every_help_ends_with_an_example_of_options_that_exist(capsys):
  for verb in (*[v for v in cli.VERBS if v not in completion.PARTS],
               *(f'{verb} {part}' for verb, names in completion.PARTS.items() for part in names)):
    with pytest.raises(SystemExit):
      cli.main([*verb.split(), '--help'])
    assert f'example:\n  {EXAMPLES[verb]}\n' in capsys.readouterr().out, verb
    words = shlex.split(EXAMPLES[verb])
    given = {word.partition('=')[0] for word in words if word.startswith('--')}
    known = {*FOUND[verb], *(['--config.seed'] if '--config' in FOUND[verb] else []), '--help'}
    assert given <= known, (verb, given - known)
  assert all(verb.split()[0] in cli.VERBS for verb in EXAMPLES)


@pytest.mark.parametrize('verb', ['needle', 'quickstart', 'finetune x --data y --out z'])
@pytest.mark.parametrize('seed', ['-1', '4294967296', '9' * 5000, 'nan', '1.5', ''])
def test_seeds_out_of_range(verb, seed, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cli.main([*verb.split(), f'--seed={seed}']) == 2
  assert 'expected a whole number from 0 to 4294967295' in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('argv, message', [
  (['train', '--confg', 'X', '--workdir', 'W'], 'unknown option --confg (nearest known: --config)'),
  (['ask', '--checkpoint', 'x', 'a.png', 'What?', '--max-new-token', '3'],
   'unknown option --max-new-token (nearest known: --max-new-tokens)'),
  (['eval', '--batchsize=4'], 'unknown option --batchsize (nearest known: --batch-size)'),
  (['data', 'check', 'x', '--image_s', 'y'], 'unknown option --image_s (nearest known: --images)'),
  (['params', '--config.seed=1'], '--config.seed needs a run config'),
  (['completion', 'zhs'], 'unknown shell zhs (nearest known: zsh)'),
  (['eval', '--benchmark', 'pope', '--data', 'x', '--out', 'y', '--batch-size', '0', '--limit=-1'],
   '--batch-size 0: expected at least 1; --limit -1: expected at least 1'),
])
def test_a_misspelt_option_is_told_the_nearest(argv, message, capsys):
  assert cli.main(argv) == 2
  assert message in capsys.readouterr().err


def test_the_version_everywhere(capsys):
  for verb in ('ask', 'train', 'completion', 'eval'):
    with pytest.raises(SystemExit) as caught:
      cli.main([verb, '--version'])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f'hrvlm_jax {__version__}\n'


def completed(script, *words):
  """What bash offers behind the last of the words."""
  line = ' '.join(shlex.quote(word) for word in words)
  program = (f'{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _hrvlm; '
             'printf "%s\\n" "${COMPREPLY[@]}"')
  run = subprocess.run(['bash', '--norc', '-c', program], capture_output=True, text=True)
  assert run.returncode == 0 and not run.stderr, run.stderr
  return run.stdout.split()


def test_bash_completes_verbs_options_choices_and_files(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'photo.png').touch()
  script = completion.bash(FOUND)
  assert completed(script, 'hrvlm', 'fin') == ['finetune']
  assert set(completed(script, 'hrvlm', 'c')) == {v for v in cli.VERBS if v.startswith('c')}
  assert '--max-new-tokens' in completed(script, 'hrvlm', 'ask', '--m')
  assert completed(script, 'hrvlm', 'ask', '--dtype', 'b') == ['bfloat16']
  assert completed(script, 'hrvlm', 'ask', 'ph') == ['photo.png']
  assert completed(script, 'hrvlm', 'ask', '--enc') == ['--encoder.']
  assert completed(script, 'hrvlm', 'data', '') == list(completion.PARTS['data'])
  assert set(completed(script, 'hrvlm', 'data', 'check', '--ima')) == {'--images', '--image'}
  for verb in cli.VERBS:
    if verb not in completion.PARTS:
      assert set(completed(script, 'hrvlm', verb, '--')) == set(FOUND[verb]), verb


def test_zsh_is_told_the_same(capsys):
  """There is no zsh here to run it: every verb and option stands in the script, quotes closed."""
  assert cli.main(['completion', 'zsh']) == 0
  script = capsys.readouterr().out
  assert script.rstrip().endswith('compdef _hrvlm hrvlm')
  for verb, known in FOUND.items():
    line = f'    {shlex.quote(verb)}) options=({" ".join(map(shlex.quote, known))}) ;;'
    assert line in script.splitlines()
  # Apart from zsh's own subscripts it is the language of bash, whose parser finds an open quote.
  subprocess.run(['bash', '-n', '-c', script.replace('$words[', '$words_[')], check=True)
  assert importlib.util.find_spec('hrvlm_jax.cli.completion')
