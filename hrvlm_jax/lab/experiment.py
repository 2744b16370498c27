"""Experiments on the built-in task: long work in parts in one folder, and the parts they share.

What is done is noted in the folder and not repeated, so that an experiment that was stopped goes on
where it was. `quickstart`, `compare`, `tiny` and `sweep` say which parts they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import json
import os
import pathlib
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.lab.locks import exclusive
from hrvlm_jax.lab.needle import read_records
from hrvlm_jax.lab.pretrain import Flat, Pretraining, pretrain
from hrvlm_jax.language.bpe import train_bpe
from hrvlm_jax.language.chat import Message, get_template, render, rendered_text
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.loop import train
from hrvlm_jax.vlm.answer import Answerer, answer_all, is_correct


class Interrupted(UserError):
  """A run was asked to stop, and saved what it had."""


class Experiment:
  """A folder with JSON files and `times.json`: the seconds of every part that is done.

  The seconds of a part that was interrupted count too (`interrupted.json`), unless it was killed.
  Several processes may work on different parts in one folder.

  Args:
    progress: whether to show progress bars.
  """

  def __init__(self, folder: str | os.PathLike, *, progress: bool = True):
    self.folder, self.progress = pathlib.Path(folder), progress
    self.folder.mkdir(parents=True, exist_ok=True)
    self._read_times()

  def _read_times(self) -> None:
    self.times: dict[str, float] = self.read('times.json', {})
    self.cpu_times: dict[str, float] = self.read('cpu_times.json', {})

  def part(self, name: str, fn: Callable[..., None], *args: Any,
           done: Callable[[], bool] = lambda: True) -> None:
    """Calls `fn(*args)` unless the part is done; notes its wall and processor seconds.

    Args:
      done: whether what the part noted as done has left is still there.
    """
    self._read_times()
    if name in self.times and done():
      say(f'[{name}] done before ({self.times[name]:.0f} s)')
      return
    say(f'[{name}]')
    before = self.read('interrupted.json', {}).get(name, [0.0, 0.0])
    clocks = time.perf_counter(), time.process_time()
    spent = lambda: [old + clock() - start for old, clock, start in
                     zip(before, (time.perf_counter, time.process_time), clocks, strict=True)]
    try:
      fn(*args)
    except BaseException:
      with exclusive(self.folder / '.times.lock'):
        self.write('interrupted.json', self.read('interrupted.json', {}) | {name: spent()})
      raise
    self.note(name, *spent())

  def note(self, name: str, seconds: float, cpu_seconds: float) -> None:
    """Notes that a part is done."""
    with exclusive(self.folder / '.times.lock'):  # another process may note one of its own
      self._read_times()
      self.times[name], self.cpu_times[name] = seconds, cpu_seconds
      self.write('cpu_times.json', self.cpu_times)
      self.write('times.json', self.times)

  def forget(self, names: Iterable[str]) -> None:
    """Notes that parts are not done, so that they are done again."""
    with exclusive(self.folder / '.times.lock'):
      self._read_times()
      for name in names:
        self.times.pop(name, None)
        self.cpu_times.pop(name, None)
      self.write('cpu_times.json', self.cpu_times)
      self.write('times.json', self.times)

  def read(self, name: str, default: Any = None) -> Any:
    """A JSON file of the folder."""
    path = self.folder / name
    return json_text.loads(path.read_text()) if path.exists() else default

  def write(self, name: str, value: Any) -> None:
    """Writes a JSON file so that it is either old or complete."""
    temporary = self.folder / f'.{name}.{os.getpid()}.tmp'
    temporary.write_text(json.dumps(value, indent=2) + '\n')
    temporary.replace(self.folder / name)

  def learn(self, title: str, task: Pretraining, start: Flat | None = None
            ) -> tuple[dict[str, Any], float]:
    """`pretrain` with a progress bar, or without one a line for every hundred steps."""
    with tqdm(total=task.steps, unit='step', disable=not self.progress) as bar:
      def report(step: int, loss: float, read: float) -> None:
        bar.update()
        shown = f'loss {loss:.3f}, letters read {read:.0%}'
        if step % 10 == 0:
          bar.set_postfix_str(shown)
        if not self.progress and (step % 100 == 0 or step == task.steps):
          say(f'{title}: step {step} of {task.steps}, {shown}')

      return pretrain(task, start, report=report)

  def train(self, run: RunConfig, workdir: str | os.PathLike) -> None:
    """Trains a run; it resumes by itself when it was interrupted.

    Raises:
      Interrupted: by a signal.
    """
    ended = train(run, workdir, progress=self.progress)
    if ended.interrupted:
      raise Interrupted(f'{workdir}: interrupted at step {ended.step}; run the same command again '
                        'to go on')

  def answers(self, checkpoint: str | os.PathLike, task: pathlib.Path, *, batch_size: int,
              max_new_tokens: int, encoder: dict[str, Any] | None = None,
              methods: Mapping[str, Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
    """[{id, area, answer, expected, correct}] of a written needle task.

    Args:
      encoder: settings of the checkpoint's encoder that are changed.
      methods: inference methods laid over the model (`vlm.answer.METHODS`).
    """
    answerer = Answerer.load(checkpoint, encoder_options=encoder, methods=methods)
    ask = lambda part: answerer.answer([([str(task / r['image'])], r['question']) for r in part],
                                       max_new_tokens=max_new_tokens)
    records, rows = read_records(task), []
    with tqdm(total=len(records), unit='image', disable=not self.progress) as bar:
      for part, texts in answer_all(ask, records, batch_size=batch_size):
        rows += [{'id': r['id'], 'area': r['relative_area'], 'answer': text,
                  'expected': r['answer'], 'correct': is_correct(text, r['answer'])}
                 for r, text in zip(part, texts, strict=True)]
        bar.update(len(part))
    return rows


def say(text: str) -> None:
  """Prints a line at once, also into a pipe."""
  print(text, flush=True)


def leaves(checkpoint: str | os.PathLike) -> dict[str, np.ndarray]:
  """The parameters of a checkpoint by path."""
  return dict(store.load_leaves(checkpoint))


def spoken(conversations: Iterable[Sequence[Message]], templates: Sequence[str]) -> list[str]:
  """Conversations as the templates write them, to train a tokenizer on."""
  conversations = list(conversations)
  return [rendered_text(render(get_template(name), messages))
          for name in templates for messages in conversations]


def write_tokenizer(folder: str | os.PathLike, texts: Iterable[str], *, vocab_size: int,
                    specials: Sequence[str], **roles: str) -> None:
  """A byte-level BPE tokenizer in which the frequent words of the texts are single tokens.

  Args:
    vocab_size: at most: bytes, special tokens and words. roles: see `train_bpe`.
  """
  pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
  train_bpe(texts, vocab_size=vocab_size, specials=specials, roles=roles).save(folder)
