"""PS3's own pre-training inside a comparison: captions of regions instead of labels of patches.

`lab.scenes` tells a tower what every patch shows, the quickest way to a reader. The paper's
pre-training knows boxes and captions only, and its switches (Table 6: ground-truth selection,
pooling in boxes, global captions, contrast within an image) belong to it. A VILA-HD that starts
here gets the tower, the residuals and the selection; the text tower is left behind.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from typing import Any

import numpy as np

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core import paths
from hrvlm_jax.lab.experiment import Experiment, leaves, write_tokenizer
from hrvlm_jax.lab.needle import NeedleConfig, plan
from hrvlm_jax.lab.needle.regions import regions, write_regions
from hrvlm_jax.lab.pretrain import Flat
from hrvlm_jax.language.captions import canonicalize
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.ps3.config import LookConfig, PS3Config, TextConfig
from hrvlm_jax.systems.ps3.pretrain import PretrainOptions
from hrvlm_jax.training.config import DataConfig, Group, OptimizerConfig, RunConfig, TrainingConfig
from hrvlm_jax.training.metrics import read_metrics
from hrvlm_jax.vlm import model as vlm

KEPT = ('tower', 'residual', 'selection')  # of PS3, for the encoder that starts from it
SPECIALS = ('<pad>', '<end>')  # ids 0 and 1, as the text tower expects
VOCABULARY = 512  # at most: bytes, special tokens, the words of the captions


def write_records(task: NeedleConfig, folder: str | os.PathLike, images: int, *, seed: int,
                  progress: bool = True) -> None:
  """Region records of a task and the tokenizer of their captions, `regions` and `captions`."""
  folder = pathlib.Path(folder)
  if (folder / 'captions').exists():
    return
  write_regions(task, folder / 'regions', images, seed=seed, progress=progress)
  texts = [canonicalize(caption) for index in range(min(images, 500))
           for caption in regions(plan(task, seed, index)).captions]
  write_tokenizer(folder / 'captions', texts, vocab_size=VOCABULARY, specials=SPECIALS,
                  pad='<pad>', eos='<end>', bos='<end>')


def with_text(tower: PS3Config) -> PS3Config:
  """A PS3 that takes one look, with a small text tower that prompts it."""
  vision = tower.vision
  text = TextConfig(vocab_size=VOCABULARY, context=32, width=vision.width, depth=2,
                    heads=vision.heads, mlp_width=2 * vision.width, out=tower.pool.width,
                    prompt_width=vision.width)
  return dataclasses.replace(tower, text=text, look=LookConfig(looks=1))


def run_config(tower: PS3Config, options: PretrainOptions, folder: str | os.PathLike, *,
               steps: int, batch_size: int, learning_rate: float, seed: int) -> RunConfig:
  """The pre-training without its start; all of it learns.

  Args:
    folder: of `write_records`.
  """
  folder = pathlib.Path(folder)
  groups = (Group(pattern='(.*/)?(bias|scale|weight|prior_prompt|logit_scale|logit_bias)',
                  decay=False), Group(pattern='.*'))
  return RunConfig(
    model=ModelConfig(system='ps3', encoder=with_text(tower), text=None, image_token=None),
    seed=seed,
    data=DataConfig(train=str(folder / 'regions'), tokenizer=str(folder / 'captions')),
    training=TrainingConfig(
      steps=steps, batch_size=batch_size, log_every=min(10, steps), checkpoint_every=200, keep=1,
      eval_every=0, mfu=False, objective=options, groups=groups,
      optimizer=OptimizerConfig(name='muon', learning_rate=learning_rate, warmup=0.05,
                                weight_decay=0.01, b2=0.98)))


def learn(experiment: Experiment, name: str, tower: PS3Config, adapt: Any, start: Flat, *,
          task: NeedleConfig, images: int, seed: int) -> tuple[dict[str, Any], float]:
  """Trains in the folder `name` of an experiment; it is taken up again where it was stopped.

  Args:
    adapt: steps, batch_size, learning_rate and regions (`PretrainOptions`).
    start: a tower that knows what crops show, by paths below the encoder (`ps3/tower/`).
    images: of the records, which lie in `data` of the experiment.

  Returns:
    what a VILA-HD starts from, by paths below its encoder; the loss of the last 50 steps.
  """
  write_records(task, experiment.folder / 'data', images, seed=seed, progress=experiment.progress)
  run = run_config(tower, adapt.regions, experiment.folder / 'data', steps=adapt.steps,
                   batch_size=adapt.batch_size, learning_rate=adapt.learning_rate, seed=seed)
  wanted = paths.flatten(vlm.build(run.model).abstract)
  flat = {path.replace('ps3/', 'vision/', 1): leaf for path, leaf in start.items()}
  flat = {path: leaf for path, leaf in flat.items() if path in wanted}
  workdir = experiment.folder / name
  before = workdir.with_name(f'{workdir.name}_start')
  store.save_params(before, paths.unflatten(flat), {'tower': name}, overwrite=True)
  given = '|'.join(map(re.escape, sorted(flat)))
  run = dataclasses.replace(run, training=dataclasses.replace(
    run.training, init_from=str(before), init_allow=(f'(?!({given})$).*',)))
  experiment.train(run, workdir)
  kept = {f'ps3/{path.removeprefix("vision/")}': leaf for path, leaf in leaves(workdir).items()
          if path.startswith(tuple(f'vision/{part}/' for part in KEPT))}
  losses = [row['loss'] for row in read_metrics(workdir)
            if 'loss' in row and row['step'] > adapt.steps - 50]
  return kept, float(np.mean(losses))
