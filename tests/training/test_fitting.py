"""The mesh that arithmetic chooses, beside what the compiler for TPUs said of seven recipes."""

import dataclasses
import json
import pathlib
import re
import shlex
import time

import pytest

from hrvlm_jax.cli import main as cli
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel import fitting as meshes
from hrvlm_jax.parallel.mesh import MeshConfig, mesh_config
from hrvlm_jax.parallel.topology import GIB
from hrvlm_jax.training import fitting, recipe, run_config
from hrvlm_jax.training.batches import batch_shapes
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.program import check_rows, micro_rows, outline_of

REPO = pathlib.Path(__file__).resolve().parents[2]
PLANS = re.findall(r'^hrvlm plan (--config .*)$', (REPO / 'docs' / 'plans.md').read_text(), re.M)


def load(name, **changes):
  return dataclasses.replace(run_config.load(RunConfig, name), **changes)


def test_arithmetic_is_near_the_compiler():
  """Every published plan: state within five per cent, the whole within a factor of 1.7."""
  assert len(PLANS) >= 7
  files = {}
  for path in (REPO / 'docs' / 'plans').glob('*.json'):
    report = json.loads(path.read_text())
    files[report.get('command', '').removeprefix('hrvlm plan ')] = report
  for line in PLANS:
    if '--slices' in line or '--config.' in line:  # one slice, the recipe as it is
      continue
    words = dict(zip(*[iter(shlex.split(line))] * 2, strict=True))
    config = load(words['--config'])
    report = files[line]
    side = tuple(map(int, words.get('--image', '1024x768').split('x')))
    length = int(words['--length']) if '--length' in words else None
    outline = outline_of(config)
    shapes = batch_shapes(config, micro_rows(config), length=length, image=side)
    begun = time.process_time()
    need = fitting.step_need(config, outline, mesh_config(report['mesh']), shapes)
    free = dataclasses.replace(config, mesh=MeshConfig())
    limit = report['memory']['usable_bytes']
    choice = fitting.chosen_mesh(free, outline, report['devices'], limit, shapes=shapes)
    assert time.process_time() - begun < 1
    compiled = report['memory']['bytes_per_device']
    arrays = need.parts['batch'] / 4  # part of the arguments, and counted generously
    state = need.parts['parameters'] + need.parts['optimizer']
    assert state < compiled['arguments'] * 1.05, line
    assert state + 3 * arrays > 0.7 * compiled['arguments'], line
    assert 0.6 < need.total / compiled['total'] < 1.7, (line, need.words)
    # The choice fits, unless the plan itself leaves too little free; nothing cut less does.
    assert choice.fits or compiled['total'] > (1 - meshes.SPARE) * limit, line
    for less in meshes.candidates(report['devices']):
      if less == choice.mesh:
        break
      if micro_rows(config) % (less.shape['data'] * less.shape['fsdp']) == 0:
        assert not meshes.Choice(less, fitting.step_need(free, outline, less, shapes), limit).fits
    assert choice.mesh.fsdp > 1 or choice.mesh.data == report['devices']


def test_what_does_not_fit_is_never_copied():
  config = load('llava_hr:7b,stage2', mesh=MeshConfig())
  outline = outline_of(config)
  # 8 devices of 80 GiB: 7B with moments are 81 GiB, so copies do not fit.
  choice = fitting.chosen_mesh(config, outline, 8, 80 * GIB)
  assert choice.mesh == MeshConfig(data=4, fsdp=2) or choice.mesh.fsdp > 2
  assert choice.fits and 'fsdp' in fitting.told(config, choice)[0]
  assert '% free' in fitting.told(config, choice)[0]
  # 8 devices of 16 GiB: nothing fits, the most cut one is named, with what would help.
  choice = fitting.chosen_mesh(config, outline, 8, 16 * GIB)
  assert not choice.fits and 'DOES NOT FIT' in '\n'.join(fitting.told(config, choice))
  assert choice.mesh.fsdp * choice.mesh.tensor == 8
  fitting.check_state(choice)
  with pytest.raises(UserError, match=r'data=8.*optimizer state are .* GiB a device, which has 16'):
    fitting.check_state(fitting.chosen_mesh(
      dataclasses.replace(config, mesh=MeshConfig(data=8)), outline, 8, 16 * GIB))


@pytest.mark.parametrize('total, parts, sizes', [
  (128, 16, {'data': 8, 'fsdp': 16}), (100, 5, {'fsdp': 8}), (6, 1, {'data': 4}),
  (96, 4, {'data': 16, 'tensor': 2}),
])
def test_a_batch_that_cannot_be_cut_is_refused_with_what_works(total, parts, sizes):
  config = load('llava_hr:7b,stage2')
  change = lambda **values: dataclasses.replace(
    config, training=dataclasses.replace(config.training, **values))
  config = change(batch_size=total, accumulate=parts)
  sizes = mesh_config({'data': 1} | sizes).shape
  with pytest.raises(UserError) as caught:
    check_rows(config, sizes)
  text = str(caught.value)
  assert f'training.batch_size={total}' in text and f'accumulate={parts}' in text
  assert all(f'{name}={size}' in text for name, size in sizes.items() if size > 1)
  for key, value in re.findall(r'--config\.training\.(\w+)=(\d+)', text):
    check_rows(change(**{key: int(value)}), sizes)
  if named := re.search(r'--mesh (\S+)', text):
    check_rows(config, mesh_config(dict(
      (k, int(v)) for k, v in (part.split('=') for part in named.group(1).split(',')))).shape)


def test_every_published_recipe_takes_a_mesh():
  for name in recipe.names():
    for mesh in ({'fsdp': 8}, {'fsdp': 4, 'data': 2}):
      overrides = [(f'mesh.{axis}', str(size)) for axis, size in ({'data': 1} | mesh).items()]
      found = run_config.load(RunConfig, name, overrides).mesh
      assert found.resolve(8).shape == mesh_config({'data': 1} | mesh).shape, name
    run_config.load(RunConfig, name, [('mesh.fsdp', '8')])


def test_plan_of_gpus_is_arithmetic_and_says_so(tmp_path, capsys):
  out = tmp_path / 'report.json'
  command = ['plan', '--config', 'llava_hr:7b,stage2', '--topology', 'h100:8']
  assert cli.run([*command, '--json', str(out)]) == 0
  printed = capsys.readouterr().out
  assert 'BY ARITHMETIC, nothing was compiled' in printed and 'mesh fsdp=8' in printed
  assert 'bucket lengths 1280' in printed
  report = json.loads(out.read_text())
  assert report['effort'] == 'arithmetic' and report['fits'] and report['mesh']['fsdp'] == 8
  with pytest.raises(UserError, match=r'batch_size=128 in training.accumulate=16 .* is 8 row'):
    cli.run([*command, '--mesh', 'data=2,fsdp=8', '--topology', 'h100:16'])
  assert cli.run([*command, '--mesh', 'data=8']) == 1
  assert 'DOES NOT FIT' in capsys.readouterr().out
