"""`hrvlm quickstart`: the whole journey on a laptop CPU, in one folder, each part done once.

Writes the built-in task, pre-trains a small encoder, trains a tiny MC-LLaVA and the same model with
one low-resolution view, evaluates both, asks, exports. What a folder already holds is not repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from hrvlm_jax.checkpoint import store
from hrvlm_jax.cli.arguments import Parser
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.interop.export import export
from hrvlm_jax.lab.compare_parts import answer_records
from hrvlm_jax.lab.glyphs import GlyphConfig, pretrain
from hrvlm_jax.lab.journal import Journal
from hrvlm_jax.lab.needle import NeedleConfig, accuracy_by_size, read_records, write
from hrvlm_jax.language import config as language
from hrvlm_jax.language.bpe import train_bpe
from hrvlm_jax.language.chat import get_template, render, rendered_text
from hrvlm_jax.language.conversation import messages_from_llava
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.systems.mc_llava.config import MCLlavaConfig
from hrvlm_jax.training.config import DataConfig, Group, OptimizerConfig, RunConfig, TrainingConfig
from hrvlm_jax.training.loop import train
from hrvlm_jax.vision.vit import ViTConfig
from hrvlm_jax.vlm.answer import Answerer

WINDOW = 80  # canvas pixels of a crop; the panorama's height, so that crops make one row
VIEW = 40  # pixels of a view
VISION = ViTConfig(image_size=VIEW, patch_size=8, width=96, depth=3, heads=4, mlp_width=384,
                   activation='gelu_tanh', pool='map')
LAST_TOKENS = 2  # K: 32 tokens over 16 views
SPECIALS = ('<|endoftext|>', '<pad>', '<|im_start|>', '<|im_end|>', '<image>')
VOCABULARY = 384  # at most; bytes, special tokens and the words of the questions
TEXT = language.phi(vocab_size=VOCABULARY, width=128, depth=2, heads=4, mlp_width=512,
                    max_positions=512, init_std=0.09)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """How much of everything; `smoke` is for tests."""

  train_images: int = 4000
  eval_images: int = 500
  photo_images: int = 200
  encoder_steps: int = 1500
  train_steps: int = 1000
  batch_size: int = 32

  @classmethod
  def smoke(cls) -> Sizes:
    """A few of everything."""
    return cls(train_images=32, eval_images=6, photo_images=4, encoder_steps=3, train_steps=3,
               batch_size=4)


def task(**options) -> NeedleConfig:
  """Panoramas with three or four signs of one letter each."""
  return NeedleConfig.panorama(**options)


def model(max_crops: int) -> ModelConfig:
  """The tiny MC-LLaVA; with `max_crops` 0 it has the single low-resolution view."""
  views = 16 if max_crops else 1
  tokens = LAST_TOKENS * views if max_crops else VISION.grid**2 - 1
  return ModelConfig(
    system='mc_llava',
    encoder=MCLlavaConfig(vision=VISION, max_crops=max_crops, num_tokens=tokens, window=WINDOW,
                          view_buckets=(1, 16)),
    text=TEXT, projector=ProjectorConfig(n_in=VISION.width, n_out=TEXT.width))


RUNS = {'multi_crop': 15, 'low_res': 0}


class Journey(Journal):
  """The steps, each of which leaves a file or folder that tells it is done."""

  def __init__(self, folder: str | os.PathLike, sizes: Sizes, *, seed: int = 0,
               progress: bool = True):
    super().__init__(folder)
    self.sizes, self.seed, self.progress = sizes, seed, progress

  def run(self) -> dict[str, Any]:
    """Everything; returns the content of results.json."""
    self.part('data', self.write_data, 'writing the task')
    self.part('tokenizer', self.tokenizer, 'training a tokenizer on its questions')
    self.part('encoder', self.pretrain, 'pre-training the encoder')
    for name in RUNS:
      self.part(f'train_{name}', lambda n=name: self.train(n), f'training the {name} model')
    for name in RUNS:
      self.part(f'eval_{name}', lambda n=name: self.evaluate(n), f'evaluating the {name} model')
    self.part('checkpoint', self.save, 'saving the trained model')
    self.part('report', self.report, 'drawing')
    self.part('ask', self.ask, 'asking the trained model')
    self.part('export', self.export, 'exporting')
    return json.loads((self.folder / 'results.json').read_text())

  def write_data(self) -> None:
    """Training images (three questions each), evaluation images, and some on photographs."""
    s = self.sizes
    write(task(turns=3), self.folder / 'data/train', s.train_images, seed=self.seed,
          progress=self.progress)
    write(task(), self.folder / 'data/eval', s.eval_images, seed=self.seed + 1,
          progress=self.progress)
    photos = self.folder / 'data/photographs'
    sample_photographs(photos)
    write(task(photographs=str(photos)), self.folder / 'data/photo_eval', s.photo_images,
          seed=self.seed + 2, progress=self.progress)

  def tokenizer(self) -> None:
    """A byte-level BPE tokenizer in which the words of the questions are single tokens."""
    template = get_template('mc_llava_train')
    texts = [rendered_text(render(template, messages_from_llava(record['conversations'])))
             for record in read_records(self.folder / 'data/train')[:1000]]
    folder = self.folder / 'tokenizer'
    folder.mkdir(exist_ok=True)
    train_bpe(texts, vocab_size=VOCABULARY, specials=SPECIALS,
              roles={'pad': '<pad>', 'eos': '<|im_end|>'}).save(folder)

  def pretrain(self) -> None:
    """The encoder both models start from, as a checkpoint of `vision/tower`."""
    config = GlyphConfig(needle=task(), vision=VISION, window=WINDOW, last_tokens=LAST_TOKENS,
                         steps=self.sizes.encoder_steps, seed=self.seed)
    with tqdm(total=config.steps, unit='step', disable=not self.progress) as bar:
      def report(step: int, loss: float, accuracy: float) -> None:
        bar.update()
        if step % 10 == 0:
          bar.set_postfix_str(f'loss {loss:.3f}, letters read {accuracy:.0%}')

      tower, accuracy = pretrain(config, report=report)
    shutil.rmtree(self.folder / 'encoder', ignore_errors=True)
    store.save_params(self.folder / 'encoder', {'vision': {'tower': tower}},
                      {'vision': to_dict(VISION), 'accuracy': accuracy})

  def config(self, name: str) -> RunConfig:
    """The run config of one of the two models: all equal but the views."""
    s = self.sizes
    return RunConfig(
      model=model(RUNS[name]), seed=self.seed,
      data=DataConfig(train=str(self.folder / 'data/train/needle.json'), lengths=(128, 192),
                      tokenizer=str(self.folder / 'tokenizer')),
      training=TrainingConfig(
        steps=s.train_steps, batch_size=s.batch_size, log_every=10, checkpoint_every=250, keep=1,
        init_from=str(self.folder / 'encoder'), init_allow=('(?!vision/tower/).*',),
        groups=(Group(pattern='vision/tower/.*', frozen=True),
                Group(pattern='.*/(bias|scale)', decay=False), Group(pattern='.*')),
        optimizer=OptimizerConfig(name='muon', learning_rate=2e-3, warmup=0.08, weight_decay=0.01,
                                  b2=0.98)))

  def train(self, name: str) -> None:
    """Resumes by itself when it was interrupted."""
    result = train(self.config(name), self.folder / 'runs' / name, progress=self.progress)
    if result.interrupted:
      raise UserError(f'interrupted at step {result.step}; run the same command again to go on')

  def evaluate(self, name: str) -> None:
    """Answers to both evaluation sets, kept one by one."""
    answerer = Answerer.load(self.folder / 'runs' / name)
    found = {}
    for split in ('eval', 'photo_eval'):
      folder = self.folder / 'data' / split
      found[split] = answer_records(answerer, folder, batch_size=25, max_new_tokens=4,
                                    progress=self.progress)
    self.write(f'answers_{name}.json', found)

  def save(self) -> None:
    """The multi-crop model alone, without optimizer state."""
    source = self.folder / 'runs/multi_crop'
    config = store.load_config(source)
    from hrvlm_jax.vlm.model import build

    params = store.load_params(source, build(model(RUNS['multi_crop'])).abstract)
    shutil.rmtree(self.folder / 'checkpoint', ignore_errors=True)
    tokenizer = tokenizer_of(str(self.folder / 'tokenizer'))
    store.save_params(
      self.folder / 'checkpoint', params, config,
      extra_files={f'tokenizer/{name}': data for name, data in tokenizer.files.items()})

  def report(self) -> None:
    """results.json, table.txt, plot.png, overlay.png."""
    answers = {name: self.read(f'answers_{name}.json', {}) for name in RUNS}
    results = summarise(answers, self.times, self.sizes)
    results['encoder_accuracy'] = store.load_config(self.folder / 'encoder')['accuracy']
    (self.folder / 'table.txt').write_text(table(results))
    plot(results, self.folder / 'plot.png')
    image = Image.open(self.example())
    answerer = Answerer.load(self.folder / 'checkpoint')
    answerer.overlay(image).save(self.folder / 'overlay.png')
    self.write('results.json', results)
    print('\n' + table(results), flush=True)

  def example(self) -> pathlib.Path:
    """An evaluation image."""
    record = read_records(self.folder / 'data/eval')[0]
    return self.folder / 'data/eval' / record['image']

  def ask(self) -> None:
    """The same call as `hrvlm ask`."""
    from hrvlm_jax.cli import ask

    record = read_records(self.folder / 'data/eval')[0]
    argv = ['--checkpoint', str(self.folder / 'checkpoint'), str(self.example()),
            record['question']]
    print(f'$ hrvlm ask {" ".join(argv[:3])} "{record["question"]}"', flush=True)
    ask.main(argv)
    print(f'(the sign says {record["answer"]})', flush=True)

  def export(self) -> None:
    """The original's layout."""
    shutil.rmtree(self.folder / 'export', ignore_errors=True)
    export(self.folder / 'checkpoint', self.folder / 'export')


def sample_photographs(folder: pathlib.Path) -> None:
  """The two photographs that scikit-learn ships.

  Raises:
    UserError: scikit-learn is not installed.
  """
  try:
    import sklearn.datasets
  except ImportError as error:
    raise UserError("scikit-learn is not installed; pip install 'hrvlm_jax[demo]'") from error
  folder.mkdir(parents=True, exist_ok=True)
  source = pathlib.Path(sklearn.datasets.__file__).parent / 'images'
  for name in ('china.jpg', 'flower.jpg'):
    shutil.copyfile(source / name, folder / name)


def summarise(answers: dict[str, Any], times: dict[str, float], sizes: Sizes) -> dict[str, Any]:
  """The content of results.json."""
  share = lambda rows: float(np.mean([row['correct'] for row in rows]))
  by_size = lambda rows: accuracy_by_size([r['area'] for r in rows], [r['correct'] for r in rows])
  return {
    'accuracy': {name: share(found['eval']) for name, found in answers.items()},
    'accuracy_by_size': {name: by_size(found['eval']) for name, found in answers.items()},
    'accuracy_on_photographs': {name: share(found['photo_eval'])
                                for name, found in answers.items()},
    'chance': task().chance,
    'images': {'train': sizes.train_images, 'eval': sizes.eval_images,
               'photographs': sizes.photo_images},
    'steps': {'encoder': sizes.encoder_steps, 'model': sizes.train_steps},
    'seconds': sum(times.values()),
    'seconds_by_part': dict(times),
  }


def table(results: dict[str, Any]) -> str:
  """The table as text."""
  sizes = list(next(iter(results['accuracy_by_size'].values())))
  header = ['model', 'all', *sizes, 'on photographs']
  rows = [[name.replace('_', ' '), results['accuracy'][name],
           *(results['accuracy_by_size'][name][size] for size in sizes),
           results['accuracy_on_photographs'][name]] for name in results['accuracy']]
  lines = [f'{header[0]:<12}' + ''.join(f'{h:>16}' for h in header[1:])]
  lines += [f'{row[0]:<12}' + ''.join(f'{value:>16.1%}' for value in row[1:]) for row in rows]
  lines.append(f'accuracy by size of the text asked for; chance is {results["chance"]:.1%}')
  return '\n'.join(lines) + '\n'


def plot(results: dict[str, Any], path: pathlib.Path) -> None:
  """Accuracy by size of the text asked for, as PNG."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
  colours = {'multi_crop': '#1b6ca8', 'low_res': '#c8553d'}
  for number, (name, by_size) in enumerate(results['accuracy_by_size'].items()):
    groups = {**by_size, 'all': results['accuracy'][name],
              'on photographs': results['accuracy_on_photographs'][name]}
    places = np.arange(len(groups)) + (number - 0.5) * 0.38
    bars = axes.bar(places, [100 * v for v in groups.values()], width=0.36, color=colours[name],
                    label=name.replace('_', ' '))
    axes.bar_label(bars, fmt='%.0f', fontsize=8)
    axes.set_xticks(np.arange(len(groups)), [label.replace('_', ' ') for label in groups])
  axes.axhline(100 * results['chance'], color='grey', linestyle=':', label='chance')
  axes.set(ylabel='answers right (%)', ylim=(0, 122), yticks=range(0, 101, 20),
           title='Reading signs: overlapping crops against one 40-pixel view')
  axes.legend(loc='upper center', ncols=3, frameon=False)
  axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def main(argv: Sequence[str]) -> int:
  """The verb."""
  parser = Parser('quickstart', 'train, compare, ask and export a tiny model on the built-in task')
  parser.add_argument('--out', default='runs/quickstart', help='folder of everything')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--smoke', action='store_true', help='a few steps of everything (a test)')
  args = parser.parse(argv)
  sizes = Sizes.smoke() if args.smoke else Sizes()
  results = Journey(args.out, sizes, seed=args.seed).run()
  flat = paths.flatten(results['accuracy'])
  print(f'everything is in {args.out}: ' + ', '.join(f'{k} {v:.1%}' for k, v in flat.items()))
  return 0
