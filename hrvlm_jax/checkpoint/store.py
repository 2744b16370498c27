"""The checkpoint store: parameters or whole training states, sharded, asynchronous, atomic.

The folder is described in `layout.py`. Every function that reads parameters accepts a checkpoint
of parameters, a training checkpoint, or a work directory (its newest checkpoint).

Orbax's experimental v1 interface is used in this file only and bound to orbax-checkpoint >= 0.12.8,
< 0.13 (pyproject.toml): it may change with any minor version until it is the top-level one.
`streaming.py` writes parameters through the older one, which lets a handler be replaced.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import logging
import math
from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from hrvlm_jax.checkpoint import chunks, commit, files, layout, manifest, streaming, trees
from hrvlm_jax.checkpoint.layout import PathLike, is_whole, resolve, steps
from hrvlm_jax.checkpoint.trees import flatten, mismatches
from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError, nearest, raise_all

PARAMS, _REST = trees.PARAMS, trees.REST

# Orbax's threads log the traceback of an error that is raised again, as a sentence, by the caller.
_RAISED_AGAIN = ('_SignalingThread.run() raised an exception', 'in background save thread',
                 '[wait_until_finished] Save Finalize thread', 'items may not be finalized',
                 # The files beside a run are no arrays, and are read without it.
                 'Failed to get metadata for checkpointable: run')
logging.getLogger('absl').addFilter(
    lambda record: not any(text in record.getMessage() for text in _RAISED_AGAIN))


class Restored(NamedTuple):
  """A training checkpoint: its step, its state, and this process's data iterator state."""

  step: int
  state: Any
  data_state: Any


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
  return paths.unflatten(flat)


def save_params(
    directory: PathLike, params: Mapping[str, Any], config: Mapping[str, Any], *,
    extra_files: Mapping[str, str | bytes] | None = None, overwrite: bool = False,
) -> None:
  """Writes parameters and their config as one checkpoint; returns when it is whole.

  Call it on every process. Host arrays are not copied, so that memory-mapped leaves cost no
  anonymous memory.

  Args:
    directory: the folder to be made. What an interrupted save left there is removed.
    params: nested dict of arrays.
    config: JSON values; becomes `config.json`.
    extra_files: further files by name, for example a tokenizer.
    overwrite: replace an existing whole checkpoint (it is removed only after the new one is
      whole, on file systems that can rename).

  Raises:
    UserError: a whole checkpoint or foreign files are there; disk full; no permission.
  """
  directory = layout.to_path(directory)
  with files.clear_errors(f'cannot write the checkpoint {directory}'):
    target = directory
    if is_whole(directory):
      if not overwrite:
        raise UserError(f'{directory}: holds a checkpoint already; choose another folder or '
                        f'remove it first')
      target = directory.parent / f'.{directory.name}.new'
    elif layout.is_foreign(directory):
      raise UserError(f'{directory}: holds other files; choose an empty folder')
    _clear(target)
    try:
      layout.write_beside(target, config, layout.header('params'), extra_files)
      streaming.save(target / layout.ARRAYS, PARAMS, jax.tree.map(trees.storable, dict(params)),
                     commit=commit.committing(target))
    except BaseException:
      if jax.process_index() == 0:
        _remove(target)
      raise
    if target != directory and jax.process_index() == 0:
      old = directory.parent / f'.{directory.name}.old'
      directory.rename(old)
      target.rename(directory)
      old.rmtree()


def _clear(directory: epath.Path) -> None:
  """Removes what an interrupted save left. All processes wait until it is gone."""
  if jax.process_index() == 0 and directory.exists():
    directory.rmtree()
  _barrier(f'clear {directory}')


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def load_config(directory: PathLike) -> dict[str, Any]:
  """The config saved with a checkpoint; `directory` as for `resolve`.

  Whoever reads a checkpoint reads its config; all its small files are checked here.

  Raises:
    UserError: no whole checkpoint, or a damaged one.
  """
  directory = resolve(directory)
  manifest.check(directory)
  return layout.read_json(layout.beside(directory) / layout.CONFIG)


def load_marker(directory: PathLike) -> dict[str, Any]:
  """Format, version, kind and, for training checkpoints, step; `directory` as for `resolve`."""
  return layout.read_json(layout.beside(resolve(directory)) / layout.MARKER)


def describe(directory: PathLike, part: str = PARAMS) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and dtype of every parameter by path, without reading any of them.

  Args:
    part: or `trees.REST`: of what a training keeps beside them (optimizer, averages, counters).
  """
  return _stored(resolve(directory), part)


@contextlib.contextmanager
def _reading(directory: epath.Path, part: str, places: Mapping[str, Any] | None) -> Iterator[None]:
  """Checks what will be read (see `chunks.check`); what cannot be read all the same is a sentence.

  Args:
    places: leaf -> what it is read as, an array or an abstract one with a sharding; None: shapes.
  """
  read = None if places is None else {
      path: (leaf.shape, getattr(leaf, 'sharding', None)) for path, leaf in places.items()}
  try:
    chunks.check(directory, part, read)
    yield
  except UserError:
    raise
  except (ValueError, KeyError, OSError) as error:
    first = (str(error).strip().splitlines() or [''])[0][:200]
    raise UserError(f'checkpoint {directory} cannot be read ({type(error).__name__}: {first}); '
                    f'{manifest.advice(directory)}') from error


def _stored(directory: epath.Path, part: str) -> dict[str, jax.ShapeDtypeStruct]:
  with _reading(directory, part, None):
    tree = ocp.checkpointables_metadata(layout.arrays(directory)).metadata.get(part) or {}
  leaves = flatten(tree)
  return {path: jax.ShapeDtypeStruct(tuple(m.shape), m.dtype) for path, m in leaves.items()}


def load_params(
    directory: PathLike, abstract: Mapping[str, Any] | None = None, *, dtype: Any = None,
    shardings: Any = None,
) -> dict[str, Any]:
  """Reads the parameters of a checkpoint, also of a training checkpoint or work directory.

  Args:
    directory: see `resolve`.
    abstract: nested dict of `jax.ShapeDtypeStruct` that the checkpoint must match exactly. Leaves
      get its dtypes, and its shardings where it has them. None: everything, as stored.
    dtype: dtype of all floating-point leaves instead; 'stored' keeps that of the file.
    shardings: one `jax.sharding.Sharding`, a nested dict of them, or 'host' for NumPy arrays.
      Default: those of `abstract`, else the first local device.

  Raises:
    UserError: missing, extra or misshapen parameters (all listed), or no whole checkpoint.
  """
  directory = resolve(directory)
  stored = _stored(directory, PARAMS)
  wanted = stored if abstract is None else flatten(abstract)
  title = f'checkpoint {directory} and model do not match'
  raise_all(title, mismatches(stored, wanted))
  places = trees.places_of(wanted, shardings)
  flat = {}
  for path, leaf in wanted.items():
    kind = stored[path].dtype if dtype == 'stored' else leaf.dtype
    if dtype not in (None, 'stored') and jnp.issubdtype(kind, jnp.floating):
      kind = jnp.dtype(dtype)
    flat[path] = trees.target(leaf.shape, kind, places[path])
  with _reading(directory, PARAMS, flat):
    return ocp.load(layout.arrays(directory), _nested(flat), checkpointable_name=PARAMS)


def load_leaf(directory: PathLike, path: str) -> np.ndarray:
  """One parameter as a NumPy array, without reading the others.

  Raises:
    UserError: no such parameter (the nearest known path is named).
  """
  return next(load_leaves(directory, [path]))[1]


def load_leaves(directory: PathLike, names: Iterable[str] | None = None, *,
                at_once: int = 1 << 28) -> Iterator[tuple[str, np.ndarray]]:
  """(path, NumPy array) of parameters, one after the other; the others are not read.

  Args:
    names: which, in this order. None: all.
    at_once: bytes of arrays that are read together; a larger one is read alone.

  Raises:
    UserError: no such parameter (the nearest known path is named).
  """
  directory = resolve(directory)
  stored = _stored(directory, PARAMS)
  groups: list[list[str]] = []
  room = 0
  for path in stored if names is None else names:
    if path not in stored:
      raise UserError(f'{directory}: has no parameter {path} (nearest: {nearest(path, stored)})')
    size = math.prod(stored[path].shape) * stored[path].dtype.itemsize
    if not groups or size > room:
      groups.append([])
      room = at_once
    groups[-1].append(path)
    room -= size
  for group in groups:
    wanted = {path: np.empty(stored[path].shape, stored[path].dtype) for path in group}
    flat = dict.fromkeys(stored, ocp.PLACEHOLDER) | wanted
    with _reading(directory, PARAMS, wanted):
      tree = ocp.load(layout.arrays(directory), _nested(flat), checkpointable_name=PARAMS)
    found = paths.flatten(tree)
    for path in group:
      yield path, found.pop(path)


class _Beside:
  """Small files of a training checkpoint as a checkpointable of Orbax, written by every process."""

  def __init__(self, contents: Mapping[str, str | bytes]):
    self._contents = contents

  async def save(self, directory: Any) -> Any:
    """Called by Orbax: what it awaits writes the files once the folder is there."""
    async def write() -> None:
      layout.write_files(await directory.await_creation(), self._contents)

    return write()

  async def load(self, directory: Any) -> Any:
    """Part of Orbax's protocol; the files are read as files."""
    raise NotImplementedError


class TrainStore:
  """Training checkpoints under `<workdir>/checkpoints/<step>`, written by Orbax's `Checkpointer`.

  Saving is asynchronous: `save` returns as soon as the arrays are copied to the host, and an error
  of the background write is raised by the next `save` or `wait`. Old checkpoints are removed only
  when a newer one is whole, and here rather than by a policy of Orbax, whose deletion may be
  interrupted and then leave half a checkpoint with its commit file. Every process makes one store
  and makes the same calls.

  Args:
    workdir: work directory of the run.
    keep: number of newest checkpoints to keep.
    keep_every: steps divisible by it are kept for good.
    config: resolved run config, written with every checkpoint.
  """

  def __init__(
      self, workdir: PathLike, *, keep: int = 3, keep_every: int | None = None,
      config: Mapping[str, Any] | None = None,
  ):
    if keep < 1:
      raise UserError(f'checkpoints to keep: found {keep}, expected at least 1')
    if keep_every is not None and keep_every < 1:
      raise UserError(f'checkpoints kept for good: every {keep_every} steps, expected at least 1')
    self.workdir = layout.to_path(workdir)
    self.keep, self.keep_every = keep, keep_every
    self.config = dict(config or {})
    self._orbax: ocp.training.Checkpointer | None = None
    self._pending: tuple[int, Any] | None = None

  def __enter__(self) -> 'TrainStore':
    return self

  def __exit__(self, kind, error, trace) -> None:
    if kind is not None and jax.process_count() > 1:
      return  # the run ends: nothing waits for processes that may have ended
    # The first error is the one to be seen.
    with contextlib.suppress(UserError) if kind is not None else contextlib.nullcontext():
      self.close()

  def folder(self, step: int) -> epath.Path:
    """The folder of one step's checkpoint."""
    return self.workdir / layout.STEPS / str(step)

  def steps(self) -> list[int]:
    """Steps with a whole checkpoint, in order."""
    return steps(self.workdir)

  def latest(self) -> int | None:
    """The newest step with a whole checkpoint, or None."""
    found = self.steps()
    return found[-1] if found else None

  def set_aside(self, found: Sequence[int]) -> epath.Path:
    """Moves checkpoints where they are neither resumed from nor removed; call it on one process.

    Returns:
      The folder they are in now.
    """
    place = self.workdir / layout.SET_ASIDE
    with files.clear_errors(f'cannot move checkpoints to {place}'):
      place.mkdir(parents=True, exist_ok=True)
      for step in found:
        target, number = place / str(step), 1
        while target.exists():
          number += 1
          target = place / f'{step}_{number}'
        self.folder(step).rename(target)
    return place

  def save(self, step: int, state: Any, data_state: Any = None) -> None:
    """Begins to save; waits for the previous save first.

    Args:
      step: number of finished steps. Saving a step that is whole already does nothing.
      state: any pytree of arrays; a mapping or object with `params` keeps these readable on their
        own (`load_params`).
      data_state: this process's data iterator state: a JSON value or bytes.

    Raises:
      UserError: disk full or no permission, for this or the previous save. Whole checkpoints stay.
    """
    self.wait()
    if is_whole(self.folder(step)):
      return
    params, rest = trees.split(state)
    parts: dict[str, Any] = {
        part: _nested({path: trees.storable(leaf) for path, leaf in leaves.items()})
        for part, leaves in ((PARAMS, params), (_REST, rest)) if leaves
    }
    parts[layout.BESIDE] = _Beside(self._beside(step, data_state))
    with self._writing(step):
      if self._orbax is None:
        self._orbax = ocp.training.Checkpointer(
            self.workdir / layout.STEPS, context=commit.context())
      _clear(self.folder(step))
      self._pending = (step, self._orbax.save_checkpointables_async(step, parts, force=True))

  def _beside(self, step: int, data_state: Any) -> dict[str, str | bytes]:
    process, found = jax.process_index(), {}
    if process == 0:
      marker = layout.header('train', step=step, processes=jax.process_count())
      found = {layout.MARKER: layout.to_json(marker), layout.CONFIG: layout.to_json(self.config)}
    if isinstance(data_state, bytes):
      found[f'{layout.DATA}/{process}.bin'] = data_state
    elif data_state is not None:
      found[f'{layout.DATA}/{process}.json'] = layout.to_json(data_state)
    return found

  @contextlib.contextmanager
  def _writing(self, step: int) -> Iterator[None]:
    """After an error nothing half-written stays; the next save begins with a new checkpointer."""
    try:
      with files.clear_errors(f'cannot write the checkpoint {self.folder(step)}'):
        yield
    except Exception:
      failed, self._orbax, self._pending = self._orbax, None, None
      with contextlib.suppress(Exception):  # the same error again
        if failed is not None and jax.process_count() == 1:  # closing waits for all processes
          failed.close()
      self._prune()
      raise

  def wait(self) -> None:
    """Waits for the save in progress, then removes checkpoints that are no longer kept.

    Raises:
      UserError: as `save`.
    """
    if self._pending is None:
      return
    (step, response), self._pending = self._pending, None
    with self._writing(step):
      response.result()
    self._prune()

  def close(self) -> None:
    """Waits for the save in progress; the store can be used again."""
    self.wait()
    if self._orbax is not None:
      self._orbax.close()
      self._orbax = None

  def _prune(self) -> None:
    """Removes what is not kept and what interrupted or failed saves left; none may be running."""
    root = self.workdir / layout.STEPS
    if jax.process_index() != 0 or not root.is_dir():
      return
    whole = self.steps()
    kept = set(whole[-self.keep:])
    if self.keep_every:
      kept |= {step for step in whole if step % self.keep_every == 0}
    for entry in list(root.iterdir()):
      # Orbax writes into `<step>.<something temporary>` and renames it.
      if entry.name.split('.')[0].isdigit() and entry.name not in map(str, kept):
        _remove(entry)

  def data_states(self, step: int) -> list[Any]:
    """The data iterator states of all processes that saved the step, by process."""
    folder = layout.beside(self.folder(step)) / layout.DATA
    if not folder.is_dir():
      return []
    found = {}
    for entry in folder.iterdir():
      process, _, kind = entry.name.partition('.')
      found[int(process)] = entry.read_bytes() if kind == 'bin' else layout.read_json(entry)
    return [found[process] for process in sorted(found)]

  def restore(self, abstract: Any, *, step: int | None = None) -> Restored:
    """Reads a whole training state.

    Args:
      abstract: pytree like the saved state, of arrays or `jax.ShapeDtypeStruct`; gives dtypes and
        shardings (also of another mesh than the one that saved), leaf by leaf.
      step: default: the newest.

    Returns:
      Step, state, and this process's data iterator state (None when none was saved for it; see
      `data_states` when the number of processes changed).

    Raises:
      UserError: no such checkpoint; missing, extra or misshapen leaves, all listed.
    """
    self.wait()
    found = self.steps()
    if step is None:
      if not found:
        raise UserError(f'{self.workdir}: holds no whole checkpoint')
      step = found[-1]
    if step not in found:
      raise UserError(f'{self.workdir}: no checkpoint of step {step}; there are: {found}')
    folder = resolve(self.folder(step))
    params, rest = trees.split(abstract)
    manifest.check(folder)
    parts, problems, targets = {}, [], {}
    for part, leaves in ((PARAMS, params), (_REST, rest)):
      stored = _stored(folder, part)
      problems += mismatches(stored, leaves)
      if leaves:
        shapes = {p: trees.stored_shape(leaf) for p, leaf in leaves.items()}
        places = trees.places_of(leaves, None)
        targets[part] = {p: trees.target(s.shape, s.dtype, places[p]) for p, s in shapes.items()}
        parts[part] = _nested(targets[part])
    raise_all(f'checkpoint {folder} and training state do not match', problems)
    with contextlib.ExitStack() as checked:
      for part, flat in targets.items():
        checked.enter_context(_reading(folder, part, flat))
      loaded = ocp.load_checkpointables(layout.arrays(folder), parts)
    state = trees.join(abstract, {part: paths.flatten(loaded[part]) for part in parts})
    states = self.data_states(step)
    mine = states[jax.process_index()] if jax.process_index() < len(states) else None
    return Restored(step, state, mine)


def _remove(folder: epath.Path) -> None:
  """Deletes a checkpoint; the commit file goes first, so that no half of it looks whole."""
  try:
    (layout.arrays(folder) / layout.COMMIT).unlink(missing_ok=True)
    folder.rmtree()
  except OSError as error:
    # Left-overs are removed again by the next save; they are never read.
    if files.cause(error) is None and folder.exists():
      raise
