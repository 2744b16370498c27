"""What the configs in `configs/tiny` share: task, tokenizer, pre-trained parts, kept results.

    def get_config(builtin='needle'):
      return tiny.config('pheye', MODEL, builtin=builtin, lengths=(96, 128), groups=GROUPS,
                         train_fresh=('(?!vision/tower/).*',))

    def preparation(builtin='needle'):
      task = NeedleConfig.square(builtin)
      return tiny.Preparation(task=task, towers={'vision/tower': GlyphConfig(...)})

`hrvlm tiny --config configs/tiny/pheye.py` makes what the config names, trains, and with `--keep`
writes `configs/tiny/results/pheye.json` and the `Result:` line of the config's header. With
`configs/tiny/pheye.py:relate` (or `:page`) the same on another built-in task, in folders of its
own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import re
import runpy
import shutil
from typing import Any

import ml_collections
import numpy as np

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core import json_text, paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError, unknown
from hrvlm_jax.evaluation import provenance
from hrvlm_jax.lab.experiment import Experiment, leaves, say, spoken, write_tokenizer
from hrvlm_jax.lab.needle import NeedleConfig, read_records, write
from hrvlm_jax.lab.needle.kinds import TASKS
from hrvlm_jax.lab.pretrain import Pretraining
from hrvlm_jax.lab.scenes import SceneConfig
from hrvlm_jax.lab.symbols import SymbolsConfig
from hrvlm_jax.language.conversation import messages_from_llava
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.training import run_config
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.metrics import read_metrics
from hrvlm_jax.training.recipe import find
from hrvlm_jax.vlm.answer import text_of

FOLDER = 'runs/tiny'
VOCABULARY = 512  # at most: bytes, special tokens, the words of the questions
SPECIALS = ('<|endoftext|>', '<pad>', '<s>', '</s>', '<|im_start|>', '<|im_end|>', '<image>')
_TEMPLATES = ('mc_llava_train', 'pheye', 'vicuna_v1', 'vila_qwen2')


def config(
  name: str, model: ModelConfig, *, task: str = 'square', builtin: str = 'needle',
  lengths: Sequence[int],
  groups: Sequence[Mapping[str, Any]], train_fresh: Sequence[str] = (),
  data: Mapping[str, Any] | None = None, **training: Any,
) -> ml_collections.ConfigDict:
  """The run config of a tiny system on the built-in task.

  Args:
    name: of the config file; its towers are `runs/tiny/encoders/<name>`.
    task: preset of the task; its folder is `runs/tiny/<task>`.
    builtin: which task (`lab.needle.kinds.TASKS`); folders of others than needle end in its name.
    groups: parameter groups.
    train_fresh: patterns of parameters that the pre-trained towers do not hold; none: the run
      starts from random parameters.
    data, training: further settings, which win.
  """
  folder = f'{FOLDER}/{named(task, builtin)}'
  if builtin != 'needle':  # longer questions
    lengths = (*lengths, 2 * lengths[-1])
  values = ml_collections.ConfigDict()
  values.seed = 0
  values.model = to_dict(model)
  values.data = {'train': f'{folder}/train/needle.json', 'eval': f'{folder}/eval/needle.json',
                 'tokenizer': f'{folder}/tokenizer', 'lengths': tuple(lengths),
                 **(data or {})}
  start = {'init_from': f'{FOLDER}/encoders/{named(name, builtin)}',
           'init_allow': tuple(train_fresh)}
  values.training = {
    'steps': 1000, 'batch_size': 32, 'log_every': 10, 'checkpoint_every': 250, 'keep': 1,
    'eval_every': 1000, 'groups': tuple(dict(group) for group in groups),
    'optimizer': dict(name='muon', learning_rate=2e-3, warmup=0.08, weight_decay=0.01, b2=0.98),
    **(start if train_fresh else {}), **training}
  return values


def named(name: str, builtin: str) -> str:
  """The name of a folder for one of the built-in tasks.

  Raises:
    UserError: there is no such task.
  """
  if builtin not in TASKS:
    raise UserError(f'{unknown(builtin, TASKS, what="task")}; expected one of {", ".join(TASKS)}')
  return name if builtin == 'needle' else f'{name}_{builtin}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
  """What a tiny config needs before it trains, and what is kept of its run.

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

  def prepare(self, run: RunConfig, experiment: Experiment) -> None:
    """Writes the data, the tokenizer and the parts that a run config names; skips what is there."""
    self.write_data(run, experiment.progress)
    if not pathlib.Path(run.data.tokenizer).exists():
      self.write_tokenizer(run)
    if self.towers and not pathlib.Path(run.training.init_from).exists():
      self._pretrain(run, experiment)

  def write_data(self, run: RunConfig, progress: bool) -> None:
    """Training and held-out images, as conversations."""
    train, held_out = (pathlib.Path(part).parent for part in (run.data.train, run.data.eval))
    say(f'the task: {train.parent}')
    write(dataclasses.replace(self.task, turns=self.turns), train, self.train_images, seed=0,
          progress=progress)
    write(dataclasses.replace(self.task, turns=1), held_out, self.eval_images, seed=1,
          progress=progress)

  def write_tokenizer(self, run: RunConfig) -> None:
    """With the words of all templates, so that systems can share the tokenizer."""
    records = read_records(pathlib.Path(run.data.train).parent)[:1000]
    first = (messages_from_llava(record['conversations'])[:2] for record in records)
    write_tokenizer(run.data.tokenizer, spoken(first, _TEMPLATES), vocab_size=VOCABULARY,
                    specials=SPECIALS, pad='<pad>', eos='<|endoftext|>', bos='<s>')

  def _pretrain(self, run: RunConfig, experiment: Experiment) -> None:
    """Learns one part after the other; what an interrupted preparation has learned is kept."""
    flat: dict[str, Any] = {}
    accuracy = {}
    folder = pathlib.Path(f'{run.training.init_from}.parts')
    for path, task in self.towers.items():
      part = folder / path.replace('/', '_')
      made_by = repr(task)
      if not (store.is_whole(part) and store.load_config(part)['made_by'] == made_by):
        before = {name.removeprefix(f'{path}/'): leaf for name, leaf in flat.items()}
        if isinstance(task, SymbolsConfig):
          writing = text_of(run.model, tokenizer_of(run.data.tokenizer))
          task = dataclasses.replace(task, writing=(writing,))
        learned, read = experiment.learn(
          path, task, before if isinstance(task, SceneConfig) else None)
        store.save_params(part, paths.unflatten(learned), {'accuracy': read, 'made_by': made_by},
                          overwrite=True)
      flat |= {f'{path}/{name}': leaf for name, leaf in leaves(part).items()}
      accuracy[path] = store.load_config(part)['accuracy']
    store.save_params(run.training.init_from, paths.unflatten(flat), {'accuracy': accuracy})
    shutil.rmtree(folder)

  def result(self, workdir: str | os.PathLike, run: RunConfig) -> dict[str, Any]:
    """What is kept of a finished run: the loss of its last 50 steps, its accuracy, what it took.

    Raises:
      UserError: the run's metrics hold no evaluation.
    """
    rows = read_metrics(workdir)
    scores = [row['eval_accuracy'] for row in rows if 'eval_accuracy' in row]
    if not scores:
      raise UserError(f'{workdir}: metrics.jsonl holds no evaluation; set training.eval_every')
    start = run.training.init_from
    return self.described(workdir, run) | {
      'accuracy': round(scores[-1], 4), 'letters_read_by_towers': {} if start is None else {
        path: round(share, 4) for path, share in store.load_config(start)['accuracy'].items()}}

  def described(self, workdir: str | os.PathLike, run: RunConfig) -> dict[str, Any]:
    """What every kept result says of its run."""
    losses = [row['loss'] for row in read_metrics(workdir)
              if 'loss' in row and row['step'] > run.training.steps - 50]
    return {'system': run.model.system, 'loss': round(float(np.mean(losses)), 4),
            'chance': round(self.task.chance, 4), 'steps': run.training.steps,
            'batch_size': run.training.batch_size}

  def plot(self, values: Mapping[str, Any], path: pathlib.Path) -> None:
    """A picture beside the kept result, where there is something to draw."""


def run(spec: str, overrides: run_config.Overrides = (), *, workdir: str | None = None,
        keep_result: bool = False, machine: str, progress: bool = True) -> None:
  """Makes what a config of `configs/tiny` names, trains, says what the run reached.

  Args:
    workdir: default `runs/tiny/NAME`.
    keep_result: writes `results/NAME.json` and the config's header (`keep`).
    machine: words for the result file.

  Raises:
    UserError: a config without `preparation()`, overrides for a result that is kept.
    Interrupted: by a signal.
  """
  found, argument = find(spec)
  if keep_result and (overrides or argument):
    raise UserError('--keep: a kept result is that of the config as it is; leave out the '
                    '--config.KEY options and what stands after the colon')
  made = run_config.load(RunConfig, spec, overrides)
  path = pathlib.Path(found)
  space = runpy.run_path(str(path))
  if 'preparation' not in space:
    raise UserError(f'{path}: has no function preparation(); use `hrvlm train`')
  builtin = argument or 'needle'
  preparation = space['preparation'](*([argument] if argument else []))
  experiment = Experiment(workdir or f'{FOLDER}/{named(path.stem, builtin)}', progress=progress)
  experiment.part('preparation', preparation.prepare, made, experiment)
  experiment.part('training', experiment.train, made, experiment.folder)
  values = preparation.result(experiment.folder, made) | {
    'seconds': round(sum(experiment.times.values())), 'machine': machine,
    # Beside other work the seconds of the clock say little.
    'cpu_seconds': round(sum(experiment.cpu_times.values())),
    'made': provenance.made(to_dict(made))}
  say(result_line(values))
  if keep_result:
    kept = keep(values, path)
    say(f'kept: {kept}')
    preparation.plot(values, kept.with_suffix('.png'))


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
    elif line is None or line.group() != result_line(json_text.loads(kept.read_text())):
      problems.append(f'{path}: header says {line and line.group()!r}, the kept result says '
                      f'{result_line(json_text.loads(kept.read_text()))!r}')
  return problems
