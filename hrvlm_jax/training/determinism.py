"""`training.deterministic`: what has to stay the same for a resumed run to repeat the same bits.

XLA's CPU programs cut products into as many pieces as there are threads, so that their sums change
in the last bits with the number of usable cores. The mode pins that number at the first start (the
environment variable NPROC, which XLA's CPU client reads) and keeps it in the work directory: a
resumed run takes the same one, on however many cores. On GPUs it asks XLA for deterministic
operations and no autotuning. Another kind or number of devices, another jax or jaxlib: refused.

What it costs: on a CPU nothing while there are as many cores as threads (0.161 s against 0.161 s
for a training-like product on 2 cores), and with fewer cores what sharing them costs. On GPUs,
atomic additions give way to slower ordered ones, and kernels are not chosen by timing.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax
import jaxlib

from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError

RECORD = 'determinism.json'
_GPU_OPTIONS = {'xla_gpu_deterministic_ops': True, 'xla_gpu_autotune_level': 0}


def pin_threads(workdir: str | os.PathLike) -> int:
  """Fixes the number of threads of XLA's CPU client for this process; returns it.

  To be called before JAX is asked for a device; later it only reads.
  """
  recorded = _read(workdir).get('threads')
  threads = recorded or int(os.environ.get('NPROC') or len(os.sched_getaffinity(0)))
  os.environ['NPROC'] = str(threads)
  return threads


def check(workdir: str | os.PathLike, threads: int) -> dict[str, Any]:
  """What the bits depend on, compared with the record of the first start (`record` writes it).

  Raises:
    UserError: something differs (all listed).
  """
  device = jax.devices()[0]
  now = {'threads': threads, 'device': device.device_kind, 'devices': jax.device_count(),
         'processes': jax.process_count(), 'jax': jax.__version__, 'jaxlib': jaxlib.__version__}
  before = _read(workdir)
  changed = [f'{key} was {before[key]}, is {value}' for key, value in now.items()
             if key in before and before[key] != value]
  if changed:
    raise UserError(f'{workdir}: cannot go on with the same bits ({"; ".join(changed)}); go on as '
                    'it was, or set training.deterministic=False')
  return now


def record(workdir: str | os.PathLike, now: dict[str, Any]) -> None:
  """Writes the record of the first start; called by the first process."""
  path = pathlib.Path(workdir) / RECORD
  if not path.exists():
    path.write_text(json.dumps(now, indent=2) + '\n')


def compiler_options() -> dict[str, Any]:
  """Options of the step's compilation."""
  return dict(_GPU_OPTIONS) if jax.default_backend() == 'gpu' else {}


def _read(workdir: str | os.PathLike) -> dict[str, Any]:
  path = pathlib.Path(workdir) / RECORD
  return json_text.loads(path.read_text()) if path.exists() else {}
