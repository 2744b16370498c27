"""Several processes as one program: start-up, and arrays made from what each host has.

`initialize` comes first in a program, before anything asks JAX for devices. On a laptop it does
nothing: no network is touched unless the surroundings say that there are several hosts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import glob
import hashlib
import logging
import math
import os
import socket
import sys
import threading
import time
from typing import Any, Literal
import urllib.error
import urllib.request

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.parallel.addresses import bind_address, split_address
from hrvlm_jax.parallel.mesh import batch_sharding, batch_shards
from hrvlm_jax.parallel.rendezvous import REPORT_EVERY, meet
from hrvlm_jax.parallel.secret import VARIABLE, run_secret

_log = logging.getLogger(__name__)

DEFAULT_PORT = 8482
START_TIMEOUT = 300.0
# Seconds after which a silent peer counts as dead and this process is ended by JAX.
HEARTBEAT = 100
_METADATA = 'http://metadata.google.internal/computeMetadata/v1/instance/attributes/'

Mode = Literal['auto', 'on', 'off']


@dataclasses.dataclass(frozen=True)
class Cluster:
  """What is known about the processes of this run before they have met.

  Attributes:
    source: where it comes from, for messages.
    coordinator, processes, process: None where JAX finds them by itself.
    hosts: host names by process, where known.
  """

  source: str
  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None
  hosts: Mapping[int, str] = dataclasses.field(default_factory=dict)


def detect(*, coordinator: str | None = None, num_processes: int | None = None,
           process_id: int | None = None, env: Mapping[str, str] | None = None) -> Cluster | None:
  """The cluster this process belongs to; None for a program of one process.

  Asked in this order: arguments, several slices, TPU_WORKER_HOSTNAMES, Slurm, Open MPI, the TPU's
  metadata server (only on a machine that has TPU devices).

  Raises:
    UserError: some but not all of the three arguments were given, or they contradict each other.
  """
  env = os.environ if env is None else env
  given = {'coordinator': coordinator, 'num_processes': num_processes, 'process_id': process_id}
  if any(value is not None for value in given.values()):
    if missing := [name for name, value in given.items() if value is None]:
      raise UserError(f'{", ".join("--" + name.replace("_", "-") for name in missing)} missing: '
                      'coordinator, num-processes and process-id belong together')
    split_address(coordinator)
    if not 0 <= process_id < num_processes:
      raise UserError(f'--process-id: found {process_id}, expected 0 to {num_processes - 1} '
                      f'(--num-processes {num_processes})')
    return Cluster('arguments', coordinator, num_processes, process_id)
  if _count(env, 'MEGASCALE_NUM_SLICES') > 1:
    return Cluster('several slices (MEGASCALE_NUM_SLICES)')
  names = [name for name in env.get('TPU_WORKER_HOSTNAMES', '').split(',') if name.strip()]
  if len(names) > 1 and env.get('TPU_WORKER_ID', '').isdigit():
    return Cluster('TPU_WORKER_HOSTNAMES', f'{names[0].strip()}:{DEFAULT_PORT}', len(names),
                   int(env['TPU_WORKER_ID']), dict(enumerate(n.strip() for n in names)))
  if len(names) > 1:
    return Cluster('TPU_WORKER_HOSTNAMES')
  if _slurm_tasks(env) > 1:
    return Cluster(f'Slurm (hosts {env.get("SLURM_JOB_NODELIST", "unknown")})')
  if _count(env, 'OMPI_COMM_WORLD_SIZE') > 1:
    return Cluster('Open MPI')
  if glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*'):
    return _tpu_metadata()
  return None


def _slurm_tasks(env: Mapping[str, str]) -> int:
  """Processes of the Slurm step this one belongs to; 1 outside a step.

  A batch script is one process, yet it sees SLURM_NTASKS of its whole job and SLURM_PROCID=0; only
  `srun` makes a step (SLURM_STEP_*) or a process with another number.
  """
  if 'SLURM_PROCID' not in env:
    return 1
  if env.get('SLURM_STEP_NUM_TASKS'):
    return _count(env, 'SLURM_STEP_NUM_TASKS')
  in_step = env.get('SLURM_STEP_NODELIST') or env['SLURM_PROCID'] != '0'
  return _count(env, 'SLURM_NTASKS') if in_step else 1


def _count(env: Mapping[str, str], name: str) -> int:
  text = (env.get(name) or '1').strip()
  if not text.isdigit():
    raise UserError(f'${name}: found {text!r}, expected a whole number; unset it to start alone')
  return int(text)


def _metadata(key: str) -> str:
  request = urllib.request.Request(_METADATA + key, headers={'Metadata-Flavor': 'Google'})
  with contextlib.suppress(urllib.error.URLError, TimeoutError, OSError):
    with urllib.request.urlopen(request, timeout=2) as reply:
      return reply.read().decode().strip()
  return ''


def _tpu_metadata() -> Cluster | None:
  # Entries look like `unknown:unknown:10.0.0.2`, in the order of the workers.
  endpoints = [e.split(':')[-1] for e in _metadata('worker-network-endpoints').split(',') if e]
  number = _metadata('agent-worker-number')
  if len(endpoints) < 2:
    return None
  if not number.isdigit():
    return Cluster('the metadata server')
  return Cluster('the metadata server', f'{endpoints[0]}:{DEFAULT_PORT}', len(endpoints),
                 int(number), dict(enumerate(endpoints)))


def initialize(mode: Mode = 'auto', *, coordinator: str | None = None,
               num_processes: int | None = None, process_id: int | None = None,
               timeout: float = START_TIMEOUT, heartbeat: int | None = None,
               report_every: float = REPORT_EVERY) -> bool:
  """Joins the processes of a run; returns whether there are several.

  Args:
    mode: 'auto' joins when more than one process is expected, 'on' insists, 'off' never does.
    timeout: seconds to wait for the others.
    heartbeat: seconds of silence after which a peer counts as dead and this process is ended;
      default: $HRVLM_HEARTBEAT_SECONDS, else 100.

  Raises:
    UserError: the others did not come in time (they are named), the settings contradict each
      other, or 'on' without a cluster.
  """
  if mode not in ('auto', 'on', 'off'):
    raise UserError(f"distributed: found '{mode}', expected auto, on or off")
  if mode == 'off':
    return False
  cluster = detect(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
  if cluster is None:
    if mode == 'on':
      raise UserError('distributed is on, but nothing says which processes belong together: give '
                      '--coordinator HOST:PORT, --num-processes and --process-id, or start by '
                      'srun, mpirun or on a TPU slice')
    return False
  if cluster.processes == 1:
    return False
  if cluster.process is not None and not 0 <= cluster.process < cluster.processes:
    raise UserError(f'{cluster.source}: found process number {cluster.process} of '
                    f'{cluster.processes} processes, expected 0 to {cluster.processes - 1}')
  heartbeat = heartbeat or int(os.environ.get('HRVLM_HEARTBEAT_SECONDS') or HEARTBEAT)
  started = time.monotonic()
  options: dict[str, Any] = {}
  if cluster.coordinator is not None:
    secret = run_secret(cluster.coordinator, cluster.process)
    if secret is not None:
      meet(cluster.coordinator, processes=cluster.processes, process=cluster.process, secret=secret,
           timeout=timeout, hosts=cluster.hosts, report_every=report_every)
    else:
      _log.warning('no %s: JAX joins the %d processes and does not say who is missing', VARIABLE,
                   cluster.processes)
    options = {'coordinator_address': cluster.coordinator, 'num_processes': cluster.processes,
               'process_id': cluster.process}
    if cluster.process == 0:
      options['coordinator_bind_address'] = bind_address(cluster.coordinator)
  left = max(30, int(timeout - (time.monotonic() - started)))
  who = f'{cluster.source}{_expected(cluster)}'
  with _reporting(f'waiting for the other processes ({who})', report_every, end=(
      left, f'the processes of this run ({who}) could not be joined within {left} s. Start the '
      'same command on every host, check that the address is that of process 0 and that the '
      f'network lets it through; with {VARIABLE} the missing ones are named')):
    try:
      jax.distributed.initialize(initialization_timeout=left + 60,
                                 heartbeat_timeout_seconds=heartbeat, **options)
    except (RuntimeError, ValueError) as error:
      raise UserError(f'the processes of this run ({cluster.source}) could not be joined within '
                      f'{left} s: {error}. Was the same command started on every host?') from error
  found = jax.process_count()
  if cluster.processes is not None and found != cluster.processes:
    raise UserError(f'expected {cluster.processes} processes ({cluster.source}), JAX found {found}')
  if jax.process_index() != 0:
    logging.getLogger().setLevel(logging.WARNING)
  return found > 1


def _expected(cluster: Cluster) -> str:
  names = list(cluster.hosts.values())
  return '' if not names else f': {", ".join(names[:8])}' + (
    f' and {len(names) - 8} more' if len(names) > 8 else '')


@contextlib.contextmanager
def _reporting(sentence: str, every: float, *, end: tuple[float, str]):
  """Logs a sentence every so often while the body blocks.

  Args:
    end: seconds after which the process ends (status 2), and its last words: JAX would abort it.
  """
  done = threading.Event()
  begun = time.monotonic()

  def report():
    while not done.wait(min(every, max(end[0] - (time.monotonic() - begun), 0.01))):
      if time.monotonic() - begun >= end[0]:
        print(f'hrvlm: {end[1]}', file=sys.stderr, flush=True)
        os._exit(2)
      _log.warning('%s (%d s)', sentence, time.monotonic() - begun)

  thread = threading.Thread(target=report, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def shutdown() -> None:
  """Leaves the run in good order, so that the others do not take this process for dead."""
  if jax.distributed.is_initialized():
    jax.distributed.shutdown()


def hosts() -> list[str]:
  """Host names by process; to be called on all of them."""
  name = np.zeros(64, np.uint8)
  own = np.frombuffer(socket.gethostname().encode()[:64], np.uint8)
  name[:len(own)] = own
  if jax.process_count() == 1:
    return [socket.gethostname()]
  return [bytes(row).rstrip(b'\0').decode() for row in
          np.asarray(multihost_utils.process_allgather(name))]


def devices_words() -> str:
  """The devices of a run by kind and host, in a line."""
  names, kinds = hosts(), {}
  for device in jax.devices():
    on = kinds.setdefault(device.device_kind, {})
    on[device.process_index] = on.get(device.process_index, 0) + 1
  parts = []
  for kind, on in kinds.items():
    shown = [f'{names[process]} {count}' for process, count in sorted(on.items())[:8]]
    more = f' and {len(on) - 8} more' if len(on) > 8 else ''
    parts.append(f'{sum(on.values())} x {kind} in {len(on)} process(es): {", ".join(shown)}{more}')
  return 'devices: ' + '; '.join(parts)


def is_main() -> bool:
  """Whether this process writes files and prints."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """All processes wait for each other here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def from_first(values: np.ndarray) -> np.ndarray:
  """An array of the first process on all; every process gives one of that shape and type."""
  if jax.process_count() == 1:
    return np.asarray(values)
  return np.asarray(multihost_utils.broadcast_one_to_all(values))


def check_same(text: str, *, what: str) -> None:
  """Every process must have the same text (a resolved config, say).

  Raises:
    UserError: names the processes that differ from process 0.
  """
  if jax.process_count() == 1:
    return
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
  everyone = np.asarray(multihost_utils.process_allgather(digest))
  if different := [i for i, row in enumerate(everyone) if not np.array_equal(row, everyone[0])]:
    raise UserError(f'{what} differs between hosts: process(es) {different} do not have that of '
                    'process 0; start the same source and the same command everywhere')


def host_rows(mesh: Mesh, rows: int) -> np.ndarray:
  """Which rows of a global batch this process must supply, in ascending order.

  Processes that hold copies of the same shard (a tensor axis across hosts) get the same rows.

  Raises:
    UserError: the batch does not divide over the shards.
  """
  shards = batch_shards(mesh)
  if rows % shards:
    raise UserError(f'global batch of {rows} rows cannot be cut over {shards} shards (data x '
                    f'fsdp); expected a multiple of {shards}')
  places = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
  return np.unique(np.concatenate([np.arange(rows)[place[0]] for place in places]))


def host_parts(mesh: Mesh, parts: int) -> tuple[int, ...]:
  """Which of `parts` equal, consecutive parts of a batch hold rows of this process, ascending.

  A part that several processes need is made by each of them; with a multiple of the shards as parts
  none is made in vain.
  """
  rows = math.lcm(parts, batch_shards(mesh))
  return tuple(np.unique(host_rows(mesh, rows) * parts // rows).tolist())


def global_batch(local: Any, mesh: Mesh, *, leading: int = 0, own: Sequence[int] | None = None,
                 parts: int | None = None) -> Any:
  """Parts of a batch -> arrays of the whole batch, cut over data and fsdp.

  Args:
    local: tree of NumPy arrays [..., local rows, ...]: the parts `own`, one after the other. Arrays
      of other lengths (shared crop slots) are cut into the same number of parts.
    leading: axes before the example axis (micro-batches).
    own: numbers of the parts held here, ascending, of `parts` in all (`host_parts`). Default: this
      process's shards, whose rows are those of `host_rows`.

  Raises:
    UserError: arrays that cannot be cut (all listed).
  """
  sharding, shards = batch_sharding(mesh, leading=leading), batch_shards(mesh)
  if own is None:
    own, parts = host_parts(mesh, shards), shards
  places = np.asarray(own)
  sizes = lambda x: divmod(x.shape[leading], len(places))
  raise_all(f'batch cannot be cut over {shards} shards (data x fsdp)', [
    f'{jax.tree_util.keystr(path)}: found {x.shape[leading]} rows in {len(places)} of {parts} parts'
    for path, x in jax.tree_util.tree_flatten_with_path(local)[0]
    if sizes(x)[1] or sizes(x)[0] * parts % shards])
  if jax.process_count() == 1 and len(places) == parts:
    return jax.tree.map(lambda x: jax.device_put(x, sharding), local)

  def make(x):
    x, size = np.asarray(x), sizes(x)[0]  # rows of one part
    shape = list(x.shape)
    shape[leading] = size * parts

    def shard(index):
      start, stop, _ = index[leading].indices(shape[leading])
      part, offset = divmod(start, max(size, 1))
      at = int(np.searchsorted(places, part)) * size + offset
      return x[(*index[:leading], slice(at, at + stop - start), *index[leading + 1:])]

    return jax.make_array_from_callback(tuple(shape), sharding, shard)

  return jax.tree.map(make, local)


def replicate(value: Any, mesh: Mesh) -> Any:
  """The same host value (equal on every process) as arrays that every device holds."""
  sharding = NamedSharding(mesh, P())
  whole = lambda x: jax.make_array_from_callback(
    np.shape(x), sharding, lambda index: np.asarray(x)[index])
  return jax.tree.map(whole, value)


def to_host(tree: Any) -> Any:
  """Arrays -> NumPy arrays, whole on every process (small values only).

  Of arrays that lie on several processes every process gets all; to be called on all of them.
  """
  far = lambda x: isinstance(x, jax.Array) and not x.is_fully_addressable
  return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True) if far(x)
                      else np.asarray(x), tree)
