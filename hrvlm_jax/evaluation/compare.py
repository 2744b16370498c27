"""Several systems on the built-in task with the same data, language model and steps: one table.

Every part leaves a file when it is done, so that a comparison that was stopped goes on where it
was. What is shared: the written task, the tokenizer, one vision encoder pre-trained on the task's
letters, from which every system's `vision/tower` starts, and all training settings. What differs is
what the systems are: views, tokens, joining.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import json
import os
import pathlib
import platform
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.core.images import open_image
from hrvlm_jax.data.needle import NeedleConfig, accuracy_by_size, is_correct, read_records, write
from hrvlm_jax.evaluation.provenance import versions
from hrvlm_jax.language.bpe import train_bpe
from hrvlm_jax.parallel.flops import count_flops
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import CrossAttentionFusion, ModelConfig
from hrvlm_jax.training.config import DataConfig, Group, OptimizerConfig, RunConfig, TrainingConfig
from hrvlm_jax.training.glyphs import GlyphConfig, pretrain
from hrvlm_jax.training.loop import train
from hrvlm_jax.vision.vit import ViTConfig
from hrvlm_jax.vlm.answer import Answerer

TOWER = 'vision/tower/'
SPECIALS = ('<|endoftext|>', '<pad>', '<|im_start|>', '<|im_end|>', '<image>')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
  """Pre-training of the encoder that all systems share (`training.glyphs`).

  Attributes:
    window: side of the crops in canvas pixels. last_tokens: what the readout sees of a view.
  """

  vision: ViTConfig
  window: int
  last_tokens: int
  steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
  """One comparison.

  Attributes:
    task: the built-in task, with one question per image; training images have `turns` of them.
    systems: models by the name they have in the table. All have the same language model and a
      tower of the shared encoder's sizes.
    train_steps, batch_size, optimizer: the same for every system; the tower stays frozen.
    lengths: buckets of text plus visual tokens.
    answer_batch: questions answered at once in evaluation.
    latency_answers: answers, one at a time, whose median time is reported.
  """

  task: NeedleConfig
  encoder: EncoderConfig
  systems: dict[str, ModelConfig]
  optimizer: OptimizerConfig
  train_images: int
  eval_images: int
  train_steps: int
  batch_size: int
  turns: int = 3
  lengths: tuple[int, ...] = (128, 256, 512)
  answer_batch: int = 25
  latency_answers: int = 20
  max_new_tokens: int = 4
  seed: int = 0

  def __post_init__(self):
    raise_all('these systems cannot be compared', problems(self))


def problems(config: CompareConfig) -> list[str]:
  """Why systems of a comparison cannot take part in it, one sentence each."""
  found = []
  if not config.systems:
    return ['systems: none is named']
  texts = {json.dumps(to_dict(m.text), sort_keys=True) if m.text else None
           for m in config.systems.values()}
  if len(texts) > 1:
    found.append('the language models of ' + ', '.join(config.systems) + ' are not equal; a '
                 'comparison needs the same one in all systems')
  for name, model in config.systems.items():
    found += [f'{name}: {reason}' for reason in _unfit(config, model)]
  return found


def _unfit(config: CompareConfig, model: ModelConfig) -> list[str]:
  if model.text is None:
    return ['an encoder without a language model cannot answer']
  system, found = registry.get(model.system), []
  wanted = config.encoder.vision
  vision = getattr(model.encoder, 'vision', None)
  if not isinstance(vision, ViTConfig) or vision != wanted:
    have = (f'{vision.image_size} pixels, width {vision.width}, depth {vision.depth}'
            if isinstance(vision, ViTConfig) else 'another kind of encoder')
    found.append(f'its tower ({have}) is not the shared encoder ({wanted.image_size} pixels, width '
                 f'{wanted.width}, depth {wanted.depth}); it could not start from it')
  try:
    tokens = system.count(config.task.width, config.task.height, model.encoder).tokens
  except UserError as error:
    return [*found, str(error)]
  places = 0 if isinstance(model.fusion, CrossAttentionFusion) else tokens
  room = min(max(config.lengths), model.text.max_positions)
  if places >= room:
    found.append(f'{places} visual tokens of a {config.task.width}x{config.task.height} image '
                 f'leave no room for text in {room} places; add a bucket, raise max_positions or '
                 'lower its tokens')
  return found


class Comparison:
  """The parts of a comparison in one folder."""

  def __init__(self, config: CompareConfig, folder: str | os.PathLike, *, progress: bool = True):
    self.config, self.folder, self.progress = config, pathlib.Path(folder), progress
    self.folder.mkdir(parents=True, exist_ok=True)
    self._same_config()
    self.times: dict[str, float] = self._read('times.json', {})

  def run(self) -> dict[str, Any]:
    """Everything that is not done yet; returns the content of results.json."""
    self._part('data', self.write_data)
    self._part('tokenizer', self.tokenizer)
    self._part('encoder', self.pretrain)
    for name in self.config.systems:
      self._part(f'train {name}', lambda n=name: self.train(n))
      self._part(f'answer {name}', lambda n=name: self.answer(n))
      self._part(f'measure {name}', lambda n=name: self.measure(n))
    return self.report()

  def _part(self, name: str, fn: Callable[[], None]) -> None:
    if name in self.times:
      print(f'[{name}] done before ({self.times[name]:.0f} s)', flush=True)
      return
    print(f'[{name}]', flush=True)
    clock = time.perf_counter()
    fn()
    self.times[name] = time.perf_counter() - clock
    self._write('times.json', self.times)

  def _same_config(self) -> None:
    """Refuses to mix two comparisons in one folder; more systems may join."""
    now = json.loads(json.dumps(to_dict(self.config)))
    before = self._read('config.json') or dict(now)
    old, new = before.pop('systems'), now.pop('systems')
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    changed += sorted(f'systems.{name}' for name in old.keys() & new.keys()
                      if old[name] != new[name])
    if changed:
      raise UserError(f'{self.folder}: holds another comparison ({", ".join(changed)} differ); '
                      'choose another --out')
    self._write('config.json', now | {'systems': {**old, **new}})

  def _read(self, name: str, default: Any = None) -> Any:
    path = self.folder / name
    return json.loads(path.read_text()) if path.exists() else default

  def _write(self, name: str, value: Any) -> None:
    temporary = self.folder / f'.{name}.tmp'
    temporary.write_text(json.dumps(value, indent=2) + '\n')
    temporary.replace(self.folder / name)

  def write_data(self) -> None:
    """Training and evaluation images."""
    c = self.config
    training = dataclasses.replace(c.task, turns=c.turns)
    write(training, self.folder / 'data/train', c.train_images, seed=c.seed,
          progress=self.progress)
    write(c.task, self.folder / 'data/eval', c.eval_images, seed=c.seed + 1,
          progress=self.progress)

  def tokenizer(self) -> None:
    """A byte-level BPE tokenizer in which the words of the questions are single tokens."""
    texts = [turn['value'] for record in read_records(self.folder / 'data/train')[:1000]
             for turn in record['conversations']]
    folder = self.folder / 'tokenizer'
    folder.mkdir(exist_ok=True)
    size = next(iter(self.config.systems.values())).text.vocab_size
    train_bpe(texts, vocab_size=size, specials=SPECIALS,
              roles={'pad': '<pad>', 'eos': '<|im_end|>'}).save(folder)

  def pretrain(self) -> None:
    """The shared encoder, as a checkpoint of `vision/tower`."""
    e = self.config.encoder
    config = GlyphConfig(needle=self.config.task, vision=e.vision, window=e.window,
                         last_tokens=e.last_tokens, steps=e.steps, seed=self.config.seed)
    with tqdm(total=e.steps, unit='step', disable=not self.progress) as bar:
      tower, accuracy = pretrain(config, report=lambda *_: bar.update())
    shutil.rmtree(self.folder / 'encoder', ignore_errors=True)
    store.save_params(self.folder / 'encoder', {'vision': {'tower': tower}},
                      {'vision': to_dict(e.vision), 'accuracy': accuracy})

  def run_config(self, name: str) -> RunConfig:
    """The training run of one system: all equal but the model."""
    c = self.config
    return RunConfig(
      model=c.systems[name], seed=c.seed,
      data=DataConfig(train=str(self.folder / 'data/train/needle.json'), lengths=c.lengths,
                      tokenizer=str(self.folder / 'tokenizer')),
      training=TrainingConfig(
        steps=c.train_steps, batch_size=c.batch_size, log_every=10, checkpoint_every=200, keep=1,
        init_from=str(self.folder / 'encoder'), init_allow=(f'(?!{TOWER}).*',),
        groups=(Group(pattern=f'{TOWER}.*', frozen=True),
                Group(pattern='.*/(bias|scale)', decay=False), Group(pattern='.*')),
        optimizer=c.optimizer))

  def train(self, name: str) -> None:
    """Resumes by itself when it was interrupted."""
    result = train(self.run_config(name), self.folder / 'runs' / name, progress=self.progress)
    if result.interrupted:
      raise UserError(f'interrupted at step {result.step}; run the same command again to go on')

  def answer(self, name: str) -> None:
    """Answers to the evaluation set, kept one by one."""
    answerer = Answerer.load(self.folder / 'runs' / name)
    rows = answer_records(answerer, self.folder / 'data/eval', batch_size=self.config.answer_batch,
                          max_new_tokens=self.config.max_new_tokens, progress=self.progress)
    self._write(f'answers_{name}.json', rows)

  def measure(self, name: str) -> None:
    """Tokens, operations, memory and time of one system."""
    records = read_records(self.folder / 'data/eval')
    items = [(str(self.folder / 'data/eval' / r['image']), r['question']) for r in records]
    answerer = Answerer.load(self.folder / 'runs' / name)
    self._write(f'cost_{name}.json', cost(
      answerer, items, answers=self.config.latency_answers,
      max_new_tokens=self.config.max_new_tokens))

  def report(self) -> dict[str, Any]:
    """results.json, table.txt, plot.png from what is there."""
    rows = {}
    for name, model in self.config.systems.items():
      answers, costs = self._read(f'answers_{name}.json'), self._read(f'cost_{name}.json')
      correct = [row['correct'] for row in answers]
      rows[name] = {
        'system': model.system, 'accuracy': float(np.mean(correct)),
        'accuracy_by_size': accuracy_by_size([row['area'] for row in answers], correct),
        # Two-pass models put their visual tokens into the prompt too.
        'family': {'two_pass': 'prefix'}.get(model.fusion.kind, model.fusion.kind),
        **costs, 'train_seconds': self.times[f'train {name}']}
    c = self.config
    results = {
      'systems': rows, 'chance': c.task.chance, 'seconds': sum(self.times.values()),
      'seconds_by_part': dict(self.times),
      'images': {'train': c.train_images, 'eval': c.eval_images}, 'steps': c.train_steps,
      'encoder_accuracy': store.load_config(self.folder / 'encoder')['accuracy'],
      'machine': machine(), 'versions': versions()}
    (self.folder / 'table.txt').write_text(table(results))
    plot(results, self.folder / 'plot.png')
    self._write('results.json', results)
    print('\n' + table(results), flush=True)
    return results


def answer_records(answerer: Answerer, folder: pathlib.Path, *, batch_size: int,
                   max_new_tokens: int, progress: bool = True) -> list[dict[str, Any]]:
  """[{id, area, answer, expected, correct}] of a written needle task."""
  records = read_records(folder)
  rows = []
  with tqdm(total=len(records), unit='image', disable=not progress) as bar:
    for start in range(0, len(records), batch_size):
      part = records[start:start + batch_size]
      # The last batch is filled up, so that one program serves all of them.
      filled = part + [part[-1]] * (batch_size - len(part))
      texts = answerer.answer([([str(folder / r['image'])], r['question']) for r in filled],
                              max_new_tokens=max_new_tokens)
      rows += [{'id': r['id'], 'area': r['relative_area'], 'answer': text,
                'expected': r['answer'], 'correct': bool(is_correct(text, r['answer']))}
               for r, text in zip(part, texts, strict=False)]
      bar.update(len(part))
  return rows


def cost(answerer: Answerer, items: Sequence[tuple[str, str]], *, answers: int,
         max_new_tokens: int) -> dict[str, Any]:
  """What answering costs, one question at a time.

  Returns:
    tokens and views (means over the images), encoder_gflops (vision and projector of one image,
    products and convolutions as traced, padding included), peak_memory_mb (arguments, results and
    temporaries of encoder and prefill as one compiled program), latency_ms (median time of an
    answer after one that is not counted).
  """
  config, system = answerer.config, answerer.system
  opened = [open_image(path) for path, _ in items]
  counts = [system.count(*image.size, config.encoder) for image in opened]
  batch = answerer.batch([([opened[0]], items[0][1])])
  held = answerer.generator
  encode = lambda params, views: held.fn.apply(params, views, method='encode').values
  abstract = lambda tree: jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.asarray(leaf).dtype), tree)
  flops = count_flops(encode, abstract(held.params), abstract(batch['views']))

  def first_token(params, batch):
    embeds, valid, extras = held.fn.apply(params, batch, method='prompt')
    slots = embeds.shape[1] + max_new_tokens
    return held.fn.apply(params, embeds, valid, slots=slots, method='prefill', **extras)[0]

  memory = _memory(first_token, held.params, batch)
  times = []
  for image, (_, question) in list(zip(opened, items, strict=True))[:answers + 1]:
    clock = time.perf_counter()
    answerer.answer([([image], question)], max_new_tokens=max_new_tokens)
    times.append(time.perf_counter() - clock)
  timed = times[1:] or times
  return {'tokens': float(np.mean([c.tokens for c in counts])),
          'views': float(np.mean([c.views for c in counts])), 'encoder_gflops': flops / 1e9,
          'peak_memory_mb': memory / 2**20, 'latency_ms': 1e3 * float(np.median(timed))}


def _memory(fn: Callable, *args: Any) -> float:
  """Bytes of arguments, results and temporaries of a compiled program."""
  found = jax.jit(fn).lower(*args).compile().memory_analysis()
  return float(found.argument_size_in_bytes + found.output_size_in_bytes
               + found.temp_size_in_bytes)


def machine() -> dict[str, Any]:
  """What the numbers were measured on."""
  device = jax.devices()[0]
  return {'device': device.device_kind, 'devices': jax.device_count(),
          'processor': platform.processor() or platform.machine(), 'cores': os.cpu_count()}


def table(results: dict[str, Any]) -> str:
  """The table as text."""
  rows = results['systems']
  sizes = list(next(iter(rows.values()))['accuracy_by_size'])
  header = ['system', 'all', *sizes, 'tokens', 'views', 'encoder GFLOP', 'latency ms', 'memory MB']
  lines = [f'{header[0]:<14}' + ''.join(f'{h.replace("_", " "):>15}' for h in header[1:])]
  for name, row in rows.items():
    cells = [f'{row["accuracy"]:.1%}', *(f'{row["accuracy_by_size"][size]:.1%}' for size in sizes),
             f'{row["tokens"]:.0f}', f'{row["views"]:.0f}', f'{row["encoder_gflops"]:.3f}',
             f'{row["latency_ms"]:.0f}', f'{row["peak_memory_mb"]:.0f}']
    lines.append(f'{name.replace("_", " "):<14}' + ''.join(f'{cell:>15}' for cell in cells))
  families = {row['family'] for row in rows.values()}
  notes = ['Right answers, in all and by size of the text asked for; chance '
           f'{results["chance"]:.1%}; '
           f'{results["images"]["eval"]} questions, {results["steps"]} training steps each.']
  if families - {'prefix', 'two_pass'}:
    notes.append('Tokens can be compared between systems that put them into the prompt only.')
  where = results['machine']
  notes.append(f'Machine: {where["device"]} x {where["devices"]}, {where["cores"]} cores.')
  return '\n'.join([*lines, *notes]) + '\n'


def plot(results: dict[str, Any], path: pathlib.Path) -> None:
  """Accuracy by target size, and accuracy against the encoder's work, as PNG."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  rows = results['systems']
  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
  sizes = [*next(iter(rows.values()))['accuracy_by_size'], 'all']
  width = 0.8 / len(rows)
  for number, (name, row) in enumerate(rows.items()):
    values = [100 * v for v in (*row['accuracy_by_size'].values(), row['accuracy'])]
    places = np.arange(len(sizes)) + (number - (len(rows) - 1) / 2) * width
    bars = left.bar(places, values, width=0.9 * width, label=name.replace('_', ' '))
    right.scatter(row['encoder_gflops'], 100 * row['accuracy'], color=bars[0].get_facecolor(),
                  s=20 + row['tokens'] / 2)
    right.annotate(name.replace('_', ' '), (row['encoder_gflops'], 100 * row['accuracy']),
                   textcoords='offset points', xytext=(6, 4), fontsize=8)
  left.axhline(100 * results['chance'], color='grey', linestyle=':', label='chance')
  left.set_xticks(np.arange(len(sizes)), [size.replace('_', ' ') for size in sizes])
  left.set(ylabel='answers right (%)', ylim=(0, 105), title='By size of the text asked for')
  left.legend(frameon=False, fontsize=8)
  right.set(xlabel='encoder GFLOP per image', ylabel='answers right (%)', xscale='log',
            ylim=(0, 105), title='Against work (area: tokens)')
  for axes in (left, right):
    axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def compare(config: CompareConfig, folder: str | os.PathLike, *, progress: bool = True
            ) -> dict[str, Any]:
  """Runs a comparison or what is left of it; see `Comparison`.

  Raises:
    UserError: systems that cannot be compared, a folder of another comparison, an interruption.
  """
  return Comparison(config, folder, progress=progress).run()
