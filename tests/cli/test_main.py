"""The dispatcher: light, lazy, and one sentence for every mistake of the user."""

import importlib
import subprocess
import sys

import pytest

from hrvlm_jax.cli import doctor, main as cli
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.training import recipe


def test_help_imports_nothing_heavy():
  program = ("import sys; from hrvlm_jax.cli.main import main; code = main(['--help']); "
             "print(sorted({'jax', 'numpy', 'flax', 'ml_collections'} & set(sys.modules)), code)")
  run = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
  assert run.stdout.endswith('[] 0\n'), run.stdout + run.stderr
  for verb in cli.VERBS:
    assert f'\n  {verb} ' in run.stdout


@pytest.mark.parametrize('verb', cli.VERBS)
def test_every_verb_exists_and_explains_itself(verb, capsys):
  module, function = cli.VERBS[verb][0].split(':')
  assert callable(getattr(importlib.import_module(module), function))
  with pytest.raises(SystemExit) as caught:
    cli.main([verb, '--help'])
  assert caught.value.code == 0
  assert f'usage: hrvlm {verb}' in capsys.readouterr().out


@pytest.mark.parametrize('argv, message', [
    (['trian'], 'hrvlm: unknown verb trian (nearest known: train)'),
    (['train'], 'hrvlm train: the following arguments are required: --config, --workdir'),
    (['train', '--config', 'no.py', '--workdir', 'x'], 'hrvlm train: run config no.py: no such'),
    (['params'], 'hrvlm params: give either --config FILE.py or --checkpoint DIR'),
    (['params', '--checkpoint', '/no/such'], 'hrvlm params: checkpoint /no/such: no such folder'),
    (['params', '--checkpoint', 'x', '--devices', '2'], 'hrvlm params: --devices belongs to'),
    (['params', '--config', 'pheye', '--config.mesh.fdsp=8'],
     f'hrvlm params: {recipe.folder()}/pheye.py: unknown key config.mesh.fdsp (nearest known: '
     'config.mesh.fsdp)'),
    (['plan', '--config', 'pheye', '--topology', 'gpu:8', '--mesh', 'fdsp=8'],
     'hrvlm plan: mesh: unknown key mesh.fdsp (nearest known: fsdp)'),
    (['verify', '/no/such'],
     'hrvlm: the verb verify is gone; its place takes HRVLM_GOLDENS=FOLDER pytest tests/parity'),
    (['eval', '--checkpoint', 'x', '--benchmark', 'vqa3', '--data', 'x', '--out', 'x'],
     'hrvlm eval: unknown benchmark vqa3'),
    (['ask', '--checkpoint', 'x', 'a.png', ' '], 'hrvlm ask: the question is empty'),
    (['ask', '--checkpoint', 'x', 'no.png', 'What?'], 'hrvlm ask: no.png'),
    (['ask', '--checkpoint', 'x', 'a.png', 'What?', '--overlay', 'o.txt'],
     'hrvlm ask: --overlay o.txt: expected a name that ends in'),
    (['ask', '--checkpoint', 'x', 'a.png', 'What?', '--encoder.max_crops'],
     'hrvlm ask: --encoder.max_crops: expected --encoder.KEY=VALUE'),
    (['export', '--checkpoint', '/no/such', '--to', 'x'], 'hrvlm export: checkpoint /no/such'),
    (['convert', '--from', '/no/such', '--to', 'x'], 'hrvlm convert: /no/such'),
])
def test_mistakes_are_one_sentence_and_status_2(argv, message, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cli.main(argv) == 2
  captured = capsys.readouterr()
  assert captured.err.startswith(message), captured.err
  assert captured.err.count('\n') == 1 and captured.out == ''
  assert list(tmp_path.iterdir()) == []


def test_unexpected_errors_keep_their_traceback(monkeypatch):
  monkeypatch.setitem(cli.VERBS, 'broken', (f'{__name__}:no_such_function', ''))
  monkeypatch.setitem(sys.modules, __name__, sys)
  with pytest.raises(AttributeError):
    cli.main(['broken'])


def test_doctor_says_what_to_do(monkeypatch, capsys, tmp_path):
  monkeypatch.setenv('HRVLM_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr('hrvlm_jax.lab.speed.SECONDS', 0.02)
  assert cli.main(['doctor']) == 0
  out = capsys.readouterr().out
  assert out.endswith('no problem found\n') and 'jax ' in out
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('HRVLM_CACHE', str(tmp_path / 'file' / 'cache'))
  assert cli.main(['doctor']) == 1
  assert 'set HRVLM_CACHE to a folder that you may write to' in capsys.readouterr().out


@pytest.mark.parametrize('version, bounds, fits', [
    ('0.10.2', '>=0.10,<0.13', True), ('0.13.0', '>=0.10,<0.13', False), ('0.9', '>=0.10', False),
    ('2.13.0+cpu', '==2.13.0', True), ('2.12', '==2.13.0', False), ('1', '', True),
    ('7.1.0', '<8,>=6.4', True),
])
def test_version_bounds(version, bounds, fits):
  assert doctor.within(version, bounds) is fits


def test_user_errors_reach_callers_of_run():
  with pytest.raises(UserError):
    cli.run(['nothing'])
