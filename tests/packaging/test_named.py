"""What the tables of docs/ name is there: tests by file and function, and places."""

import re

import pytest

from tests.pages import ROOT, pages

HOMES = (ROOT, ROOT / 'hrvlm_jax', ROOT / 'tests', ROOT / 'configs', ROOT / 'docs')
# A file or folder with a test or function of it, as written between backticks.
SPAN = re.compile(r'(?P<path>[\w.\-]+(?:/[\w.\-]+)+/?|[\w\-]+\.py)?(?:::(?P<name>\w+))?')
TABLES = ('docs/coverage.md', 'docs/faults.md')


def problems_of(text):
  """What a page names and is not there; a name alone belongs to the file named before it."""
  wrong, last = [], None
  for span in re.findall(r'`([^`\n]+)`', text):
    match = SPAN.fullmatch(span)
    if match is None or not (match['path'] or match['name']):
      continue
    if match['path']:
      found = [home / match['path'] for home in HOMES]
      found += [path.with_name(f'{path.name}.mixture.json') for path in found]
      last = next((path for path in found if path.exists()), None)
      if last is None:
        wrong.append(f'{span}: no such file')
        continue
    if match['name']:
      if last is None or last.suffix != '.py':
        wrong.append(f'{span}: of no file')
      elif not re.search(rf'^\s*(?:def|class) {match["name"]}\b', last.read_text(), re.M):
        wrong.append(f'{span}: not in {last.relative_to(ROOT)}')
  return wrong


@pytest.mark.parametrize('page', TABLES)
def test_places_and_tests_of_a_table_are_there(page):
  text = (ROOT / page).read_text()
  assert text.count('.py') > 30
  assert not (wrong := problems_of(text)), '\n'.join(wrong)


def test_every_test_that_a_page_names_is_there():
  named = re.compile(r'`(?:tests/)?((?:\w+/)*test_\w+\.py)(?:::(\w+))?`')
  wrong = []
  for page in pages():
    for path, name in named.findall(page.read_text()):
      file = next((f for f in (ROOT / 'tests' / path, *sorted((ROOT / 'tests').rglob(path)))
                   if f.exists()), None)
      if file is None or (name and f'def {name}(' not in file.read_text()):
        wrong.append(f'{page.relative_to(ROOT)}: {path}{name and "::" + name}')
  assert not wrong, '\n'.join(wrong)


def test_what_is_not_there_is_found():
  assert not problems_of('`core/test_errors.py`, `::test_a_rare_kind_is_not_cut_away`')
  assert problems_of('`core/test_nothing.py`') and problems_of('`core/test_errors.py::test_none`')
  assert problems_of('`::test_none`')
