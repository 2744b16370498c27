"""The training loop on a very small MC-LLaVA: metrics, stops, starts, hand-over."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language import config as language
from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.systems.mc_llava.encoder import MCLlavaConfig
from hrvlm_jax.training import determinism, loop, saving
from hrvlm_jax.training.batches import make_batches, picture_words
from hrvlm_jax.training.config import DataConfig, Group, OptimizerConfig, RunConfig, TrainingConfig
from hrvlm_jax.training.metrics import MetricsWriter, read_metrics
from hrvlm_jax.training.program import assemble
from hrvlm_jax.training.start import initial_params
from hrvlm_jax.vision.vit import ViTConfig
from hrvlm_jax.vlm import model as vlm

VISION = ViTConfig(image_size=12, patch_size=4, width=16, depth=2, heads=2, mlp_width=16)
MODEL = ModelConfig(
  system='mc_llava',
  encoder=MCLlavaConfig(vision=VISION, max_crops=4, num_tokens=8, window=12, growth=2,
                        view_buckets=(1, 5)),
  text=language.phi(vocab_size=264, width=16, depth=2, heads=2, mlp_width=16),
  projector=ProjectorConfig(n_in=16, n_out=16))
GROUPS = (Group(pattern='vision/tower/.*', frozen=True), Group(pattern='.*'))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """Eight pictures with a question and an answer each."""
  root = tmp_path_factory.mktemp('data')
  rng, rows = np.random.default_rng(0), []
  for i in range(8):
    Image.fromarray(rng.integers(0, 256, (20, 20 + i, 3), dtype=np.uint8)).save(root / f'{i}.png')
    turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': f'A{i}'}]
    rows.append({'id': str(i), 'image': f'{i}.png', 'conversations': turns})
  (root / 'train.json').write_text(json.dumps(rows))
  return str(root / 'train.json')


def config(data, *, model=MODEL, eval=None, **training):
  training = {'steps': 6, 'batch_size': 4, 'log_every': 1, 'checkpoint_every': 2, 'groups': GROUPS,
              'optimizer': OptimizerConfig(learning_rate=1e-3), **training}
  return RunConfig(model=model, data=DataConfig(train=data, eval=eval, lengths=(64,)),
                   training=TrainingConfig(**training))


def losses(workdir):
  return {row['step']: row['loss'] for row in read_metrics(workdir) if 'loss' in row}


@pytest.fixture(scope='module')
def finished(data, tmp_path_factory):
  """A finished run with everything switched on, and its batches' host arrays."""
  workdir = tmp_path_factory.mktemp('finished')
  c = config(data, eval=data, eval_every=3, eval_images=3, eval_overlays=1, profile=(3, 4),
             deterministic=True)
  seen = []
  result = loop.train(c, workdir, progress=False, on_step=lambda step, _: seen.append(step))
  assert result.step == 6 and seen == [1, 2, 3, 4, 5, 6] and result.compilations == 1
  return workdir


def test_metrics(finished):
  rows = [row for row in read_metrics(finished) if 'loss' in row]
  assert [row['step'] for row in rows] == [1, 2, 3, 4, 5, 6]
  for row in rows:
    assert row['tokens_per_second'] > 0 and row['images_per_second'] > 0
    assert 0 <= row['input_wait_share'] <= 1 and 0 <= row['token_waste'] < 1
    assert row['compilations'] == 1 and row['recompilations'] == 0
    assert 0 < row['mfu'] < 1
    assert row.get('device_memory_gib', row.get('process_memory_gib')) > 0
  # 4 rows share 4 x 5 crop slots; small pictures leave some of them empty.
  assert all(0 <= row['crop_waste'] < 1 for row in rows)
  assert any((finished / 'tensorboard').iterdir())


def test_evaluation_keeps_answers_and_pictures(finished):
  rows = [row for row in read_metrics(finished) if 'eval_accuracy' in row]
  assert [row['step'] for row in rows] == [3, 6]
  for step in ('3', '6'):
    folder = finished / 'evaluation' / step
    answers = [json.loads(line) for line in (folder / 'answers.jsonl').read_text().splitlines()]
    assert [a['expected'] for a in answers] == ['A0', 'A1', 'A2']
    assert all(isinstance(a['answer'], str) and not a['correct'] for a in answers)
    assert Image.open(folder / '0.png').size == (20, 20)
    assert not (folder / '1.png').exists()


def test_the_profiled_window_is_there(finished):
  assert list((finished / 'profile').rglob('*.xplane.pb'))


def test_resumed_losses_are_the_same_bits(data, finished, tmp_path):
  """Stopped by SIGTERM after the third step: a checkpoint, PREEMPTED; then on to the end."""
  c = config(data, deterministic=True)

  def stop(step, _):
    if step == 3:
      os.kill(os.getpid(), signal.SIGTERM)

  result = loop.train(c, tmp_path, progress=False, on_step=stop)
  assert result.interrupted and result.step == 3 and (tmp_path / loop.PREEMPTED).exists()
  assert store.steps(tmp_path)[-1] == 3
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 5, "loss": 1.0}\n{"step": ')  # of a life that got further, and torn
  result = loop.train(c, tmp_path, progress=False)
  assert not result.interrupted and not (tmp_path / loop.PREEMPTED).exists()
  assert losses(tmp_path) == losses(finished)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(data):
  small = dataclasses.replace(MODEL, text=dataclasses.replace(MODEL.text, vocab_size=200))
  with pytest.raises(UserError, match='byte has ids up to .* model.text.vocab_size is 200; use'):
    make_batches(config(data, model=small))


def test_a_deterministic_run_refuses_what_would_change_its_bits(data, finished):
  record = json.loads((finished / determinism.RECORD).read_text())
  try:
    (finished / determinism.RECORD).write_text(json.dumps(record | {'devices': 77}))
    with pytest.raises(UserError, match='devices was 77, is .*deterministic=False'):
      loop.train(config(data, deterministic=True), finished, progress=False)
  finally:
    (finished / determinism.RECORD).write_text(json.dumps(record))


def test_threads_stay_those_of_the_first_start(tmp_path, monkeypatch):
  monkeypatch.setenv('NPROC', '3')
  assert determinism.pin_threads(tmp_path) == 3
  (tmp_path / determinism.RECORD).write_text('{"threads": 5}')
  assert determinism.pin_threads(tmp_path) == 5 and os.environ['NPROC'] == '5'


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_batch(data, tmp_path):
  c = config(data, checkpoint_every=1,
             optimizer=OptimizerConfig(learning_rate=1e30, clip_norm=None, warmup=2))
  with pytest.raises(UserError, match=r'step \d is bad: .*\); its batch is saved') as e:
    loop.train(c, tmp_path, progress=False)
  step = int(str(e.value).split('step ')[1][0])
  batch = np.load(tmp_path / f'bad_batch_{step}.npz')
  assert batch['tokens'].shape == (4, 64) and batch['views/pixels'].dtype == np.uint8
  assert step > 1 and f'steps 1 to {step - 1} of this start were finite' in str(e.value)
  # No checkpoint holds what the bad step left.
  assert store.steps(tmp_path)[-1] < step


def test_a_full_disk_does_not_end_a_run_at_once(data, tmp_path, monkeypatch):
  """One save fails, the next one works; three failures in a row end the run."""
  real, calls = store.TrainStore.save, []

  def save(self, step, *arguments):
    calls.append(step)
    if step in failing:
      raise UserError(f'cannot write the checkpoint {step}: the disk is full')
    return real(self, step, *arguments)

  monkeypatch.setattr(store.TrainStore, 'save', save)
  said = []
  monkeypatch.setattr(MetricsWriter, 'log', lambda self, text: said.append(text))
  failing = {4}
  loop.train(config(data), tmp_path / 'a', progress=False)
  assert calls == [2, 4, 6] and store.steps(tmp_path / 'a') == [2, 6]
  assert any('disk is full' in line and 'last good checkpoint is that of step 2' in line
             for line in said)
  failing, calls[:] = {3, 4, 5}, []
  c = config(data, steps=9, checkpoint_every=1)
  with pytest.raises(UserError, match='3 checkpoints in a row .* step 5, the last good .* step 2'):
    loop.train(c, tmp_path / 'b', progress=False)
  assert store.steps(tmp_path / 'b') == [1, 2] and calls == [1, 2, 3, 4, 5]
  failing = {6}
  with pytest.raises(UserError, match='the last checkpoint, of step 6, could not be written'):
    loop.train(config(data), tmp_path / 'a2', progress=False)


def test_storage_that_is_lost_in_the_middle(data, tmp_path, monkeypatch):
  """The background write fails as TensorStore reports it; the error comes one save later."""
  real, failures = store.TrainStore.wait, [0]

  def wait(self):
    real(self)
    if 2 in self.steps() and failures[0] < saving.ATTEMPTS:
      failures[0] += 1
      raise ValueError('NOT_FOUND: Error writing "gs://bucket/x": The specified bucket is gone')

  monkeypatch.setattr(store.TrainStore, 'wait', wait)
  with pytest.raises(UserError, match='bucket is gone.*last good checkpoint'):
    loop.train(config(data, steps=20, checkpoint_every=1), tmp_path, progress=False)
  assert 2 in store.steps(tmp_path)


def test_hand_over_is_said_aloud(data, tmp_path, capsys):
  """Stage 2 trains the tower, has a finer position table, and adapters that are new."""
  loop.train(config(data, steps=1), tmp_path / 'one', progress=False)
  finer = dataclasses.replace(
    MODEL,
    encoder=dataclasses.replace(MODEL.encoder, num_tokens=8, window=16, vision=dataclasses.replace(
      VISION, image_size=16)),
    text=dataclasses.replace(MODEL.text, depth=2))
  c = config(data, model=finer, steps=1, groups=(
    Group(pattern='language/.*', frozen=True), Group(pattern='.*')),
    init_from=str(tmp_path / 'one'))
  capsys.readouterr()
  loop.train(c, tmp_path / 'two', progress=False)
  said = capsys.readouterr().out
  assert 'position table vision/tower/pos_embed is resampled from 3 x 3 to 4 x 4' in said
  assert 'parameters that were frozen in' in said and 'are trained now: vision/tower/' in said
  assert 'are frozen now: language/' in said
  before, after = (store.load_params(tmp_path / x) for x in ('one', 'two'))
  np.testing.assert_array_equal(before['language']['norm']['scale'],
                                after['language']['norm']['scale'])


def test_only_what_a_start_has_not_is_made(data, tmp_path, monkeypatch):
  """Fresh parameters are those of a run from nothing; of a whole start nothing is made at all."""
  def start(**training):
    run = config(data, **training)
    lay = Layout(run.mesh)
    return paths.flatten(initial_params(assemble(run, lay.mesh), lay, print))

  random = start()
  taken = {p: np.asarray(x) + 1 for p, x in random.items() if not p.startswith('projector/')}
  store.save_params(tmp_path / 'some', paths.unflatten(taken), {})
  store.save_params(tmp_path / 'all', paths.unflatten(
    {p: np.asarray(x) + 1 for p, x in random.items()}), {})
  found = start(init_from=str(tmp_path / 'some'), init_allow=('projector/.*',))
  assert list(found) == list(random)
  for path, leaf in found.items():
    np.testing.assert_array_equal(leaf, taken.get(path, random[path]))
  monkeypatch.setattr(Layout, 'make', None)
  whole = start(init_from=str(tmp_path / 'all'))
  assert all(np.array_equal(whole[path], random[path] + 1) for path in random)


@pytest.mark.full('training')
def test_frozen_leaves_keep_the_dtype_of_their_file(data, tmp_path):
  fn = vlm.build(MODEL)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), jax.jit(fn.init)(jax.random.key(0)))
  store.save_params(tmp_path / 'start', params, {})
  run = config(data, steps=1, dtype='bfloat16', init_from=str(tmp_path / 'start'),
               optimizer=OptimizerConfig(learning_rate=1e-3, ema=0.9))
  states = []
  loop.train(run, tmp_path / 'run', progress=False, on_step=lambda _, state: states.append(
    jax.tree.map(lambda x: x.dtype, state)))
  dtypes = paths.flatten(states[0]['params'])
  for path, dtype in dtypes.items():
    assert dtype == (jnp.bfloat16 if path.startswith('vision/tower/') else jnp.float32), path
  moments = {str(d) for path, d in store.flatten(states[0]['opt']).items()}
  assert moments <= {'float32', 'int32'}
  assert set(states[0]['ema']) == {p for p in dtypes if not p.startswith('vision/tower/')}
  # A resumed run keeps them, also without the start; what the config asks for wins.
  kept = store.describe(tmp_path / 'run')
  assert kept['vision/tower/pos_embed'].dtype == jnp.bfloat16
  again = dataclasses.replace(run, training=dataclasses.replace(
    run.training, steps=2, init_from=None))
  loop.train(again, tmp_path / 'run', progress=False, on_step=lambda _, state: states.append(
    jax.tree.map(lambda x: x.dtype, state)))
  assert states[1] == states[0]
  wide = dataclasses.replace(run, training=dataclasses.replace(
    run.training, frozen_dtype='float32'))
  loop.train(wide, tmp_path / 'wide', progress=False)
  assert store.describe(tmp_path / 'wide')['vision/tower/pos_embed'].dtype == jnp.float32


def test_the_state_is_donated(data, tmp_path):
  """What a step got is gone after it: parameters and moments exist once."""
  previous = []

  def look(step, state):
    if previous:
      leaves = jax.tree.leaves({k: previous[-1][k] for k in ('params', 'opt')})
      assert all(leaf.is_deleted() for leaf in leaves)
    previous.append(state)

  loop.train(config(data, steps=3, checkpoint_every=10), tmp_path, progress=False, on_step=look)
  assert len(previous) == 3


def test_weights_and_biases(data, tmp_path, monkeypatch):
  class Run:
    def __init__(self, **options):
      self.options, self.rows, self.finished = options, [], False
      runs.append(self)

    def log(self, values, step):
      self.rows.append((step, values['loss']))

    def finish(self):
      self.finished = True

  runs: list[Run] = []
  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=Run))
  loop.train(config(data, steps=2, wandb='project'), tmp_path, progress=False)
  loop.train(config(data, steps=3, wandb='project'), tmp_path, progress=False)
  assert [row[0] for run in runs for row in run.rows] == [1, 2, 3] and runs[0].finished
  assert runs[0].options['id'] == runs[1].options['id'] and runs[0].options['project'] == 'project'
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(UserError, match='Weights & Biases is not installed'):
    loop.train(config(data, steps=4, wandb='project'), tmp_path, progress=False)


def test_evaluation_that_cannot_be_made(data, tmp_path):
  with pytest.raises(UserError, match='data.eval names no evaluation data'):
    loop.train(config(data, eval_every=1), tmp_path, progress=False)
  with pytest.raises(UserError, match='no evaluation inside a run'):
    loop.train(config(data, eval=data, eval_every=1, objective='ps3_pretrain'), tmp_path,
               progress=False)


def test_another_model_in_the_same_work_directory(data, finished):
  other = dataclasses.replace(MODEL, text=dataclasses.replace(MODEL.text, mlp_width=32))
  with pytest.raises(UserError, match='model.text.mlp_width was 16, is 32'):
    loop.train(config(data, model=other), pathlib.Path(finished), progress=False)


def test_the_memory_of_large_pictures_is_said(data):
  raised = config(data)
  assert picture_words(raised) == []
  raised = dataclasses.replace(raised, data=dataclasses.replace(
    raised.data, max_pixels=10**9, workers=3))
  (said,) = picture_words(raised)
  assert 'data.max_pixels=1,000,000,000' in said and '6.5 GiB' in said and '3 data workers' in said


@pytest.mark.parametrize('changed, words', [
  ({'clip_norm': None}, r'optimizer.clip_norm was 1.0, is None.*clip_norm=1e9'),
  ({'weight_decay': 0.1}, r'optimizer.weight_decay was 0.0, is 0.1'),
  ({'ema': 0.9}, r'optimizer.ema was None, is 0.9'),
  ({'name': 'muon'}, r"optimizer.name was 'adamw', is 'muon'"),
  ({'name': 'muon', 'clip_norm': None}, r'optimizer.name was .*; training.optimizer.clip_norm was'),
])
def test_settings_that_change_the_optimizers_state(data, finished, changed, words):
  other = OptimizerConfig(learning_rate=1e-3, **changed)
  before = contents(pathlib.Path(finished))
  with pytest.raises(UserError, match=words):
    loop.train(config(data, optimizer=other, steps=8), pathlib.Path(finished), progress=False)
  assert contents(pathlib.Path(finished)) == before  # nothing is written


@pytest.mark.full('training')
def test_the_advice_about_changed_settings_works(data, finished, tmp_path):
  """What the messages of a refused resume say: another number, another work directory."""
  shutil.copytree(finished, tmp_path / 'same')
  same = OptimizerConfig(learning_rate=1e-3, clip_norm=1e9)
  assert loop.train(config(data, optimizer=same, steps=7), tmp_path / 'same',
                    progress=False).step == 7
  other = config(data, optimizer=OptimizerConfig(learning_rate=1e-3, name='muon', ema=0.9),
                 steps=1, init_from=str(finished))
  other = dataclasses.replace(other, seed=9)
  assert loop.train(other, tmp_path / 'other', progress=False).step == 1


def contents(folder):
  """Every file below a folder: its bytes and when it was written."""
  return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
          for path in folder.rglob('*') if path.is_file()}


def test_records_of_starts_and_lines_of_a_log(data, finished, tmp_path, capsys, monkeypatch):
  """Refused: nothing changes. Changed: said, recorded by steps, and in the checkpoints."""
  shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
  before = contents(tmp_path)
  c = config(data, steps=8, deterministic=True)
  renamed = dataclasses.replace(c.model, chat='pheye')
  for changed, sentence in (
      (dataclasses.replace(c, seed=9), 'seed was 0, is 9'),
      (dataclasses.replace(c, model=renamed), 'another model'),
      (dataclasses.replace(c, data=dataclasses.replace(c.data, train='gone.json')), 'gone.json'),
      (config(data, steps=8, eval='gone.json', eval_every=1), 'gone.json'),
      (config(data, steps=8, groups=(Group(pattern='vision/.*'),)), 'cover'),
      (config(data, steps=8, evaluators=({'name': 'gone'},)), 'gone')):
    with pytest.raises(UserError, match=sentence):
      loop.train(changed, tmp_path, progress=False)
    assert contents(tmp_path) == before, sentence
  # Another rate, but no step is left: said, and not recorded.
  rate = OptimizerConfig(learning_rate=5e-4)
  capsys.readouterr()
  said = 'training.optimizer.learning_rate was 0.001, is 0.0005'
  assert loop.train(config(data, steps=6, optimizer=rate), tmp_path, progress=False).loss is None
  assert said in capsys.readouterr().out
  assert json.loads((tmp_path / 'config.json').read_text())['training']['optimizer'][
    'learning_rate'] == 1e-3
  loop.train(config(data, steps=8, optimizer=rate, deterministic=True), tmp_path, progress='lines')
  printed = capsys.readouterr().out
  assert said in printed and 'training.steps was 6, is 8' in printed
  read = lambda path: json.loads((tmp_path / path).read_text())
  first, second = read('starts/000000.json'), read('starts/000006.json')
  assert (first['from_step'], first['to_step']) == (0, 6)
  assert (second['from_step'], second['to_step']) == (6, 8)
  assert second['changed']['training.optimizer.learning_rate'] == [1e-3, 5e-4]
  rates = [c['training']['optimizer']['learning_rate'] for c in (
    first['config'], second['config'], read('config.json'), store.load_config(
      tmp_path / 'checkpoints' / '6'), store.load_config(tmp_path / 'checkpoints' / '8'))]
  assert rates == [1e-3, 5e-4, 5e-4, 1e-3, 5e-4]
  # The log of a pod: what it runs on, then a line per step, compilation and checkpoint.
  for pattern in (
      r'^devices: \d+ x \S.* in 1 process\(es\): \S+ \d+$', r'^mesh data=1 .*% free \(parameters ',
      r'^batch 4 in 1 part\(s\), 4 row.*bucket lengths 64$',
      r'^step 7: compiled for tokens \[4, 64\].* in \d+\.\d s$',
      r'^step 8 of 8: loss \d\.\d+, \d+ tokens/s, MFU .+, input wait \d+\.\d%, 0:00:00 left$',
      r'^step 8: checkpoint written in \d'):
    assert re.search(pattern, printed, re.M), (pattern, printed)
  assert '\r' not in printed
