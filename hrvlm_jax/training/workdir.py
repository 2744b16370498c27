"""The work directory of a run: a folder, or an address such as gs://bucket/run.

Checkpoints are written straight to an address by the checkpoint store. Everything else (metrics,
TensorBoard, settings, answers, profiles) is small and is appended to, which buckets cannot do; it
lies in a folder of this machine and is copied to the address in the background.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib
import shutil
import tempfile
import threading

from etils import epath

from hrvlm_jax.core import installed
from hrvlm_jax.core.errors import UserError

_log = logging.getLogger(__name__)

EVERY = 60.0
# What a start reads of the start before it.
_READ_BACK = ('config.json', 'metrics.jsonl', 'determinism.json', 'wandb_id', 'resumed_from.json')
_CHECKPOINTS = 'checkpoints'
STARTS = 'starts'  # what each start was made of (`training.starts`)


class Workdir:
  """Where a run writes; used as a context, which ends with everything copied.

  Args:
    address: a folder or an address.
    main: this process copies to the address (one of the run does).
    every: seconds between copies.

  Attributes:
    local: the folder for everything but checkpoints; of an ordinary folder, itself.
    address: where checkpoints go.
    shared: several hosts may write checkpoints there.

  Raises:
    UserError: the address cannot be read (no package for it, no permission).
  """

  def __init__(self, address: str | os.PathLike, *, main: bool = True, every: float = EVERY):
    self.address = os.fspath(address)
    self.remote = epath.Path(self.address) if '://' in self.address else None
    self._copied: dict[str, tuple[int, int]] = {}
    self._done, self._thread, self._lock = threading.Event(), None, threading.Lock()
    if self.remote is None:
      self.local = pathlib.Path(self.address)
      return
    name = hashlib.sha256(self.address.encode()).hexdigest()[:16]
    user = os.getuid() if hasattr(os, 'getuid') else 0
    self.local = pathlib.Path(tempfile.gettempdir()) / f'hrvlm-{user}' / f'{name}-{os.getpid()}'
    self.local.mkdir(parents=True, exist_ok=True)
    self._try(self._read_back, 'read')
    if main:
      self._thread = threading.Thread(target=self._copy_now_and_then, args=(every,), daemon=True)
      self._thread.start()

  @property
  def name(self) -> str:
    """The last part of the address."""
    return self.address.rstrip('/').rpartition('/')[2] or self.address

  def copy_now(self, log) -> None:
    """`copy`, where a failure is only said: what is copied next may get through."""
    try:
      self.copy()
    except UserError as error:
      log(str(error))

  @property
  def shared(self) -> bool:
    """Whether the address is a bucket, which all hosts see."""
    return self.remote is not None

  def _try(self, action, what: str) -> None:
    try:
      action()
    except ImportError as error:
      raise UserError(f'{self.address}: buckets need the package gcsfs ({error}); install it with: '
                      f'{installed.add("tpu")}') from error
    except Exception as error:
      raise UserError(f'{self.address}: cannot {what} there: {error}; does the bucket exist, and '
                      'may this machine use it?') from error

  def _read_back(self) -> None:
    starts = self.remote / STARTS
    more = [f'{STARTS}/{path.name}' for path in starts.glob('*.json')] if starts.exists() else []
    for name in (*_READ_BACK, *more):
      source = self.remote / name
      if source.exists():
        (self.local / name).parent.mkdir(exist_ok=True)
        (self.local / name).write_bytes(source.read_bytes())

  def copy(self) -> None:
    """Copies what is new or has changed to the address; nothing for a folder.

    Raises:
      UserError: it cannot be written there.
    """
    if self.remote is not None:
      with self._lock:
        self._try(self._copy, 'write')

  def _copy(self) -> None:
    for path in sorted(self.local.rglob('*')):
      name = path.relative_to(self.local).as_posix()
      if not path.is_file() or name.startswith(f'{_CHECKPOINTS}/') or name.endswith('.tmp'):
        continue
      stat = path.stat()
      state = (stat.st_mtime_ns, stat.st_size)
      if self._copied.get(name) != state:
        target = self.remote / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        self._copied[name] = state

  def _copy_now_and_then(self, every: float) -> None:
    while not self._done.wait(every):
      try:
        self.copy()
      except UserError as error:  # the next one may work; the last one is not forgiven
        _log.warning('%s', error)

  def remove(self, name: str) -> None:
    """Removes a file here and at the address, if it is there."""
    (self.local / name).unlink(missing_ok=True)
    self._copied.pop(name, None)
    if self.remote is not None:
      self._try(lambda: (self.remote / name).unlink(missing_ok=True), 'write')

  def __enter__(self) -> Workdir:
    return self

  def __exit__(self, kind, error, trace) -> None:
    if self.remote is None:
      return
    self._done.set()
    if self._thread is not None:
      self._thread.join()
      try:
        self.copy()
      except UserError as late:
        if kind is None:
          raise
        _log.warning('%s', late)
    shutil.rmtree(self.local, ignore_errors=True)
