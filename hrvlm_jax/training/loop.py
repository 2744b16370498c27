"""The training loop of every stage of every system.

Order: resolve the config, build the data iterator and the state, resume if the work directory
holds a checkpoint, then step. The step is one compiled program per bucket; the loop itself only
hands batches over, writes metrics one step late and saves checkpoints in the background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import time
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils
import numpy as np

from hrvlm_jax.checkpoint import files, layout as layout_of, store
from hrvlm_jax.core import heap, paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.parallel import distributed
from hrvlm_jax.parallel.fitting import device_bytes, slices_of
from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.training import determinism, fitting, resume, starts
from hrvlm_jax.training.bad_steps import INTERNAL, SKIPPED, Judge
from hrvlm_jax.training.batches import make_batches, picture_words
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.evaluators import Evaluator, evaluators_of
from hrvlm_jax.training.lock import Lock
from hrvlm_jax.training.metrics import MetricsWriter, check_wandb, read_metrics
from hrvlm_jax.training.program import TrainProgram, assemble, outline_of
from hrvlm_jax.training.saving import Saver
from hrvlm_jax.training.signals import Signals
from hrvlm_jax.training.start import check_same_model, initial_params, stored_params
from hrvlm_jax.training.step import State, trained_paths
from hrvlm_jax.training.usage import Meter
from hrvlm_jax.training.watchdog import Watchdog
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
  resume_from: int | str | None = None,
) -> Result:
  """Trains to `training.steps`, resuming by itself from the work directory's newest checkpoint.

  SIGTERM and SIGINT finish the step at hand, save and return with `interrupted`; the second one
  ends the process at once. A run that stands still ends with status 5 (`training.watchdog`).

  Args:
    workdir: a folder, or the address of one in a bucket (gs://...), which several hosts need unless
      they share a file system.
    progress: True shows a bar on a terminal and else a line per logged step, 'lines' always lines,
      False neither.
    params: initial parameters (instead of random ones or `init_from`); ignored on resume.
    on_step: called after every step (tests, in-loop evaluation).
    resume_from: another checkpoint than the newest, see `training.resume`.

  Raises:
    UserError: somebody else trains in the work directory; bad config or data; a bad step (with its
      tensors and the saved batch, see `training.bad_steps`); a damaged checkpoint; the work
      directory belongs to another config.
  """
  heap.trim_after_compiling()
  with (_clear_errors(workdir), Workdir(workdir, main=distributed.is_main()) as place,
        contextlib.ExitStack() as held):
    lock = None
    if distributed.is_main():
      lock = held.enter_context(Lock(os.fspath(layout_of.to_path(place.address))))
    dog = held.enter_context(Watchdog(config.training.stall_minutes, place.local))
    return _train(config, place, progress, params, on_step, resume_from, dog, lock)


@contextlib.contextmanager
def _clear_errors(workdir: str | os.PathLike) -> Iterator[None]:
  """A full disk and the like in a sentence that names the file, where it is known."""
  try:
    yield
  except OSError as error:
    if (sentence := files.cause(error)) is None:
      raise
    raise UserError(f'cannot write {error.filename or workdir}: {sentence}; the same command goes '
                    'on from the last checkpoint') from error


def _train(config: RunConfig, place: Workdir, progress: bool | str, params: Any, on_step,
           resume_from: int | str | None, dog: Watchdog, lock: Lock | None) -> Result:
  workdir, t, resolved = place.local, config.training, to_dict(config)
  distributed.check_same(json.dumps(resolved), what='the config')
  starts.check_shared(place)
  check_same_model(workdir, resolved, checkpoints=place.address)
  bits = determinism.check(workdir, determinism.pin_threads(workdir)) if t.deterministic else None
  evaluators = evaluators_of(config)
  check_wandb(t.wandb)
  with store.TrainStore(
      place.address, keep=t.keep, keep_every=t.keep_every, config=resolved) as checkpoints:
    notes: list[str] = []
    step = resume.choose(checkpoints, workdir, resume_from, notes.append)
    stored = _stored_before(config, checkpoints, step) if params is None else paths.flatten(params)
    outline = outline_of(config, stored=stored)
    choice = fitting.chosen_mesh(config, outline, jax.device_count(), device_bytes(),
                                 slices=slices_of(jax.devices()))
    fitting.check_state(choice)
    layout = Layout(choice.mesh)
    program = assemble(config, layout.mesh, outline=outline)
    batches = make_batches(config, layout)
    for evaluator in evaluators:
      evaluator.prepare(config, layout=layout, workdir=workdir)
    notes += [distributed.devices_words(), *picture_words(config), *fitting.told(config, choice),
              fitting.batch_words(config, choice.mesh.shape), program.summary,
              *(note for evaluator in evaluators for note in evaluator.notes)]
    if jax.process_count() > 1:
      notes.append(_host_part(batches))
    dog.begin('restoring' if step is not None else 'starting')
    state, start, skipped = _start(program, layout, checkpoints, step, batches, params,
                                   notes.append)
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
                            config=resolved, name=place.name)
              if distributed.is_main() else _Silent())
    for note in notes:
      writer.log(note)
    place.copy_now(writer.log)  # the name of the run elsewhere, before there is anything to lose
    judge = Judge(t, trained_paths(program.groups), workdir, checkpoints, writer.log,
                  skipped=skipped, source=t.init_from if step is None else checkpoints.folder(step))
    run = _Run(program, layout, batches, Saver(checkpoints, writer.log), writer, evaluators,
               place, judge, dog, lock)
    with Signals() as signals:
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


def _stored_before(config: RunConfig, checkpoints: store.TrainStore, step: int | None
                   ) -> dict[str, Any] | None:
  """What the parameters are read from: the run's own checkpoint, else where it starts."""
  if step is not None:
    return stored_params(checkpoints.folder(step))
  return None if config.training.init_from is None else stored_params(config.training.init_from)


def _host_part(batches) -> str:
  """What of a batch this process makes, in a sentence."""
  own, shards = batches.own, batches.shards
  if len(own) == shards:
    return ('every process makes the whole batch; data.packing lets each make what its devices '
            'need')
  return f'process 0 makes {len(own)} of the {shards} shards of every batch'


def _start(program: TrainProgram, layout: Layout, checkpoints: store.TrainStore, step: int | None,
           batches, params: Any, log: Callable[[str], None]) -> tuple[State, int, int]:
  """(state, first step, steps left out so far): restored into its places, or fresh.

  Raises:
    UserError: the checkpoint says nothing of the data: they would begin anew.
  """
  if step is not None:
    restored = checkpoints.restore(program.placed_state, step=step)
    # A process that was not there when the checkpoint was saved goes on where the others do.
    position = restored.data_state or next(iter(checkpoints.data_states(restored.step)), None)
    if position is None:
      raise UserError(
        f'{checkpoints.folder(step)}: the position in the data is lost (run/data holds none), and '
        'the data would begin anew; go on from an earlier checkpoint with --resume-from STEP '
        f'(there are: {checkpoints.steps()}), or begin another run with training.init_from='
        f'{checkpoints.folder(step)} and another --workdir')
    batches.set_state(position)
    log(f'resuming from step {restored.step} of {checkpoints.workdir}')
    return restored.state, restored.step, int(position.get(SKIPPED, 0))
  if params is None:
    params = initial_params(program, layout, log)
  else:
    cast = jax.tree.map(lambda x, like: np.asarray(x, like.dtype), jax.device_get(params),
                        program.state['params'])
    params = layout.put(cast, program.shardings['params'])
  return layout.make(program.init, program.shardings, params), 0, 0


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
               evaluators: Sequence[Evaluator], place: Workdir, judge: Judge, dog: Watchdog,
               lock: Lock | None):
    t = program.config.training
    self.training, self.layout, self.batches, self.saver = t, layout, batches, saver
    self.writer, self.evaluators, self.workdir = writer, evaluators, place.local
    self.place, self.judge, self.dog, self.lock = place, judge, dog, lock
    self._shapes: set[Any] = set()
    for evaluator in evaluators:
      evaluator.beat = dog.beat
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

  def steps(self, state: State, start: int, signals: Signals, on_step) -> tuple[int, float | None]:
    """Steps to the end of the run, or to a signal; returns (step reached, its loss)."""
    t, step, iterator = self.training, start, iter(self.batches)
    self._start = self._logged = self.judge.start = start
    profile = _Profile(t.profile, self.workdir)
    self._evaluate(start, state, self._missing(start))
    while step < t.steps and not signals.stop(step):
      if self.lock is not None:
        self.lock.check()
      self.dog.begin('waiting for data')
      before = time.perf_counter()
      batch = next(iterator)
      self._meter.waited += time.perf_counter() - before
      placed = self.layout.batch(batch, leading=int(t.accumulate > 1), own=self.batches.own,
                                 shards=self.batches.shards)
      whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), placed)
      self._announce(step + 1, whole)
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
      if step == t.steps:
        self._finish(step, state)
      elif step % t.checkpoint_every == 0:
        self._settle()
        self._saving()
        begun = time.perf_counter()
        self.saver.save(step, state, self._data_state())
        self.writer.event(f'step {step}: checkpoint taken in {time.perf_counter() - begun:.1f} s, '
                          'written in the background')
      # After the checkpoint: what an evaluation meets must not cost the steps before it.
      self._evaluate(step, state, self._due(step))
    profile.close()
    if start < step < t.steps:
      self._finish(step, state)
    return step, self._loss

  def _announce(self, step: int, whole: Any) -> None:
    """Says to the watchdog what comes: the first step of a shape compiles."""
    key = tuple(leaf.shape for leaf in jax.tree.leaves(whole))
    self.dog.begin(f'step {step}' if key in self._shapes else f'compiling step {step}')
    self._shapes.add(key)

  def _saving(self) -> None:
    """Everything that is not the checkpoint gets to its place before it."""
    self.dog.begin('saving')
    self.writer.flush()
    self.place.copy_now(self.writer.log)

  def _finish(self, step: int, state: State) -> None:
    """The last checkpoint of this start."""
    self._settle()
    if step == self.training.steps:
      self.judge.ended(step)
    self._saving()
    begun = time.perf_counter()
    self.saver.finish(step, state, self._data_state())
    self.writer.event(f'step {step}: checkpoint written in {time.perf_counter() - begun:.1f} s')

  def _data_state(self) -> dict[str, Any]:
    """Where the data are, and what must not be forgotten by a restart."""
    skipped = self.judge.skipped
    return self.batches.get_state() | ({SKIPPED: skipped} if skipped else {})

  def _settle(self) -> None:
    """Reads the metrics of the step before; stops the run on a bad step."""
    if self._pending is None:
      return
    taken, self._pending = self._pending, None
    self._loss = float(taken.metrics['loss'])
    self._meter.count(taken.batch, taken.whole)
    self.judge.see(taken.step, taken.metrics, taken.batch)
    if taken.step % self.training.log_every == 0 or taken.step == self.training.steps:
      own = {key: value for key, value in taken.metrics.items() if key not in INTERNAL}
      values = jax.device_get(own) | self._meter.values(taken.batch, self.compilations)
      if self.judge.skipped:
        values['skipped_steps'] = self.judge.skipped
      values |= {f'bad_rows/{kind}': count for kind, count in sorted(self.batches.counts.items())}
      self.writer.write(taken.step, values, advance=taken.step - self._logged)
      self._logged = taken.step

  def _due(self, step: int) -> list[Evaluator]:
    """The evaluators that have their turn after a step."""
    return [e for e in self.evaluators if step == self.training.steps
            or e.options.every and step % e.options.every == 0]

  def _missing(self, start: int) -> list[Evaluator]:
    """Those of the step that was resumed from which were cut off: their numbers are not there."""
    due = self._due(start) if start else []
    path = self.workdir / 'metrics.jsonl'
    names = [name for row in (read_metrics(self.workdir) if path.exists() else ())
             if row.get('step') == start for name in row]
    flags = np.array([not any(name.startswith(f'{e.options.label}_') for name in names)
                      for e in due], bool)
    if due and jax.process_count() > 1:  # as the first process sees it
      flags = multihost_utils.broadcast_one_to_all(flags)
    return [e for e, missing in zip(due, flags, strict=True) if missing]

  def _evaluate(self, step: int, state: State, due: Sequence[Evaluator]) -> None:
    """Runs evaluators after a step."""
    if not due:
      return
    self._settle()
    before = time.perf_counter()
    for evaluator in due:
      with self.dog.phase(f'evaluation {evaluator.options.label} of step {step}'):
        values = evaluator.run(evaluated_params(state), step)
      self.writer.write(step, values)
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


class _Silent:
  """Writes nothing: the metrics writer of all processes but the first."""

  def log(self, text: str) -> None: ...

  def event(self, text: str) -> None: ...

  def write(self, step: int, values: Any, *, advance: int = 0) -> None: ...

  def flush(self) -> None: ...

  def close(self) -> None: ...
