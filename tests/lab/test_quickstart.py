"""The quickstart: its images, that both models meet the same terms, what is said of them."""

import dataclasses
import hashlib
import types

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.lab import quickstart
from hrvlm_jax.lab.experiment import Experiment, Interrupted
from hrvlm_jax.lab.needle import write

# Pinned: a change of these means that the kept accuracies are those of other images.
PIXELS = {'train': '6cae5a0691f4ac51', 'eval': 'fd6cec3d2b7df454'}
PHOTOGRAPHS = {'china.jpg': '8378025ad2519d64', 'flower.jpg': 'a77f6ec41e353afd'}


@pytest.mark.parametrize('split', PIXELS)
def test_the_images_are_the_same_on_every_machine(split, tmp_path):
  task = dataclasses.replace(quickstart.TASK, turns=3 if split == 'train' else 1)
  seed = quickstart.config().seed + (split == 'eval')
  write(task, tmp_path, 3, seed=seed, progress=False)
  digest = hashlib.sha256((tmp_path / 'needle.json').read_bytes())
  for path in sorted((tmp_path / 'images').iterdir()):
    digest.update(np.asarray(Image.open(path)).tobytes())
  assert digest.hexdigest()[:16] == PIXELS[split]


def test_the_photographs_are_those_of_the_kept_accuracies(tmp_path):
  quickstart.sample_photographs(tmp_path)
  assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
          for path in tmp_path.iterdir()} == PHOTOGRAPHS


def test_the_two_models_differ_in_their_views_alone():
  made = quickstart.config()
  one, other = (made.systems[name] for name in ('multi_crop', 'low_res'))
  encoder = dataclasses.replace(
    other.encoder, max_crops=one.encoder.max_crops, num_tokens=one.encoder.num_tokens)
  assert dataclasses.replace(other, encoder=encoder) == one
  # What the kept accuracies were measured with.
  assert (made.train_images, made.eval_images, made.train_steps, made.batch_size, made.turns,
          made.encoder.steps, made.lengths) == (4000, 500, 1000, 32, 3, 1500, (128, 192))


def test_the_table_has_a_row_per_model():
  sizes = {'small': 0.25, 'medium': 0.5, 'large': 0.75}
  text = quickstart.table({
    'accuracy': {'multi_crop': 0.974, 'low_res': 0.052}, 'chance': 0.043,
    'accuracy_by_size': {'multi_crop': sizes, 'low_res': sizes},
    'accuracy_on_photographs': {'multi_crop': 0.9, 'low_res': 0.05}})
  lines = text.splitlines()
  assert lines[1].split() == ['multi', 'crop', '97.4%', '25.0%', '50.0%', '75.0%', '90.0%']
  assert 'on photographs' in lines[0] and 'chance is 4.3%' in lines[3]


def test_a_folder_keeps_one_quickstart(tmp_path):
  quickstart.Quickstart(quickstart.config(smoke=True), tmp_path)
  with pytest.raises(UserError, match='holds another comparison .*seed'):
    quickstart.Quickstart(quickstart.config(smoke=True, seed=1), tmp_path)


def test_a_run_that_is_stopped_is_no_part_that_is_done(tmp_path, monkeypatch):
  stopped = types.SimpleNamespace(step=7, interrupted=True)
  monkeypatch.setattr('hrvlm_jax.lab.experiment.train', lambda *_, **__: stopped)
  made = Experiment(tmp_path, progress=False)
  with pytest.raises(Interrupted, match='interrupted at step 7; run the same command again'):
    made.part('train', made.train, None, tmp_path / 'run')
  assert Experiment(tmp_path).times == {}
