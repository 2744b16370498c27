"""What a run was started with: `config.json` of its newest start, `starts/000012.json` of each.

A start that is refused leaves the work directory as it was; so nothing is written before the state
lies in its places. The number of a file is the step that its start went on from; `to_step` is the
last one made with its settings, None while it runs (or when it was killed and none followed).
"""

from __future__ import annotations

from collections.abc import Mapping
import datetime
import json
import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from hrvlm_jax import __version__
from hrvlm_jax.checkpoint import files
from hrvlm_jax.core import json_text, paths
from hrvlm_jax.core.errors import UserError, shortened
from hrvlm_jax.language.tokenizer import Tokenizer
from hrvlm_jax.parallel import distributed
from hrvlm_jax.training.workdir import STARTS, Workdir

_PROBE = '.seen_by_all'


def check_shared(place: Workdir) -> None:
  """Several processes must see one work directory; to be called on all of them.

  Raises:
    UserError: some do not see what the first one writes there.
  """
  if jax.process_count() == 1 or place.shared:
    return
  folder, main = place.local, distributed.is_main()
  made = main and not folder.exists()
  if main:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _PROBE).touch()
  distributed.barrier('work directory')
  seen = np.asarray(multihost_utils.process_allgather(np.asarray((folder / _PROBE).exists())))
  if main:
    (folder / _PROBE).unlink()
    if made:  # by the start that is not refused
      folder.rmdir()
  if not seen.all():
    blind = shortened([str(i) for i in np.flatnonzero(~seen)])
    raise UserError(f'{folder}: process(es) {blind} do not see what process 0 wrote there; several '
                    'hosts need a work directory on storage that they share')


def changed(place: Workdir, resolved: Mapping[str, Any]) -> dict[str, list[Any]]:
  """Settings that differ from those of the start before: key -> [then, now]."""
  path = place.local / 'config.json'
  if not path.exists():
    return {}
  before = paths.flatten(json_text.loads(path.read_text()))
  now = paths.flatten(json.loads(json.dumps(resolved)))
  return {key.replace('/', '.'): [before.get(key), now.get(key)]
          for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)}


def words(changes: Mapping[str, list[Any]]) -> str:
  """The line about them."""
  told = '; '.join(f'{key} was {then!r}, is {now!r}' for key, (then, now) in changes.items())
  return f'settings changed since the start before: {told}'


def record(place: Workdir, resolved: Mapping[str, Any], tokenizer: Tokenizer, *, step: int,
           changes: Mapping[str, list[Any]], mesh: Mapping[str, int]) -> None:
  """Writes what the run is made of from `step` on; called by the first process."""
  folder = place.local
  (folder / STARTS).mkdir(parents=True, exist_ok=True)
  for path in sorted((folder / STARTS).glob('*.json')):
    earlier = json_text.loads(path.read_text())
    if earlier['from_step'] > step:  # its steps are made again
      place.remove(f'{STARTS}/{path.name}')
    elif earlier['to_step'] is None or earlier['to_step'] > step:
      _write(path, earlier | {'to_step': step})
  _write(_path(place, step), {
    'from_step': step, 'to_step': None,
    'started': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'hrvlm_jax': __version__, 'jax': jax.__version__, 'processes': jax.process_count(),
    'devices': jax.device_count(), 'device_kind': jax.devices()[0].device_kind, 'mesh': dict(mesh),
    'changed': dict(changes), 'config': dict(resolved)})
  with files.staged_folder(folder / 'tokenizer', overwrite=True) as stage:
    tokenizer.save(stage)
  _write(folder / 'config.json', dict(resolved))


def end(place: Workdir, start: int, step: int) -> None:
  """Notes the last step of the start that went on from `start`; called by the first process."""
  path = _path(place, start)
  if path.exists():
    _write(path, json_text.loads(path.read_text()) | {'to_step': step})


def _path(place: Workdir, step: int) -> pathlib.Path:
  return place.local / STARTS / f'{step:06d}.json'


def _write(path: pathlib.Path, value: Any) -> None:
  """Whole or not at all."""
  temporary = path.with_suffix('.tmp')
  temporary.write_text(json.dumps(value, indent=2))
  temporary.replace(path)
