"""Names on the Hugging Face hub as folders: a commit each, from the local cache first; and pushing.

Only weights and JSON, text and tokenizer files are fetched; code in a repository is not, and
nothing in it is ever run.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import re
from typing import Any

from hrvlm_jax.core.errors import UserError

SOURCE = 'source.json'  # beside a converted checkpoint: what it was made from
MAIN = 'main'

_NAME = re.compile(r'(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?')
_COMMIT = re.compile(r'[0-9a-f]{40}')
_BRANCH = re.compile(r'(?!.*\.\.)[\w][\w./-]*')
_COMMON = ('*.json', '*.txt', '*.jinja', '*.model')
_PICKLES = ('*.bin', '*.pt', '*.pth')
_SECONDS = 10  # for the hub to say something


def resolve(source: str | os.PathLike, *, revision: str | None = None
            ) -> tuple[pathlib.Path, dict[str, Any]]:
  """The folder or file of a source, and where it is from.

  Args:
    source: a path; or `owner/name` on the hub, with `@revision` or `revision`.
    revision: commit (40 hexadecimal digits), branch or tag; default: main. A branch or tag is
      looked up while the hub can be reached, else it is what the cache knows of it.

  Returns:
    The local path, and {'name': its name or that on the hub, 'revision': the commit or None}, with
    'asked' where a branch or tag was asked for: the result of a later call may be another commit.

  Raises:
    UserError: no such path and no name on the hub, a revision that is none, not in the cache and
      the hub cannot be reached, huggingface_hub absent, or the hub refuses.
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
  wanted = wanted or MAIN
  if not _BRANCH.fullmatch(wanted):
    raise UserError(f'{source}: revision {wanted!r} is neither a commit (40 hexadecimal digits) '
                    'nor the name of a branch or tag')
  if _COMMIT.fullmatch(wanted):
    return _snapshot(name, wanted), {'name': name, 'revision': wanted}
  commit = _commit_of(name, wanted)
  return _snapshot(name, commit), {'name': name, 'revision': commit, 'asked': wanted}


def _hub(name: str) -> Any:
  try:
    return importlib.import_module('huggingface_hub')
  except ImportError as error:
    raise UserError(f'{name}: the Hugging Face hub needs huggingface_hub; install it (pip install '
                    'huggingface_hub) or give a local folder') from error


def _unreachable() -> tuple[type[Exception], ...]:
  """What is raised where the hub cannot be reached, by the HTTP library that is installed."""
  kinds: list[type[Exception]] = [ConnectionError, TimeoutError]
  for library in ('httpx2', 'httpx'):
    try:
      kinds.append(importlib.import_module(library).TransportError)
    except (ImportError, AttributeError):
      continue
  return tuple(kinds)


def _refusal(name: str, error: Exception) -> UserError:
  first = (str(error).strip().splitlines() or [type(error).__name__])[0]
  return UserError(f'{name}: the hub refuses ({first})')


def _commit_of(name: str, reference: str) -> str:
  """The commit of a branch or tag now, or the one that the cache has of it."""
  hub = _hub(name)
  from huggingface_hub import constants
  from huggingface_hub.errors import HfHubHTTPError
  from huggingface_hub.file_download import repo_folder_name

  folder = pathlib.Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type='model')
  path = folder / 'refs' / reference
  try:
    if not constants.HF_HUB_OFFLINE:
      commit = hub.HfApi().model_info(name, revision=reference, timeout=_SECONDS).sha
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(commit)
      return commit
  except _unreachable():
    pass
  except (HfHubHTTPError, ValueError) as error:
    raise _refusal(f'{name}@{reference}', error) from error
  if path.is_file():
    return path.read_text().strip()
  raise UserError(f'{name}: no such folder, and as a name on the Hugging Face hub it cannot be '
                  f'looked up: {reference} is not in the local cache, and {_why_not()}, or give '
                  'a folder')


def _why_not() -> str:
  """Why the hub is not asked, and what to do."""
  from huggingface_hub import constants

  if constants.HF_HUB_OFFLINE:
    return 'HF_HUB_OFFLINE is set; unset it'
  return 'the hub cannot be reached; go online'


def push(folder: str | os.PathLike, name: str, *, private: bool = False, branch: str | None = None,
         message: str = 'Upload by hrvlm push') -> tuple[str, str]:
  """Uploads an export as a model on the hub, which is made where it does not exist.

  Args:
    folder: what `hrvlm export` wrote: it is held against its manifest first.
    name: `owner/name`.
    private: of a model that is made now.
    branch: to push to; default: main.

  Returns:
    (address, commit).

  Raises:
    UserError: no export, damaged files, a name of another form, no permission, no connection.
  """
  from hrvlm_jax.checkpoint import hf, layout

  path = pathlib.Path(folder)
  if not path.is_dir():
    raise UserError(f'{folder}: no such folder; expected what hrvlm export wrote')
  if (layout.beside(path) / layout.MARKER).exists() or (path / layout.STEPS).is_dir():
    raise UserError(f'{folder}: is a checkpoint, which nobody else can open; hrvlm export '
                    f'--checkpoint {folder} --to FOLDER, then push FOLDER')
  if not (path / 'config.json').is_file():
    raise UserError(f'{folder}: has no config.json; expected what hrvlm export wrote')
  if not _NAME.fullmatch(name) or '@' in name:
    raise UserError(f'{name}: expected owner/name')
  hf.check_manifest(path)
  hub = _hub(name)
  from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

  api = hub.HfApi()
  try:
    api.create_repo(name, private=private, exist_ok=True)
    made = api.upload_folder(repo_id=name, folder_path=path, revision=branch,
                             commit_message=message)
  except _unreachable() as error:
    raise UserError(f'{name}: not pushed, {_why_not()}') from error
  except LocalTokenNotFoundError as error:
    raise UserError(f'{name}: not pushed, nobody is logged in; hf auth login') from error
  except (HfHubHTTPError, ValueError, OSError) as error:
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    hint = '; log in with a token that may write: hf auth login' if status in (401, 403) else ''
    raise UserError(f'{_refusal(name, error)}{hint}') from error
  return str(made.repo_url or f'{api.endpoint}/{name}'), made.oid


def _snapshot(name: str, commit: str) -> pathlib.Path:
  hub = _hub(name)
  from huggingface_hub import constants
  from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

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
    if not constants.HF_HUB_OFFLINE:  # one question: a download would try again for half a minute
      hub.HfApi().model_info(name, revision=commit, timeout=_SECONDS)
    for kinds in (('*.safetensors',), _PICKLES):
      if (folder := get(kinds, False)) is not None:
        return folder
  except (LocalEntryNotFoundError, *_unreachable()) as error:
    raise UserError(f'{name}@{commit}: not (or not wholly) in the local cache, and {_why_not()}, '
                    'or give a folder') from error
  except (HfHubHTTPError, ValueError, OSError) as error:
    raise _refusal(f'{name}@{commit}', error) from error
  raise UserError(f'{name}@{commit}: holds no weights (.safetensors, .bin, .pt or .pth)')
