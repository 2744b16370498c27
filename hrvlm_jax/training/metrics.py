"""Metrics of a run: JSON lines, TensorBoard, Weights & Biases, a progress bar.

Never in the step's way: values arrive as device arrays and are read one step late, when they are
certainly done.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
import math
import os
import pathlib
from typing import Any
import uuid

import numpy as np
from tqdm import tqdm

from hrvlm_jax.core.errors import UserError


class MetricsWriter:
  """Appends to `<workdir>/metrics.jsonl` and TensorBoard, and drives the progress bar.

  A resumed run first drops lines of steps it will run again, so that every step has one line.

  Args:
    start, total: first and last step, for the progress bar and its ETA.
    wandb: a project of Weights & Biases, which also gets the values; None: none. A resumed run goes
      on in the same run there.
    config: told to Weights & Biases.

  Raises:
    UserError: `wandb` is not installed.
  """

  def __init__(self, workdir: str | os.PathLike, *, start: int, total: int, progress: bool = True,
               tensorboard: bool = True, wandb: str | None = None,
               config: Mapping[str, Any] | None = None):
    self.path = pathlib.Path(workdir) / 'metrics.jsonl'
    self._keep_until(start)
    self._file = self.path.open('a', encoding='utf-8')
    self._board = None
    if tensorboard:
      from tensorboardX import SummaryWriter

      self._board = SummaryWriter(str(pathlib.Path(workdir) / 'tensorboard'), purge_step=start)
    self._bar = tqdm(total=total, initial=start, disable=not progress, unit='step',
                     dynamic_ncols=True)
    self._wandb = None if wandb is None else _wandb_run(wandb, workdir, config)

  def _keep_until(self, step: int) -> None:
    """Drops lines beyond `step` and a torn last line."""
    if not self.path.exists():
      return
    kept = []
    for line in self.path.read_text(encoding='utf-8').splitlines():
      try:
        row = json.loads(line)
      except ValueError:
        continue
      if row.get('step', 0) <= step:
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
          self._board.add_scalar(key, value, step)
    if self._wandb is not None:
      self._wandb.log({k: v for k, v in plain.items() if isinstance(v, (int, float))}, step=step)
    self._bar.update(advance)
    if 'loss' in plain:
      self._bar.set_postfix_str(f'loss {plain["loss"]:.4f}')

  def log(self, text: str) -> None:
    """A line above the progress bar."""
    self._bar.write(text)

  def close(self) -> None:
    """Flushes everything."""
    self._bar.close()
    self._file.close()
    if self._board is not None:
      self._board.close()
    if self._wandb is not None:
      self._wandb.finish()


def _wandb_run(project: str, workdir: str | os.PathLike, config: Mapping[str, Any] | None):
  try:
    import wandb
  except ImportError as error:
    raise UserError("training.wandb: Weights & Biases is not installed; pip install "
                    "'hrvlm_jax[wandb]' or set it to None") from error
  # One run there per work directory, whatever its name elsewhere.
  path = pathlib.Path(workdir) / 'wandb_id'
  if not path.exists():
    path.write_text(uuid.uuid4().hex)
  return wandb.init(project=project, id=path.read_text(), resume='allow', dir=str(workdir),
                    name=pathlib.Path(workdir).name, config=dict(config or {}))


def _plain(value: Any) -> Any:
  if isinstance(value, (str, bool)) or value is None:
    return value
  number = np.asarray(value).item()
  return number if not isinstance(number, float) or math.isfinite(number) else str(number)


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines of a run's metrics.jsonl; a torn last line is left out."""
  rows = []
  for line in (pathlib.Path(workdir) / 'metrics.jsonl').read_text(encoding='utf-8').splitlines():
    try:
      rows.append(json.loads(line))
    except ValueError:
      continue
  return rows
