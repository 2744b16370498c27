"""The notebooks and the tutorial run from first to last, beside a folder as the quickstart's."""

import ast
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from hrvlm_jax.cli.main import main
from tests import levels

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / 'docs/notebooks'
NAMES = sorted(path.stem for path in FOLDER.glob('*.ipynb'))


def cells(name, kind='code'):
  book = json.loads((FOLDER / f'{name}.ipynb').read_text(encoding='utf-8'))
  return [cell for cell in book['cells'] if cell['cell_type'] == kind]


@pytest.fixture
def here(world, tmp_path, monkeypatch):
  """A folder with the quickstart's checkpoint and a few questions, where the test runs."""
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs/quickstart').symlink_to(world / 'runs/quickstart')
  for name in ('photo.png', 'other.png', 'own.jsonl'):  # a row's picture must lie in its folder
    shutil.copy(world / name, tmp_path / name)
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.parametrize('name', levels.rows('notebooks', NAMES, first=['ask_and_look']))
def test_runs(name, here):
  names = {'__name__': '__main__'}
  for number, cell in enumerate(cells(name)):
    body = ast.parse(''.join(cell['source'])).body
    shown = body.pop().value if isinstance(body[-1], ast.Expr) else None
    where = f'{name}, cell {number}'
    exec(compile(ast.Module(body, []), where, 'exec'), names)
    if shown is not None:  # what Jupyter would show
      eval(compile(ast.Expression(shown), where, 'eval'), names)


def test_there_are_three_with_titles_and_without_failures():
  assert len(NAMES) == 3
  for name in NAMES:
    assert cells(name, 'markdown')[0]['source'][0].startswith('# ')
    found = [output for cell in cells(name) for output in cell['outputs']]
    assert not any(output['output_type'] == 'error' for output in found), name


@pytest.mark.full('notebooks')
def test_the_commands_of_the_tutorial_run(here, capsys):
  page = (ROOT / 'docs/tutorial.md').read_text()
  commands = [line for block in re.findall(r'```bash\n(.*?)```', page, re.DOTALL)
              for line in block.splitlines() if line.startswith('hrvlm ')]
  assert len(commands) == 7
  for command in commands:
    assert main(shlex.split(command)[1:]) == 0, command + capsys.readouterr().err
  assert (here / 'crops.png').is_file() and (here / 'runs/tutorial_exported/config.json').is_file()


@pytest.mark.full('notebooks')
def test_the_second_question_costs_next_to_nothing(here):
  """As a user runs it: with the compiler's own settings, which the suite changes."""
  program = """
import time, hrvlm_jax
model = hrvlm_jax.load('runs/quickstart/checkpoint')
path = 'runs/quickstart/data/eval/images/000000.png'
model.ask(path, 'What does the red sign say?')
took = []
for colour in ('blue', 'green', 'yellow'):
  programs, began = model.compilations(), time.process_time()
  model.ask(path, f'What does the {colour} sign say?')
  took.append(time.process_time() - began)
  assert model.compilations() == programs
print(min(took))
"""
  run = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True,
                       env={**os.environ, 'XLA_FLAGS': '', 'PYTHONPATH': str(ROOT)})
  assert run.returncode == 0, run.stderr
  assert float(run.stdout.split()[-1]) < 0.2
