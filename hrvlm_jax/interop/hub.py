"""Names on the Hugging Face hub as folders: pinned to a commit, from the local cache first.

Only weights and JSON, text and tokenizer files are fetched; code in a repository is not, and
nothing in it is ever run.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

from hrvlm_jax.core.errors import UserError

SOURCE = 'source.json'  # beside a converted checkpoint: what it was made from

_NAME = re.compile(r'(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?')
_COMMIT = re.compile(r'[0-9a-f]{40}')
_COMMON = ('*.json', '*.txt', '*.jinja', '*.model')
_PICKLES = ('*.bin', '*.pt', '*.pth')


def resolve(source: str | os.PathLike, *, revision: str | None = None
            ) -> tuple[pathlib.Path, dict[str, Any]]:
  """The folder or file of a source, and where it is from.

  Args:
    source: a path; or `owner/name` on the hub, with `@commit` or `revision`.
    revision: the full commit (40 hexadecimal digits): a branch would change under the result.

  Returns:
    The local path, and {'name': its name or that on the hub, 'revision': the commit or None}.

  Raises:
    UserError: no such path and no name on the hub, no pinned commit, not in the cache while
      offline, huggingface_hub absent, or the hub refuses.
  """
  path = pathlib.Path(source)
  if path.exists():
    if revision is not None:
      raise UserError(f'{source}: is on this machine; a revision belongs to a name on the hub')
    return path, {'name': path.resolve().name, 'revision': None}
  match = None if isinstance(source, os.PathLike) else _NAME.fullmatch(source)
  if match is None:
    raise UserError(f'{source}: no such folder; expected one, or a name on the Hugging Face hub '
                    'such as owner/name@commit')
  name, wanted = match['name'], match['revision'] or revision
  if match['revision'] and revision not in (None, match['revision']):
    raise UserError(f'{source}: names another revision than {revision}; give one')
  if wanted is None or not _COMMIT.fullmatch(wanted):
    found = 'no revision' if wanted is None else f'revision {wanted!r}'
    raise UserError(f'{source}: no such folder; as a name on the Hugging Face hub it needs a '
                    f'pinned commit ({name}@ and 40 hexadecimal digits), found {found}'
                    f'{_known(name, wanted or "main")}')
  return _snapshot(name, wanted), {'name': name, 'revision': wanted}


def _known(name: str, reference: str) -> str:
  """What the cache knows about a branch, as a hint."""
  try:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name
  except ImportError:
    return ''
  folder = pathlib.Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type='model')
  path = folder / 'refs' / reference
  if '..' in reference or not path.is_file():
    return ''
  return f'; {reference} in the local cache is {path.read_text().strip()}'


def _snapshot(name: str, commit: str) -> pathlib.Path:
  try:
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
  except ImportError as error:
    raise UserError(f'{name}: fetching from the Hugging Face hub needs huggingface_hub; install '
                    'it (pip install huggingface_hub) or give a local folder') from error

  def get(kinds: tuple[str, ...], local: bool) -> pathlib.Path | None:
    try:
      folder = pathlib.Path(hub.snapshot_download(
        name, revision=commit, local_files_only=local, allow_patterns=[*_COMMON, *kinds]))
    except LocalEntryNotFoundError:
      if local:
        return None
      raise
    return folder if any(p.match(kind) for p in folder.rglob('*') for kind in kinds) else None

  for kinds in (('*.safetensors',), _PICKLES):
    if (folder := get(kinds, True)) is not None:
      return folder
  try:
    for kinds in (('*.safetensors',), _PICKLES):
      if (folder := get(kinds, False)) is not None:
        return folder
  except LocalEntryNotFoundError as error:
    raise UserError(f'{name}@{commit}: not (or not wholly) in the local cache, and the hub cannot '
                    'be reached; go online, unset HF_HUB_OFFLINE, or give a folder') from error
  except (HfHubHTTPError, ValueError, OSError) as error:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(f'{name}@{commit}: the hub refuses ({first})') from error
  raise UserError(f'{name}@{commit}: holds no weights (.safetensors, .bin, .pt or .pth)')
