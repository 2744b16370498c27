"""A published recipe shows its numbers in its own file, and is found by its names, old ones too."""

import ast
import contextlib
import dataclasses
import re

import pytest

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel.mesh import MeshConfig
from hrvlm_jax.systems import registry
from hrvlm_jax.training import recipe, run_config
from hrvlm_jax.training.config import RunConfig
from tests.configs.golden import CONFIGS, RECIPES, difference, load, path_of

FILES = sorted(CONFIGS.glob('*.py'))
# A recipe takes from the package how its words are read, and nothing that holds a number.
IMPORTS = {
  ('ml_collections', 'ConfigDict'), ('hrvlm_jax.training.recipe', 'words'),
  ('hrvlm_jax.core.errors', 'UserError')}


def imported(tree):
  """(module, name) of every import of a file."""
  found = {(node.module, alias.name) for node in ast.walk(tree)
           if isinstance(node, ast.ImportFrom) for alias in node.names}
  return found | {(alias.name, '') for node in ast.walk(tree)
                  if isinstance(node, ast.Import) for alias in node.names}


def written(tree):
  """The numbers that stand in a file, and products and quotients of numbers that stand there."""
  def number(node):
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
      return -number(node.operand)
    if isinstance(node, ast.BinOp):
      left, right = number(node.left), number(node.right)
      operations = {ast.Mult: lambda: left * right, ast.Div: lambda: left / right,
                    ast.FloorDiv: lambda: left // right}
      return operations[type(node.op)]()
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
      return float(node.value)
    raise KeyError(node)

  found = set()
  for node in ast.walk(tree):
    with contextlib.suppress(KeyError):
      found.add(number(node))
  return found


def numbers(values, path=''):
  """(path, number) of every number in nested values."""
  if isinstance(values, dict):
    for key, value in values.items():
      yield from numbers(value, f'{path}.{key}')
  elif isinstance(values, (list, tuple)):
    for value in values:
      yield from numbers(value, path)
  elif isinstance(values, (int, float)) and not isinstance(values, bool):
    yield path, float(values)


def test_a_file_per_system_of_the_papers():
  assert [path.stem for path in FILES] == ['llava_hr', 'mc_llava', 'pheye', 'ps3', 'vila_hd']
  assert {spec.partition(':')[0] for spec in RECIPES} == {path.stem for path in FILES}


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_a_recipe_imports_nothing_that_holds_its_numbers(path):
  tree = ast.parse(path.read_text())
  assert imported(tree) <= IMPORTS
  calls = {node.func.id for node in ast.walk(tree)
           if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
  assert not calls & {'open', 'exec', 'eval', '__import__'}


def test_the_checks_see_what_is_hidden():
  hidden = ast.parse('from hrvlm_jax.systems.pheye.config import RELEASED\nimport numpy')
  assert len(imported(hidden) - IMPORTS) == 2
  found = written(ast.parse('a = 1_000 // 8\nb = -2e-4\nc = len("33")'))
  assert found == {1000, 8, 125, 2e-4, -2e-4}


@pytest.mark.parametrize('spec', RECIPES)
def test_a_recipe_shows_its_numbers(spec):
  """Those of model, mesh, optimizer and schedule stand in the file; none is a silent default."""
  name, _, argument = spec.partition(':')
  path = CONFIGS / f'{name}.py'
  own, config = recipe.evaluate(f'{path}:{argument}').to_dict(), to_dict(load(spec))
  text = written(ast.parse(path.read_text()))
  training = dict(own['training'])
  for key in ('steps', 'batch_size', 'accumulate', 'groups', 'optimizer', 'dtype', 'remat',
              'init_from'):
    assert key in training, key
  assert {'train', 'tokenizer', 'lengths'} <= set(own['data']) | (
    {'lengths'} if name == 'ps3' else set())  # PS3's rows are as long as its text tower's context
  chosen = [training[key] for key in ('steps', 'batch_size')]
  chosen += [number for _, number in numbers(own['training']['optimizer'])]
  chosen += [number for _, number in numbers(own['data'])]
  chosen += [number for _, number in numbers(own['mesh'])]
  assert set(map(float, chosen)) <= text
  assert set(own['mesh']) == {field.name for field in dataclasses.fields(MeshConfig)}
  # What a default adds may be neutral (0, 1, none), but is no size, no rate and no length.
  for section in ('model', 'mesh', 'seed'):
    shown = set(numbers({section: own[section]}))
    added = {(path, number) for path, number in numbers({section: config[section]})
             if (path, number) not in shown and number not in (0, 1)}
    assert not added
  shown = set(numbers(training['optimizer']))
  added = {(path, number) for path, number in numbers(config['training']['optimizer'])
           if (path, number) not in shown and number not in (0, 1)}
  assert not added and {'name', 'learning_rate', 'schedule'} <= set(training['optimizer'])


def model_of(spec):
  return load(spec).model


def released(system):
  return registry.get(system).released


def test_the_models_are_the_released_ones():
  """`convert` reads the systems' tables, recipes show the same numbers: held together here."""
  for variant in ('x2_448', 'x2_672', 'x4_448', 'x4_672'):
    assert model_of(f'pheye:{variant},stage1') == released('pheye')[f'pheye_{variant}']
  trained = model_of('mc_llava:full,one_view')
  whole = dataclasses.replace(
    trained, encoder=dataclasses.replace(trained.encoder, max_crops=100))
  assert trained.encoder.max_crops == 1 and whole == released('mc_llava')['mc_llava_3b']
  lora = model_of('mc_llava:lora,one_view')
  assert dataclasses.replace(lora, text=dataclasses.replace(lora.text, lora=())) == trained
  for size in ('7b', 'x_13b'):
    table = released('llava_hr')
    assert model_of(f'llava_hr:{size},stage1') == table[f'llava_hr_{size}_stage1']
    assert model_of(f'llava_hr:{size},stage2') == table[f'llava_hr_{size}']
  for size in ('1_5k', '4k'):
    table = released('vila_hd')
    assert model_of(f'vila_hd:{size},align') == table[f'vila_hd_8b_{size}_siglip']
    sft = model_of(f'vila_hd:{size},sft')
    back = dataclasses.replace(
      sft, encoder=dataclasses.replace(sft.encoder, select_target=False),
      fusion=dataclasses.replace(sft.fusion, selection_weight=0.0))
    assert sft.fusion.selection_weight == 1 and back == table[f'vila_hd_8b_{size}_siglip']
  other = model_of('vila_hd:1_5k,sft,cradio_v2').encoder.tower
  assert other == released('vila_hd')['vila_hd_8b_1_5k_cradio_v2'].encoder.tower
  for spec in ('1_5k,siglip', '1_5k,siglip2', '1_5k,cradio_v2_l', '4k,siglip', '4k,siglip2',
               '4k,cradio_v2_l'):
    assert model_of(f'ps3:{spec}') == released('ps3')[f'ps3_{spec.replace(",", "_")}']


@pytest.mark.parametrize('spec', RECIPES)
def test_the_golden_text_of_a_recipe_is_up_to_date(spec):
  found = difference(spec)
  assert not found, (
    f'{found}\nWhere this is wanted: python -m tests.configs.golden --write, and look at git diff')
  assert path_of(spec).stat().st_size < 60_000


def test_there_is_no_golden_text_without_a_recipe():
  assert {path.name for path in path_of('any').parent.iterdir()} == {
    path_of(spec).name for spec in RECIPES}


OLD = [
  ('configs/vila_hd_8b_4k.py', 'vila_hd.py', '4k,sft'),
  ('vila_hd_8b_1_5k:align,siglip2', 'vila_hd.py', '1_5k,align,siglip2'),
  ('vila_hd_8b_1_5k.py', 'vila_hd.py', '1_5k,sft'),
  ('configs/pheye_x2_448_stage1.py:code', 'pheye.py', 'x2_448,stage1,code'),
  ('llava_hr_x_13b_stage2', 'llava_hr.py', 'x_13b,stage2'),
  ('configs/mc_llava_3b_lora.py', 'mc_llava.py', 'lora'),
  ('ps3_4k_pretrain:script,siglip2', 'ps3.py', '4k,script,siglip2')]


@pytest.mark.parametrize('old, file, argument', OLD)
def test_an_old_name_is_answered_by_the_new_one(old, file, argument, capsys, monkeypatch):
  monkeypatch.chdir(CONFIGS.parent)
  assert run_config.load(RunConfig, old) == run_config.load(
    RunConfig, f'configs/{file}:{argument}')
  [line] = capsys.readouterr().err.splitlines()
  assert line.startswith(old.partition(':')[0] + ' is now ') and line.endswith(
    f'configs/{file}:{argument}; used that')


def test_every_recipe_of_before_has_a_new_name():
  before = [*(f'pheye_x{x}_{side}_stage{n}' for x in (2, 4) for side in (448, 672)
              for n in (1, 2, 3)),
            *(f'llava_hr_{size}_stage{n}' for size in ('7b', 'x_13b') for n in (1, 2)),
            *(f'mc_llava_3b_{stage}' for stage in ('full', 'lora', 'projector')),
            *(f'ps3_{size}_pretrain' for size in ('1_5k', '4k')),
            *(f'vila_hd_8b_{size}' for size in ('1_5k', '4k'))]
  said = []
  for name in before:
    path, argument = recipe.find(name, say=said.append)
    assert recipe.evaluate(f'{path}:{argument}').training.steps
  assert len(said) == len(before) == 23


def test_names(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # by name from anywhere
  load = lambda spec: run_config.load(RunConfig, spec)
  assert load('pheye:x2_448,stage1') == load(f'{CONFIGS}/pheye.py')
  assert load('pheye:stage3,x4_672').training.init_from == 'runs/pheye_x4_672_stage2'
  assert load('tiny/pheye').model.system == 'pheye'
  for spec, sentence in (
      ('phey', r'run config phey: no such file.*or a name in .*configs \(nearest: pheye\)'),
      ('pheye.py', r'run config pheye.py: no such file'),
      ('pheye:x2_449', r"pheye.py:x2_449: argument 'x2_449': unknown word 'x2_449' .nearest: x2_4"),
      ('pheye:x2_448,x2_672', 'give one of x2_448, x2_672'),
      ('vila_hd:4k,cradio_v2', 'cradio_v2 was published for 1_5k alone')):
    with pytest.raises(UserError, match=sentence):
      load(spec)


def test_a_recipe_can_be_changed_key_by_key():
  changed = run_config.load(RunConfig, 'llava_hr:7b,stage2', [
    ('mesh.fsdp', '4'), ('mesh.data', '2'), ('training.optimizer.clip_norm', 'none'),
    ('model.text.depth', '2'), ('data.group', 'none')])
  assert changed.mesh.resolve(8) == MeshConfig(data=2, fsdp=4)
  assert changed.training.optimizer.clip_norm is None and changed.model.text.depth == 2
  assert changed.data.group is None


def test_words():
  assert recipe.words('', ('a', 'b'), {'c': 1, 'd': 2}) == ('a', 'c')
  assert recipe.words('d,b', ('a', 'b'), ('c', 'd')) == ('b', 'd')
  with pytest.raises(UserError, match=re.escape("argument 'e,c,d': 2 problems")):
    recipe.words('e,c,d', ('a', 'b'), ('c', 'd'))
