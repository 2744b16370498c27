"""Where releases answer, by arithmetic."""

import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from hrvlm_jax.cli import main as cli
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel import fitting
from hrvlm_jax.parallel.mesh import MeshConfig
from hrvlm_jax.parallel.topology import parse
from hrvlm_jax.planning import answering
from hrvlm_jax.systems import registry
from hrvlm_jax.training import run_config
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.vlm import laid, model as vlm, where

REPO = pathlib.Path(__file__).resolve().parents[2]
PAGE = REPO / 'docs' / 'answering.md'
TINY = str(REPO / 'configs' / 'tiny' / 'mc_llava.py')


@pytest.mark.full('plans')
def test_the_page_is_that_of_today():
  assert PAGE.read_text() == answering.page()


def test_every_release_has_its_smallest_slice():
  names = [name for name, _ in answering.releases()]
  systems = {config.system for _, config in answering.releases()}
  assert {'mc_llava', 'pheye', 'llava_hr', 'vila_hd'} <= systems
  for name in names:
    assert re.search(rf'^\| {re.escape(name)} \|.*\d+x\d+', PAGE.read_text(), re.M), name
  # 13B in bfloat16 are 26 GB: no chip of 16 GB, and less than four of them.
  config = next(c for n, c in answering.releases() if c.system == 'llava_hr' and c.text.depth == 40)
  assert not answering.answers_on(config, parse('v5e:1x1')).fits
  topology, choice = answering.smallest_slice(config, 'v5e')
  assert topology.chips == 4 and choice.mesh.tensor * choice.mesh.fsdp == 4
  params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(laid.held(config, 'bfloat16')))
  assert choice.need.parts['parameters'] == pytest.approx(2 * params / 4, rel=0.1)


def test_the_verb(capsys):
  command = ['plan', '--config', 'llava_hr:x_13b,stage2', '--step', 'answer']
  assert cli.run(command) == 0
  printed = capsys.readouterr().out
  assert 'BY ARITHMETIC' in printed and re.search(r'^v5e: v5e:2x2 \(4 chips\), mesh tensor=4',
                                                  printed, re.M)
  assert cli.run([*command, '--topology', 'v5e:1x1']) == 1
  assert 'DOES NOT FIT' in capsys.readouterr().out
  assert cli.run([*command, '--topology', 'v5e:2x2', '--mesh', 'fsdp=4']) == 0
  assert 'mesh fsdp=4' in capsys.readouterr().out
  for wrong, sentence in ((['--mesh', 'fsdp=4'], '--mesh needs --topology'),
                          (['--json', 'x', '--search'], 'leave out --search, --json'),
                          (['--slices', '2'], 'leave out --slices')):
    with pytest.raises(UserError, match=sentence):
      cli.run([*command, *wrong])


@pytest.mark.parametrize('step', ['answer', 'prefill', 'decode'])
def test_every_step_says_where_a_release_answers(step, capsys):
  assert cli.run(['plan', '--release', 'llava_1_5_7b', '--step', step]) == 0
  printed = capsys.readouterr().out
  for chip, shape in (('v5e', '2x2'), ('v5p', '2x2x1'), ('v6e', '1x1')):
    assert f'{chip}: {chip}:{shape} (' in printed, printed
  assert ('--topology SLICE' in printed) == (step != 'answer')


def test_rows_and_new_tokens_are_paid_for(capsys):
  """64 prompts of 7B need caches of 64 rows; a train step has its batch in the config."""
  command = ['plan', '--release', 'llava_1_5_7b', '--step', 'answer', '--topology', 'v5e:2x2']

  def cache(*more):
    cli.run([*command, '--mesh', 'data=1,tensor=4', *more])
    return float(re.search(r'cache ([\d.]+) GiB', capsys.readouterr().out)[1])

  one = cache('--rows', '1')
  assert cache() == one
  assert cache('--rows', '64') == pytest.approx(64 * one, rel=0.05)
  assert cache('--new-tokens', '4096') > 3 * one
  for wrong, sentence in ((['--step', 'train', '--rows', '8'], 'training.batch_size'),
                          (['--step', 'train', '--new-tokens', '8'], 'writes no new tokens'),
                          (['--rows', '0'], '--rows: found 0, expected at least 1')):
    with pytest.raises(UserError, match=sentence):
      cli.run(['plan', '--config', 'llava_hr:7b,stage2', *command[3:], *wrong])


def test_what_a_release_cannot_be(capsys):
  for wrong, sentence in (([], 'expected --step answer'),
                          (['--step', 'train', '--topology', 'v5e:2x2'], 'expected --step answer'),
                          (['--step', 'answer', '--config', 'pheye:x2_448,stage1'], 'both name'),
                          (['--step', 'answer', '--topology', 'v5e'], 'expected CHIP')):
    with pytest.raises(UserError, match=sentence):
      cli.run(['plan', '--release', 'llava_1_5_7b', *wrong])
  with pytest.raises(UserError, match='nearest known: llava_hr_7b'):
    cli.run(['plan', '--release', 'llava_hr_7c', '--step', 'answer'])


def test_a_model_answers_on_one_device_where_it_fits():
  config = registry.get('mc_llava').tiny()
  layout, choice = where.layout_for(config, mesh=None, rows=1, new_tokens=8)
  assert layout.mesh.size == 1 and choice.fits and choice.mesh == MeshConfig(data=1)
  assert 'answers on 1 x ' in where.told(layout, choice)
  need = lambda **asked: where.answer_need(
    config, laid.held(config, 'float32'), MeshConfig(data=1), rows=4, new_tokens=64, **asked)
  assert need(beams=4).parts['cache'] == 8 * need().parts['cache']
  assert fitting.size(need().total).endswith('MiB')


def test_a_step_holds_what_it_does_not_read(tmp_path):
  """A step of decoding reads no encoder, which lies on the device beside it all the same."""
  out = tmp_path / 'report.json'
  assert cli.run(['plan', '--config', TINY, '--step', 'decode', '--topology',
                  'cpu:1', '--mesh', 'data=1', '--json', str(out)]) == 0
  config = run_config.load(RunConfig, TINY, [])
  leaves = jax.tree.leaves(vlm.build(config.model).abstract)
  held = sum(leaf.size for leaf in leaves) * jnp.dtype(config.training.dtype).itemsize
  used = json.loads(out.read_text())['memory']['bytes_per_device']
  assert used['total'] >= used['arguments'] >= held
