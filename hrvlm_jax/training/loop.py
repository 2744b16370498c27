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
import signal
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.parallel import distributed
from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.systems.contract import sharding_rules
from hrvlm_jax.training import determinism
from hrvlm_jax.training.batches import make_batches
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.evaluation import evaluated_params, evaluation_of
from hrvlm_jax.training.metrics import MetricsWriter
from hrvlm_jax.training.optimizer import frozen_summary, groups_of
from hrvlm_jax.training.saving import Saver
from hrvlm_jax.training.start import check_same_model, initial_params, run_dtypes, stored_params
from hrvlm_jax.training.step import State, execution_of, init_state, make_train_step
from hrvlm_jax.training.usage import Meter
from hrvlm_jax.training.workdir import Workdir
from hrvlm_jax.vlm import model as vlm

# Left in the work directory by a run that was told to end; scripts/worker_run.sh looks for it.
PREEMPTED = 'PREEMPTED'


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended: the step reached, the last loss, and whether a signal ended it early.

  Attributes:
    bad_rows: rows that could not be used, by kind, since the run began (of this process' shards).
  """

  step: int
  loss: float | None
  interrupted: bool
  compilations: int
  bad_rows: dict[str, int] = dataclasses.field(default_factory=dict)


def train(
  config: RunConfig, workdir: str | os.PathLike, *, progress: bool = True,
  params: Any = None, on_step: Callable[[int, State], None] | None = None,
) -> Result:
  """Trains to `training.steps`, resuming by itself from the work directory's newest checkpoint.

  SIGTERM and SIGINT finish the step at hand, save and return with `interrupted`.

  Args:
    workdir: a folder, or the address of one in a bucket (gs://...), which several hosts need unless
      they share a file system.
    params: initial parameters (instead of random ones or `init_from`); ignored on resume.
    on_step: called after every step (tests, in-loop evaluation).

  Raises:
    UserError: bad config or data; a non-finite loss (with the steps and the saved batch); the
      work directory belongs to another config.
  """
  with Workdir(workdir, main=distributed.is_main()) as place:
    return _train(config, place, progress, params, on_step)


def _train(config: RunConfig, place: Workdir, progress: bool, params: Any, on_step) -> Result:
  workdir = place.local
  layout = Layout(config.mesh)
  resolved = to_dict(config)
  distributed.check_same(json.dumps(resolved), what='the config')
  check_same_model(workdir, resolved, checkpoints=place.address)
  if distributed.is_main():
    (workdir / 'tokenizer').mkdir(parents=True, exist_ok=True)
    tokenizer_of(config.data.tokenizer).save(workdir / 'tokenizer')
    (workdir / 'config.json').write_text(json.dumps(resolved, indent=2))
    place.remove(PREEMPTED)
  distributed.barrier('work directory')
  if not place.shared and not (workdir / 'config.json').exists():
    raise UserError(f'{workdir}: process {jax.process_index()} does not see what process 0 wrote '
                    'there; several hosts need a work directory on storage that they share')

  t = config.training
  if t.deterministic:
    determinism.check(workdir, determinism.pin_threads(workdir))
  fn = vlm.build(config.model)
  groups = groups_of(t, fn.abstract)
  batches = make_batches(config, layout)
  evaluate = evaluation_of(config, workdir)
  with store.TrainStore(
      place.address, keep=t.keep, keep_every=t.keep_every, config=resolved) as saver:
    notes: list[str] = [frozen_summary(groups, fn.abstract)]
    if params is None:
      stored = _stored_before(config, saver)
    else:
      stored = paths.flatten(params)
    wanted = run_dtypes(t, groups, fn.abstract, stored)
    abstract = jax.eval_shape(lambda p: init_state(t, groups, p), wanted)
    shardings = layout.state_shardings(abstract, sharding_rules(config.model))
    if jax.process_count() > 1:
      notes.append(_host_part(batches))
    state, start = _start(config, fn, groups, saver, batches, params, layout,
                          layout.abstract(abstract, shardings), notes.append)
    writer = (MetricsWriter(workdir, start=start, total=t.steps, progress=progress, wandb=t.wandb,
                            config=resolved)
              if distributed.is_main() else _Silent())
    for note in notes:
      writer.say(note)
    # The chunk of the loss is meant per device; the step sees the batch of all.
    wide = dataclasses.replace(t, loss_chunk=t.loss_chunk * layout.shards)
    ex = execution_of(t, layout.mesh)
    step_fn = layout.compile(
      make_train_step(fn, wide, groups, config.seed, ex=ex), shardings,
      options=determinism.compiler_options() if t.deterministic else None)
    counted = make_train_step(fn, wide, groups, config.seed, ex=ex.plain) if t.mfu else None
    meter = Meter(counted, abstract, layout.mesh.size)
    with _Signals() as signals:
      try:
        loss = _run(config, state, start, step_fn, batches, Saver(saver, writer.say), writer,
                    signals, on_step, workdir, layout, evaluate, meter)
      finally:
        writer.close()
    if signals.caught and distributed.is_main():
      # Exit code 0 is not the whole story: whoever watches the run starts it again.
      (workdir / PREEMPTED).touch()
  return Result(loss[0], loss[1], signals.caught, step_fn._cache_size(), dict(batches.counts))


def _stored_before(config: RunConfig, saver: store.TrainStore) -> dict[str, Any] | None:
  """What the parameters are read from: the run's own checkpoint, else where it starts."""
  latest = saver.latest()
  if latest is not None:
    return stored_params(saver.folder(latest))
  return None if config.training.init_from is None else stored_params(config.training.init_from)


def _host_part(batches) -> str:
  """What of a batch this process makes, in a sentence."""
  own, shards = batches.own, batches.shards
  if len(own) == shards:
    return ('every process makes the whole batch; data.packing lets each make what its devices '
            'need')
  return f'process 0 makes {len(own)} of the {shards} shards of every batch'


def _start(config, fn, groups, saver, batches, params, layout, abstract, say):
  """(state, first step): restored into its places, or fresh."""
  if saver.latest() is not None:
    restored = saver.restore(abstract)
    # A process that was not there when the checkpoint was saved goes on where the others do.
    position = restored.data_state or next(iter(saver.data_states(restored.step)), None)
    if position is not None:
      batches.set_state(position)
    say(f'resuming from step {restored.step} of {saver.workdir}')
    return restored.state, restored.step
  places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  wanted = abstract['params']
  if params is None:
    params = initial_params(config, fn, groups, wanted, layout, places['params'], say)
  else:
    cast = jax.tree.map(lambda x, like: np.asarray(x, like.dtype), jax.device_get(params), wanted)
    params = layout.put(cast, places['params'])
  return layout.make(lambda p: init_state(config.training, groups, p), places, params), 0


def _run(config, state, start, step_fn, batches, saver, writer, signals, on_step, workdir, layout,
         evaluate, meter):
  t = config.training
  iterator: Iterator = iter(batches)
  profile = _Profile(t.profile, workdir)
  pending: tuple[int, dict, Any, Any] | None = None
  last_logged, loss = start, None

  def settle(pending):
    """Reads the metrics of the previous step; stops the run on a non-finite loss."""
    nonlocal last_logged
    number, metrics, batch, whole = pending
    value = float(metrics['loss'])
    meter.count(batch, whole)
    if not np.isfinite(value):
      path = _save_batch(workdir, number, batch)
      before = (f'steps {start + 1} to {number - 1} were finite' if number > start + 1
                else 'it is the first step of this start')
      raise UserError(
        f'the loss is {value} at step {number} ({before}); its batch is saved as {path}; lower the '
        'learning rate, look at the batch, or resume from the last checkpoint with another seed')
    if number % t.log_every == 0 or number == t.steps:
      values = jax.device_get(metrics) | meter.values(batch, step_fn._cache_size())
      values |= {f'bad_rows/{kind}': count for kind, count in sorted(batches.counts.items())}
      writer.write(number, values, advance=number - last_logged)
      last_logged = number
    return value

  step = start
  while step < t.steps and not signals.stop(step):
    before = time.perf_counter()
    batch = next(iterator)
    meter.waited += time.perf_counter() - before
    placed = layout.batch(batch, leading=int(t.accumulate > 1), own=batches.own,
                          shards=batches.shards)
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), placed)
    profile.before(step + 1)
    # Nothing reaches or leaves the devices inside a step but what was put there.
    with jax.transfer_guard('disallow'):
      state, metrics = step_fn(state, placed)
    step += 1
    profile.after(step, metrics)
    if pending is not None:
      loss = settle(pending)
    pending = (step, metrics, batch, whole)
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
      meter.pause(time.perf_counter() - before)
  profile.close()
  if pending is not None:
    loss = settle(pending)
  if step > start:
    saver.finish(step, state, batches.get_state())
  return step, loss


class _Profile:
  """Traces the steps of a window into `<workdir>/profile` (TensorBoard, Perfetto)."""

  def __init__(self, window: tuple[int, int] | None, workdir: pathlib.Path):
    self._window, self._folder, self._on = window, workdir / 'profile', False

  def before(self, step: int) -> None:
    if self._window is not None and step == self._window[0]:
      jax.profiler.start_trace(str(self._folder))
      self._on = True

  def after(self, step: int, metrics: Any) -> None:
    if self._on and step == self._window[1]:
      jax.block_until_ready(metrics)
      self.close()

  def close(self) -> None:
    if self._on:
      jax.profiler.stop_trace()
      self._on = False


def _save_batch(workdir: pathlib.Path, step: int, batch: Any) -> pathlib.Path:
  process = f'_{jax.process_index()}' if jax.process_count() > 1 else ''
  path = workdir / f'bad_batch_{step}{process}.npz'
  np.savez_compressed(path, **{k: np.asarray(v) for k, v in paths.flatten(batch).items()})
  return path


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
