"""The folder of a checkpoint: what is in it, whether it is whole, and which one a path means.

    checkpoint.json   format name, version, kind, step
    config.json       the resolved config of the run or model
    data/<process>.*  state of each process's data iterator (training checkpoints)
    arrays/           Orbax; its commit file is written last

The commit file makes the folder a checkpoint: everything else is on disk before it, so that one
interrupted at any moment is never taken for a whole one. Training checkpoints are such folders
under `<workdir>/checkpoints/<step>`.
"""

from collections.abc import Mapping
import json
import os
from typing import Any

from etils import epath
import jax

from hrvlm_jax import __version__
from hrvlm_jax.core.errors import UserError

FORMAT = 'hrvlm_jax'
VERSION = 1
STEPS = 'checkpoints'
MARKER, CONFIG, ARRAYS, DATA = 'checkpoint.json', 'config.json', 'arrays', 'data'
COMMIT = 'commit_success.txt'

PathLike = str | os.PathLike


def to_path(directory: PathLike) -> epath.Path:
  """Absolute path; addresses such as gs://bucket stay as they are."""
  text = os.fspath(directory)
  return epath.Path(text if '://' in text else os.path.abspath(text))


def is_whole(directory: PathLike) -> bool:
  """Whether a folder is a checkpoint that was written to its end."""
  directory = to_path(directory)
  return (directory / ARRAYS / COMMIT).exists() and (directory / MARKER).exists()


def is_foreign(directory: PathLike) -> bool:
  """Whether a folder holds files that no save of ours, finished or interrupted, has left."""
  directory = to_path(directory)
  if not directory.exists() or (directory / MARKER).exists():
    return False
  return not directory.is_dir() or any(True for _ in directory.iterdir())


def steps(workdir: PathLike) -> list[int]:
  """Steps of the whole training checkpoints of a work directory, in order."""
  root = to_path(workdir) / STEPS
  if not root.is_dir():
    return []
  return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit() and is_whole(p))


def resolve(directory: PathLike) -> epath.Path:
  """The checkpoint folder meant by a folder: itself, or the newest one of a work directory.

  Raises:
    UserError: no checkpoint there, an unfinished one, or one of an unknown format or version.
  """
  directory = to_path(directory)
  if not directory.is_dir():
    old = directory.parent / f'.{directory.name}.old'
    hint = f'; an interrupted overwrite left the previous one as {old}' if old.is_dir() else ''
    raise UserError(f'checkpoint {directory}: no such folder{hint}')
  if not (directory / MARKER).exists() and (found := steps(directory)):
    directory = directory / STEPS / str(found[-1])
  if not (directory / MARKER).exists():
    hint = 'its first checkpoint is not finished' if (directory / STEPS).is_dir() else (
        'to read original weights, use hrvlm convert first')
    raise UserError(f'{directory}: holds no checkpoint ({MARKER} is absent); {hint}')
  if not is_whole(directory):
    raise UserError(f'{directory}: the checkpoint is not whole, writing it was interrupted; '
                    f'remove the folder and use another checkpoint')
  marker = read_json(directory / MARKER)
  if marker.get('format') != FORMAT:
    raise UserError(f'{directory / MARKER}: format {marker.get("format")!r}, expected {FORMAT!r}')
  if marker.get('version') != VERSION:
    raise UserError(
        f'{directory}: checkpoint format version {marker.get("version")}, this is hrvlm_jax '
        f'{__version__}, which reads version {VERSION}; it was written by hrvlm_jax '
        f'{marker.get("hrvlm_jax")}')
  return directory


def read_json(path: epath.Path) -> Any:
  """A JSON file; `UserError` when it cannot be read."""
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UserError(f'{path}: cannot be read as JSON ({error})') from error


def write_json(path: epath.Path, value: Any) -> None:
  """Writes indented JSON."""
  path.write_text(json.dumps(value, indent=2) + '\n')


def write_beside(
    directory: epath.Path, config: Mapping[str, Any], marker: Mapping[str, Any],
    extra_files: Mapping[str, str | bytes] | None = None,
) -> None:
  """Everything but the arrays. Process 0 only; on disk before the arrays are committed."""
  if jax.process_index() != 0:
    return
  directory.mkdir(parents=True, exist_ok=True)
  # First, so that what an interrupted save left is known to be ours.
  header = {'format': FORMAT, 'version': VERSION, 'hrvlm_jax': __version__, **marker}
  write_json(directory / MARKER, header)
  write_json(directory / CONFIG, dict(config))
  for name, content in (extra_files or {}).items():
    target = directory / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
      target.write_bytes(content)
    else:
      target.write_text(content)
