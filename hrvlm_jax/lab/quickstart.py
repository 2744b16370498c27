"""The whole journey on a laptop CPU: a comparison of two models, then what follows for the better.

Writes the built-in task, pre-trains a small encoder, trains a tiny MC-LLaVA and the same model with
one low-resolution view, evaluates both, saves and exports.
"""

from __future__ import annotations

from collections.abc import Sequence
import os
import pathlib
import shutil
from typing import Any

from PIL import Image

from hrvlm_jax.checkpoint import store
from hrvlm_jax.checkpoint.files import whole_file
from hrvlm_jax.interop.export import export
from hrvlm_jax.lab import report
from hrvlm_jax.lab.compare import Comparison
from hrvlm_jax.lab.compare_config import CompareConfig, EncoderConfig
from hrvlm_jax.lab.experiment import say, spoken
from hrvlm_jax.lab.needle import NeedleConfig, read_records, write
from hrvlm_jax.language import config as language
from hrvlm_jax.language.conversation import messages_from_llava
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.systems.mc_llava.encoder import MCLlavaConfig
from hrvlm_jax.training.config import OptimizerConfig
from hrvlm_jax.vision.vit import ViTConfig
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer

WINDOW = 80  # canvas pixels of a crop; the panorama's height, so that crops make one row
VIEW = 40  # pixels of a view
VISION = ViTConfig(image_size=VIEW, patch_size=8, width=96, depth=3, heads=4, mlp_width=384,
                   activation='gelu_tanh', pool='map')
LAST_TOKENS = 2  # K: 32 tokens over 16 views
VOCABULARY = 384  # at most; bytes, special tokens and the words of the questions
TEXT = language.phi(vocab_size=VOCABULARY, width=128, depth=2, heads=4, mlp_width=512,
                    max_positions=512, init_std=0.09)
TASK = NeedleConfig.panorama()  # three or four signs of one letter each
CROPS = {'multi_crop': 15, 'low_res': 0}
SPLITS = ('eval', 'photo_eval')


def model(max_crops: int) -> ModelConfig:
  """The tiny MC-LLaVA; with `max_crops` 0 it has the single low-resolution view."""
  views = 16 if max_crops else 1
  tokens = LAST_TOKENS * views if max_crops else VISION.grid**2 - 1
  return ModelConfig(
    system='mc_llava',
    encoder=MCLlavaConfig(vision=VISION, max_crops=max_crops, num_tokens=tokens, window=WINDOW,
                          view_buckets=(1, 16)),
    text=TEXT, projector=ProjectorConfig(n_in=VISION.width, n_out=TEXT.width))


def config(*, smoke: bool = False, seed: int = 0) -> CompareConfig:
  """Both models on the same terms; `smoke`: a few of everything, for tests."""
  return CompareConfig(
    task=TASK, seed=seed, systems={name: model(crops) for name, crops in CROPS.items()},
    encoder=EncoderConfig(vision=VISION, window=WINDOW, last_tokens=LAST_TOKENS, colour_weight=0.0,
                          steps=3 if smoke else 1500),
    optimizer=OptimizerConfig(name='muon', learning_rate=2e-3, warmup=0.08, weight_decay=0.01,
                              b2=0.98),
    train_images=32 if smoke else 4000, eval_images=6 if smoke else 500,
    train_steps=3 if smoke else 1000, batch_size=4 if smoke else 32, lengths=(128, 192))


class Quickstart(Comparison):
  """The two models, the better one's checkpoint and export, and pictures.

  Args:
    photographs: images of the evaluation set with photographs behind the signs.
  """

  def __init__(self, made: CompareConfig, folder: str | os.PathLike, *, photographs: int = 200,
               progress: bool = True):
    super().__init__(made, folder, progress=progress)
    self.photographs = photographs

  def run(self, only: Sequence[str] = ()) -> dict[str, Any]:
    """Everything; returns the content of results.json."""
    del only
    self.prepare()
    self.part('photographs', self.write_photographs)
    for name in CROPS:
      self.part(f'train {name}', self.learn_task, name)
    for name in CROPS:
      self.part(f'answer {name}', self.answer, name)
    self.part('checkpoint', self.save)
    self.part('report', self.report)
    self.part('export', self.export)
    return self.read('results.json')

  def write_photographs(self) -> None:
    """The evaluation set on the two photographs that the package ships."""
    folder = self.folder / 'data/photographs'
    sample_photographs(folder)
    write(NeedleConfig.panorama(photographs=str(folder)), self.folder / 'data/photo_eval',
          self.photographs, seed=self.config.seed + 2, progress=self.progress)

  def texts(self) -> list[str]:
    """Whole conversations of the task."""
    records = read_records(self.folder / 'data/train')[:1000]
    return spoken((messages_from_llava(record['conversations']) for record in records),
                  ['mc_llava_train'])

  def answer(self, name: str, point: None = None) -> None:
    """Answers to both evaluation sets, kept one by one."""
    del point
    self.write(f'answers_{name}.json', {split: self.asked(name, split) for split in SPLITS})

  def save(self) -> None:
    """The multi-crop model alone, without optimizer state."""
    source = self.folder / 'runs/multi_crop'
    params = store.load_params(source, vlm.build(self.config.systems['multi_crop']).abstract)
    tokenizer = tokenizer_of(str(self.folder / 'tokenizer'))
    store.save_params(
      self.folder / 'checkpoint', params, store.load_config(source), overwrite=True,
      extra_files={f'tokenizer/{name}': data for name, data in tokenizer.files.items()})

  def export(self) -> None:
    """The original's layout."""
    shutil.rmtree(self.folder / 'export', ignore_errors=True)
    export(self.folder / 'checkpoint', self.folder / 'export')

  def example(self) -> tuple[pathlib.Path, dict[str, Any]]:
    """An evaluation image, and its record."""
    record = read_records(self.folder / 'data/eval')[0]
    return self.folder / 'data/eval' / record['image'], record

  def report(self) -> dict[str, Any]:
    """results.json, table.txt, plot.png, overlay.png."""
    c, answers = self.config, {name: self.read(f'answers_{name}.json') for name in CROPS}
    results = {
      'accuracy': {name: report.accuracy(found['eval']) for name, found in answers.items()},
      'accuracy_by_size': {name: report.accuracy_by_size(found['eval'])
                           for name, found in answers.items()},
      'accuracy_on_photographs': {name: report.accuracy(found['photo_eval'])
                                  for name, found in answers.items()},
      'chance': c.task.chance,
      'images': {'train': c.train_images, 'eval': c.eval_images, 'photographs': self.photographs},
      'steps': {'encoder': c.encoder.steps, 'model': c.train_steps},
      'seconds': sum(self.times.values()), 'seconds_by_part': dict(self.times),
      'machine': report.machine(),
      'encoder_accuracy': store.load_config(self.folder / 'encoder')['accuracy']}
    with whole_file(self.folder / 'table.txt') as part:
      part.write_text(table(results))
    with report.figure(self.folder / 'plot.png') as (axes,):
      report.bars(axes, shown(results), chance=results['chance'], numbers=True)
      axes.set_title('Reading signs: overlapping crops against one 40-pixel view')
      axes.legend(loc='upper center', ncols=3, frameon=False)
    answerer = Answerer.load(self.folder / 'checkpoint')
    answerer.overlay(Image.open(self.example()[0])).save(self.folder / 'overlay.png')
    self.write('results.json', results)
    say('\n' + table(results))
    return results


def sample_photographs(folder: pathlib.Path) -> None:
  """Copies the two photographs that the package ships (lab/photographs/README.md)."""
  folder.mkdir(parents=True, exist_ok=True)
  for path in sorted((pathlib.Path(__file__).parent / 'photographs').glob('*.jpg')):
    shutil.copyfile(path, folder / path.name)


def shown(results: dict[str, Any]) -> dict[str, dict[str, float]]:
  """model -> what is told of it -> share of right answers."""
  return {name: {'all': results['accuracy'][name], **results['accuracy_by_size'][name],
                 'on photographs': results['accuracy_on_photographs'][name]}
          for name in results['accuracy']}


def table(results: dict[str, Any]) -> str:
  """The table as text."""
  shares = shown(results)
  rows = [[name.replace('_', ' '), *(f'{value:.1%}' for value in values.values())]
          for name, values in shares.items()]
  return (report.text_table(['model', *next(iter(shares.values()))], rows)
          + 'accuracy by size of the text asked for; chance is '
          f'{results["chance"]:.1%}\n')
