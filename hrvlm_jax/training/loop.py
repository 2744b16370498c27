"""The training loop of every stage of every system.

Order: resolve the config, build the data iterator and the state, resume if the work directory
holds a checkpoint, then step. The step is one compiled program per bucket; the loop itself only
hands batches over, writes metrics one step late and saves checkpoints in the background.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import json
import os
import pathlib
import signal
import time
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils
import numpy as np

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.parallel import distributed
from hrvlm_jax.parallel.fitting import device_bytes, slices_of
from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.training import determinism, fitting, starts
from hrvlm_jax.training.batches import make_batches
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.evaluators import Evaluator, evaluators_of
from hrvlm_jax.training.metrics import MetricsWriter, check_wandb
from hrvlm_jax.training.program import TrainProgram, assemble, outline_of
from hrvlm_jax.training.saving import Saver
from hrvlm_jax.training.start import check_same_model, initial_params, stored_params
from hrvlm_jax.training.step import State
from hrvlm_jax.training.usage import Meter
from hrvlm_jax.training.workdir import Workdir

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
  config: RunConfig, workdir: str | os.PathLike, *, progress: bool | Literal['lines'] = True,
  params: Any = None, on_step: Callable[[int, State], None] | None = None,
) -> Result:
  """Trains to `training.steps`, resuming by itself from the work directory's newest checkpoint.

  SIGTERM and SIGINT finish the step at hand, save and return with `interrupted`.

  Args:
    workdir: a folder, or the address of one in a bucket (gs://...), which several hosts need unless
      they share a file system.
    progress: True shows a bar on a terminal and else a line per logged step, 'lines' always lines,
      False neither.
    params: initial parameters (instead of random ones or `init_from`); ignored on resume.
    on_step: called after every step (tests, in-loop evaluation).

  Raises:
    UserError: bad config or data; a non-finite loss (with the steps and the saved batch); the
      work directory belongs to another config.
  """
  with Workdir(workdir, main=distributed.is_main()) as place:
    return _train(config, place, progress, params, on_step)


def _train(config: RunConfig, place: Workdir, progress: bool | str, params: Any, on_step) -> Result:
  workdir, t, resolved = place.local, config.training, to_dict(config)
  distributed.check_same(json.dumps(resolved), what='the config')
  starts.check_shared(place)
  check_same_model(workdir, resolved, checkpoints=place.address)
  bits = determinism.check(workdir, determinism.pin_threads(workdir)) if t.deterministic else None
  evaluators = evaluators_of(config)
  check_wandb(t.wandb)
  with store.TrainStore(
      place.address, keep=t.keep, keep_every=t.keep_every, config=resolved) as checkpoints:
    stored = _stored_before(config, checkpoints) if params is None else paths.flatten(params)
    outline = outline_of(config, stored=stored)
    choice = fitting.chosen_mesh(config, outline, jax.device_count(), device_bytes(),
                                 slices=slices_of(jax.devices()))
    fitting.check_state(choice)
    layout = Layout(choice.mesh)
    program = assemble(config, layout.mesh, outline=outline)
    batches = make_batches(config, layout)
    for evaluator in evaluators:
      evaluator.prepare(config, layout=layout, workdir=workdir)
    notes: list[str] = [distributed.devices_words(), *fitting.told(config, choice),
                        fitting.batch_words(config, choice.mesh.shape), program.summary]
    if jax.process_count() > 1:
      notes.append(_host_part(batches))
    state, start = _start(program, layout, checkpoints, batches, params, notes.append)
    # Nothing is refused any more: from here on the work directory is this start's.
    if changes := starts.changed(place, resolved):
      notes.append(starts.words(changes))
    if distributed.is_main() and start < t.steps:
      workdir.mkdir(parents=True, exist_ok=True)
      starts.record(place, resolved, tokenizer_of(config.data.tokenizer), step=start,
                    changes=changes, mesh=choice.mesh.shape)
      if bits is not None:
        determinism.record(workdir, bits)
    if distributed.is_main():
      place.remove(PREEMPTED)
    distributed.barrier('start recorded')
    writer = (MetricsWriter(workdir, start=start, total=t.steps, progress=progress, wandb=t.wandb,
                            config=resolved)
              if distributed.is_main() else _Silent())
    for note in notes:
      writer.log(note)
    run = _Run(program, layout, batches, Saver(checkpoints, writer.log), writer, evaluators,
               workdir)
    with _Signals() as signals:
      try:
        step, loss = run.steps(state, start, signals, on_step)
      finally:
        writer.close()
    if distributed.is_main():
      starts.end(place, start, step)
      if signals.caught:
        # Exit code 0 is not the whole story: whoever watches the run starts it again.
        (workdir / PREEMPTED).touch()
  return Result(step, loss, signals.caught, run.compilations, dict(batches.counts))


def _stored_before(config: RunConfig, checkpoints: store.TrainStore) -> dict[str, Any] | None:
  """What the parameters are read from: the run's own checkpoint, else where it starts."""
  latest = checkpoints.latest()
  if latest is not None:
    return stored_params(checkpoints.folder(latest))
  return None if config.training.init_from is None else stored_params(config.training.init_from)


def _host_part(batches) -> str:
  """What of a batch this process makes, in a sentence."""
  own, shards = batches.own, batches.shards
  if len(own) == shards:
    return ('every process makes the whole batch; data.packing lets each make what its devices '
            'need')
  return f'process 0 makes {len(own)} of the {shards} shards of every batch'


def _start(program: TrainProgram, layout: Layout, checkpoints: store.TrainStore, batches,
           params: Any, log: Callable[[str], None]) -> tuple[State, int]:
  """(state, first step): restored into its places, or fresh."""
  if checkpoints.latest() is not None:
    restored = checkpoints.restore(program.placed_state)
    # A process that was not there when the checkpoint was saved goes on where the others do.
    position = restored.data_state or next(iter(checkpoints.data_states(restored.step)), None)
    if position is not None:
      batches.set_state(position)
    log(f'resuming from step {restored.step} of {checkpoints.workdir}')
    return restored.state, restored.step
  if params is None:
    params = initial_params(program, layout, log)
  else:
    cast = jax.tree.map(lambda x, like: np.asarray(x, like.dtype), jax.device_get(params),
                        program.state['params'])
    params = layout.put(cast, program.shardings['params'])
  return layout.make(program.init, program.shardings, params), 0


@dataclasses.dataclass(frozen=True)
class _Taken:
  """A step that was begun: its metrics arrive later. `whole` are the shapes of all hosts' batch."""

  step: int
  metrics: dict[str, jax.Array]
  batch: Any
  whole: Any


class _Run:
  """The steps of one start of a run."""

  def __init__(self, program: TrainProgram, layout: Layout, batches, saver: Saver, writer,
               evaluators: Sequence[Evaluator], workdir: pathlib.Path):
    t = program.config.training
    self.training, self.layout, self.batches, self.saver = t, layout, batches, saver
    self.writer, self.evaluators, self.workdir = writer, evaluators, workdir
    self._step = layout.compile(
      program.step, program.shardings,
      options=determinism.compiler_options() if t.deterministic else None)
    self._meter = Meter(program.plain if t.mfu else None, program.state, layout.mesh.size)
    self._pending: _Taken | None = None
    self._loss: float | None = None
    self._start = self._logged = 0

  @property
  def compilations(self) -> int:
    """Programs of the step that were compiled so far."""
    return self._step._cache_size()

  def steps(self, state: State, start: int, signals: _Signals, on_step) -> tuple[int, float | None]:
    """Steps to the end of the run, or to a signal; returns (step reached, its loss)."""
    t, step, iterator = self.training, start, iter(self.batches)
    self._start = self._logged = start
    profile = _Profile(t.profile, self.workdir)
    while step < t.steps and not signals.stop(step):
      before = time.perf_counter()
      batch = next(iterator)
      self._meter.waited += time.perf_counter() - before
      placed = self.layout.batch(batch, leading=int(t.accumulate > 1), own=self.batches.own,
                                 shards=self.batches.shards)
      whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), placed)
      profile.before(step + 1)
      # Nothing reaches or leaves the devices inside a step but what was put there.
      programs, begun = self.compilations, time.perf_counter()
      with jax.transfer_guard('disallow'):
        state, metrics = self._step(state, placed)
      step += 1
      if self.compilations > programs:
        self.writer.event(f'step {step}: compiled for {_shape_words(whole)} in '
                          f'{time.perf_counter() - begun:.1f} s')
      profile.after(step, metrics)
      self._settle()
      self._pending = _Taken(step, metrics, batch, whole)
      if on_step is not None:
        on_step(step, state)
      if step % t.checkpoint_every == 0 and step < t.steps:
        self._settle()
        begun = time.perf_counter()
        self.saver.save(step, state, self.batches.get_state())
        self.writer.event(f'step {step}: checkpoint taken in {time.perf_counter() - begun:.1f} s, '
                          'written in the background')
      self._evaluate(step, state)
    profile.close()
    self._settle()
    if step > start:
      begun = time.perf_counter()
      self.saver.finish(step, state, self.batches.get_state())
      self.writer.event(f'step {step}: checkpoint written in {time.perf_counter() - begun:.1f} s')
    return step, self._loss

  def _settle(self) -> None:
    """Reads the metrics of the step before; stops the run on a non-finite loss."""
    if self._pending is None:
      return
    taken, self._pending = self._pending, None
    self._loss = float(taken.metrics['loss'])
    self._meter.count(taken.batch, taken.whole)
    if not np.isfinite(self._loss):
      path = _save_batch(self.workdir, taken.step, taken.batch)
      before = (f'steps {self._start + 1} to {taken.step - 1} were finite'
                if taken.step > self._start + 1 else 'it is the first step of this start')
      raise UserError(
        f'the loss is {self._loss} at step {taken.step} ({before}); its batch is saved as {path}; '
        'lower the learning rate, look at the batch, or resume from the last checkpoint with '
        'another seed')
    if taken.step % self.training.log_every == 0 or taken.step == self.training.steps:
      values = jax.device_get(taken.metrics) | self._meter.values(taken.batch, self.compilations)
      values |= {f'bad_rows/{kind}': count for kind, count in sorted(self.batches.counts.items())}
      self.writer.write(taken.step, values, advance=taken.step - self._logged)
      self._logged = taken.step

  def _evaluate(self, step: int, state: State) -> None:
    """Runs what is due at a step."""
    due = [e for e in self.evaluators if step == self.training.steps
           or e.options.every and step % e.options.every == 0]
    if not due:
      return
    self._settle()
    before = time.perf_counter()
    for evaluator in due:
      self.writer.write(step, evaluator.run(evaluated_params(state), step))
    self._meter.pause(time.perf_counter() - before)


def evaluated_params(state: State) -> Any:
  """The parameters to be judged: with the moving average where one is kept."""
  if 'ema' not in state:
    return state['params']
  return paths.unflatten({**paths.flatten(state['params']), **state['ema']})


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


def _shape_words(batch: Any) -> str:
  """The shape of a batch that a program was compiled for: its rows, or all of its arrays."""
  flat = paths.flatten(batch)
  chosen = {name: flat[name] for name in ('tokens', 'views/pixels', 'pixels') if name in flat}
  return ', '.join(f'{name} {list(leaf.shape)}' for name, leaf in (chosen or flat).items())


def _save_batch(workdir: pathlib.Path, step: int, batch: Any) -> pathlib.Path:
  process = f'_{jax.process_index()}' if jax.process_count() > 1 else ''
  path = workdir / f'bad_batch_{step}{process}.npz'
  np.savez_compressed(path, **{k: np.asarray(v) for k, v in paths.flatten(batch).items()})
  return path


class _Silent:
  """Writes nothing: the metrics writer of all processes but the first."""

  def log(self, text: str) -> None: ...

  def event(self, text: str) -> None: ...

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
