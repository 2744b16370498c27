"""The wheel holds everything: built, installed into another folder, and used from there."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """A folder with the package installed from its wheel, the wheel, and the names of its sources."""
  folder = tmp_path_factory.mktemp('wheel')
  pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '--quiet']
  here = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'hrvlm_jax').rglob('*')
          if path.is_file() and '__pycache__' not in path.parts}
  # A copy without ignored files: what git does not hold must not be needed.
  source = folder / 'source'
  source.mkdir()
  files = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
                         cwd=ROOT, capture_output=True, check=True).stdout.split(b'\0')
  for name in filter(None, map(os.fsdecode, files)):
    if name.split('/')[0] in ('hrvlm_jax', 'configs', 'setup.py', 'pyproject.toml', 'README.md',
                              'LICENSE', 'NOTICE'):
      target = source / name
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes((ROOT / name).read_bytes())
  run = subprocess.run([*pip, 'wheel', '--no-build-isolation', '--no-deps', '-w', str(folder),
                        str(source)], capture_output=True, text=True)
  assert run.returncode == 0, run.stdout + run.stderr
  [wheel] = folder.glob('*.whl')
  run = subprocess.run([*pip, 'install', '--no-deps', '--no-index', '--target',
                        str(folder / 'site'), str(wheel)], capture_output=True, text=True)
  assert run.returncode == 0, run.stdout + run.stderr
  return folder / 'site', wheel, here


def run_installed(site, arguments, cwd):
  environment = {**os.environ, 'PYTHONPATH': str(site), 'HRVLM_CACHE': str(cwd / 'cache')}
  return subprocess.run([sys.executable, '-P', *arguments], cwd=cwd, env=environment,
                        capture_output=True, text=True)


def test_doctor_runs_from_the_wheel(installed, tmp_path):
  site = installed[0]
  where = run_installed(site, ['-c', 'import hrvlm_jax; print(hrvlm_jax.__file__)'], tmp_path)
  assert where.stdout.strip() == str(site / 'hrvlm_jax' / '__init__.py')
  run = run_installed(site, [str(site / 'bin' / 'hrvlm'), 'doctor'], tmp_path)
  assert run.returncode == 0, run.stdout + run.stderr
  assert run.stdout.endswith('no problem found\n')


def test_the_wheel_holds_code_data_and_licence(installed):
  _, wheel, here = installed
  names = set(zipfile.ZipFile(wheel).namelist())
  assert here <= names, sorted(here - names)
  assert not {name for name in names if name.startswith('tests')}
  licences = {name.rsplit('/', 1)[-1] for name in names if '.dist-info/licenses/' in name}
  assert licences == {'LICENSE', 'NOTICE'}


def test_every_module_imports_from_the_wheel(installed, tmp_path):
  """Nothing imports a test tool, an optional package, or a file outside the package."""
  site = installed[0]
  program = """
import importlib, pkgutil, sys
for name in ('torch', 'transformers', 'sklearn', 'pytest', 'wandb', 'lmms_eval', 'fastapi',
             'gradio', 'openai', 'starlette', 'uvicorn'):
  sys.modules[name] = None
# Behind the extras `serve` and `page`; the engine they stand on imports with nothing of these.
EXTRAS = {f'hrvlm_jax.serving.{name}' for name in (
  'chat', 'completions', 'guard', 'metrics', 'server')} | {'hrvlm_jax.front.page'}
import hrvlm_jax
failed = []
for module in pkgutil.walk_packages(hrvlm_jax.__path__, 'hrvlm_jax.', onerror=lambda name: None):
  # The second is loaded by another program, lmms_eval, which must be there; the third is model code
  # for PyTorch, copied into exported folders.
  if module.name.endswith(('__main__', '.lmms_eval_model')): continue
  if module.name.startswith('hrvlm_jax.interop.torch.') or module.name in EXTRAS: continue
  try: importlib.import_module(module.name)
  except Exception as error: failed.append(f'{module.name}: {error!r}')
print(failed)
"""
  run = run_installed(site, ['-c', program], tmp_path)
  assert run.stdout.strip() == '[]', run.stdout + run.stderr


def test_recipes_by_name_come_with_the_wheel(installed, tmp_path):
  """Every file of configs/, by its name or as the pages write it; results stay in the checkout."""
  site, wheel, _ = installed
  ours = {path.relative_to(ROOT).as_posix() for pattern in ('*.py', '*.mixture.json', 'README.md')
          for path in (ROOT / 'configs').rglob(pattern)}
  inside = {name.removeprefix('hrvlm_jax/') for name in zipfile.ZipFile(wheel).namelist()
            if name.startswith('hrvlm_jax/configs/')}
  assert inside == ours
  program = """
import pathlib
from hrvlm_jax.training import recipe
print(recipe.folder())
for path in sorted(recipe.folder().rglob('*.py')):
  name = path.relative_to(recipe.folder()).as_posix()
  for spec in (name.removesuffix('.py'), f'configs/{name}'):
    assert recipe.find(spec)[0] == str(path), spec
  shared = 'def get_config(' not in path.read_text()  # rows of several tables
  if not (shared or name.startswith('compare')): recipe.evaluate(name.removesuffix('.py'))
print(recipe.evaluate('pheye:x2_448,stage1').model.system)
"""
  run = run_installed(site, ['-c', program], tmp_path)
  assert run.returncode == 0, run.stdout + run.stderr
  assert run.stdout.splitlines()[0] == str(site / 'hrvlm_jax' / 'configs')
