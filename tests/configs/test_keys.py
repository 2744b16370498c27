"""Every key of a run config acts: on the batch, the program of a step, or what a test looks at."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language import config as language
from hrvlm_jax.parallel.mesh import MeshConfig
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.systems.mc_llava.encoder import MCLlavaConfig
from hrvlm_jax.training.config import DataConfig, Group, OptimizerConfig, RunConfig, TrainingConfig
from hrvlm_jax.training.inspection import inspect_batch
from hrvlm_jax.training.optimizer import groups_of
from hrvlm_jax.training.program import outline_of
from hrvlm_jax.training.step import execution_of, make_train_step
from hrvlm_jax.vision.vit import ViTConfig
from tests import levels

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ModelConfig(
  system='mc_llava', projector=ProjectorConfig(n_in=16, n_out=16),
  encoder=MCLlavaConfig(
    vision=ViTConfig(image_size=12, patch_size=4, width=16, depth=1, heads=2, mlp_width=16),
    max_crops=0, num_tokens=8, window=12, growth=2, view_buckets=(1, 5)),
  text=language.phi(vocab_size=264, width=16, depth=1, heads=2, mlp_width=16,
                    residual_dropout=0.1))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Pictures that show how they are opened: transparent, turned by EXIF, large; two data sets."""
  folder = tmp_path_factory.mktemp('keys')
  rng = np.random.default_rng(0)
  for place in ('.', 'others'):
    (folder / place).mkdir(exist_ok=True)
    noise = lambda *shape: rng.integers(0, 256, shape, np.uint8)
    Image.fromarray(noise(12, 20, 4), 'RGBA').save(folder / place / '0.png')
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(64, 96, 3)).save(folder / place / '1.jpg', exif=exif, quality=95)
  for name, word in (('train', 'A'), ('other', 'B')):
    rows = [{'id': str(i), 'image': ('0.png', '1.jpg')[i % 2], 'conversations': [
      {'from': 'human', 'value': '<image>\nWhat is it?'},
      {'from': 'gpt', 'value': f'{word} {"long " * i}answer.'}]} for i in range(6)]
    (folder / f'{name}.json').write_text(json.dumps(rows))
  return folder


def base(folder):
  return RunConfig(
    model=MODEL, seed=0,
    data=DataConfig(train=str(folder / 'train.json'), lengths=(128, 256)),
    training=TrainingConfig(
      steps=10, batch_size=4, groups=(Group(pattern='vision/.*'), Group(pattern='.*')),
      mfu=False, optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)))


def batch(config) -> str:
  """What two batches are, or the sentence with which they are refused."""
  try:
    found = [inspect_batch(config, step, rows=0) for step in range(2)]
  except (UserError, ValueError) as error:
    return f'refused: {error}'
  leaves = jax.tree.leaves([one.batch for one in found])
  return str([(np.asarray(leaf).shape, np.asarray(leaf).tobytes()) for leaf in leaves]) + str(
    [len(one.faults) for one in found])


def program(config) -> str:
  """The step as JAX has traced it."""
  t = config.training
  try:
    outline = outline_of(config)
    groups = groups_of(t, outline.fn.abstract)
    step = make_train_step(outline.fn, t, groups, config.seed, ex=execution_of(t))
    shape = lambda *dims: jax.ShapeDtypeStruct((*(
      (t.accumulate,) if t.accumulate > 1 else ()), t.batch_size // t.accumulate, *dims), np.int32)
    rows = t.batch_size // t.accumulate
    lead = (t.accumulate,) if t.accumulate > 1 else ()
    views = {'pixels': ((rows, 12, 12, 3), np.uint8), 'coords': ((rows, 2), np.float32),
             'index': ((rows, 8), np.int32), 'valid': ((rows, 8), bool)}
    arrays = {'tokens': shape(32), 'visual_index': shape(32), 'labels': shape(32),
              'valid': jax.ShapeDtypeStruct((*lead, rows, 32), bool),
              'views': {k: jax.ShapeDtypeStruct((*lead, *s), d) for k, (s, d) in views.items()}}
    return str(jax.make_jaxpr(step)(outline.state, arrays))
  except (UserError, ValueError) as error:
    return f'refused: {error}'


# Key -> (another value, what else has to be so for it to act).
BATCH = {
  'train': ('other.json', {}), 'images': ('others', {}), 'lengths': ((192,), {}),
  'max_length': (20, {}), 'too_long': ('refuse', {'max_length': 20}),
  'slots': (8, {}), 'shuffle': (False, {}), 'order': ('grouped', {}),
  'exif': ('ignore', {'draw': {'max_crops': (1, 1)}}), 'alpha': ('white', {}),
  'max_pixels': (1000, {}), 'inexact_decode': (12, {}),
  'bad_rows': ('fatal', {'max_pixels': 1000}), 'boxes': (True, {}),
  'background': ({'side': (32, 40)}, {}), 'draw': ({'max_crops': (4, 4)}, {}),
  'split': ('test', {}), 'fields': ({'answer': 'x'}, {}), 'tokenizer': ('nowhere', {}),
  'group': ((1, 2), {'order': 'grouped'}),
  'packing': ({'rows': 2}, {'slots': None}),
}
PROGRAM = {
  'training': {
    'batch_size': (8, {}), 'accumulate': (2, {}), 'dtype': ('bfloat16', {}),
    'groups': ((Group(pattern='vision/.*', frozen=True), Group(pattern='.*')), {}),
    'frozen_dtype': ('bfloat16', {'groups': (Group(pattern='vision/.*', frozen=True),
                                             Group(pattern='.*'))}),
    'remat': ('layers', {}), 'layers': ('unrolled', {}),
    'loss_average': ('micro_batch', {'accumulate': 2}), 'loss_chunk': (8, {}),
    'on_bad_step': ('skip', {}), 'spike_norm': (2.0, {'on_bad_step': 'skip'}),
    'objective': ('two_pass', {}), 'steps': (20, {}),
  },
  'optimizer': {
    'learning_rate': (2e-3, {}), 'name': ('muon', {}), 'schedule': ('linear', {}),
    'warmup': (0.3, {}), 'warmup_from': (1, {'warmup': 0.3}), 'b1': (0.8, {}), 'b2': (0.99, {}),
    'eps': (1e-6, {}), 'weight_decay': (0.2, {}), 'clip_norm': (2.0, {}), 'ema': (0.9, {}),
  },
  'muon': {'b1': (0.8, {'name': 'muon'}), 'b2': (0.99, {'name': 'muon'}),
           'eps': (1e-6, {'name': 'muon'}), 'weight_decay': (0.2, {'name': 'muon'}),
           'learning_rate': (2e-3, {'name': 'muon'})},
  'group': {'learning_rate': (0.5, {}), 'decay': (False, {}), 'frozen': (True, {}),
            'pattern': ('projector/.*', {'frozen': True})},
  'run': {'seed': (1, {})},
}
# What neither a batch nor a program shows, and the test that looks at it.
ELSEWHERE = {
  'data': {
    'eval': 'training/test_in_run_evaluation.py', 'eval_split': 'data/test_splits.py',
    'eval_fields': 'data/test_splits.py', 'workers': 'data/test_pipeline.py',
    'shards': 'data/test_packed_rows.py'},
  'training': {
    'attention': 'core/test_splash.py', 'optimizer': 'configs/test_keys.py',
    'deterministic': 'training/test_loop.py', 'keep_heap': 'core/test_cpu.py',
    'profile': 'training/test_loop.py', 'mfu': 'training/test_loop.py',
    'wandb': 'training/test_loop.py', 'log_every': 'training/test_loop.py',
    'checkpoint_every': 'training/test_loop.py', 'keep': 'checkpoint/test_store.py',
    'keep_every': 'checkpoint/test_store.py', 'bad_steps': 'training/test_bad_steps.py',
    'stall_minutes': 'training/test_lock.py', 'evaluators': 'training/test_in_run_evaluation.py',
    'eval_every': 'training/test_in_run_evaluation.py',
    'eval_images': 'training/test_in_run_evaluation.py',
    'eval_overlays': 'training/test_in_run_evaluation.py', 'init_from': 'training/test_loop.py',
    'init_allow': 'training/test_bad_steps.py'},
  'run': {'model': 'systems/test_combinations.py', 'data': 'configs/test_keys.py',
          'training': 'configs/test_keys.py', 'mesh': 'parallel/test_mesh.py'},
  'mesh': dict.fromkeys(('data', 'fsdp', 'sequence', 'tensor', 'dcn_data'),
                        'parallel/test_mesh.py'),
}
CLASSES = {'data': DataConfig, 'training': TrainingConfig, 'optimizer': OptimizerConfig,
           'group': Group, 'run': RunConfig, 'mesh': MeshConfig}


def test_every_key_is_looked_at():
  for name, kind in CLASSES.items():
    known = {*(BATCH if name == 'data' else {}), *PROGRAM.get(name, {}),
             *ELSEWHERE.get(name, {})}
    assert known == {field.name for field in dataclasses.fields(kind)}, name
    assert not set(PROGRAM.get(name, {})) & set(ELSEWHERE.get(name, {}))
  for places in ELSEWHERE.values():
    for key, path in places.items():
      text = (ROOT / 'tests' / path).read_text()
      if path not in ('configs/test_keys.py', 'data/test_packed_rows.py', 'core/test_cpu.py',
                      'core/test_splash.py', 'systems/test_combinations.py'):
        assert key in text, (key, path)


def made(part, config, values):
  """The config with the values of one part changed."""
  if part == 'run':
    return dataclasses.replace(config, **values)
  if part in ('data', 'training'):
    kind = {'packing': 'packing', 'background': 'background', 'fields': 'fields'}
    return _replaced(config, part, values, kind)
  t = config.training
  if part == 'group':
    first = dataclasses.replace(t.groups[0], **values)
    groups = (first, *t.groups[1:])
    return dataclasses.replace(config, training=dataclasses.replace(t, groups=groups))
  optimizer = dataclasses.replace(t.optimizer, **values)
  return dataclasses.replace(config, training=dataclasses.replace(t, optimizer=optimizer))


def _replaced(config, part, values, kinds):
  from hrvlm_jax.data.background import PasteOnBackground
  from hrvlm_jax.data.packing import Packing
  from hrvlm_jax.data.rows import Fields

  classes = {'packing': Packing, 'background': PasteOnBackground, 'fields': Fields}
  values = {key: classes[key](**value) if key in kinds and isinstance(value, dict) else value
            for key, value in values.items()}
  return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})


@pytest.mark.parametrize('key', levels.rows('training', BATCH, first=('alpha', 'split', 'draw')))
def test_a_key_of_the_data_changes_the_batch(key, folder):
  value, needed = BATCH[key]
  if key in ('train', 'images'):
    value = str(folder / value)
  before = made('data', base(folder), needed)
  assert batch(made('data', before, {key: value})) != batch(before)


STEPS = [(part, key) for part, keys in PROGRAM.items() for key in keys]


@pytest.mark.parametrize('part, key', levels.rows('training', STEPS, first=[
  ('muon', 'b1'), ('muon', 'eps'), ('optimizer', 'b2')]))
def test_a_key_of_the_training_changes_the_program(part, key, folder):
  value, needed = PROGRAM[part][key]
  before = made(part, base(folder), needed)
  found, now = program(before), program(made(part, before, {key: value}))
  assert not found.startswith('refused'), found
  assert now != found
