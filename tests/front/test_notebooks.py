"""The notebooks run from their first cell to their last, beside a folder as the quickstart's."""

import ast
import json
import pathlib

import pytest

from tests import levels

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / 'docs/notebooks'
NAMES = sorted(path.stem for path in FOLDER.glob('*.ipynb'))


def cells(name, kind='code'):
  book = json.loads((FOLDER / f'{name}.ipynb').read_text(encoding='utf-8'))
  return [cell for cell in book['cells'] if cell['cell_type'] == kind]


@pytest.mark.parametrize('name', levels.rows('notebooks', NAMES, first=['ask_and_look']))
def test_runs(name, world, tmp_path, monkeypatch):
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs/quickstart').symlink_to(world / 'runs/quickstart')
  monkeypatch.chdir(tmp_path)
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
