"""Tuning a model on one's own data in one call: the checkpoint says what a config would.

    hrvlm finetune CHECKPOINT --data own.json --lora 16 --epochs 3 --eval 0.1 --out runs/mine

Model, chat template, tokenizer and preprocessing are the checkpoint's; what its system freezes
(`System.frozen`) stays frozen. The rows are split once, by the seed, and kept below OUT/data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np

from hrvlm_jax.checkpoint import layout, store
from hrvlm_jax.core import json_text, paths
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.images import image_size
from hrvlm_jax.core.layers import LoRA
from hrvlm_jax.core.registry import load_callable
from hrvlm_jax.data.rows import BadRow, Row
from hrvlm_jax.data.sources import open_source
from hrvlm_jax.front.loading import is_checkpoint, load
from hrvlm_jax.interop import adapters, hub
from hrvlm_jax.interop.convert import convert
from hrvlm_jax.language.chat import ASSISTANT, IMAGE, USER
from hrvlm_jax.language.generate import bucket
from hrvlm_jax.language.prompt import Text
from hrvlm_jax.parallel import distributed
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.training import loop
from hrvlm_jax.training.answers import METRICS, AnswersOptions
from hrvlm_jax.training.config import DataConfig, Group, OptimizerConfig, RunConfig, TrainingConfig
from hrvlm_jax.training.metrics import read_metrics
from hrvlm_jax.training.objectives import OBJECTIVES
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import find_tokenizer, model_config, text_of

ASKED = 'finetune.json'  # in OUT: what was asked for
LORA_LEAVES = r'language/.*lora_[ab].*'
READING = ('exif', 'alpha', 'max_pixels')  # settings of a run's data that say how images are opened
ANSWER_TOKENS = 64  # most of a held-out answer
_MEASURED = 500  # rows whose length is looked at before training
_BATCH = 8
_LARGE = 200_000_000  # parameters from which on the backward pass recomputes layers

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned:
  """What came of it.

  Attributes:
    workdir: ask it, or go on: it is the work directory of a run.
    rows, held_out: questions trained on, and kept for the score.
    steps: of the optimizer.
    loss: of the last step; None where nothing was left to do.
    metric: name of the score. before, after: mean score on the held-out rows, 0 to 1; None without.
    example: (image or None, question) to try.
    interrupted: a signal stopped it; the same call goes on.
  """

  workdir: pathlib.Path
  rows: int
  held_out: int
  steps: int
  loss: float | None
  metric: str
  before: float | None
  after: float | None
  example: tuple[str | None, str]
  interrupted: bool = False


def finetune(checkpoint: str | os.PathLike, data: str | os.PathLike, out: str | os.PathLike, *,
             images: str | os.PathLike | None = None, lora: int | None = None, epochs: float = 3,
             held_out: float = 0.1, metric: str = 'plain', batch_size: int | None = None,
             learning_rate: float | None = None, seed: int = 0, dtype: str = 'float32',
             encoder: Mapping[str, Any] | None = None, progress: bool = False,
             say: Say = lambda text: None) -> Tuned:
  """See `hrvlm_jax.api.finetune`."""
  _check_numbers(lora, epochs, held_out, batch_size, learning_rate)
  score = load_callable(metric, 'metric') if ':' in metric else METRICS.get(metric)
  out = pathlib.Path(out)
  source = open_source(data, images=images)
  rows = usable(source, say)
  asked = {'checkpoint': _absolute(checkpoint), 'data': _absolute(data),
           'images': None if images is None else _absolute(images), 'lora': lora, 'epochs': epochs,
           'held_out': held_out, 'metric': metric, 'batch_size': batch_size,
           'learning_rate': learning_rate, 'seed': seed, 'dtype': dtype,
           'encoder': json.loads(json.dumps(dict(encoder or {}), default=str))}
  _same(out, asked)
  start = _start(checkpoint, out, asked, say)
  config = _model(start, lora, encoder)
  system, tokenizer = registry.get(config.system), find_tokenizer(start)
  rows = fitting(rows, text_of(config, tokenizer), say)
  parts = split(len(rows), held_out, seed)
  _claim(out, asked)
  (out / 'data').mkdir(exist_ok=True)
  folder = write_rows({name: [rows[i] for i in part] for name, part in parts.items()}, out / 'data')
  tokenizer_folder = out / 'tokenizer'
  tokenizer_folder.mkdir(exist_ok=True)
  tokenizer.save(tokenizer_folder)
  train, kept = len(parts['train']), len(parts['eval'])
  # Rows are cut over the devices.
  size = batch_size or -(-min(_BATCH, train) // jax.device_count()) * jax.device_count()
  steps = max(1, math.ceil(train * epochs / size))
  frozen = [pattern for pattern in (system.frozen,) if pattern]
  if lora:
    frozen.append(f'(?!{LORA_LEAVES})language/.*')
  before = store.load_config(start).get('data') or {}
  reading = {key: before[key] for key in READING if key in before}
  places = _lengths(config, tokenizer, [rows[i] for i in parts['train'][:_MEASURED]])
  run = RunConfig(
    model=config, seed=seed,
    data=DataConfig(train=str(out / 'data/train.jsonl'), images=folder, **reading,
                    tokenizer=str(tokenizer_folder), lengths=places),
    training=TrainingConfig(
      steps=steps, batch_size=size, dtype=dtype, log_every=max(1, min(10, steps // 10)),
      checkpoint_every=max(1, min(500, steps)), keep=1,
      frozen_dtype=dtype if dtype != 'float32' else None,
      remat='layers' if _parameters(config) > _LARGE else 'none',
      groups=(*(Group(pattern=pattern, frozen=True) for pattern in frozen),
              Group(pattern=r'.*/(bias|scale)', decay=False), Group(pattern='.*')),
      objective=config.fusion.kind if config.fusion.kind in OBJECTIVES.names() else 'next_token',
      optimizer=OptimizerConfig(
        learning_rate=learning_rate or (2e-4 if lora else 2e-5), warmup=0.03),
      evaluators=(AnswersOptions(
        data=str(out / 'data/eval.jsonl'), images=folder, metric=metric, label='eval',
        max_new_tokens=ANSWER_TOKENS, batch_size=min(25, kept)),) if kept else (),
      init_from=str(start), init_allow=(LORA_LEAVES,) if lora else ()))
  say(f'{config.system} from {checkpoint}: {train} rows to train on, {kept} held out; {steps} '
      f'steps of {size} rows, learning rate {run.training.optimizer.learning_rate:g}'
      + (f', LoRA of rank {lora} on the language model' if lora else ''))
  before = _before(start, encoder, reading, [rows[i] for i in parts['eval']], score, out, metric)
  if before is not None:
    say(f'held out, before: {metric} {before:.1%}')
  result = loop.train(run, out, progress=progress)
  scored = [m['eval_accuracy'] for m in read_metrics(out) if 'eval_accuracy' in m]
  after = scored[-1] if scored and kept and not result.interrupted else None
  if after is not None:
    say(f'held out, after: {metric} {after:.1%}')
  shown = rows[(parts['eval'] or parts['train'])[0]]
  return Tuned(workdir=out, rows=train, held_out=kept, steps=result.step, loss=result.loss,
               metric=metric, before=before, after=after, interrupted=result.interrupted,
               example=_example(shown, out / 'data', folder))


def _check_numbers(lora, epochs, held_out, batch_size, learning_rate) -> None:
  problems = []
  if lora is not None and lora < 1:
    problems.append(f'lora: found {lora}, expected a rank of at least 1')
  if not 0 < epochs < 1e9:
    problems.append(f'epochs: found {epochs}, expected a number above 0')
  if not 0 <= held_out < 1:
    problems.append(f'eval: found {held_out}, expected a share from 0 to below 1, such as 0.1')
  if batch_size is not None and batch_size < 1:
    problems.append(f'batch_size: found {batch_size}, expected at least 1')
  if learning_rate is not None and not learning_rate > 0:
    problems.append(f'learning_rate: found {learning_rate}, expected more than 0')
  if problems:
    raise UserError('; '.join(problems))


def _absolute(what: str | os.PathLike) -> str:
  return os.path.abspath(what) if os.path.exists(what) else os.fspath(what)


def _same(out: pathlib.Path, asked: Mapping[str, Any]) -> None:
  """Refuses to go on in the folder of something else.

  Raises:
    UserError: what differs.
  """
  if not out.is_dir() or not any(out.iterdir()):
    return
  if not (out / ASKED).is_file():
    raise UserError(f'{out}: is not empty and holds no run of hrvlm finetune; choose another --out')
  before = json_text.loads((out / ASKED).read_text())
  changed = [f'{key} was {before.get(key)!r}, is {value!r}' for key, value in asked.items()
             if before.get(key) != value]
  if changed:
    raise UserError(f'{out}: holds another run ({"; ".join(changed)}); choose another --out')


def usable(source: Any, say: Say) -> list[Row]:
  """The rows that can be trained on; what is wrong with others is said.

  Raises:
    UserError: there is none.
  """
  def checked(index: int) -> Row:
    row = source[index]
    roles = [message.role for message in row.messages]
    if len(roles) < 2 or roles != [USER, ASSISTANT] * (len(roles) // 2):
      raise BadRow('conversation', row.where, 'expected questions and their answers in turn')
    for ref in row.images:
      image_size(ref.read(), name=ref.name)
    return row

  return _kept(range(len(source)), checked, say)


def fitting(rows: Sequence[Row], text: Text, say: Say) -> list[Row]:
  """The rows whose conversations the model's chat template can hold; others are said.

  Raises:
    UserError: there is none.
  """
  def checked(row: Row) -> Row:
    try:
      text.encode(row.messages, len(row.images), system=row.system)
    except UserError as error:
      raise UserError(f'{row.where}: {error}') from error
    return row

  return _kept(rows, checked, say)


def _kept(values: Sequence[Any], checked: Callable[[Any], Row], say: Say) -> list[Row]:
  rows, problems = [], []
  for value in values:
    try:
      rows.append(checked(value))
    except UserError as error:
      problems.append(str(error))
  if problems:
    listed = '\n'.join(f'  {problem}' for problem in problems[:5])
    more = f'\n  and {len(problems) - 5} more (hrvlm data check lists them)' if len(problems) > 5 \
        else ''
    text = f'{len(problems)} of {len(values)} rows cannot be used:\n{listed}{more}'
    if not rows:
      raise UserError(text)
    say(text)
  return rows


def split(count: int, held_out: float, seed: int) -> dict[str, list[int]]:
  """{'train', 'eval'}: numbers of the rows, drawn by the seed; each has at least one.

  Raises:
    UserError: one row alone, and a share to hold out.
  """
  if held_out and count < 2:
    raise UserError('one row cannot be trained on and held out; give more, or --eval 0')
  kept = min(count - 1, max(1, round(count * held_out))) if held_out else 0
  order = np.random.default_rng(seed).permutation(count).tolist()
  return {'eval': sorted(order[:kept]), 'train': sorted(order[kept:])}


def write_rows(parts: Mapping[str, Sequence[Row]], folder: pathlib.Path) -> str:
  """Writes `<part>.jsonl` in LLaVA's form; returns the folder of their images.

  Images that are files of one folder stay where they are; all others are written out.
  """
  refs = [ref for rows in parts.values() for row in rows for ref in row.images]
  folders = {ref.folder for ref in refs}
  stay = len(folders) == 1 and None not in folders
  if not stay:
    (folder / 'images').mkdir(exist_ok=True)
  number = 0
  for name, rows in parts.items():
    lines = []
    for row in rows:
      names = []
      for ref in row.images:
        names.append(ref.path if stay else f'{number:06d}{pathlib.PurePath(ref.name).suffix[:6]}')
        if not stay:
          (folder / 'images' / names[-1]).write_bytes(ref.read())
        number += 1
      said = [{'from': {USER: 'human', ASSISTANT: 'gpt'}[m.role], 'value': m.text}
              for m in row.messages]
      lines.append(json.dumps({'id': row.id, **({'image': names} if names else {}),
                               **({'system': row.system} if row.system else {}),
                               'conversations': said}, ensure_ascii=False))
    (folder / f'{name}.jsonl').write_text(''.join(line + '\n' for line in lines), 'utf-8')
  return os.path.abspath(folders.pop() if stay else folder / 'images' if refs else folder)


def _claim(out: pathlib.Path, asked: Mapping[str, Any]) -> None:
  out.mkdir(parents=True, exist_ok=True)
  (out / ASKED).write_text(json.dumps(asked, indent=1) + '\n')


def _start(checkpoint: str | os.PathLike, out: pathlib.Path, asked: Mapping[str, Any], say: Say
           ) -> pathlib.Path:
  """The checkpoint to begin with; an original's weights are converted once, to OUT/start."""
  if is_checkpoint(checkpoint):
    return pathlib.Path(os.fspath(layout.resolve(checkpoint)))
  start = out / 'start'
  if not is_checkpoint(start):
    hub.resolve(checkpoint)  # nothing is written for what is not there
    _claim(out, asked)
    convert(checkpoint, start, say=say)
  return start


def _model(start: pathlib.Path, lora: int | None, encoder: Mapping[str, Any] | None) -> ModelConfig:
  """The checkpoint's model, with a LoRA set where one is wanted.

  Raises:
    UserError: no language model, or one that has another set already.
  """
  config = model_config(start, dict(encoder or {}))
  if config.text is None:
    raise UserError(f'{start}: is an encoder alone; there is no language model to tune')
  if not lora:
    return config
  there = [spec for spec in config.text.lora if not spec.name]
  if there and there[0].rank != lora:
    raise UserError(f'{start}: has a LoRA set of rank {there[0].rank} already; give --lora '
                    f'{there[0].rank} to go on with it, or merge it first (hrvlm export '
                    '--merge-lora)')
  return config if there else adapters.with_set(config, LoRA(rank=lora, alpha=2.0 * lora))


def _lengths(config: ModelConfig, tokenizer: Any, rows: Sequence[Row]) -> tuple[int, ...]:
  """Buckets for the rows: the one that holds the longest, half of it, and what the model can hold.

  Raises:
    UserError: the model knows fewer positions than a row's images take.
  """
  text, system = text_of(config, tokenizer), registry.get(config.system)
  longest, visual = 1, 0
  for row in rows:
    sizes = [image_size(ref.read(), name=ref.name) for ref in row.images]
    counts = [system.count(*size, config.encoder).tokens for size in sizes]
    arrays = text.conversation(row.messages, counts, system=row.system)
    longest = max(longest, len(arrays['tokens']))
    visual = max(visual, sum(counts) if config.fusion.in_prompt else 0)
  most = config.text.max_positions
  if visual >= most:
    raise UserError(f'a row has {visual} visual tokens, but the language model knows {most} '
                    'positions; lower them (--encoder.KEY=VALUE)')
  largest = min(bucket(longest), most)
  return tuple(sorted({n for n in (bucket(largest // 2), largest) if n > visual} | {largest}))


def _parameters(config: ModelConfig) -> int:
  return sum(math.prod(leaf.shape) for leaf in paths.flatten(vlm.build(config).abstract).values())


def _before(start, encoder, reading, rows: Sequence[Row], score, out: pathlib.Path, metric: str
            ) -> float | None:
  """The score of the model as it was, kept in OUT/before.json."""
  path = out / 'before.json'
  if not rows:
    return None
  if path.exists() and (kept := json_text.loads(path.read_text())).get('metric') == metric:
    return kept['value']
  model = load(start, encoder=encoder, **reading)
  ask = lambda row: row.messages[0].text.replace(IMAGE, '').strip()
  asked = [([ref.read() for ref in row.images],
            ask(row) if row.system is None else f'{row.system}\n{ask(row)}') for row in rows]
  answers = model.batch(asked, max_new_tokens=ANSWER_TOKENS)
  value = float(np.mean([score(answer, row.messages[1].text.strip())
                         for answer, row in zip(answers, rows, strict=True)]))
  if distributed.is_main():
    path.write_text(json.dumps({'metric': metric, 'value': value}))
  return value


def _example(row: Row, data: pathlib.Path, folder: str) -> tuple[str | None, str]:
  question = row.messages[0].text.replace(IMAGE, '').strip()
  if not row.images:
    return None, question
  for part in ('eval', 'train'):
    for line in (data / f'{part}.jsonl').read_text('utf-8').splitlines():
      value = json_text.loads(line)
      if value['id'] == row.id and value['conversations'][0]['value'] == row.messages[0].text:
        return os.path.relpath(os.path.join(folder, value['image'][0])), question
  return None, question


def summary(tuned: Tuned) -> str:
  """What to do next, in a line or two."""
  image, question = tuned.example
  quoted = question.replace('"', "'")
  words = f'hrvlm ask --checkpoint {tuned.workdir} ' + (f'{image} ' if image else '')
  if len(quoted) > 200:
    quoted = quoted[:200]
  return f'tuned: {tuned.workdir}\ntry: {words}"{quoted}"'
