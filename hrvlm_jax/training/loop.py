"""The training loop of every stage of every system.

Order: resolve the config, build the data iterator and the state, resume if the work directory
holds a checkpoint, then step. The step is one compiled program per bucket; the loop itself only
hands batches over, writes metrics one step late and saves checkpoints in the background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import json
import os
import pathlib
import re
import signal
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.core.module import Functional
from hrvlm_jax.data.transforms import tokenizer_of
from hrvlm_jax.parallel import distributed
from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.training.batches import make_batches
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.evaluation import evaluated_params, evaluation_of
from hrvlm_jax.training.metrics import MetricsWriter
from hrvlm_jax.training.optimizer import frozen_summary, groups_of
from hrvlm_jax.training.step import State, init_state, make_train_step
from hrvlm_jax.vlm import model as vlm

# Left in the work directory by a run that was told to end; scripts/worker_run.sh looks for it.
PREEMPTED = 'PREEMPTED'


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended: the step reached, the last loss, and whether a signal ended it early."""

  step: int
  loss: float | None
  interrupted: bool
  compilations: int


def initial_params(config: RunConfig, fn: Functional, layout: Layout, places: Any,
                   say: Callable[[str], None]) -> Any:
  """Random parameters, or those of `training.init_from` with the differences said aloud.

  Args:
    places: sharding of every parameter; nothing is ever whole on one device.

  Raises:
    UserError: parameters missing there that `init_allow` does not name, or of another shape.
  """
  init = lambda: layout.make(fn.init, places, jax.random.key(config.seed))
  if config.training.init_from is None:
    return init()
  source = config.training.init_from
  stored = {path.removeprefix('params/'): leaf for path, leaf in store.describe(source).items()
            if not path.startswith('state/')}
  wanted = paths.flatten(fn.abstract)
  allowed = lambda path: any(re.fullmatch(p, path) for p in config.training.init_allow)
  fresh = sorted(p for p in wanted if p not in stored)
  problems = [f'{p}: missing there' for p in fresh if not allowed(p)]
  problems += [f'{p}: {tuple(stored[p].shape)} there, {tuple(wanted[p].shape)} in the model'
               for p in wanted if p in stored and tuple(stored[p].shape) != tuple(wanted[p].shape)]
  raise_all(f'training.init_from={source}', problems)
  unused = sorted(p for p in stored if p not in wanted)
  if fresh:
    say(f'{len(fresh)} parameters start fresh: {_few(fresh)}')
  if unused:
    say(f'{len(unused)} parameters of {source} are not used: {_few(unused)}')
  params, where = paths.flatten(init()), paths.flatten(places)
  for path in wanted:
    if path in stored:
      leaf = np.asarray(store.load_leaf(source, path), wanted[path].dtype)
      params[path] = layout.put(leaf, where[path])
  return paths.unflatten(params)


def _few(names: list[str]) -> str:
  return ', '.join(names[:6]) + (f' and {len(names) - 6} more' if len(names) > 6 else '')


def train(
  config: RunConfig, workdir: str | os.PathLike, *, progress: bool = True,
  params: Any = None, on_step: Callable[[int, State], None] | None = None,
) -> Result:
  """Trains to `training.steps`, resuming by itself from the work directory's newest checkpoint.

  SIGTERM and SIGINT finish the step at hand, save and return with `interrupted`.

  Args:
    params: initial parameters (instead of random ones or `init_from`); ignored on resume.
    on_step: called after every step (tests, in-loop evaluation).

  Raises:
    UserError: bad config or data; a non-finite loss (with the steps and the saved batch); the
      work directory belongs to another config.
  """
  workdir = pathlib.Path(workdir)
  layout = Layout(config.mesh)
  resolved = to_dict(config)
  distributed.check_same(json.dumps(resolved), what='the config')
  _same_model(workdir, resolved)
  if distributed.is_main():
    (workdir / 'tokenizer').mkdir(parents=True, exist_ok=True)
    tokenizer_of(config.data.tokenizer).save(workdir / 'tokenizer')
    (workdir / 'config.json').write_text(json.dumps(resolved, indent=2))
    (workdir / PREEMPTED).unlink(missing_ok=True)
  distributed.barrier('work directory')
  if not (workdir / 'config.json').exists():
    raise UserError(f'{workdir}: process {jax.process_index()} does not see what process 0 wrote '
                    'there; several hosts need a work directory on storage that they share')

  t = config.training
  fn = vlm.build(config.model)
  groups = groups_of(t, fn.abstract)
  batches = make_batches(config)
  evaluate = evaluation_of(config, workdir)
  with store.TrainStore(workdir, keep=t.keep, keep_every=t.keep_every, config=resolved) as saver:
    notes: list[str] = [frozen_summary(groups, fn.abstract)]
    abstract = jax.eval_shape(lambda p: init_state(t, groups, p), fn.abstract)
    shardings = layout.state_shardings(abstract)
    state, start = _start(config, fn, groups, saver, batches, params, layout,
                          layout.abstract(abstract, shardings), notes.append)
    writer = (MetricsWriter(workdir, start=start, total=t.steps, progress=progress)
              if distributed.is_main() else _Silent())
    for note in notes:
      writer.say(note)
    # The chunk of the loss is meant per device; the step sees the batch of all.
    wide = dataclasses.replace(t, loss_chunk=t.loss_chunk * layout.shards)
    step_fn = layout.compile(make_train_step(fn, wide, groups, config.seed), shardings)
    with _Signals() as signals:
      try:
        loss = _run(config, state, start, step_fn, batches, saver, writer, signals, on_step,
                    workdir, layout, evaluate)
      finally:
        writer.close()
    if signals.caught and distributed.is_main():
      # Exit code 0 is not the whole story: whoever watches the run starts it again.
      (workdir / PREEMPTED).touch()
  return Result(loss[0], loss[1], signals.caught, step_fn._cache_size())


def _start(config, fn, groups, saver, batches, params, layout, abstract, say):
  """(state, first step): restored into its places, or fresh."""
  if saver.latest() is not None:
    restored = saver.restore(abstract)
    if restored.data_state is not None:
      batches.set_state(restored.data_state)
    say(f'resuming from step {restored.step} of {saver.workdir}')
    return restored.state, restored.step
  places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  if params is None:
    params = initial_params(config, fn, layout, places['params'], say)
  else:
    params = layout.put(jax.device_get(params), places['params'])
  return layout.make(lambda p: init_state(config.training, groups, p), places, params), 0


def _run(config, state, start, step_fn, batches, saver, writer, signals, on_step, workdir, layout,
         evaluate):
  t = config.training
  iterator: Iterator = iter(batches)
  pending: tuple[int, dict, Any, float] | None = None
  waited = 0.0
  clock, last_logged, loss = time.perf_counter(), start, None

  def settle(pending):
    """Reads the metrics of the previous step; stops the run on a non-finite loss."""
    nonlocal clock, last_logged, waited
    number, metrics, batch, _ = pending
    value = float(metrics['loss'])
    if not np.isfinite(value):
      path = _save_batch(workdir, number, batch)
      raise UserError(
        f'loss is {value} at step {number} (last finite loss was written before it); the batch is '
        f'saved as {path}; lower the learning rate, look at the batch, or resume from the last '
        'checkpoint with another seed')
    if number % t.log_every == 0 or number == t.steps:
      now = time.perf_counter()
      seconds, steps = now - clock, number - last_logged
      values = jax.device_get(metrics) | {
        'steps_per_second': steps / seconds if seconds else 0.0,
        'input_wait_share': waited / seconds if seconds else 0.0,
        'compilations': step_fn._cache_size()}
      writer.write(number, values, advance=steps)
      clock, last_logged, waited = now, number, 0.0
    return value

  step = start
  while step < t.steps and not signals.stop(step):
    before = time.perf_counter()
    batch = next(iterator)
    waited += time.perf_counter() - before
    state, metrics = step_fn(state, layout.batch(batch, leading=int(t.accumulate > 1)))
    step += 1
    if pending is not None:
      loss = settle(pending)
    pending = (step, metrics, batch, 0.0)
    if on_step is not None:
      on_step(step, state)
    if step % t.checkpoint_every == 0 and step < t.steps:
      loss, pending = settle(pending), None
      saver.save(step, state, batches.get_state())
    if evaluate is not None and (step % t.eval_every == 0 or step == t.steps):
      if pending is not None:
        loss, pending = settle(pending), None
      before = time.perf_counter()
      writer.write(step, evaluate(step, evaluated_params(state)))
      clock += time.perf_counter() - before
  if pending is not None:
    loss = settle(pending)
  if step > start:
    saver.save(step, state, batches.get_state())
    saver.wait()
  return step, loss


def _save_batch(workdir: pathlib.Path, step: int, batch: Any) -> pathlib.Path:
  path = workdir / f'bad_batch_{step}.npz'
  np.savez_compressed(path, **{k: np.asarray(v) for k, v in paths.flatten(batch).items()})
  return path


def _same_model(workdir: pathlib.Path, resolved: dict[str, Any]) -> None:
  """Refuses to go on with another model in the same work directory."""
  path = workdir / 'config.json'
  if not path.exists() or not store.steps(workdir):
    return
  before = json.loads(path.read_text())
  if before.get('model') != resolved['model']:
    old, new = (paths.flatten(x) for x in (before.get('model', {}), resolved['model']))
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    raise UserError(f'{workdir}: holds a run of another model (model.{changed[0]} was '
                    f'{old.get(changed[0])!r}, is {new.get(changed[0])!r}); choose another '
                    '--workdir')


class _Silent:
  """Writes nothing: the metrics writer of all processes but the first."""

  def say(self, text: str) -> None: ...

  def write(self, step: int, values: Any, *, advance: int = 0) -> None: ...

  def close(self) -> None: ...


class _Signals:
  """Turns SIGTERM and SIGINT into a flag while training runs.

  With several processes JAX's preemption service watches SIGTERM instead, because all must stop
  after the same step.
  """

  def __init__(self):
    self.caught = False
    self._old: dict[int, Any] = {}

  def stop(self, step: int) -> bool:
    """Whether to save and end now, the same answer on every process."""
    if jax.process_count() > 1:
      self.caught = multihost_utils.reached_preemption_sync_point(step)
    return self.caught

  def __enter__(self):
    if jax.process_count() > 1:
      return self

    def note(number, frame):
      del number, frame
      self.caught = True

    for number in (signal.SIGTERM, signal.SIGINT):
      try:
        self._old[number] = signal.signal(number, note)
      except ValueError:  # not in the main thread (a test): signals stay as they are
        break
    return self

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)
