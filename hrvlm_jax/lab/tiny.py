"""What the configs in `configs/tiny` share: task, tokenizer, pre-trained towers, kept results.

    def get_config():
      return tiny.config('pheye', MODEL, lengths=(96, 128), groups=GROUPS,
                         train_fresh=('(?!vision/tower/).*',))

    def preparation():
      return tiny.Preparation(towers={'vision/tower': GlyphConfig(...)})

`hrvlm tiny --config configs/tiny/pheye.py` makes what the config names, trains, and with `--keep`
writes `configs/tiny/results/pheye.json` and the `Result:` line of the config's header.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import re
import shutil
from typing import Any

import ml_collections
import numpy as np

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.lab import glyph_scenes, glyphs, symbols
from hrvlm_jax.lab.glyph_scenes import SceneConfig
from hrvlm_jax.lab.glyphs import GlyphConfig
from hrvlm_jax.lab.needle import NeedleConfig, read_records, write
from hrvlm_jax.lab.symbols import SymbolsConfig
from hrvlm_jax.language.bpe import train_bpe
from hrvlm_jax.language.chat import get_template, render, rendered_text
from hrvlm_jax.language.conversation import messages_from_llava
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.training.metrics import read_metrics
from hrvlm_jax.vlm.answer import text_of

Pretraining = GlyphConfig | SceneConfig | SymbolsConfig

FOLDER = 'runs/tiny'
VOCABULARY = 512  # at most: bytes, special tokens, the words of the questions
SPECIALS = ('<|endoftext|>', '<pad>', '<s>', '</s>', '<|im_start|>', '<|im_end|>', '<image>')
_TEMPLATES = ('mc_llava_train', 'pheye', 'vicuna_v1', 'vila_qwen2')


def config(
  name: str, model: ModelConfig, *, task: str = 'square', lengths: Sequence[int],
  groups: Sequence[Mapping[str, Any]], train_fresh: Sequence[str] = (),
  data: Mapping[str, Any] | None = None, **training: Any,
) -> ml_collections.ConfigDict:
  """The run config of a tiny system on the built-in task.

  Args:
    name: of the config file; its towers are `runs/tiny/encoders/<name>`.
    task: preset of the task; its folder is `runs/tiny/<task>`.
    groups: parameter groups.
    train_fresh: patterns of parameters that the pre-trained towers do not hold; none: the run
      starts from random parameters.
    data, training: further settings, which win.
  """
  folder = f'{FOLDER}/{task}'
  values = ml_collections.ConfigDict()
  values.seed = 0
  values.model = to_dict(model)
  values.data = {'train': f'{folder}/train/needle.json', 'eval': f'{folder}/eval/needle.json',
                 'tokenizer': f'{folder}/tokenizer', 'lengths': tuple(lengths),
                 **(data or {})}
  start = {'init_from': f'{FOLDER}/encoders/{name}', 'init_allow': tuple(train_fresh)}
  values.training = {
    'steps': 1000, 'batch_size': 32, 'log_every': 10, 'checkpoint_every': 250, 'keep': 1,
    'eval_every': 1000, 'groups': tuple(dict(group) for group in groups),
    'optimizer': dict(name='muon', learning_rate=2e-3, warmup=0.08, weight_decay=0.01, b2=0.98),
    **(start if train_fresh else {}), **training}
  return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
  """What a tiny config needs before it trains.

  Attributes:
    towers: parameter path -> the pre-training of what lies there: a ViT on crops, or the parts of
      an encoder (path 'vision') that learn from whole scenes, which start from the ViTs before
      them; 'language': the decoder on symbols, in the run's own way of writing; may be empty.
    task: the built-in task of the config's data folder.
  """

  towers: Mapping[str, Pretraining] = dataclasses.field(default_factory=dict)
  task: NeedleConfig = NeedleConfig.square()
  train_images: int = 4000
  eval_images: int = 500
  turns: int = 3


def prepare(
  preparation: Preparation, run: Any, *, say: Callable[[str], None] = print, progress: bool = True
) -> None:
  """Writes the data, the tokenizer and the towers that a run config names; skips what is there.

  Args:
    run: the `RunConfig`.
  """
  p = preparation
  train, held_out = (pathlib.Path(part).parent for part in (run.data.train, run.data.eval))
  say(f'the task: {train.parent}')
  write(dataclasses.replace(p.task, turns=p.turns), train, p.train_images, seed=0,
        progress=progress)
  write(dataclasses.replace(p.task, turns=1), held_out, p.eval_images, seed=1, progress=progress)
  tokenizer = pathlib.Path(run.data.tokenizer)
  if not tokenizer.exists():
    conversations = [messages_from_llava(record['conversations'])[:2]
                     for record in read_records(train)[:1000]]
    # Words of all templates, so that systems can share the tokenizer.
    texts = [rendered_text(render(get_template(name), messages))
             for name in _TEMPLATES for messages in conversations]
    tokenizer.mkdir(parents=True)
    train_bpe(texts, vocab_size=VOCABULARY, specials=SPECIALS,
              roles={'pad': '<pad>', 'eos': '<|endoftext|>', 'bos': '<s>'}).save(tokenizer)
  if p.towers and not pathlib.Path(run.training.init_from).exists():
    _pretrain(p.towers, run, say)


def _pretrain(towers: Mapping[str, Pretraining], run: Any, say: Callable[[str], None]) -> None:
  """Learns one part after the other; what an interrupted preparation has learned is kept."""
  flat: dict[str, Any] = {}
  accuracy = {}
  folder = pathlib.Path(f'{run.training.init_from}.parts')
  for path, task in towers.items():
    part = folder / path.replace('/', '_')
    made_by = repr(task)
    if not (store.is_whole(part) and store.load_config(part)['made_by'] == made_by):
      learned, read = _learn(path, task, flat, run, say)
      store.save_params(part, paths.unflatten(learned), {'accuracy': read, 'made_by': made_by},
                        overwrite=True)
    names = [name.removeprefix('params/') for name in store.describe(part)]
    flat |= {f'{path}/{name}': store.load_leaf(part, name) for name in names}
    accuracy[path] = store.load_config(part)['accuracy']
  store.save_params(run.training.init_from, paths.unflatten(flat), {'accuracy': accuracy})
  shutil.rmtree(folder)


def _learn(path: str, task: Pretraining, before: Mapping[str, Any], run: Any,
           say: Callable[[str], None]) -> tuple[dict[str, Any], float]:
  """(flat parameters below `path`, accuracy); `before`: what was learned before, by whole path."""
  def report(step: int, loss: float, read: float) -> None:
    if step % 100 == 0 or step == task.steps:
      say(f'{path}: step {step} of {task.steps}, loss {loss:.3f}, letters read {read:.0%}')

  if isinstance(task, SceneConfig):
    start = {name.removeprefix(f'{path}/'): leaf for name, leaf in before.items()}
    return glyph_scenes.pretrain(task, start, report=report)
  if isinstance(task, SymbolsConfig):
    writing = text_of(run.model, tokenizer_of(run.data.tokenizer))
    made, read = symbols.pretrain(task, (writing,), report=report)
  else:
    made, read = glyphs.pretrain(task, report=report)
  return paths.flatten(made), read


def result(workdir: str | os.PathLike, run: Any, *, chance: float, seconds: float, machine: str
           ) -> dict[str, Any]:
  """What is kept of a finished run: the loss of its last 50 steps, its accuracy, what it took.

  Raises:
    UserError: the run's metrics hold no evaluation.
  """
  rows = read_metrics(workdir)
  scores = [row['eval_accuracy'] for row in rows if 'eval_accuracy' in row]
  losses = [row['loss'] for row in rows if 'loss' in row
            and row['step'] > run.training.steps - 50]
  if not scores or not losses:
    raise UserError(f'{workdir}: metrics.jsonl holds no evaluation; set training.eval_every')
  start = run.training.init_from
  return {
    'system': run.model.system, 'loss': round(float(np.mean(losses)), 4),
    'accuracy': round(scores[-1], 4), 'chance': round(chance, 4), 'steps': run.training.steps,
    'batch_size': run.training.batch_size, 'seconds': round(seconds), 'machine': machine,
    'letters_read_by_towers': {} if start is None else {
      path: round(share, 4) for path, share in store.load_config(start)['accuracy'].items()}}


def result_line(values: Mapping[str, Any]) -> str:
  """The line of a config's header that says what its run reached."""
  if 'summary' in values:  # a task of its own
    return f'Result:   {values["summary"]}'
  return (f'Result:   loss {values["loss"]:.3f}, accuracy {values["accuracy"]:.1%} '
          f'(chance {values["chance"]:.1%}), {values["steps"]} steps.')


_RESULT = re.compile(r'^Result: .*$', re.MULTILINE)


def keep(values: Mapping[str, Any], config_file: str | os.PathLike) -> pathlib.Path:
  """Writes `results/<name>.json` beside a config and the `Result:` line of its header.

  Raises:
    UserError: the header has no `Result:` line.
  """
  path = pathlib.Path(config_file)
  text, found = _RESULT.subn(lambda _: result_line(values), path.read_text(encoding='utf-8'),
                             count=1)
  if not found:
    raise UserError(f'{path}: its header has no line that begins with "Result:"')
  kept = path.parent / 'results' / f'{path.stem}.json'
  kept.parent.mkdir(exist_ok=True)
  kept.write_text(json.dumps(dict(values), indent=2) + '\n', encoding='utf-8')
  path.write_text(text, encoding='utf-8')
  return kept


def headers(configs: Iterable[str | os.PathLike]) -> list[str]:
  """Sentences about configs whose header and kept result differ; empty: all agree."""
  problems = []
  for path in map(pathlib.Path, configs):
    kept = path.parent / 'results' / f'{path.stem}.json'
    line = _RESULT.search(path.read_text(encoding='utf-8'))
    if not kept.exists():
      problems.append(f'{kept}: missing; run hrvlm tiny --config {path} --keep')
    elif line is None or line.group() != result_line(json.loads(kept.read_text())):
      problems.append(f'{path}: header says {line and line.group()!r}, the kept result says '
                      f'{result_line(json.loads(kept.read_text()))!r}')
  return problems
