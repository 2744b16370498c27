"""An objective and an evaluator of one's own: a file outside the package and one line each."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.training import evaluators, loop, objectives, run_config
from hrvlm_jax.training.batches import batch_shapes
from hrvlm_jax.training.config import RunConfig, TrainingConfig
from hrvlm_jax.training.evaluators import evaluators_of
from hrvlm_jax.training.metrics import read_metrics

REPO = pathlib.Path(__file__).resolve().parents[2]

# Next tokens with a cost of large hidden states, whose bound is kept after every update; what is
# measured is the norm of the parameters and an answer.
TOY = """
import dataclasses

import jax
import jax.numpy as jnp

from hrvlm_jax.systems.objective import ObjectiveOptions
from hrvlm_jax.training.evaluators import Evaluator, EvaluatorOptions
from hrvlm_jax.training.next_token import NextToken


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalmOptions(ObjectiveOptions):
  name: str = 'calm'
  weight: float = 0.5
  bound: float = 0.01


class Calm(NextToken):
  Options = CalmOptions
  evaluator = 'norm'

  def loss(self, fn, params, batch, *, key=None, **options):
    total, count = super().loss(fn, params, batch, key=key, **options)
    size = sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params['projector']))
    return total + self.options.weight * size * count, count

  def after_update(self, leaves):
    bound = self.options.bound
    return {path: jnp.clip(leaf, -bound, bound) if path.startswith('projector/') else leaf
            for path, leaf in leaves.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormOptions(EvaluatorOptions):
  name: str = 'norm'
  label: str = 'norm'
  rows: int | None = None
  overlays: int = 0
  power: int = 1


class Norm(Evaluator):
  Options = NormOptions

  def prepare(self, run, *, layout, workdir):
    self.model = run.model

  def run(self, params, step):
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(params['projector']))
    return {'norm_largest': size ** self.options.power}
"""

CONFIG = """
import json
import pathlib
import sys

import ml_collections
import numpy as np
from PIL import Image

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.systems.mc_llava.encoder import MCLlavaConfig
from hrvlm_jax.vision.vit import ViTConfig

MODEL = ModelConfig(
  system='mc_llava',
  encoder=MCLlavaConfig(
    vision=ViTConfig(image_size=12, patch_size=4, width=16, depth=1, heads=2, mlp_width=16),
    max_crops=4, num_tokens=8, window=12, growth=2, view_buckets=(1, 5)),
  text=language.phi(vocab_size=264, width=16, depth=1, heads=2, mlp_width=16),
  projector=ProjectorConfig(n_in=16, n_out=16))


def get_config(data):
  path = pathlib.Path(data)
  if not path.exists():
    rng, rows = np.random.default_rng(0), []
    for i in range(7):
      name = f'{i}.png'
      pixels = rng.integers(0, 256, (20, 20 + 7 * i, 3), dtype=np.uint8)
      Image.fromarray(pixels).save(path.parent / name)
      turns = [{'from': 'human', 'value': '<image>\\nWhat?'}, {'from': 'gpt', 'value': f'A{i}'}]
      rows.append({'id': str(i), 'image': name, 'conversations': turns})
    path.write_text(json.dumps(rows))
  config = ml_collections.ConfigDict()
  config.model = to_dict(MODEL)
  config.data = dict(train=data, eval=data, lengths=(64,))
  config.training = dict(
    steps=4, batch_size=4, log_every=1, checkpoint_every=2, objective='calm', mfu=False,
    optimizer=dict(learning_rate=1e-2, schedule='constant'), evaluators=(
      dict(name='answers', rows=5, overlays=1, batch_size=3, max_new_tokens=4),
      dict(name='norm', every=2, power=2)))
  return config
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
  """The module of a user, known by one line each, and the path of a run config."""
  monkeypatch.syspath_prepend(str(tmp_path))
  (tmp_path / 'calm_toy.py').write_text(TOY)
  (tmp_path / 'run.py').write_text(CONFIG)
  monkeypatch.setattr(objectives.OBJECTIVES, '_known', dict(objectives.OBJECTIVES._known))
  monkeypatch.setattr(evaluators.EVALUATORS, '_known', dict(evaluators.EVALUATORS._known))
  objectives.register('calm', 'calm_toy:Calm')
  evaluators.register('norm', 'calm_toy:Norm')
  return f'{tmp_path / "run.py"}:{tmp_path / "train.json"}'


def test_it_is_configured_trained_resumed_and_evaluated(toy, tmp_path):
  config = run_config.load(RunConfig, toy, [('training.objective.weight', '0.25')])
  t = config.training
  assert (t.objective.name, t.objective.weight, t.objective.bound) == ('calm', 0.25, 0.01)
  assert from_dict(RunConfig, to_dict(config)) == config
  assert batch_shapes(config, 2, image=(20, 20)).length == 64
  ended = loop.train(run_config.load(RunConfig, toy, [('training.steps', '2')]), tmp_path / 'run',
                     progress=False)
  assert ended.step == 2
  ended = loop.train(run_config.load(RunConfig, toy), tmp_path / 'run', progress=False)
  assert ended.step == 4 and np.isfinite(ended.loss)
  whole = loop.train(run_config.load(RunConfig, toy, [('training.accumulate', '2')]),
                     tmp_path / 'parts', progress=False)
  np.testing.assert_allclose(whole.loss, ended.loss, rtol=1e-3)
  largest = [(row['step'], row['norm_largest']) for row in read_metrics(tmp_path / 'run')
             if 'norm_largest' in row]
  assert [step for step, _ in largest] == [2, 4]
  # The bound of the one, to the power of the other.
  np.testing.assert_allclose(largest[-1][1], 0.01**2, rtol=1e-5)
  rows = [row for row in read_metrics(tmp_path / 'run') if 'eval_accuracy' in row]
  assert [row['step'] for row in rows] == [2, 4] and rows[-1]['eval_accuracy'] == 0
  answers = (tmp_path / 'run' / 'evaluation' / '4' / 'answers.jsonl').read_text().splitlines()
  assert [json.loads(line)['expected'] for line in answers] == ['A0', 'A1', 'A2', 'A3', 'A4']


def test_the_environment_names_it_for_every_command(tmp_path):
  (tmp_path / 'calm_toy.py').write_text(TOY)
  (tmp_path / 'run.py').write_text(CONFIG)
  surroundings = os.environ | {
    'HRVLM_OBJECTIVES': 'calm=calm_toy:Calm', 'HRVLM_EVALUATORS': 'norm=calm_toy:Norm',
    'PYTHONPATH': f'{tmp_path}{os.pathsep}{REPO}'}
  done = subprocess.run(
    [sys.executable, '-m', 'hrvlm_jax.cli', 'train', '--quiet', '--config',
     f'{tmp_path / "run.py"}:{tmp_path / "train.json"}', '--workdir', str(tmp_path / 'run'),
     '--config.training.steps=1', '--config.training.evaluators=()',
     '--config.training.eval_every=1'],
    env=surroundings, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  assert any('norm_largest' in row for row in read_metrics(tmp_path / 'run'))


def test_names_are_checked_when_a_config_is_made(toy):
  with pytest.raises(UserError, match=r'objective next_tokens \(nearest known: next_token\)'):
    TrainingConfig(steps=1, batch_size=1, optimizer=None, objective='next_tokens')
  with pytest.raises(UserError, match='unknown key config.training.objective.wait'):
    run_config.load(RunConfig, toy, [('training.objective.wait', '1')])
  with pytest.raises(UserError, match='unknown evaluator norms'):
    run_config.load(RunConfig, toy, [('training.evaluators', "({'name': 'norms'},)")])
  plain = run_config.load(RunConfig, str(REPO / 'configs' / 'tiny' / 'ps3.py'),
                          [('training.objective', 'next_token')])
  assert to_dict(plain)['training']['objective'] == {'name': 'next_token'}
  config = run_config.load(RunConfig, toy, [
    ('training.evaluators', "({'name': 'answers'}, {'name': 'needle'})")])
  with pytest.raises(UserError, match="the labels \\['eval', 'eval'\\]"):
    evaluators_of(config)


PROGRAM = textwrap.dedent("""
  import json, sys
  import jax
  from hrvlm_jax.parallel import distributed
  from hrvlm_jax.parallel.layout import Layout
  from hrvlm_jax.training import run_config
  from hrvlm_jax.training.config import RunConfig
  from hrvlm_jax.training.answers import Answers, AnswersOptions
  from hrvlm_jax.vlm import model as vlm
  import pathlib
  port, process, folder = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
  processes = int(sys.argv[4])
  if processes > 1:
    distributed.initialize(coordinator=f'localhost:{port}', num_processes=processes,
                           process_id=process, timeout=60)
  assert jax.process_count() == processes and jax.device_count() == 4
  config = run_config.load(RunConfig, f'{folder}/run.py:{folder}/train.json',
                           [('training.objective', 'next_token'), ('training.evaluators', '()')])
  fn = vlm.build(config.model)
  class Seen(Answers):
    opened = set()
    def _images(self, index):
      self.opened.add(index)
      return super()._images(index)
  found = []
  for shape in ({'data': 4}, {'fsdp': 2, 'tensor': 2}):
    layout = Layout(shape)
    places = layout.state_shardings({'params': fn.abstract})['params']
    params = layout.make(fn.init, places, jax.random.key(3))
    evaluator = Seen(AnswersOptions(overlays=0, max_new_tokens=6, batch_size=4))
    evaluator.opened.clear()
    workdir = folder / f'{processes}_{process}_{len(found)}'
    evaluator.prepare(config, layout=layout, workdir=workdir)
    values = evaluator.run(params, 1)
    path = workdir / 'evaluation' / '1' / 'answers.jsonl'
    found.append({'opened': sorted(evaluator.opened), 'accuracy': values['eval_accuracy'],
                  'rows': path.read_text() if path.exists() else None})
  print('FOUND ' + json.dumps(found), flush=True)
  distributed.shutdown()
""")


def test_two_processes_share_the_questions_and_agree(tmp_path, port):
  """On two processes of two devices, over a data and a tensor axis, and on one of four."""
  (tmp_path / 'run.py').write_text(CONFIG)

  def start(processes):
    surroundings = dict(os.environ, JAX_PLATFORMS='cpu', PYTHONPATH=str(REPO),
                        JAX_NUM_CPU_DEVICES=str(4 // processes))
    surroundings.pop('XLA_FLAGS', None)
    return [subprocess.Popen(
      [sys.executable, '-c', PROGRAM, str(port), str(i), str(tmp_path), str(processes)],
      env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
      for i in range(processes)]

  def results(started):
    out = [process.communicate(timeout=300)[0] for process in started]
    assert all('FOUND ' in text for text in out), '\n'.join(out)
    return [json.loads(text.split('FOUND ')[1].splitlines()[0]) for text in out]

  one, = results(start(1))
  first, second = results(start(2))
  for number in (0, 1):
    assert one[number]['opened'] == list(range(7))
    assert first[number]['rows'] == one[number]['rows'] and second[number]['rows'] is None
    assert len(first[number]['rows'].splitlines()) == 7
    assert first[number]['accuracy'] == second[number]['accuracy'] == one[number]['accuracy']
  # Rows 0, 1 of a batch of four lie on the first process; the last batch is filled up with row 6.
  assert (first[0]['opened'], second[0]['opened']) == ([0, 1, 4, 5], [2, 3, 6])
