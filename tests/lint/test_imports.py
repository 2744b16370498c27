"""Rules of the house that a reader could overlook: who may import what."""

import ast
import pathlib
import re

PACKAGE = pathlib.Path(__file__).parents[2] / 'hrvlm_jax'
# The functional core of NNX, and nothing else of Flax.
NNX_NAMES = {'Module', 'Param', 'Rngs', 'initializers', 'split', 'merge', 'eval_shape',
             'to_pure_dict', 'List', 'Variable'}
# A room may import rooms below it (imports point down only).
FLOORS = ('core', 'checkpoint', 'parallel', 'vision', 'language', 'data', 'systems', 'vlm',
          'serving', 'training', 'interop', 'planning', 'evaluation', 'lab', 'front', 'cli')
# What every system may import of the room; the others are systems.
SHARED = ('contract', 'fusion', 'grid', 'objective', 'packing', 'pictures', 'registry')
BASELINE_PARTS = ('layout', 'pruning', 'resamplers', 'scaling', 'tiled', 'tiles')
# Rooms side by side: neither imports the other.
BESIDE = (('checkpoint', 'parallel'), ('vision', 'language'), ('interop', 'planning'))


def modules():
  for path in sorted(PACKAGE.rglob('*.py')):
    yield path, ast.parse(path.read_text())


def imported(tree):
  """(module name, names) of every import of a file."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, ()
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield node.module, tuple(alias.name for alias in node.names)


def test_only_core_imports_flax_and_only_nnx_functional_names():
  problems = []
  for path, tree in modules():
    inside_core = path.parent == PACKAGE / 'core'
    for module, names in imported(tree):
      if module.split('.')[0] != 'flax':
        continue
      if not inside_core or (module, names) != ('flax', ('nnx',)):
        problems.append(f'{path.relative_to(PACKAGE)}: imports {module} {names}')
    for node in ast.walk(tree):
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.value.id == 'nnx' and node.attr not in NNX_NAMES:
          problems.append(f'{path.relative_to(PACKAGE)}: uses nnx.{node.attr}')
  assert not problems, '\n'.join(problems)


def test_imports_point_down():
  problems = []
  for path, tree in modules():
    room = path.relative_to(PACKAGE).parts[0]
    if room not in FLOORS:
      continue
    for module, names in imported(tree):
      parts = module.split('.')
      if parts[0] != 'hrvlm_jax':
        continue
      for other in parts[1:2] or names:
        if other not in FLOORS or other == room:
          continue
        beside = any(room in pair and other in pair for pair in BESIDE)
        if beside or FLOORS.index(other) > FLOORS.index(room):
          problems.append(f'{path.relative_to(PACKAGE)}: imports {module}')
  assert not problems, '\n'.join(problems)


def test_every_room_has_a_floor():
  rooms = {path.name for path in PACKAGE.iterdir() if (path / '__init__.py').exists()}
  assert rooms == set(FLOORS)


def test_systems_do_not_import_each_other():
  problems = []
  for path, tree in modules():
    parts = path.relative_to(PACKAGE).parts
    if parts[0] != 'systems' or len(parts) < 3:
      continue
    # ps3 is the vision tower of vila_hd; every other system stands alone.
    allowed = {parts[1], *SHARED} | ({'ps3'} if parts[1] == 'vila_hd' else set())
    for module, names in imported(tree):
      other = module.split('.')
      if other[:2] != ['hrvlm_jax', 'systems']:
        continue
      if len(other) > 2 and other[2] not in allowed:
        problems.append(f'{path.relative_to(PACKAGE)}: imports {module}')
      # Baselines are a file each; they know the parts that several share, and no other baseline.
      found = other[3:4] or (names if other[2:] == ['baselines'] else ())
      if other[2:3] == ['baselines']:
        problems += [f'{path.relative_to(PACKAGE)}: imports {module} {name}' for name in found
                     if name not in BASELINE_PARTS]
  assert not problems, '\n'.join(problems)


def test_meshes_name_their_axis_types():
  problems = [
    str(path.relative_to(PACKAGE)) for path, tree in modules() for node in ast.walk(tree)
    if isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'make_mesh'
    and not any(k.arg == 'axis_types' for k in node.keywords)]
  assert not problems, problems


def test_public_functions_and_classes_say_what_they_do():
  problems = []
  for path, tree in modules():
    if tree.body and not ast.get_docstring(tree):
      problems.append(f'{path.relative_to(PACKAGE)}: the module')
    problems += [
      f'{path.relative_to(PACKAGE)}: {node.name}' for node in tree.body
      if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_')
      and not ast.get_docstring(node)]
  assert not problems, '\n'.join(problems)


def test_what_registries_name_exists():
  """Import strings are no imports: a file that moves would leave them behind unseen."""
  problems, seen = [], 0
  for path, _ in modules():
    for module, name in re.findall(r"'(hrvlm_jax(?:\.\w+)+):(\w+)'", path.read_text()):
      seen += 1
      stem = PACKAGE.parent.joinpath(*module.split('.'))
      files = (stem.with_suffix('.py'), stem / '__init__.py')
      source = next((file for file in files if file.exists()), None)
      if source is None or not re.search(rf'^(?:def|class) {name}\b|^{name}\b.*=',
                                         source.read_text(), re.MULTILINE):
        problems.append(f'{path.relative_to(PACKAGE)}: {module}:{name}')
  assert seen > 10 and not problems, problems
