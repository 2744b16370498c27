"""Which checkpoint a start goes on from: the newest, one asked for, or the newest whole one.

Going back (`--resume-from STEP`) sets the newer checkpoints aside, under `<workdir>/set_aside`,
where nothing reads or removes them. A restart with the same words goes on from the newest again:
what was done is written down in `resumed_from.json`.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import json
import pathlib

import jax
from jax.experimental import multihost_utils
import numpy as np

from hrvlm_jax.checkpoint import manifest, store
from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel import distributed

DONE = 'resumed_from.json'
LAST_WHOLE = 'last-whole'


def parse(text: str | None) -> int | str | None:
  """`--resume-from`: a step, or 'last-whole'.

  Raises:
    UserError: neither.
  """
  if text is None or text == LAST_WHOLE:
    return text
  if not text.isdigit():
    raise UserError(f'--resume-from: found {text!r}, expected the step of a checkpoint, or '
                    f'{LAST_WHOLE}')
  return int(text)


def choose(checkpoints: store.TrainStore, workdir: pathlib.Path, wanted: int | str | None,
           log: Callable[[str], None]) -> int | None:
  """The step of the checkpoint to go on from; None: there is none, the run begins.

  Args:
    workdir: the local part of the work directory.
    wanted: see `parse`.

  Raises:
    UserError: no checkpoint of that step, or none that is whole.
  """
  found = [-1, None]
  if distributed.is_main():
    try:
      found = [0, _choose(checkpoints, workdir, wanted, log)]
    except UserError as error:
      found = [1, error]
  if jax.process_count() > 1:
    # One process looks and moves; the others learn the step, or that there is none.
    failed, step = multihost_utils.broadcast_one_to_all(np.array(
      [found[0], -1 if not isinstance(found[1], int) else found[1]])).tolist()
    if failed and not isinstance(found[1], UserError):
      raise UserError('--resume-from: process 0 found no checkpoint to go on from; see its log')
    if not failed:
      return None if step < 0 else step
  if isinstance(found[1], UserError):
    raise found[1]
  return found[1]


def _choose(checkpoints: store.TrainStore, workdir: pathlib.Path, wanted: int | str | None,
            log: Callable[[str], None]) -> int | None:
  steps, note = checkpoints.steps(), workdir / DONE
  if wanted is None:
    note.unlink(missing_ok=True)
    return steps[-1] if steps else None
  done = {}
  with contextlib.suppress(OSError, ValueError):
    done = json_text.loads(note.read_text())
  if wanted == LAST_WHOLE:
    if not steps:
      return None
    whole = [step for step in reversed(steps) if not manifest.damaged(checkpoints.folder(step))]
    if not whole:
      raise UserError(f'{checkpoints.workdir}: none of its checkpoints {steps} is whole; hrvlm '
                      'doctor says what is wrong with each')
    step = whole[0]
  elif done.get('resume_from') == wanted and steps and steps[-1] > wanted:
    log(f'--resume-from {wanted} was done before, going on from step {steps[-1]} (remove {note} to '
        'go back once more)')
    return steps[-1]
  elif wanted not in steps:
    raise UserError(f'--resume-from {wanted}: {checkpoints.workdir} has no whole checkpoint of '
                    f'that step; there are: {steps}')
  else:
    step = wanted
  newer = [other for other in steps if other > step]
  if newer:
    place = checkpoints.set_aside(newer)
    log(f'going back to step {step}; newer checkpoints ({", ".join(map(str, newer))}) are set '
        f'aside in {place}')
  note.write_text(json.dumps({'resume_from': wanted}))
  return step
