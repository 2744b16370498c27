"""Several systems on the built-in task with the same data, language model and steps: one table.

What is shared: the written task, the tokenizer, one vision encoder pre-trained on the task's
letters, from which the ViT of every system starts, one language model pre-trained on the task's
text with symbols in place of images, and all training settings. What differs is what the systems
are: views, tokens, joining. Two of them need more than that encoder: LLaVA-HR has a
ConvNeXt besides, PS3 reads patches of a large grid one by one. Both get a pre-training of their own
on the task's scenes (`adapt`), whose steps and seconds are part of the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from hrvlm_jax.checkpoint import store
from hrvlm_jax.checkpoint.files import whole_file
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation.provenance import made
from hrvlm_jax.lab import analyses, claims, compare_report, contrast
from hrvlm_jax.lab.compare_config import (
  FIRST,
  ChangesConfig,
  CompareConfig,
  EncoderConfig,
  encoder_of,
  tower_path,
  towers,
)
from hrvlm_jax.lab.experiment import Experiment, leaves, say, spoken, write_tokenizer
from hrvlm_jax.lab.glyphs import GlyphConfig
from hrvlm_jax.lab.measure import cost
from hrvlm_jax.lab.needle import (
  cue_description,
  description,
  differing,
  plan,
  read_records,
  single_turns,
  write,
)
from hrvlm_jax.lab.report import accuracy, accuracy_by_size, machine
from hrvlm_jax.lab.scenes import SceneConfig
from hrvlm_jax.lab.symbols import SymbolsConfig
from hrvlm_jax.language.conversation import messages_from_llava
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.training.config import DataConfig, Group, RunConfig, TrainingConfig
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer, text_of

TOWER = 'vision/tower/'  # where the shared encoder stands in its own checkpoint
SPECIALS = ('<|endoftext|>', '<pad>', '<|im_start|>', '<|im_end|>', '<image>')


# Part, the function that does it, its arguments.
Work = Sequence[tuple]
# Settings whose entries may be more in a folder than in a config.
JOINING = ('systems', 'encoders', 'adapt', 'changes', 'claims', 'rates')


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """Keys of two comparisons' settings that differ, so that their numbers must not be mixed.

  Systems may join, and claims are only read.
  """
  found = []
  both = before.get('systems', {}).keys() & now['systems'].keys()
  for key in sorted((before.keys() | now.keys()) - {'claims', 'seeds', 'everywhere'}):
    old, new = before.get(key), now.get(key)
    if key in JOINING:
      old, new = old or {}, new or {}
      # A system that is there already may not get or lose settings either.
      shared = both if key in ('adapt', 'changes', 'rates') else old.keys() & new.keys()
      found += sorted(f'{key}.{name}' for name in shared if old.get(name) != new.get(name))
    elif key == 'task' and isinstance(old, dict):
      # Fields that the folder was made without have their defaults.
      found += ['task'] if differing(old, new) else []
    elif old != new:
      found.append(key)
  return found


class Comparison(Experiment):
  """The parts of a comparison in one folder.

  Raises:
    UserError: the folder holds another comparison.
  """

  def __init__(self, config: CompareConfig, folder: str | os.PathLike, *, progress: bool = True):
    super().__init__(folder, progress=progress)
    self.config = config
    self._same_config()

  def run(self, only: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that is not done yet; returns the content of results.json.

    Args:
      only: names of the systems to work on now; () for all. The results tell of all systems that
        are done.

    Raises:
      UserError: an unknown name, an interruption.
    """
    if wrong := sorted(set(only) - set(self.config.systems)):
      raise UserError(f'no system is called {", ".join(wrong)}; there are '
                      f'{", ".join(self.config.systems)}')
    self.prepare()
    for name in only or self.config.systems:
      self.do(self.work(name))
    return self.report()

  def do(self, work: Work) -> None:
    """Those of the parts that are not done yet."""
    for name, fn, *arguments in work:
      self.part(name, fn, *arguments)

  def prepare(self) -> None:
    """What all systems share."""
    for work in self.shared().values():
      self.do(work)

  def shared(self) -> dict[str, Work]:
    """What systems need first, by what it is: data, encoder, further encoders, language."""
    found = {'data': [('data', self.write_data), ('tokenizer', self.tokenizer)],
             'encoder': self._encoder('')}
    found |= {f'encoder {name}': self._encoder(name) for name in self.encoders()}
    if self.config.language is not None:
      found['language'] = [('language', self.pretrain_language)]
    return found

  def _encoder(self, name: str) -> Work:
    step, e = f'encoder {name}'.rstrip(), self._settings(name)
    first = [(f'{step} {FIRST}', self.pretrain, name, True)] if e.first_steps else []
    return [*first, (step, self.pretrain, name)]

  def _settings(self, name: str) -> EncoderConfig:
    return self.config.encoders[name] if name else self.config.encoder

  def adapted(self, name: str) -> Work:
    """Pre-training of a system's own, or of the one that it is like; () for none."""
    if name not in self.config.adapt:
      return []
    source = self.config.adapt[name].like or name
    return [(f'adapt {source}', self.adapt, source)]

  def work(self, name: str) -> Work:
    """Parts of one system in their order: pre-training, training, answers, costs, and what the
    claims ask of it besides."""
    found = [*self.adapted(name), (f'train {name}', self.learn_task, name),
             (f'answer {name}', self.answer, name), (f'measure {name}', self.measure, name)]
    points = [point for claim in self.config.claims.values() for point in claim.points
              if point.system == name]
    for point in points:
      if point.measure == 'accuracy' and point.key != name:
        found.append((f'answer {point.key}', self.answer, name, point))
      if point.encoder and point.measure in claims.COSTS:
        found.append((f'measure {point.key}', self.measure, name, point))
      if point.measure in claims.ANALYSES:
        found.append((f'{point.measure} {point.key}', self.analyse, point))
    return list({part[0]: part for part in found}.values())

  def parts(self) -> set[str]:
    """Names of all parts of this comparison; the folder may hold those of others beside it."""
    works = [*self.shared().values(), *map(self.work, self.config.systems)]
    return {part[0] for work in works for part in work}

  def encoders(self) -> list[str]:
    """Names of the further encoders that a system starts from."""
    used = {encoder_of(self.config, model) for model in self.config.systems.values()}
    return [name for name in self.config.encoders if name in used]

  def _same_config(self) -> None:
    """Refuses to mix two comparisons in one folder; more systems may join."""
    now = json.loads(json.dumps(to_dict(self.config)))
    before = self.read('config.json') or now
    _fill(before, self.config)
    if changed := changes(before, now):
      raise UserError(f'{self.folder}: holds another comparison ({", ".join(changed)} differ); '
                      'choose another --out')
    self.write('config.json', now | {key: {**before.get(key, {}), **now[key]} for key in JOINING})

  def write_data(self) -> None:
    """Training and evaluation images."""
    c = self.config
    training = dataclasses.replace(c.task, turns=c.turns)
    write(training, self.folder / 'data/train', c.train_images, seed=c.seed,
          progress=self.progress)
    records, rows = read_records(self.folder / 'data/train'), []
    for index, record in enumerate(records):
      own = single_turns([record])
      if c.described:
        shown = plan(training, c.seed, index)
        for row in own:
          row['conversations'] += cue_description(training, shown)
        record['conversations'] += description(training, shown)
      rows += own
    (self.folder / 'data/train/rows.json').write_text(json.dumps(rows))
    if c.described:
      (self.folder / 'data/train/described.json').write_text(json.dumps(records))
    write(c.task, self.folder / 'data/eval', c.eval_images, seed=c.seed + 1,
          progress=self.progress)

  def texts(self) -> list[str]:
    """What the tokenizer learns from: the task's single questions in all templates."""
    rows = self.read('data/train/rows.json')[:1000 * self.config.turns]
    told = self.read('data/train/described.json')[:1000] if self.config.described else []
    return spoken((messages_from_llava(record['conversations']) for record in [*rows, *told]),
                  sorted({model.chat for model in self.config.systems.values()}))

  def tokenizer(self) -> None:
    """Words of the questions and of all templates are single tokens."""
    write_tokenizer(self.folder / 'tokenizer', self.texts(), specials=SPECIALS,
                    vocab_size=next(iter(self.config.systems.values())).text.vocab_size,
                    pad='<pad>', eos='<|im_end|>')

  def pretrain(self, name: str = '', first: bool = False) -> None:
    """The shared encoder, or a further one, as a checkpoint of `vision/tower`.

    Args:
      first: on the simpler task that it begins with.
    """
    e, begun = self._settings(name), f'{name} {FIRST}'.lstrip()
    start, task, steps = None, self.config.task, e.steps
    if first:
      name, task, steps = begun, e.first, e.first_steps
    elif e.first_steps:
      start = {path.replace(TOWER, GlyphConfig.below): leaf
               for path, leaf in leaves(self.folder / encoder_folder(begun)).items()}
    tower, read = self.learn(f'encoder {name}'.rstrip(), GlyphConfig(
      needle=task, vision=e.vision, window=e.window, last_tokens=e.last_tokens,
      colour_weight=e.colour_weight, steps=steps, seed=self.config.seed), start)
    self._keep(encoder_folder(name), {TOWER + path: leaf for path, leaf in tower.items()},
               {'vision': to_dict(e.vision), 'accuracy': read})

  def pretrain_language(self) -> None:
    """The shared language model, as a checkpoint of `language`."""
    c = self.config
    models = {model.chat: model for model in c.systems.values()
              if model.fusion.in_prompt}
    tokenizer = tokenizer_of(str(self.folder / 'tokenizer'))
    language, read = self.learn('language', SymbolsConfig(
      needle=dataclasses.replace(c.task, turns=c.turns), text=next(iter(models.values())).text,
      steps=c.language.steps, slots=c.language.slots, batch_size=c.language.batch_size,
      learning_rate=c.language.learning_rate, lengths=c.lengths, seed=c.seed,
      described=c.described, uncued=c.language.uncued, uncued_ask=c.language.uncued_ask,
      writing=tuple(text_of(models[name], tokenizer) for name in sorted(models))))
    self._keep('language', {f'language/{path}': leaf for path, leaf in language.items()},
               {'accuracy': read})

  def _keep(self, name: str, flat: dict[str, Any], config: dict[str, Any]) -> None:
    store.save_params(self.folder / name, paths.unflatten(flat), config, overwrite=True)

  def given(self, model: ModelConfig) -> dict[str, np.ndarray]:
    """The pre-trained tower's parameters by their paths in a model; {} for one without a ViT."""
    if not any(towers(model.encoder)):
      return {}
    folder = self.folder / encoder_folder(encoder_of(self.config, model))
    shared = {path.removeprefix(TOWER): leaf for path, leaf in leaves(folder).items()}
    place = tower_path(model, shared)
    return {place + path: leaf for path, leaf in shared.items()}

  def adapt(self, name: str) -> None:
    """Pre-trains what one system needs beside the shared tower, starting from that tower."""
    c, a, model = self.config, self.config.adapt[name], self.config.systems[name]
    start = {path.removeprefix('vision/'): leaf for path, leaf in self.given(model).items()}
    if a.regions is not None:
      learned, loss = contrast.learn(
        self, f'adapting/{name}', model.encoder.tower, a, start, task=c.task,
        images=c.train_images, seed=c.seed)
      self._keep(f'adapted/{name}', learned, {'loss': loss})
      return
    learned, read = self.learn(name, SceneConfig(
      needle=c.task, encoder=model.encoder, steps=a.steps, batch_size=a.batch_size,
      learning_rate=a.learning_rate, window=a.window, seed=c.seed), start)
    self._keep(f'adapted/{name}', learned, {'accuracy': read})

  def start(self, name: str) -> tuple[pathlib.Path, list[str], list[str]]:
    """(checkpoint of all pre-trained parameters of a system, their paths, those of the encoder)."""
    model = self.config.systems[name]
    wanted = paths.flatten(vlm.build(model).abstract)
    flat = {path: leaf for path, leaf in self.given(model).items() if path in wanted}
    if name in self.config.adapt:
      learned = leaves(self.folder / 'adapted' / (self.config.adapt[name].like or name))
      # All of it, unless it is like another system.
      flat |= {f'vision/{path}': leaf for path, leaf in learned.items()
               if f'vision/{path}' in wanted}
    seen = sorted(flat)
    if self.config.language is not None:
      flat |= leaves(self.folder / 'language')
    flat |= self.zeros(name, wanted)
    self._keep(f'start/{name}', flat, {'system': model.system})
    return self.folder / 'start' / name, sorted(flat), seen

  def zeros(self, name: str, wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Of the parameters of a system those that start at zero.

    Raises:
      UserError: its `changes` ask for some, and none has such a path.
    """
    pattern = self.config.changes.get(name, ChangesConfig()).zeros
    found = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in wanted.items()
             if re.fullmatch(pattern, path)}
    if pattern and not found:
      raise UserError(f'changes.{name}.zeros: {pattern!r} matches no parameter of {name}; '
                      '`hrvlm params` lists them')
    return found

  def run_config(self, name: str) -> RunConfig:
    """The training run of one system: all equal but the model and its `changes`."""
    c, model = self.config, self.config.systems[name]
    change = c.changes.get(name, ChangesConfig())
    folder, given, seen = self.start(name)
    still = [path for path in seen if not re.fullmatch(change.learns, path)]
    exactly, frozen = ('|'.join(re.escape(path) for path in names) for names in (given, still))
    frozen = '|'.join(filter(None, (frozen, change.frozen)))
    boxes = model.fusion.boxes
    rate = c.rates.get(name, c.optimizer.learning_rate)
    records = 'rows' if boxes else 'described' if c.described else 'needle'
    return RunConfig(
      model=model, seed=c.seed,
      data=DataConfig(
        train=str(self.folder / f'data/train/{records}.json'),
        lengths=c.lengths, boxes=boxes, tokenizer=str(self.folder / 'tokenizer'),
        draw=change.draw, background=change.background),
      training=TrainingConfig(
        steps=c.train_steps * change.times, log_every=10,
        batch_size=c.batch_size * (c.turns if boxes else 1),
        checkpoint_every=200, keep=1, objective=model.fusion.objective,
        init_from=str(folder), init_allow=(f'(?!({exactly})$).*',),
        groups=(*((Group(pattern=frozen, frozen=True),) if frozen else ()),
                Group(pattern='.*/(bias|scale)', decay=False), Group(pattern='.*')),
        optimizer=dataclasses.replace(c.optimizer, learning_rate=rate), dtype=c.dtype,
        remat=c.remat, accumulate=c.accumulate))

  def learn_task(self, name: str) -> None:
    """Trains one system."""
    self.train(self.run_config(name), self.folder / 'runs' / name)

  def asked(self, name: str, split: str, encoder: dict[str, Any] | None = None,
            methods: dict[str, dict[str, Any]] | None = None) -> list:
    """The answers of a trained system to a written part of the task."""
    return self.answers(
      self.folder / 'runs' / name, self.folder / 'data' / split, encoder=encoder, methods=methods,
      batch_size=self.config.answer_batch, max_new_tokens=self.config.max_new_tokens)

  def answer(self, name: str, point: claims.Point | None = None) -> None:
    """Answers to the evaluation set, kept one by one; `point`: with its settings."""
    changed = () if point is None else (point.encoder, point.methods)
    rows = self.asked(name, 'eval', *changed)
    self.write(f'answers_{name if point is None else point.key}.json', rows)

  def measure(self, name: str, point: claims.Point | None = None) -> None:
    """Tokens, operations, memory and time of one system; `point`: with its settings."""
    records = read_records(self.folder / 'data/eval')
    items = [(str(self.folder / 'data/eval' / r['image']), r['question']) for r in records]
    answerer = Answerer.load(self.folder / 'runs' / name,
                             encoder_options=None if point is None else point.encoder)
    self.write(f'cost_{name if point is None else point.key}.json', cost(
      answerer, items, answers=self.config.latency_answers,
      max_new_tokens=self.config.max_new_tokens))

  def analyse(self, point: claims.Point) -> None:
    """What a point measures of every question of the evaluation set (`lab.analyses`)."""
    data = self.folder / 'data/eval'
    self.write(f'{point.measure}_{point.key}.json', analyses.FOUND[point.measure](
      Answerer.load(self.folder / 'runs' / point.system, encoder_options=point.encoder),
      read_records(data), data, batch_size=self.config.answer_batch))

  def report(self) -> dict[str, Any]:
    """results.json, table.txt, plot.png from what is there."""
    rows, c = {}, self.config
    own = self.parts()
    times, cpu_times = ({part: spent for part, spent in noted.items() if part in own}
                        for noted in (self.times, self.cpu_times))
    for name, model in c.systems.items():
      if f'measure {name}' not in self.times:
        continue
      answers = self.read(f'answers_{name}.json')
      rows[name] = {
        'system': model.system, 'accuracy': accuracy(answers),
        'accuracy_by_size': accuracy_by_size(answers),
        # Two-pass models put their visual tokens into the prompt too.
        'family': 'prefix' if model.fusion.in_prompt else model.fusion.kind,
        'times': c.changes.get(name, ChangesConfig()).times,
        **self.read(f'cost_{name}.json'), 'train_seconds': self.times[f'train {name}']}
      if name in c.adapt:
        learned = c.adapt[name].like or name
        source = self.folder / 'adapted' / learned
        rows[name]['adapted'] = {'steps': c.adapt[learned].steps, **store.load_config(source),
                                 'seconds': self.times[f'adapt {learned}']}
    results = {
      'systems': rows, 'chance': c.task.chance, 'seconds': sum(times.values()),
      'seconds_by_part': times, 'cpu_seconds_by_part': cpu_times,
      'images': {'train': c.train_images, 'eval': c.eval_images, 'questions': c.turns},
      'steps': c.train_steps, 'batch_size': c.batch_size, 'encoder_steps': c.encoder.steps,
      'encoder_accuracy': store.load_config(self.folder / 'encoder')['accuracy'],
      'language_steps': None if c.language is None else c.language.steps,
      'machine': machine(), 'made': made(to_dict(c))}
    with whole_file(self.folder / 'table.txt') as part:
      part.write_text(compare_report.table(results))
    compare_report.plot(results, self.folder / 'plot.png')
    self.write('results.json', results)
    say('\n' + compare_report.table(results))
    return results


def encoder_folder(name: str) -> str:
  """Where a pre-trained encoder lies: the shared one ('') or a further one."""
  return f'encoder_{name}' if name else 'encoder'


def _fill(before: dict[str, Any], settings: Any) -> None:
  """Gives noted settings the fields that they were noted without, with their defaults."""
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    if field.name in ('language', 'encoder') and value and before.get(field.name):
      _fill(before[field.name], value)
    elif field.name in ('adapt', 'changes', 'encoders'):
      for name, part in value.items():
        if name in before.get(field.name, {}):
          _fill(before[field.name][name], part)
    elif field.default is not dataclasses.MISSING:
      before.setdefault(field.name, json.loads(json.dumps(field.default)))
