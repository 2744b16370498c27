"""The folder of a checkpoint: what is in it, whether it is whole, and which one a path means.

Parameters (`store.save_params`):

    checkpoint.json   format name, version, kind
    manifest.json     a checksum of every other file but the commit file (`manifest.py`)
    config.json       the resolved config of the model
    arrays/           Orbax; its commit file is written last

A training checkpoint, `<workdir>/checkpoints/<step>` (`store.TrainStore`), is one checkpoint of
Orbax: `params/`, `state/`, the commit file, and in `run/` manifest.json, checkpoint.json with the
step, config.json and `data/<process>.*`, the state of each process's data iterator. Version 1 had
these files beside `arrays/` there too, and is still read.

The commit file makes the folder a checkpoint: everything else is on disk before it, so that one
interrupted at any moment is never taken for a whole one.
"""

from collections.abc import Mapping
import json
import os
from typing import Any

from etils import epath
import jax

from hrvlm_jax import __version__
from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError

FORMAT = 'hrvlm_jax'
VERSION = 2
READ = (1, 2)
STEPS, SET_ASIDE = 'checkpoints', 'set_aside'
BESIDE = 'run'
MARKER, CONFIG, ARRAYS, DATA = 'checkpoint.json', 'config.json', 'arrays', 'data'
COMMIT = 'commit_success.txt'

PathLike = str | os.PathLike


def to_path(directory: PathLike) -> epath.Path:
  """Absolute path; addresses such as gs://bucket stay as they are."""
  text = os.fspath(directory)
  return epath.Path(text if '://' in text else os.path.abspath(text))


def arrays(directory: PathLike) -> epath.Path:
  """The folder of the arrays, a checkpoint of Orbax, inside the folder of a checkpoint."""
  inside = to_path(directory) / ARRAYS
  return inside if inside.exists() else to_path(directory)


def beside(directory: PathLike) -> epath.Path:
  """The folder of marker and config inside the folder of a checkpoint."""
  inside = to_path(directory) / BESIDE
  return inside if (inside / MARKER).exists() else to_path(directory)


def is_whole(directory: PathLike) -> bool:
  """Whether a folder is a checkpoint that was written to its end."""
  return (arrays(directory) / COMMIT).exists() and (beside(directory) / MARKER).exists()


def is_foreign(directory: PathLike) -> bool:
  """Whether a folder holds files that no save of ours, finished or interrupted, has left."""
  directory = to_path(directory)
  if not directory.exists() or (beside(directory) / MARKER).exists():
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
  if not (beside(directory) / MARKER).exists() and (found := steps(directory)):
    directory = directory / STEPS / str(found[-1])
  if not (beside(directory) / MARKER).exists():
    hint = 'its first checkpoint is not finished' if (directory / STEPS).is_dir() else (
        'to read original weights, use hrvlm convert first')
    raise UserError(f'{directory}: holds no checkpoint ({MARKER} is absent); {hint}')
  if not is_whole(directory):
    raise UserError(f'{directory}: the checkpoint is not whole, writing it was interrupted; '
                    f'remove the folder and use another checkpoint')
  marker = read_json(beside(directory) / MARKER)
  if not isinstance(marker, dict):
    raise UserError(f'{beside(directory) / MARKER}: found {str(marker)[:80]}, expected a mapping')
  if marker.get('format') != FORMAT:
    raise UserError(f'{beside(directory) / MARKER}: format {marker.get("format")!r}, expected '
                    f'{FORMAT!r}')
  if marker.get('version') not in READ:
    raise UserError(
        f'{directory}: checkpoint format version {marker.get("version")}, this is hrvlm_jax '
        f'{__version__}, which reads versions {READ}; it was written by hrvlm_jax '
        f'{marker.get("hrvlm_jax")}')
  return directory


def read_json(path: epath.Path) -> Any:
  """A JSON file; `UserError` when it cannot be read."""
  try:
    return json_text.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UserError(f'{path}: cannot be read as JSON ({error})') from error


def to_json(value: Any) -> str:
  """Indented JSON, as the text of a file."""
  return json.dumps(value, indent=2) + '\n'


def write_json(path: epath.Path, value: Any) -> None:
  """Writes indented JSON."""
  path.write_text(to_json(value))


def header(kind: str, **facts: Any) -> dict[str, Any]:
  """The content of the marker file of a checkpoint that is written now."""
  return {'format': FORMAT, 'version': VERSION, 'hrvlm_jax': __version__, 'kind': kind,
          'manifest': True, **facts}


def write_beside(
    directory: epath.Path, config: Mapping[str, Any], marker: Mapping[str, Any],
    extra_files: Mapping[str, str | bytes] | None = None,
) -> None:
  """Everything but the arrays. Process 0 only; on disk before the arrays are committed."""
  if jax.process_index() != 0:
    return
  # The marker first, so that what an interrupted save left is known to be ours.
  write_files(directory, {MARKER: to_json(marker), CONFIG: to_json(config), **(extra_files or {})})


def write_files(directory: epath.Path, contents: Mapping[str, str | bytes]) -> None:
  """Writes files by their names below a folder, in order; folders are made."""
  for name, content in contents.items():
    target = directory / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content.encode() if isinstance(content, str) else content)
