"""The real steps, compiled for machines that are not here, through the command line."""

import json

import jax
import numpy as np
import pytest

from hrvlm_jax.cli import main as cli, plan as plan_verb
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel.mesh import make_mesh
from hrvlm_jax.planning import programs
from hrvlm_jax.systems import registry
from hrvlm_jax.training.batches import batch_shapes
from hrvlm_jax.training.config import DataConfig, OptimizerConfig, RunConfig, TrainingConfig

CONFIG = """
import ml_collections
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.systems import registry

def get_config():
  config = ml_collections.ConfigDict()
  config.model = to_dict(registry.get('mc_llava').tiny())
  config.data = dict(train='nowhere.json', lengths=(96,))
  config.training = dict(steps=10, batch_size=8, optimizer=dict(learning_rate=1e-3))
  config.mesh = dict(data=2, fsdp=2)
  return config
"""


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'c.py'
  path.write_text(CONFIG)
  return str(path)


@pytest.mark.full('parallel')
def test_plan_verb_on_the_train_step(file, tmp_path, capsys):
  out = tmp_path / 'report.json'
  command = [
    'plan',
    '--config',
    file,
    '--topology',
    'gpu:4',
    '--image',
    '80x60',
    '--effort',
    'scheduled',
    '--json',
    str(out),
  ]
  assert cli.run(command) == 0
  printed = capsys.readouterr().out
  assert 'train step of mc_llava' in printed and 'mesh data=2 fsdp=2' in printed
  report = json.loads(out.read_text())
  assert report['examples'] == 8 and report['tokens'] == 8 * 96
  assert report['memory']['fits'] and report['model_flops'] > 0
  state = 3 * 4 * sum(np.prod(x.shape) for x in _leaves())  # parameters and two moments, float32
  arguments = report['memory']['bytes_per_device']['arguments']
  assert state / 2 < arguments < state  # cut over fsdp, all but vectors and small leaves


def _leaves():
  from hrvlm_jax.vlm import model

  return jax.tree.leaves(model.build(registry.get('mc_llava').tiny()).abstract)


def test_plan_verb_on_the_decode_step(file, capsys):
  command = [
    'plan',
    '--config',
    file,
    '--topology',
    'gpu:2',
    '--mesh',
    'tensor=2',
    '--step',
    'decode',
  ]
  assert cli.run([*command, '--image', '80x60']) == 0
  assert 'decode of mc_llava' in capsys.readouterr().out


@pytest.mark.parametrize(
  'arguments, sentence',
  [
    (['--mesh', 'data'], 'expected AXIS=SIZE'),
    (['--mesh', 'data=2,data=2'], 'data is there twice'),
    (['--mesh', 'fdsp=2'], 'unknown key .*fdsp'),
    (['--image', '80'], 'expected WIDTHxHEIGHT'),
    (['--batches', 'a', '--search'], 'expected numbers'),
    (['--compiler', 'xla_x'], 'expected NAME=VALUE'),
    (['--program', 'x.txt', '--search'], 'keeps one program'),
    (['--topology', 'v5e:16'], '2 dimensions'),
  ],
)
def test_mistakes(file, arguments, sentence):
  with pytest.raises(UserError, match=sentence):
    cli.run(['plan', '--config', file, '--topology', 'gpu:4', *arguments])


def planned(monkeypatch, *, fits, rate=lambda training, mesh: 1.0):
  """Replaces the compiler: what was tried, as (remat, batch, micro-batches, mesh)."""
  from hrvlm_jax.planning import plan

  tried = []

  def fake(target, options, topology, *, mesh, slices, **how):
    training = options['config']['training']
    tried.append((training['remat'], training['batch_size'], training['accumulate'], mesh))
    memory = {'kind': 'k', 'fits': fits(training), 'usable_bytes': 1,
              'bytes_per_device': {'total': 2}}
    return {
      'memory': memory, 'examples_per_second': rate(training, mesh), 'mesh': mesh,
      'slices': 1, 'topology': topology, 'chips': 4, 'device_kind': 'd', 'notes': [],
      'model_flops': 1.0, 'compile_seconds': 1, 'compile_cpu_seconds': 1, 'effort': 'e',
      'tokens_per_second_per_chip': 1, 'collectives_per_device': {}, 'roofline': {},
      'step': {'seconds': 1.0, 'likely_seconds': 1.5, 'mfu': 0.5, 'likely_mfu': 0.3,
               'assumptions': []}}

  monkeypatch.setattr(plan, 'plan', fake)
  return tried


def test_search_goes_by_meshes_then_recomputation_then_micro_batches(file, monkeypatch, capsys):
  tried = planned(monkeypatch, fits=lambda training: training['remat'] != 'none',
                  rate=lambda training, mesh: training['batch_size'] * mesh['fsdp']
                  + (training['remat'] == 'dots'))
  command = ['plan', '--config', file, '--topology', 'gpu:4', '--search', '--batches', '8,16']
  assert plan_verb.main(command[1:]) == 0
  first = [row for row in tried if row[0] == 'layers' and row[2] == 1]
  assert tried[:len(first)] == first and {row[1] for row in first} == {8, 16}
  best, second = {'data': 1, 'fsdp': 4, 'tensor': 1, 'dcn_data': 1}, 2
  others = [row for row in tried if row[0] != 'layers' and row[2] == 1]
  assert {row[0] for row in others} >= {'none', 'dots'}
  assert sum(row[0] == 'dots' for row in others) == second  # of two meshes
  assert tried[-1] == ('dots', 16, 2, best)  # micro-batches last
  captured = capsys.readouterr()
  assert 'mesh fsdp=4' in captured.out and 'fsdp=4 remat=layers batch=16' in captured.err


def test_search_compiles_nothing_that_cannot_fit(file, monkeypatch, capsys):
  tried = planned(monkeypatch, fits=lambda training: False)
  command = ['plan', '--config', file, '--topology', 'gpu:8', '--search',
             '--config.training.batch_size=12', '--config.training.accumulate=6']  # fmt: skip
  with pytest.raises(UserError, match='none of .* candidates fits'):
    plan_verb.main(command[1:])
  # Twelve rows: no eight shards; on four the largest number of micro-batches with four rows each.
  cut = {(row[0], row[2], row[3]['data'] * row[3]['fsdp']) for row in tried}
  assert cut == {('layers', 3, 4), ('layers', 6, 2)}
  assert '2 rows cannot be cut over 8 shards' in capsys.readouterr().err
  # A billion places of 2 bytes a layer and width: arithmetic alone refuses it.
  tried.clear()
  with pytest.raises(UserError, match='none of .* candidates fits'):
    plan_verb.main([*command[1:7], '--length', str(2**31)])
  assert not tried and 'cannot fit: at least' in capsys.readouterr().err


def test_the_least_memory_is_state_and_gradients(file):
  from hrvlm_jax.parallel.topology import parse
  from hrvlm_jax.planning.arithmetic import Least
  from hrvlm_jax.training import run_config

  config = to_dict(run_config.load(RunConfig, file, []))
  size = sum(np.prod(x.shape) for x in _leaves())
  least = Least({'config': config}, parse('gpu:4'))
  whole = least.bytes({'config': config}, {'data': 4, 'fsdp': 1})
  # Parameters, two moments, and gradients or what layers keep; the step counter.
  assert 4 * 4 * size <= whole <= 4 * 4 * size + 2**20
  assert least.bytes({'config': config}, {'fsdp': 4}) < whole / 2


@pytest.mark.parametrize('name', ['mc_llava', 'llava_hr', 'pheye', 'single_view'])
def test_batch_shapes_are_those_of_a_real_batch(name):
  model = registry.get(name).tiny()
  config = RunConfig(
    model=model,
    data=DataConfig(train='x'),
    training=TrainingConfig(steps=1, batch_size=4, optimizer=OptimizerConfig(learning_rate=1.0)),
  )
  found = batch_shapes(config, 6, length=512, image=(90, 70)).arrays
  from PIL import Image

  system = registry.get(name)
  example = system.views([Image.new('RGB', (90, 70))], model.encoder)
  views = system.count(90, 70, model.encoder).views
  real = system.batch([example] * 6, model.encoder, slots=6 * views)
  expected = {k: (v.shape, v.dtype) for k, v in real.items()}
  assert {k: (v.shape, v.dtype) for k, v in found['views'].items()} == expected
  assert found['tokens'].shape == (6, 512)


def test_a_batch_that_does_not_divide_is_named():
  model = registry.get('mc_llava').tiny()
  config = RunConfig(
    model=model,
    data=DataConfig(train='x', lengths=(96,)),
    training=TrainingConfig(steps=1, batch_size=3, optimizer=OptimizerConfig(learning_rate=1.0)),
  )
  mesh = jax.sharding.AbstractMesh((2, 1, 1, 1), ('data', 'fsdp', 'sequence', 'tensor'))
  with pytest.raises(UserError, match=r'batch_size=3 in .*accumulate=1 part.*is 3 row.*'
                     r'2 shards .*data=2.*batch_size=4, or a mesh of 1 shard.*tensor=2'):
    programs.train_program(mesh, config=to_dict(config), image=(80, 60))
  with pytest.raises(UserError, match='alone take'):
    batch_shapes(config, 4, length=4, image=(80, 60))
  with pytest.raises(UserError, match="found 'train'"):
    programs.serve_program(
      make_mesh({'data': 1}, devices=jax.devices()[:1]), config=config, what='train'
    )


def test_a_planned_answer_cuts_the_cache_by_heads_as_answers_do():
  """Cut by places, every token's attention would be added up over devices."""
  model = registry.get('mc_llava').tiny()
  config = RunConfig(model=model, data=DataConfig(train='x', lengths=(96,)),
                     training=TrainingConfig(steps=1, batch_size=4, optimizer=OptimizerConfig(
                       learning_rate=1.0)))
  mesh = jax.sharding.AbstractMesh((1, 2, 1, 2), ('data', 'fsdp', 'sequence', 'tensor'))
  plan = {what: programs.serve_program(mesh, config=config, what=what, length=96, new_tokens=32,
                                       image=(80, 60), platform='tpu')
          for what in ('prefill', 'decode')}
  cache = plan['decode'].args[3]
  heads = model.text.kv_heads
  assert {leaf.shape for leaf in jax.tree.leaves(cache)} == {(2, heads, 128, model.text.head_dim)}
  for laid in (jax.tree.map(lambda leaf: leaf.sharding, cache), plan['decode'].out_shardings[2],
               plan['prefill'].out_shardings[1]):
    assert {place.shard_shape((2, heads, 128, 16)) for place in jax.tree.leaves(laid)} == {
      (1, heads // 2, 128, 16)}
