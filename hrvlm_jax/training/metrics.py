"""Metrics of a run: JSON lines, TensorBoard, Weights & Biases, a progress bar.

Never in the step's way: values arrive as device arrays and are read one step late, when they are
certainly done.
"""

from __future__ import annotations

from collections.abc import Mapping
import datetime
import json
import math
import os
import pathlib
import sys
import time
from typing import Any
import uuid

import numpy as np
from tqdm import tqdm

from hrvlm_jax.core import installed, json_text
from hrvlm_jax.core.errors import UserError


class MetricsWriter:
  """Appends to `<workdir>/metrics.jsonl` and TensorBoard, and shows how the run goes on.

  On a terminal that is a progress bar. In a log it is one plain line per logged step, evaluation,
  checkpoint and compilation, written at once.

  A resumed run first drops lines of steps it will run again, so that every step has one line.

  Args:
    start, total: first and last step, for the progress bar and its ETA.
    progress: True: a bar where standard error is a terminal, else lines; 'lines': lines; False:
      nothing but what is logged.
    wandb: a project of Weights & Biases, which also gets the values; None: none. A resumed run goes
      on in the same run there.
    config: told to Weights & Biases; name: of the run there, default: the folder's.

  Raises:
    UserError: `wandb` is not installed.
  """

  def __init__(self, workdir: str | os.PathLike, *, start: int, total: int,
               progress: bool | str = True, tensorboard: bool = True, wandb: str | None = None,
               config: Mapping[str, Any] | None = None, name: str | None = None):
    self.path = pathlib.Path(workdir) / 'metrics.jsonl'
    self._keep_until(start)
    self._file = self.path.open('a', encoding='utf-8')
    self._board = None
    if tensorboard:
      self._board = _Board(pathlib.Path(workdir) / 'tensorboard', start + 1)
    self._total, self._shown = total, bool(progress)
    self._lines = progress == 'lines' or (self._shown and not sys.stderr.isatty())
    self._bar = tqdm(total=total, initial=start, disable=self._lines or not self._shown,
                     unit='step', dynamic_ncols=True)
    self._wandb = None if wandb is None else _wandb_run(wandb, workdir, config, name)

  def _keep_until(self, step: int) -> None:
    """Drops lines beyond `step` and a torn last line."""
    if not self.path.exists():
      return
    kept = []
    for line in self.path.read_text(encoding='utf-8', errors='replace').splitlines():
      row = _row(line)
      if row is not None and row.get('step', 0) <= step:
        kept.append(line)
    temporary = self.path.with_suffix('.tmp')
    temporary.write_text(''.join(f'{line}\n' for line in kept), encoding='utf-8')
    temporary.replace(self.path)

  def write(self, step: int, values: Mapping[str, Any], *, advance: int = 0) -> None:
    """One line of finished values; `advance` moves the progress bar by so many steps."""
    plain = {key: _plain(value) for key, value in values.items()}
    self._file.write(json.dumps({'step': step, **plain}) + '\n')
    self._file.flush()
    if self._board is not None:
      for key, value in plain.items():
        if isinstance(value, (int, float)):
          self._board.scalar(key, value, step)
    if self._wandb is not None:
      self._wandb.log({k: v for k, v in plain.items() if isinstance(v, (int, float))}, step=step)
    if self._lines:
      self.log(self._line(step, plain))
    self._bar.update(advance)
    if 'loss' in plain:  # a text where it is not finite
      loss = plain['loss']
      self._bar.set_postfix_str(f'loss {loss if isinstance(loss, str) else f"{loss:.4f}"}')

  def _line(self, step: int, values: Mapping[str, Any]) -> str:
    """A step, or an evaluation after it, in a line."""
    if 'loss' not in values:
      shown = (f'{key} {value:.4g}' if isinstance(value, float) else f'{key} {value}'
               for key, value in values.items())
      return f'step {step}: {", ".join(shown)}'
    number = lambda key, form: f'{values[key]:{form}}' if isinstance(
      values.get(key), (int, float)) else values.get(key) or 'n/a'
    rate = values.get('steps_per_second') or 0
    left = f'{datetime.timedelta(seconds=round((self._total - step) / rate))} left' if rate else ''
    return (f'step {step} of {self._total}: loss {number("loss", ".4f")}, '
            f'{number("tokens_per_second", ".0f")} tokens/s, MFU {number("mfu", ".1%")}, '
            f'input wait {number("input_wait_share", ".1%")}, {left}')

  def log(self, text: str) -> None:
    """A line above the progress bar, or of the log."""
    if self._bar.disable:
      print(text, flush=True)  # whoever reads a log reads it now
    else:
      self._bar.write(text)

  def event(self, text: str) -> None:
    """A line about what the run does, where progress is shown."""
    if self._shown:
      self.log(text)

  def flush(self) -> None:
    """What was written so far is on the disk when this returns (before a checkpoint)."""
    self._file.flush()
    if self._board is not None:
      self._board.flush()

  def close(self) -> None:
    """Flushes everything."""
    self._bar.close()
    self._file.close()
    if self._board is not None:
      self._board.close()
    if self._wandb is not None:
      self._wandb.finish()


class _Board:
  """A file of TensorBoard's events.

  tensorboardX's SummaryWriter hands events to a thread, and its flush does not wait for the thread:
  the file of a killed run may lack steps that its checkpoint has. Its own writer of the file, used
  here, writes at once.

  Args:
    purge: the first step of this run; a viewer drops what earlier files say of it and later ones.
  """

  def __init__(self, folder: pathlib.Path, purge: int):
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    folder.mkdir(parents=True, exist_ok=True)
    self._event, self._scalar = event_pb2.Event, summary.scalar
    self._file = event_file_writer.EventsWriter(
      str(folder / 'events'), f'.{time.time_ns()}')  # two starts within a second: two files
    self._write(step=purge, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
    self.flush()

  def _write(self, **values: Any) -> None:
    self._file.write_event(self._event(wall_time=time.time(), **values))

  def scalar(self, tag: str, value: float, step: int) -> None:
    self._write(step=step, summary=self._scalar(tag, value))

  def flush(self) -> None:
    self._file.flush()

  def close(self) -> None:
    self._file.close()


def _row(line: str) -> dict[str, Any] | None:
  """A line of metrics; None for a torn or foreign one."""
  try:
    row = json_text.loads(line)
  except (ValueError, RecursionError):
    return None
  good = isinstance(row, dict) and isinstance(row.get('step', 0), (int, float))
  return row if good else None


def check_wandb(project: str | None) -> None:
  """Weights & Biases must be there where a run names a project of it.

  Raises:
    UserError: it is not installed.
  """
  if project is None:
    return
  try:
    import wandb  # noqa: F401
  except ImportError as error:
    raise UserError(f'training.wandb: Weights & Biases is not installed; {installed.add("wandb")}, '
                    'or set it to None') from error


def _wandb_run(project: str, workdir: str | os.PathLike, config: Mapping[str, Any] | None,
               name: str | None):
  check_wandb(project)
  import wandb

  # One run there per work directory, whatever its name elsewhere.
  path = pathlib.Path(workdir) / 'wandb_id'
  if not path.exists():
    path.write_text(uuid.uuid4().hex)
  return wandb.init(project=project, id=path.read_text(), resume='allow', dir=str(workdir),
                    name=name or pathlib.Path(workdir).name, config=dict(config or {}))


def _plain(value: Any) -> Any:
  if isinstance(value, (str, bool)) or value is None:
    return value
  number = np.asarray(value).item()
  return number if not isinstance(number, float) or math.isfinite(number) else str(number)


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines of a run's metrics.jsonl; a torn last line is left out."""
  text = (pathlib.Path(workdir) / 'metrics.jsonl').read_text(encoding='utf-8', errors='replace')
  return [row for line in text.splitlines() if (row := _row(line)) is not None]
