"""What the documentation site is made of beside docs/: hooks of MkDocs, named in mkdocs.yml.

Pages that lie beside the code (README files) are brought in under their own paths. The reference is
a page per folder of the package, written from its docstrings. Links are held against the
repository: one to a page becomes a link in the site, one to a picture brings it along, one to any
other file becomes its name, and one to nothing stops the build.
"""

from __future__ import annotations

import ast
import base64
from collections.abc import Iterator
import json
import os
import pathlib
import posixpath
import re
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE, DOCS, NOTEBOOKS = 'hrvlm_jax', 'docs', 'docs/notebooks'
# Files outside docs/ that are pages, where they are not called README.md: repository path -> page.
NAMED = {'README.md': 'index.md', **{name: name for name in (
  'CONTRIBUTING.md', 'CHANGELOG.md', 'tests/goldens/README.md')}}
READMES = ('configs', 'hrvlm_jax', 'tpu')  # folders whose README files are pages
PICTURES = ('.png', '.jpg', '.svg')

# A link, or code, in which there are none.
_LINK = re.compile(r'```.*?```|(?P<before>!?\[(?P<text>[^\]]*)\]\()(?P<target>[^)\s]+)\)|`[^`\n]*`',
                   re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
  """Adds the pages beside the code, the notebooks and the reference."""
  for file in list(files):
    if file.src_uri.endswith(('.json', '.jsonl', '.ipynb')):
      files.remove(file)  # kept results, which pages speak of
  for source, page in outside().items():
    files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
  for path in sorted((ROOT / NOTEBOOKS).glob('*.ipynb')):
    page = path.relative_to(ROOT / DOCS).with_suffix('.md').as_posix()
    files.append(File.generated(config, page, content=notebook(path)))
  for page, content in reference():
    files.append(File.generated(config, page, content=content))
  return files


def on_config(config: Any) -> Any:
  """Adds to the navigation what it does not name: pages under More, then the reference."""
  own = {page_of(path.relative_to(ROOT).as_posix()) for path in (ROOT / DOCS).rglob('*')
         if path.suffix in ('.md', '.ipynb')}
  more = sorted((own | set(outside().values())) - set(_named(config['nav'])))
  if more:
    config['nav'].append({'More': more})
  config['nav'].append({'Reference': [
    {title(page): page} for page, _ in reference()]})
  return config


def _named(nav: Any) -> Iterator[str]:
  """All pages of a navigation."""
  if isinstance(nav, str):
    yield nav
  for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
    yield from _named(part)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
  """Links of the repository -> links of the site.

  Raises:
    PluginError: links to nothing, all of them.
  """
  source = source_of(page.file.src_uri)
  missing: list[str] = []

  def replaced(match: re.Match) -> str:
    if match['target'] is None:
      return match[0]
    target, hash_, anchor = match['target'].partition('#')
    if not target or re.match(r'[a-z]+:', target):
      return match[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path.startswith('..') or not (ROOT / path).exists():
      if page_of(path) is None:
        missing.append(match['target'])
      return match[0]
    found = page_of(path)
    if found is None and path.endswith(PICTURES):
      found = path
      if files.get_file_from_path(path) is None:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    if found is None:
      return match['text'] if '`' in match['text'] else f'{match["text"]} (`{path}`)'
    here = posixpath.dirname(page.file.src_uri)
    return f'{match["before"]}{posixpath.relpath(found, here or ".")}{hash_}{anchor})'

  text = _LINK.sub(replaced, markdown)
  if missing:
    raise PluginError(f'{source}: links to what does not exist: {", ".join(missing)}')
  return text


def outside() -> dict[str, str]:
  """Repository path of each page outside docs/ -> its path in the site."""
  found = dict(NAMED)
  for folder in READMES:
    for path in sorted((ROOT / folder).rglob('README.md')):
      name = path.relative_to(ROOT).as_posix()
      found[name] = name
  return found


def page_of(path: str) -> str | None:
  """The page that a path of the repository is, or None."""
  path = next((name for name in (path, f'{path}/README.md') if name in outside()), path)
  if path in outside():
    return outside()[path]
  if path.startswith(f'{DOCS}/'):
    inside = path.removeprefix(f'{DOCS}/')
    if inside.endswith(('.md', '.ipynb', *PICTURES)) and (ROOT / path).is_file():
      return re.sub(r'\.ipynb$', '.md', inside)
    if (ROOT / path / 'README.md').is_file():
      return f'{inside}/README.md'
  return None


def source_of(page: str) -> str:
  """The repository path that a page is made from."""
  turned = {made: source for source, made in outside().items()}
  return turned.get(page, f'{DOCS}/{page}')


def title(page: str) -> str:
  """What a page of the reference is called."""
  name = pathlib.PurePosixPath(page).stem
  return 'Public names' if name == 'public' else name


def reference() -> Iterator[tuple[str, str]]:
  """(page, its text) of the public names, then of every folder of the package."""
  public = ('api', 'front.model')
  yield 'reference/public.md', _page(
    'The public names', '`import hrvlm_jax` has the names of this page.',
    [f'{PACKAGE}.{name}' for name in public])
  folders = sorted({path.parent for path in (ROOT / PACKAGE).rglob('*.py')})
  for folder in folders:
    room = folder.relative_to(ROOT).as_posix().replace('/', '.')
    modules = [f'{room}.{path.stem}' for path in sorted(folder.glob('*.py'))
               if path.stem not in ('__init__', '__main__')]
    modules = [name for name in modules if name not in (f'{PACKAGE}.api', f'{PACKAGE}.front.model')]
    init = folder / '__init__.py'
    if modules and folder != ROOT / PACKAGE:
      said = ast.get_docstring(ast.parse(init.read_text())) if init.is_file() else None
      yield f'reference/{room.removeprefix(f"{PACKAGE}.")}.md', _page(room, said or '', modules)


def _page(heading: str, said: str, modules: list[str]) -> str:
  return f'# {heading}\n\n{said}\n\n' + ''.join(f'::: {name}\n\n' for name in modules)


def notebook(path: pathlib.Path) -> str:
  """A notebook as Markdown: text, code, and what the code printed and drew when it was kept."""
  parts = []
  for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':
      parts.append(source)
    elif source.strip():
      parts.append(f'```python\n{source}\n```')
      parts += [_output(output) for output in cell['outputs']]
  return '\n\n'.join(part for part in parts if part) + '\n'


def _output(output: dict[str, Any]) -> str:
  if output['output_type'] == 'stream':
    return '```text\n' + ''.join(output['text']).rstrip() + '\n```'
  data = output.get('data', {})
  if 'image/png' in data:
    png = base64.b64encode(base64.b64decode(''.join(data['image/png']))).decode()
    return f'![output](data:image/png;base64,{png})'
  return '```text\n' + ''.join(data.get('text/plain', '')).rstrip() + '\n```' if data else ''


def on_post_build(config: Any) -> None:
  """Nothing in the site may be fetched from elsewhere when a page is opened.

  Raises:
    PluginError: scripts, styles, fonts or pictures with an address, all of them.
  """
  loaded = re.compile(r'<(?:script|img|iframe|source)[^>]+src="(?:https?:)?//[^"]*"|'
                      r'<link(?![^>]*rel="canonical")[^>]+href="(?:https?:)?//[^"]*"|'
                      r'url\((?:https?:)?//[^)]*\)|@import[^;]*//[^;]*;')
  found = []
  for folder, _, names in os.walk(config['site_dir']):
    for name in names:
      if name.endswith(('.html', '.css')):
        path = pathlib.Path(folder, name)
        found += [f'{path.name}: {text[:120]}' for text in loaded.findall(path.read_text())]
  if found:
    raise PluginError(f'pages that fetch from elsewhere: {"; ".join(found[:20])}')
