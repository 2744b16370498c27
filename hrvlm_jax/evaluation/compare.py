"""Several systems on the built-in task with the same data, language model and steps: one table.

Every part leaves a file when it is done, so that a comparison that was stopped goes on where it
was. What is shared: the written task, the tokenizer, one vision encoder pre-trained on the task's
letters, from which the ViT of every system starts, and all training settings. What differs is what
the systems are: views, tokens, joining. Two of them need more than that encoder: LLaVA-HR has a
ConvNeXt besides, PS3 reads patches of a large grid one by one. Both get a pre-training of their own
on the task's scenes (`adapt`), whose steps and seconds are part of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import re
import shutil
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.core.images import open_image
from hrvlm_jax.data.needle import NeedleConfig, accuracy_by_size, is_correct, read_records, write
from hrvlm_jax.evaluation.compare_report import machine, plot, table
from hrvlm_jax.evaluation.journal import Journal
from hrvlm_jax.evaluation.provenance import versions
from hrvlm_jax.language.bpe import train_bpe
from hrvlm_jax.parallel.flops import count_flops
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import CrossAttentionFusion, ModelConfig, TwoPassFusion
from hrvlm_jax.training import glyph_scenes, glyphs
from hrvlm_jax.training.config import DataConfig, Group, OptimizerConfig, RunConfig, TrainingConfig
from hrvlm_jax.training.loop import train
from hrvlm_jax.vision.vit import ViTConfig
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer

TOWER = 'vision/tower/'  # where the shared encoder stands in its own checkpoint
SPECIALS = ('<|endoftext|>', '<pad>', '<|im_start|>', '<|im_end|>', '<image>')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
  """Pre-training of the encoder that all systems share (`training.glyphs`).

  Attributes:
    window: side of the crops in canvas pixels. last_tokens: what the readout sees of a view.
    colour_weight: of the loss that asks every patch for the colour of its sign.
  """

  vision: ViTConfig
  window: int
  last_tokens: int
  steps: int
  colour_weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptConfig:
  """Pre-training of a part of one system on whole scenes (`training.glyph_scenes`)."""

  steps: int
  batch_size: int = 32
  learning_rate: float = 2e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
  """One comparison.

  Attributes:
    task: the built-in task, with one question per image; training images have `turns` of them.
    systems: models by the name they have in the table. All have the same language model and a
      tower of the shared encoder's sizes.
    train_steps, batch_size, optimizer: the same for every system; what was pre-trained (the tower,
      the parts of `adapt`) stays frozen. A batch holds `batch_size` images with all their
      questions; two-pass systems, which look where the FIRST question of a row points, read the
      same questions as rows of their own, with the box of each sign for the selection's loss.
    adapt: by name, systems a part of which is first pre-trained on scenes.
    dtype, remat, accumulate: as in `TrainingConfig`, the same for every system.
    lengths: buckets of text plus visual tokens.
    answer_batch: questions answered at once in evaluation.
    latency_answers: answers, one at a time, whose median time is reported.
  """

  task: NeedleConfig
  encoder: EncoderConfig
  systems: dict[str, ModelConfig]
  optimizer: OptimizerConfig
  adapt: dict[str, AdaptConfig] = dataclasses.field(default_factory=dict)
  train_images: int
  eval_images: int
  train_steps: int
  batch_size: int
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  remat: Literal['none', 'layers', 'dots'] = 'none'
  accumulate: int = 1
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
  found += [f'adapt: no system is called {name}' for name in config.adapt
            if name not in config.systems]
  for name, model in config.systems.items():
    found += [f'{name}: {reason}' for reason in _unfit(config, model)]
    if name in config.adapt:
      try:
        glyph_scenes.part(model.encoder)
      except UserError as error:
        found.append(f'adapt.{name}: {error}')
  return found


def towers(encoder: Any, path: str = '') -> Iterator[tuple[str, ViTConfig]]:
  """(path, config) of every ViT in an encoder's settings."""
  for field in dataclasses.fields(encoder):
    value, place = getattr(encoder, field.name), f'{path}{field.name}'
    if isinstance(value, ViTConfig):
      yield place, value
    elif dataclasses.is_dataclass(value):
      yield from towers(value, f'{place}.')


def _plain(vision: ViTConfig) -> ViTConfig:
  """Without what a tower may have beside its blocks: LoRA sets, a pool."""
  return dataclasses.replace(vision, lora=(), pool=None, pool_width=None, pool_mlp_width=None)


def tower_path(model: ModelConfig, shared: Mapping[str, Any]) -> str:
  """Where in a model the shared tower belongs: 'vision/tower/', 'vision/fast/', ...

  Args:
    shared: flat parameters of the tower; all that the model has too must have equal shapes.

  Raises:
    UserError: nowhere.
  """
  flat = paths.flatten(vlm.build(model).abstract)
  places = sorted(path.removesuffix('pos_embed') for path in flat if path.endswith('/pos_embed'))
  for place in places:
    same = {path: flat.get(place + path) for path in shared}
    wrong = [path for path, leaf in same.items()
             if leaf is not None and tuple(leaf.shape) != tuple(np.shape(shared[path]))]
    if not wrong and same.get('blocks/attn/q/kernel', same.get('pos_embed')) is not None:
      return place
  raise UserError(f'{model.system}: none of its towers ({", ".join(places) or "it has none"}) has '
                  'the shapes of the shared encoder')


def _unfit(config: CompareConfig, model: ModelConfig) -> list[str]:
  if model.text is None:
    return ['an encoder without a language model cannot answer']
  system, found = registry.get(model.system), []
  wanted = config.encoder.vision
  visions = [vision for _, vision in towers(model.encoder)]
  if not any(_plain(vision) == _plain(wanted) for vision in visions):
    have = ', '.join(f'{v.image_size} pixels, width {v.width}, depth {v.depth}' for v in visions)
    found.append(f'its tower ({have or "no ViT"}) is not the shared encoder ({wanted.image_size} '
                 f'pixels, width {wanted.width}, depth {wanted.depth}); it could not start from it')
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


class Comparison(Journal):
  """The parts of a comparison in one folder."""

  def __init__(self, config: CompareConfig, folder: str | os.PathLike, *, progress: bool = True):
    super().__init__(folder)
    self.config, self.progress = config, progress
    self._same_config()

  def run(self, only: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that is not done yet; returns the content of results.json.

    Args:
      only: names of the systems to work on now; () for all. The results tell of all systems that
        are done.
    """
    if wrong := sorted(set(only) - set(self.config.systems)):
      raise UserError(f'no system is called {", ".join(wrong)}; there are '
                      f'{", ".join(self.config.systems)}')
    self.part('data', self.write_data)
    self.part('tokenizer', self.tokenizer)
    self.part('encoder', self.pretrain)
    for name in only or self.config.systems:
      if name in self.config.adapt:
        self.part(f'adapt {name}', lambda n=name: self.adapt(n))
      self.part(f'train {name}', lambda n=name: self.train(n))
      self.part(f'answer {name}', lambda n=name: self.answer(n))
      self.part(f'measure {name}', lambda n=name: self.measure(n))
    return self.report()

  def _same_config(self) -> None:
    """Refuses to mix two comparisons in one folder; more systems may join."""
    now = json.loads(json.dumps(to_dict(self.config)))
    before = self.read('config.json') or dict(now)
    joining = {}
    changed = []
    for key in ('systems', 'adapt'):
      old, new = before.pop(key), now.pop(key)
      joining[key] = {**old, **new}
      changed += sorted(f'{key}.{name}' for name in old.keys() & new.keys()
                        if old[name] != new[name])
    changed += sorted(key for key in before.keys() | now.keys()
                      if before.get(key) != now.get(key))
    if changed:
      raise UserError(f'{self.folder}: holds another comparison ({", ".join(changed)} differ); '
                      'choose another --out')
    self.write('config.json', now | joining)

  def write_data(self) -> None:
    """Training and evaluation images."""
    c = self.config
    training = dataclasses.replace(c.task, turns=c.turns)
    write(training, self.folder / 'data/train', c.train_images, seed=c.seed,
          progress=self.progress)
    rows = single_turns(read_records(self.folder / 'data/train'))
    (self.folder / 'data/train/rows.json').write_text(json.dumps(rows))
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
    config = glyphs.GlyphConfig(
      needle=self.config.task, vision=_plain(e.vision), window=e.window,
      last_tokens=e.last_tokens, colour_weight=e.colour_weight, steps=e.steps,
      seed=self.config.seed)
    with tqdm(total=e.steps, unit='step', disable=not self.progress) as bar:
      tower, accuracy = glyphs.pretrain(config, report=_shown(bar))
    shutil.rmtree(self.folder / 'encoder', ignore_errors=True)
    store.save_params(self.folder / 'encoder', {'vision': {'tower': tower}},
                      {'vision': to_dict(e.vision), 'accuracy': accuracy})

  def shared(self) -> dict[str, np.ndarray]:
    """Flat parameters of the shared tower."""
    source = self.folder / 'encoder'
    names = [path.removeprefix('params/') for path in store.describe(source)]
    return {name.removeprefix(TOWER): np.asarray(store.load_leaf(source, name))
            for name in names if name.startswith(TOWER)}

  def adapt(self, name: str) -> None:
    """Pre-trains what one system needs beside the shared tower, starting from that tower."""
    c, a, model = self.config, self.config.adapt[name], self.config.systems[name]
    config = glyph_scenes.SceneConfig(
      needle=c.task, encoder=model.encoder, steps=a.steps, batch_size=a.batch_size,
      learning_rate=a.learning_rate, seed=c.seed)
    shared = self.shared()
    place = tower_path(model, shared).removeprefix('vision/')
    start = {place + path: leaf for path, leaf in shared.items()}
    with tqdm(total=a.steps, unit='step', disable=not self.progress) as bar:
      learned, accuracy = glyph_scenes.pretrain(config, start, report=_shown(bar))
    folder = self.folder / 'adapted' / name
    shutil.rmtree(folder, ignore_errors=True)
    store.save_params(folder, paths.unflatten(learned), {'accuracy': accuracy})

  def start(self, name: str) -> tuple[pathlib.Path, list[str]]:
    """(checkpoint of all pre-trained parameters of a system, by the system's paths; those paths)"""
    model, shared = self.config.systems[name], self.shared()
    place = tower_path(model, shared)
    wanted = paths.flatten(vlm.build(model).abstract)
    leaves = {place + path: leaf for path, leaf in shared.items() if place + path in wanted}
    if name in self.config.adapt:
      source = self.folder / 'adapted' / name
      for path in store.describe(source):
        path = path.removeprefix('params/')
        leaves[f'vision/{path}'] = np.asarray(store.load_leaf(source, path))
    folder = self.folder / 'start' / name
    shutil.rmtree(folder, ignore_errors=True)
    store.save_params(folder, paths.unflatten(leaves), {'system': model.system})
    return folder, sorted(leaves)

  def run_config(self, name: str) -> RunConfig:
    """The training run of one system: all equal but the model."""
    c, model = self.config, self.config.systems[name]
    folder, given = self.start(name)
    exactly = '|'.join(re.escape(path) for path in given)
    two_pass = isinstance(model.fusion, TwoPassFusion)
    return RunConfig(
      model=model, seed=c.seed,
      data=DataConfig(
        train=str(self.folder / 'data/train' / ('rows.json' if two_pass else 'needle.json')),
        lengths=c.lengths, boxes=two_pass, tokenizer=str(self.folder / 'tokenizer')),
      training=TrainingConfig(
        steps=c.train_steps, batch_size=c.batch_size * (c.turns if two_pass else 1), log_every=10,
        checkpoint_every=200, keep=1, objective='two_pass' if two_pass else 'next_token',
        init_from=str(folder), init_allow=(f'(?!({exactly})$).*',),
        groups=(Group(pattern=exactly, frozen=True),
                Group(pattern='.*/(bias|scale)', decay=False), Group(pattern='.*')),
        optimizer=c.optimizer, dtype=c.dtype, remat=c.remat, accumulate=c.accumulate))

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
    self.write(f'answers_{name}.json', rows)

  def measure(self, name: str) -> None:
    """Tokens, operations, memory and time of one system."""
    records = read_records(self.folder / 'data/eval')
    items = [(str(self.folder / 'data/eval' / r['image']), r['question']) for r in records]
    answerer = Answerer.load(self.folder / 'runs' / name)
    self.write(f'cost_{name}.json', cost(
      answerer, items, answers=self.config.latency_answers,
      max_new_tokens=self.config.max_new_tokens))

  def report(self) -> dict[str, Any]:
    """results.json, table.txt, plot.png from what is there."""
    rows, c = {}, self.config
    for name, model in c.systems.items():
      if f'measure {name}' not in self.times:
        continue
      answers, costs = self.read(f'answers_{name}.json'), self.read(f'cost_{name}.json')
      correct = [row['correct'] for row in answers]
      rows[name] = {
        'system': model.system, 'accuracy': float(np.mean(correct)),
        'accuracy_by_size': accuracy_by_size([row['area'] for row in answers], correct),
        # Two-pass models put their visual tokens into the prompt too.
        'family': {'two_pass': 'prefix'}.get(model.fusion.kind, model.fusion.kind),
        **costs, 'train_seconds': self.times[f'train {name}']}
      if name in c.adapt:
        source = self.folder / 'adapted' / name
        rows[name]['adapted'] = {'steps': c.adapt[name].steps, **store.load_config(source),
                                 'seconds': self.times[f'adapt {name}']}
    results = {
      'systems': rows, 'chance': c.task.chance, 'seconds': sum(self.times.values()),
      'seconds_by_part': dict(self.times), 'cpu_seconds_by_part': dict(self.cpu_times),
      'images': {'train': c.train_images, 'eval': c.eval_images, 'questions': c.turns},
      'steps': c.train_steps, 'batch_size': c.batch_size, 'encoder_steps': c.encoder.steps,
      'encoder_accuracy': store.load_config(self.folder / 'encoder')['accuracy'],
      'machine': machine(), 'versions': versions()}
    (self.folder / 'table.txt').write_text(table(results))
    plot(results, self.folder / 'plot.png')
    self.write('results.json', results)
    print('\n' + table(results), flush=True)
    return results


def _shown(bar: tqdm) -> Callable[[int, float, float], None]:
  """Moves a bar on and says how well letters are read."""
  def report(step: int, loss: float, accuracy: float) -> None:
    bar.update()
    if step % 10 == 0:
      bar.set_postfix_str(f'loss {loss:.3f}, letters read {accuracy:.0%}')

  return report


def single_turns(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The questions of all records as rows of their own, each with the box it is about."""
  rows = []
  for record in records:
    turns = record['conversations']
    for number, box in enumerate(record['boxes']):
      question, answer = turns[2 * number], turns[2 * number + 1]
      text = question['value'].removeprefix('<image>\n')
      rows.append({'id': f'{record["id"]}-{number}', 'image': record['image'], 'box': list(box),
                   'conversations': [{**question, 'value': f'<image>\n{text}'}, dict(answer)]})
  return rows


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


def compare(config: CompareConfig, folder: str | os.PathLike, *, only: Sequence[str] = (),
            progress: bool = True) -> dict[str, Any]:
  """Runs a comparison or what is left of it; see `Comparison`.

  Raises:
    UserError: systems that cannot be compared, a folder of another comparison, an interruption.
  """
  return Comparison(config, folder, progress=progress).run(only)
