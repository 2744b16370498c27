"""Run configs and overrides: types kept, every mistake one sentence with the key path."""

import dataclasses
import textwrap
from typing import Literal

import pytest

from hrvlm_jax.cli import arguments
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.training import recipe, run_config


@dataclasses.dataclass(frozen=True)
class Training:
  steps: int
  rate: float = 0.1
  warmup: float = 0.0
  name: str = 'adam'
  clip: float | None = None
  ema: bool = False
  sizes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Run:
  training: Training
  seed: int = 0
  looks: int | Literal['all'] = 6
  views: int | Literal['all'] = 'all'


FILE = textwrap.dedent("""
    import ml_collections
    def get_config(size='small'):
      config = ml_collections.ConfigDict()
      config.training = ml_collections.ConfigDict()
      config.training.steps = {'small': 10, 'large': 1000}[size]
      config.training.rate = 0.5
      config.training.warmup = config.training.get_ref('rate') * 2
      return config
""")


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'run.py'
  path.write_text(FILE)
  return str(path)


def load(file, **overrides):
  return run_config.load(Run, file, [(k.replace('__', '.'), v) for k, v in overrides.items()])


def test_file_and_argument(file):
  assert load(file) == Run(Training(steps=10, rate=0.5, warmup=1.0))
  assert run_config.load(Run, f'{file}:large').training.steps == 1000


def test_a_number_or_a_word(file):
  """A key that takes both, from either to the other."""
  run = load(file, looks='all', views='3')
  assert (run.looks, run.views) == ('all', 3)
  run = load(file, looks='2', views='all')
  assert (run.looks, run.views) == (2, 'all')
  with pytest.raises(UserError) as error:
    load(file, looks='al', views='al')
  assert "config.looks: found 'al', expected an integer or 'all'" in str(error.value)
  with pytest.raises(UserError, match="config.views: found 'al'"):
    load(file, views='al')
  runs = run_config.sweep(Run, file, [('looks', '1,all')])
  assert [run.looks for run in runs] == [1, 'all']


def test_overrides_keep_types_and_reach_defaults(file):
  run = load(file, training__steps='1e3', training__ema='true', training__clip='2',
             training__sizes='(3,4)', training__name="'a,b'", seed='7')
  assert run == Run(Training(steps=1000, rate=0.5, warmup=1.0, ema=True, clip=2.0, sizes=(3, 4),
                             name='a,b'), seed=7)
  assert load(file, training__clip='none').training.clip is None
  # Values computed from others follow them.
  assert load(file, training__rate='2').training.warmup == 4.0
  assert load(file, training__rate='2', seed='1').training.warmup == 4.0


def test_all_mistakes_of_overrides_together(file):
  with pytest.raises(UserError) as caught:
    load(file, trainng__steps='3', training__steps='1.5', training__rate='fast',
         training__ema='yes', training='x', training__sizes='3', seed='1,2')
  assert str(caught.value).splitlines() == [
      f'{file}: 7 problems',
      '  unknown key config.trainng.steps (nearest known: config.training.steps)',
      "  config.training.steps: found '1.5', expected an integer",
      "  config.training.rate: found 'fast', expected a number",
      "  config.training.ema: found 'yes', expected true or false",
      "  config.training: found 'x', expected one of its keys to be set (training.clip, "
      'training.ema, training.name, training.rate, training.sizes)',
      "  config.training.sizes: found '3', expected a list such as (1,2)",
      '  config.seed=1,2: a list of values spans several runs, this command makes one; give one '
      'value',
  ]
  with pytest.raises(UserError, match=r'config.training.clip: found .big. .str., expected'):
    load(file, training__clip='big')
  with pytest.raises(UserError, match='config.seed: found None'):
    load(file, seed='none')


@pytest.mark.parametrize('text', ['9' * 400, '(' * 5000, '\x00', '9' * 5000])
def test_numbers_that_are_none(file, text):
  with pytest.raises(UserError, match='config.training.rate: found .*expected a'):
    load(file, training__rate=text)


def test_sweeps(file):
  runs = run_config.sweep(Run, file, [('seed', '1,2'), ('training.name', 'x,y'),
                                      ('training.sizes', '[5,6]')])
  assert [(r.seed, r.training.name, r.training.sizes) for r in runs] == [
      (1, 'x', (5, 6)), (1, 'y', (5, 6)), (2, 'x', (5, 6)), (2, 'y', (5, 6))]


@pytest.mark.parametrize('text, message', [
    ('x = 1', 'has no function get_config'),
    ('def get_config(): return {}', r'returned dict, expected ml_collections.ConfigDict'),
    ('def get_config(:', 'line 1:'),
    ('import json\nimport no_such_module', "line 2: ModuleNotFoundError: No module named 'no_such"),
    ('def get_config():\n  return 1 / 0', 'line 2: ZeroDivisionError'),
    ('def get_config(which): return None', 'TypeError: get_config.. missing 1 required'),
    ('x = "\x00"', 'run config .*bad.py: '),
    (f'{FILE}\ninner = get_config\ndef get_config():\n  c = inner()\n  with c.ignore_type():\n'
     '    c.data = 3\n  return c', 'unknown key config.data'),
    (FILE.replace('steps', 'stepz'), 'unknown key config.training.stepz .nearest known: steps'),
])
def test_bad_files(tmp_path, text, message):
  path = tmp_path / 'bad.py'
  path.write_text(text)
  with pytest.raises(UserError, match=message):
    run_config.load(Run, str(path))


def test_absent_files(tmp_path):
  with pytest.raises(UserError, match='no such file; expected a Python file with get_config'):
    run_config.load(Run, str(tmp_path / 'none.py'))
  (tmp_path / 'a.json').write_text('{}')
  with pytest.raises(UserError, match=r'expected a Python file \(.py\)'):
    run_config.load(Run, str(tmp_path / 'a.json'))


def test_splitting_overrides():
  rest, overrides = arguments.split_overrides(
      ['--config.a=1', 'x', '--config.b.c', '2=3', '--config', 'f.py', '--', '--config.d=4'])
  assert rest == ['x', '--config', 'f.py', '--', '--config.d=4']
  assert overrides == [('a', '1'), ('b.c', '2=3')]
  with pytest.raises(UserError, match='--config.a has no value; write --config.a=VALUE'):
    arguments.split_overrides(['--config.a'])


def test_parser_mistakes_are_user_errors():
  parser = arguments.Parser('demo', 'Shows.', config=True, config_required=False)
  parser.add_argument('--number', type=int)
  for argv, message in (
      (['--numbr', '1'], 'unknown option --numbr .nearest known: --number'),
      (['--num', '1'], 'unknown option --num .nearest known: --number'),
      (['--number', 'x'], "argument --number: invalid int value: 'x'"),
      (['--config.a=1'], 'needs a run config')):
    with pytest.raises(UserError, match=message):
      parser.parse(argv)


def test_a_config_without_a_mesh_takes_one(tmp_path):
  """The mesh is typed: its axes can be set where the file names none, and only they."""
  from hrvlm_jax.parallel.mesh import MeshConfig
  from hrvlm_jax.training.config import RunConfig

  path = tmp_path / 'run.py'
  path.write_text(textwrap.dedent("""
      from hrvlm_jax.core.config import to_dict
      from hrvlm_jax.systems.mc_llava.encoder import tiny
      import ml_collections
      def get_config():
        return ml_collections.ConfigDict(dict(
          model=to_dict(tiny()), data=dict(train='x.json'),
          training=dict(steps=1, batch_size=8, optimizer=dict(learning_rate=0.1))))
  """))
  load = lambda *overrides: run_config.load(RunConfig, str(path), overrides).mesh
  assert load() == MeshConfig(data=-1)
  assert load(('mesh.fsdp', '8')) == MeshConfig(data=-1, fsdp=8)
  assert load(('mesh.fsdp', '4'), ('mesh.dcn_data', '2'), ('seed', '3')).resolve(16) == MeshConfig(
    data=2, fsdp=4, dcn_data=2)
  with pytest.raises(UserError, match='config.mesh.fdsp .nearest known: config.mesh.fsdp'):
    load(('mesh.fdsp', '8'))
  with pytest.raises(UserError, match=r'config.mesh: at most one of .* may be -1'):
    load(('mesh.tensor', '-1'))


def test_a_key_that_was_renamed_is_answered(tmp_path, capsys):
  from hrvlm_jax.training.config import RunConfig

  path = tmp_path / 'run.py'
  path.write_text(textwrap.dedent("""
      from hrvlm_jax.core.config import to_dict
      from hrvlm_jax.systems.mc_llava.encoder import tiny
      import ml_collections
      def get_config():
        return ml_collections.ConfigDict(dict(
          model=to_dict(tiny()), data=dict(train='x.json', lanes=4),
          training=dict(steps=1, batch_size=8, optimizer=dict(learning_rate=0.1))))
  """))
  recipe.key_now.cache_clear()
  assert run_config.load(RunConfig, str(path)).data.shards == 4
  assert capsys.readouterr().err == 'config.data.lanes is now config.data.shards; used that\n'
  assert run_config.load(RunConfig, str(path), [('data.lanes', '2')]).data.shards == 2
