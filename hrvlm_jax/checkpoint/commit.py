"""How Orbax commits a folder here: our manifest first, then its commit file.

Orbax knows the class that commits as `temporary_path_class` of its older interface and, in the one
of `store.py`, by a mode of its context; the table of modes is the one private name that is used
(bound to the same versions as `store.py`).
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

from etils import epath
import jax
from orbax.checkpoint import multihost
from orbax.checkpoint._src.path import atomicity, atomicity_defaults
import orbax.checkpoint.experimental.v1 as ocp

from hrvlm_jax.checkpoint import layout, manifest

_MODE = 'hrvlm_jax: with a manifest'


class _AsyncOptions(ocp.options.AsyncOptions):
  """Orbax's, but a process whose write has failed waits for no other.

  Orbax lets it meet the others first, for up to 20 minutes; they wait for it to finish writing.
  """

  def v0(self) -> Any:
    options = super().v0()
    meet = multihost.get_barrier_sync_fn()

    def meet_unless_failed(*, key: str, timeout_ms: int) -> None:
      if (error := sys.exc_info()[1]) is not None:
        raise error
      meet(key=key, timeout_ms=timeout_ms)

    options.barrier_sync_fn = meet_unless_failed
    return options


def context() -> ocp.Context:
  """A context of Orbax: folders made at once, checkpoints committed with a manifest."""
  # Orbax warns of options that are handed over whole, but has no other place for a class of ours.
  made = ocp.Context() if jax.process_count() == 1 else ocp.Context(async_options=_AsyncOptions())
  # Otherwise a folder that cannot be made is noticed only after minutes of waiting for it.
  made.asynchronous.create_directories_asynchronously = False
  atomicity_defaults._ATOMICITY_MODE_TO_PATH_CLASS.setdefault(_MODE, committing())
  made.atomicity.mode = _MODE
  return made


def committing(root: epath.Path | None = None) -> type[atomicity.TemporaryPathBase]:
  """The class of Orbax that commits a folder, writing a manifest first.

  Args:
    root: the checkpoint's own folder, of which a folder is committed; the manifest goes there.
      Default: the folder itself is the checkpoint; the manifest goes into its `run`.
  """

  class Renamed(_Committing, atomicity.AtomicRenameTemporaryPath):
    """Where folders can be renamed."""

  class Marked(_Committing, atomicity.CommitFileTemporaryPath):
    """Where renaming is copying (Orbax draws the line at the same place)."""

  class Commit(atomicity.AtomicRenameTemporaryPath):
    """Either, by the address."""

    @classmethod
    def from_final(cls, final_path, **options):
      kind = Marked if os.fspath(final_path).startswith('gs://') else Renamed
      return kind.from_final(final_path, **options)

  Renamed.root = Marked.root = root
  return Commit


class _Committing:
  root: epath.Path | None

  async def finalize(self) -> None:
    """Orbax's facts of the commit, our manifest, Orbax's commit."""
    inside = self.get()
    if self._checkpoint_metadata_store:
      # Otherwise changed after the manifest, by the method below.
      facts = atomicity.checkpoint_metadata.step_metadata_file_path(inside)
      store, self._checkpoint_metadata_store = self._checkpoint_metadata_store, None
      await asyncio.to_thread(store.wait_until_finished)
      await asyncio.to_thread(store.update, file_path=facts, commit_timestamp_nsecs=time.time_ns())
      await asyncio.to_thread(store.wait_until_finished)
    place = self.root or inside / layout.BESIDE
    if place.is_dir():  # parts are committed with this class, too, before the whole
      await asyncio.to_thread(
        manifest.write, place, self.root or inside, inside, self.get_final().name)
    await super().finalize()
