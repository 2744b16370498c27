"""Every analysis of `hrvlm analyse` over tiny models and the made-up samples."""

import json
from pathlib import Path

import jax
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint import store
from hrvlm_jax.cli.main import main
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.evaluation.analysis import ANALYSES
from hrvlm_jax.evaluation.runner import Model, Options, Setup, evaluate
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems import registry
from hrvlm_jax.vlm import model as vlm

SAMPLES = Path(__file__).parents[1] / 'evaluation/samples'
OCR = SAMPLES / 'textvqa/TextVQA_Rosetta_OCR_v0.2_val.json'


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """System -> folder of its tiny model with random weights, made once."""
  made = {}

  def make(system):
    if system not in made:
      config, rng = registry.get(system).tiny(), np.random.default_rng(0)
      fill = lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32)
      made[system] = tmp_path_factory.mktemp(system) / 'model'
      files = {f'tokenizer/{name}': data for name, data in tokenizer_of('byte').files.items()}
      store.save_params(made[system], jax.tree.map(fill, vlm.build(config).abstract),
                        {'model': to_dict(config)}, extra_files=files)
    return str(made[system])

  return make


def run(name, capsys, **options):
  """The lines that an analysis prints."""
  argv = ['analyse', name]
  for key, value in options.items():
    values = value if isinstance(value, (list, tuple)) else [value]
    argv += ['--' + key.replace('_', '-'), *map(str, values)]
  status = main(argv)
  captured = capsys.readouterr()
  assert status == 0, captured.err
  return captured.out.splitlines()


def test_curve(checkpoint, capsys, tmp_path):
  lines = run('curve', capsys, checkpoint=checkpoint('single_view'), data=SAMPLES / 'needle',
              out=tmp_path, benchmark='needle', x='fastv.ratio',
              knobs=['fastv.ratio=0,0.75', 'fastv.layer=1'], max_new_tokens=2, batch_size=3)
  assert [line.split(':')[0] for line in lines] == [
    'fastv.layer 1, fastv.ratio 0', 'fastv.layer 1, fastv.ratio 0.75']
  assert len((tmp_path / 'curve.csv').read_text().splitlines()) == 3
  assert (tmp_path / 'curve.png').stat().st_size > 1000


def test_resolution(checkpoint, capsys, tmp_path):
  lines = run('resolution', capsys, checkpoint=checkpoint('single_view'), data=SAMPLES / 'needle',
              out=tmp_path, benchmark='needle', sides=[8, 32], max_new_tokens=2, batch_size=3)
  assert lines[-2:] == ['side 8: enough for 0.0%', 'side 32: enough for 0.0%']
  found = json.loads((tmp_path / 'resolution.json').read_text())
  assert found['solved'] == 0 and found['median'] is None and len(found['sides']) == 3


def test_pca(checkpoint, capsys, tmp_path):
  rng = np.random.default_rng(0)
  for number in range(2):
    pixels = rng.integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f'{number}.png')
  lines = run('pca', capsys, checkpoint=checkpoint('single_view'), out=tmp_path / 'o.png',
              images=[tmp_path / '0.png', tmp_path / '1.png'], height=48)
  assert [line.split(':')[0] for line in lines] == ['component 1', 'component 2', 'component 3']
  page = np.asarray(Image.open(tmp_path / 'o.png'))
  assert page.shape[:2] == (96, 72 + 4 + 48)
  assert page[:48, 76:].std() > 20  # colours, not one colour


def test_sizes(capsys, tmp_path):
  answers = {'before': ['nokia', 'x', 'stop'], 'after': ['nokia', '2', 'stop']}
  for name, texts in answers.items():
    left = iter(texts)
    answer = lambda pairs, left=left: [next(left) for _ in pairs]
    evaluate('textvqa', Model(setup=Setup(model=name), answer=answer), data=SAMPLES / 'textvqa',
             out=tmp_path / name, options=Options(batch_size=1, progress=False))
  lines = run('sizes', capsys, data=SAMPLES / 'textvqa', boxes=OCR, before=tmp_path / 'before',
              after=tmp_path / 'after', out=tmp_path / 'changes.json')
  assert lines[0].startswith('fine') and '+0.0 %' in lines[0]
  assert json.loads((tmp_path / 'changes.json').read_text())[1]['after'] == 1


def test_attention(checkpoint, capsys, tmp_path):
  lines = run('attention', capsys, checkpoint=checkpoint('pheye'), data=SAMPLES / 'textvqa',
              out=tmp_path / 'shares.json', benchmark='textvqa', boxes=OCR, max_new_tokens=3)
  found = json.loads((tmp_path / 'shares.json').read_text())
  assert len(lines) == len(found['layers']) and found['n'] + found['empty'] == 3
  assert all(0 < share < 1 for share in found['layers'])
  assert set(found['tertiles']) == {'fine', 'medium', 'broad'}


def test_cost(checkpoint, capsys):
  lines = run('cost', capsys)
  assert any(line.startswith('(3) / (4), I = 2: 12.06') and line.endswith('(paper: 12.1)')
             for line in lines)
  lines = run('cost', capsys, checkpoint=checkpoint('single_view'), width=90, height=50)
  assert lines[0].startswith('64 image tokens and 64 of text, 64 new ones: ')
  assert 'cache of 191 positions' in lines[-1]
  assert main(['analyse', 'cost', '--checkpoint', checkpoint('pheye')]) == 2
  assert 'stand in the prompt' in capsys.readouterr().err


@pytest.mark.parametrize('name', ANALYSES)
def test_every_analysis_explains_itself(name, capsys):
  with pytest.raises(SystemExit) as caught:
    main(['analyse', name, '--help'])
  assert caught.value.code == 0
  assert f'usage: hrvlm analyse {name}' in capsys.readouterr().out


def test_unknown_analysis(capsys):
  assert main(['analyse', 'pac']) == 2
  assert 'unknown analysis pac (nearest known: pca)' in capsys.readouterr().err
