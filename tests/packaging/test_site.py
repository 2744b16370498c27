"""The documentation site: built strictly, every page in it, every link to something."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.full('site')


@pytest.fixture(scope='module')
def hooks():
  spec = importlib.util.spec_from_file_location('site_hooks', ROOT / 'scripts/site_hooks.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  folder = tmp_path_factory.mktemp('site')
  run = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '-d', folder],
                       cwd=ROOT, capture_output=True, text=True)
  assert run.returncode == 0, run.stdout + run.stderr
  return folder


def test_every_page_is_there(site):
  for path in (ROOT / 'docs').rglob('*'):
    if path.suffix in ('.md', '.ipynb'):
      name = path.relative_to(ROOT / 'docs').with_suffix('.html').as_posix()
      assert (site / name.replace('README', 'index')).is_file(), name
  assert (site / 'search/search_index.json').is_file()
  assert 'data-md-component="search"' in (site / 'index.html').read_text()
  text = (site / 'reference/public.html').read_text()
  for name in ('load', 'finetune', 'evaluate', 'Model', 'Chat'):
    assert re.search(rf'id="hrvlm_jax\.[\w.]*\b{name}"', text), name
  assert 'hrvlm_jax.api.load' in text and '&gt;&gt;&gt;' in text
  rooms = {path.parent.relative_to(ROOT / 'hrvlm_jax').as_posix().replace('/', '.')
           for path in (ROOT / 'hrvlm_jax').rglob('*.py')
           if path.name not in ('__init__.py', '__main__.py')} - {'.'}
  assert all((site / f'reference/{room}.html').is_file() for room in rooms)


def test_notebooks_are_pages(site, hooks, tmp_path):
  assert 'hrvlm_jax.load' in re.sub('<[^>]*>', '', (
    site / 'notebooks/ask_and_look.html').read_text())
  (tmp_path / 'a.ipynb').write_text(json.dumps({'cells': [
    {'cell_type': 'markdown', 'source': ['# Title']},
    {'cell_type': 'code', 'source': ['print(1)'], 'outputs': [
      {'output_type': 'stream', 'text': ['1\n']},
      {'output_type': 'display_data', 'data': {'image/png': 'iVBORw0KGgo=', 'text/plain': 'x'}},
      {'output_type': 'execute_result', 'data': {'text/plain': ['(3, 4)']}}]}]}))
  assert hooks.notebook(tmp_path / 'a.ipynb').split('\n\n') == [
    '# Title', '```python\nprint(1)\n```', '```text\n1\n```',
    '![output](data:image/png;base64,iVBORw0KGgo=)', '```text\n(3, 4)\n```\n']


class Page:
  """What the hook reads of a page."""

  class file:
    src_uri = 'tutorial.md'


def test_links_lead_somewhere(hooks):
  from mkdocs.exceptions import PluginError

  made = lambda text: hooks.on_page_markdown(text, Page, None, None)
  assert made('[a](finetune.md#x) `[b](none.md)`') == '[a](finetune.md#x) `[b](none.md)`'
  assert made('[`c`](../configs/README.md)') == '[`c`](configs/README.md)'
  assert made('[code](../hrvlm_jax/api.py)') == 'code (`hrvlm_jax/api.py`)'
  assert made('[README](../README.md)') == '[README](index.md)'
  with pytest.raises(PluginError, match=r'tutorial.md: links to .* none.md, ../no/where.py'):
    made('[a](none.md)\n```\n[b](fenced.md)\n```\n[c](../no/where.py)')


def test_pages_that_fetch_from_elsewhere_stop_the_build(hooks, tmp_path):
  from mkdocs.exceptions import PluginError

  (tmp_path / 'a.html').write_text('<a href="https://example.com">a link is none</a>')
  hooks.on_post_build({'site_dir': tmp_path})
  (tmp_path / 'b.html').write_text('<script src="https://example.com/x.js"></script>')
  (tmp_path / 'c.css').write_text('@font-face {src: url(//example.com/x.woff)}')
  with pytest.raises(PluginError, match='b.html.*c.css|c.css.*b.html'):
    hooks.on_post_build({'site_dir': tmp_path})
