"""What the processes of one run know and nobody else on the network does.

`HRVLM_RUN_TOKEN`, the same text on every host (scripts/launch.sh makes one for a run). Where all
processes are on this machine (`--coordinator localhost:PORT`) none is needed: process 0 leaves one
in a folder that only this user can enter.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import os
import pathlib
import secrets
import stat
import tempfile

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel.addresses import is_local, split_address

VARIABLE = 'HRVLM_RUN_TOKEN'
_SHORTEST = 16  # letters


def run_secret(coordinator: str, process: int) -> Callable[[], bytes] | None:
  """Gives the secret of a run; None where there is none, and JAX's own meeting must do.

  Of a secret on this machine the other processes get the newest at every call (an OSError while
  there is none): process 0 makes a new one at every start.

  Raises:
    UserError: a text too short to be one.
  """
  if token := os.environ.get(VARIABLE, ''):
    if len(token) < _SHORTEST:
      raise UserError(f'{VARIABLE}: has {len(token)} letters, expected at least {_SHORTEST}, such '
                      'as of: openssl rand -hex 16')
    return token.encode
  host, port = split_address(coordinator)
  folder = _private() if is_local(host) else None
  if folder is None:
    return None
  path = folder / f'meeting.{port}'
  if process:
    return path.read_bytes
  token, part = secrets.token_hex(16), path.with_name(f'{path.name}.{os.getpid()}')
  with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 'w') as file:
    file.write(token)
  os.replace(part, path)
  return token.encode


def _private() -> pathlib.Path | None:
  """A folder of this user alone; None: somebody else's is in its place."""
  root = '/tmp' if os.path.isdir('/tmp') else tempfile.gettempdir()
  folder = pathlib.Path(root, f'hrvlm-meetings-{os.getuid()}')
  try:
    with contextlib.suppress(FileExistsError):
      folder.mkdir(mode=0o700)
    found = folder.lstat()
  except OSError:
    return None
  mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
  return folder if mine else None
