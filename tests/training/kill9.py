"""Ends training by signals at random moments and compares with a run that nobody disturbed.

A program, not a test: the suite runs it with two kills per system, `scripts/test_kill9.sh` with
twenty.

    python -m tests.training.kill9 [--kills N] [--systems A,B] [--relaxed] [--seed S] [--out FOLDER]
                                   [--workers N] [--signal KILL|TERM]
                                   [--keep FOLDER --machine WORDS]

A life of the run is a forked process with a group of its own, and --workers data workers in it. It
is killed (signal 9, the trainer alone) while it trains, at a random moment after some steps, or
(every third kill) while a checkpoint is being written; its workers must be gone seconds later. Or
its group gets SIGTERM: it must save and end with status 0 within a minute. The next life resumes by
itself.
With `training.deterministic=True` the losses of all steps must be those of the undisturbed run, bit
for bit; with `--relaxed` (without it) within 1e-6 relative. The batches must be the same bits in
both. Ends with status 1 where they are not.

`--keep docs/kill9` writes a file per system and mode there, and beside the folder a page,
docs/kill9.md, from all files in it.
"""

import argparse
import datetime
import hashlib
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time

# Before JAX is imported: looking for accelerators takes longer than a life.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

import jax
import numpy as np
import tensorboardX  # noqa: F401 - slow to import, so before the forks

from hrvlm_jax.checkpoint import layout
from hrvlm_jax.core import paths
from hrvlm_jax.lab.needle import NeedleConfig, write
from hrvlm_jax.lab.needle.regions import write_regions
from hrvlm_jax.systems import registry
from hrvlm_jax.training import determinism, loop
from hrvlm_jax.training.config import DataConfig, OptimizerConfig, RunConfig, TrainingConfig
from hrvlm_jax.training.metrics import read_metrics

SYSTEMS = {'mc_llava': 'next_token', 'pheye': 'next_token', 'llava_hr': 'next_token',
           'vila_hd': 'two_pass', 'ps3': 'ps3_pretrain'}
TASK = NeedleConfig.square()
IMAGES = 12
TIME_LIMIT = 600  # seconds of one life
END_LIMIT = {signal.SIGKILL: 20, signal.SIGTERM: 60}  # seconds after the signal, workers too


def write_data(folder):
  """The task as conversations and as region records."""
  write(TASK, folder / 'needle', IMAGES, seed=0, progress=False)
  write_regions(TASK, folder / 'regions', IMAGES, seed=0, progress=False)


def write_data_apart(folder):
  """`write_data` in a fork: the threads of the ArrayRecord writer would not survive later forks."""
  pid = os.fork()
  if pid == 0:
    status = 1
    try:
      write_data(folder)
      status = 0
    finally:
      os._exit(status)
  if os.waitpid(pid, 0)[1]:
    sys.exit(f'{folder}: writing the task failed')


def config(system, data, steps, *, deterministic, workers=0):
  """Its tiny size on the built-in task; a checkpoint every second step."""
  model = registry.get(system).tiny()
  source = 'regions' if system == 'ps3' else 'needle/needle.json'
  return RunConfig(
    model=model, data=DataConfig(train=str(data / source), lengths=(384,), workers=workers),
    training=TrainingConfig(
      steps=steps, batch_size=2, log_every=1, checkpoint_every=2, keep=2, mfu=False,
      objective=SYSTEMS[system], deterministic=deterministic,
      optimizer=OptimizerConfig(learning_rate=1e-3, warmup=2, ema=0.9)))


class Recorded:
  """Batches that leave a digest of each in a file before they are used."""

  def __init__(self, batches, path):
    self._batches, self._path, self._noted = batches, path, False

  def __iter__(self):
    return self

  def __next__(self):
    batch = next(self._batches)
    if not self._noted:
      self._noted = True
      with open(self._path.parent / 'lives.txt', 'a') as file:
        file.write(f'{os.getpid()}\n')
    digest = hashlib.sha256()
    for name, leaf in sorted(paths.flatten(batch).items()):
      digest.update(name.encode() + np.ascontiguousarray(leaf).tobytes())
    with open(self._path, 'a') as file:
      number = self._batches.get_state()['step']
      row = {'batch': number, 'sha256': digest.hexdigest(), 'cpu': time.process_time()}
      file.write(json.dumps(row) + '\n')
    return batch

  def __getattr__(self, name):
    return getattr(self._batches, name)


def live(run, workdir):
  """One life: trains to the end unless it is killed. Never returns."""
  os.setpgid(0, 0)
  log = os.open(workdir / 'log.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(log, 1)
  os.dup2(log, 2)
  try:
    if run.training.deterministic:
      determinism.pin_threads(workdir)  # before there is a device
    make = loop.make_batches
    loop.make_batches = lambda *arguments, **options: Recorded(
      make(*arguments, **options), workdir / 'batches.jsonl')
    loop.train(run, workdir, progress=False)
  except BaseException:  # noqa: BLE001 - a fork must not go on as its parent
    import traceback

    traceback.print_exc()
    os._exit(1)
  os._exit(0)


def start(run, workdir):
  """Forks a life; the parent has no devices, so that nothing of JAX runs yet."""
  workdir.mkdir(parents=True, exist_ok=True)
  pid = os.fork()
  if pid == 0:
    live(run, workdir)
  return pid


def finish(pid, workdir):
  """Waits for a life that nobody kills."""
  _, status = os.waitpid(pid, 0)
  if status != 0:
    raise SystemExit(f'{workdir}: the run ended with status {status}:\n'
                     + (workdir / 'log.txt').read_text()[-3000:])


def lines(workdir):
  """Whole lines of metrics so far."""
  path = workdir / 'metrics.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0


def unfinished(workdir):
  """Checkpoints that are begun and not whole."""
  folder = workdir / layout.STEPS
  entries = list(folder.iterdir()) if folder.exists() else []
  return [entry.name for entry in entries
          if not layout.is_whole(layout.to_path(entry))]


def wait_for(condition, pid, workdir):
  """Polls; raises when the life ends by itself first."""
  until = time.monotonic() + TIME_LIMIT
  while not condition():
    if time.monotonic() > until:
      os.kill(pid, signal.SIGKILL)
      raise SystemExit(f'{workdir}: a life did not get anywhere in {TIME_LIMIT} s')
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended:
      raise SystemExit(f'{workdir}: the run ended by itself (status {status}) before it could be '
                       'killed:\n' + (workdir / 'log.txt').read_text()[-3000:])
    time.sleep(0.001)


def group(pid):
  """The processes of a life's group that live."""
  found = []
  for path in pathlib.Path('/proc').iterdir():
    try:
      fields = (path / 'stat').read_text().rpartition(')')[2].split()
    except (OSError, IndexError):
      continue
    if path.name.isdigit() and fields[2] == str(pid) and fields[0] not in 'ZX':
      found.append(int(path.name))
  return found


def end(pid, number, workdir):
  """Sends the signal; the life, and its workers, must end as it asks for, in time."""
  if number == signal.SIGKILL:
    os.kill(pid, number)
  else:
    os.killpg(pid, number)
  until, status = time.monotonic() + END_LIMIT[number], None
  while status is None or group(pid):
    if status is None:
      ended, found = os.waitpid(pid, os.WNOHANG)
      status = found if ended else None
    if time.monotonic() > until:
      left = group(pid)
      os.killpg(pid, signal.SIGKILL)
      raise SystemExit(f'{workdir}: {END_LIMIT[number]} s after the signal {left} still live:\n'
                       + (workdir / 'log.txt').read_text()[-3000:])
    time.sleep(0.01)
  saved = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
  if number == signal.SIGTERM and not (saved and (workdir / loop.PREEMPTED).exists()):
    raise SystemExit(f'{workdir}: a life ended with status {status} instead of saving:\n'
                     + (workdir / 'log.txt').read_text()[-3000:])
  return number == signal.SIGTERM or os.WIFSIGNALED(status)


def disturb(run, workdir, kills, rng, number=signal.SIGKILL):
  """Ends so many lives, then lets the last one finish; returns how many died writing."""
  writing = 0
  for kill in range(kills):
    before = lines(workdir)
    pid = start(run, workdir)
    # Resuming drops lines of steps that will run again: wait until that is over.
    wait_for(lambda pid=pid: str(pid) in started(workdir), pid, workdir)
    before = min(before, lines(workdir))
    if kill % 3 == 1 and number == signal.SIGKILL:
      wait_for(lambda b=before: lines(workdir) > b and unfinished(workdir), pid, workdir)
    else:
      # Nothing is lost by SIGTERM: fewer steps, so that enough are left.
      wanted = before + rng.randint(1, 3 if number == signal.SIGKILL else 1)
      wait_for(lambda w=wanted: lines(workdir) >= w, pid, workdir)
      time.sleep(rng.random() * 0.2)
    if not end(pid, number, workdir):
      raise SystemExit(f'{workdir}: the run ended before kill {kill + 1}; it needs more steps')
    writing += bool(unfinished(workdir))
  finish(start(run, workdir), workdir)
  return writing


def started(workdir):
  """Process ids of the lives that have got to their first batch."""
  path = workdir / 'lives.txt'
  return path.read_text().split() if path.exists() else []


def losses(workdir):
  """Loss by step; every step must be there once."""
  rows = [row for row in read_metrics(workdir) if 'loss' in row]
  steps = [row['step'] for row in rows]
  if steps != list(range(1, len(steps) + 1)):
    raise SystemExit(f'{workdir}: steps in metrics.jsonl are {steps}')
  return [row['loss'] for row in rows]


def digests(workdir):
  """Digest by batch number; a batch that was read twice must be the same."""
  found = {}
  for line in (workdir / 'batches.jsonl').read_text().splitlines():
    row = json.loads(line)
    if found.setdefault(row['batch'], row['sha256']) != row['sha256']:
      raise SystemExit(f'{workdir}: batch {row["batch"]} was another one after a restart')
  return found


def cpu_per_step(workdir):
  """CPU seconds of a step of an undisturbed run: half the median of two steps, one of which saves.

  Other work on the machine lengthens the time of a step, but not this.
  """
  lines = (workdir / 'batches.jsonl').read_text().splitlines()
  seconds = [json.loads(line)['cpu'] for line in lines]
  # The first steps trace and compile.
  return statistics.median(b - a for a, b in zip(seconds[3:], seconds[5:], strict=False)) / 2


def check(system, root, kills, *, deterministic, seed, workers=0, number=signal.SIGKILL):
  """Undisturbed and disturbed run of a system; a row of the report."""
  run = config(system, root / 'data', 4 * kills + 4, deterministic=deterministic, workers=workers)
  calm, disturbed = root / system / 'calm', root / system / 'disturbed'
  finish(start(run, calm), calm)
  writing = disturb(run, disturbed, kills, random.Random(seed), number)
  ours, theirs = np.array(losses(disturbed)), np.array(losses(calm))
  batches, reference = digests(disturbed), digests(calm)
  wrong = [n for n, digest in batches.items() if reference.get(n, digest) != digest]
  difference = float(np.max(np.abs(ours - theirs) / np.abs(theirs)))
  good = not wrong and len(ours) == len(theirs) == run.training.steps and np.isfinite(ours).all()
  good = good and (bool((ours == theirs).all()) if deterministic else difference <= 1e-6)
  return {'system': system, 'deterministic': deterministic, 'signal': number.name,
          'workers': workers, 'kills': kills,
          'killed_while_writing': writing, 'steps': len(ours),
          'equal_losses': int((ours == theirs).sum()), 'largest_relative_difference': difference,
          'batches_that_differ': wrong, 'cpu_seconds_per_step': round(cpu_per_step(calm), 4),
          'good': bool(good)}


def keep(row, folder, machine, seed):
  """Writes a row as a file of the folder, and the page of all its rows."""
  folder.mkdir(parents=True, exist_ok=True)
  mode = 'deterministic' if row['deterministic'] else 'relaxed'
  values = row | {'seed': seed, 'machine': machine, 'jax': jax.__version__,
                  'date': datetime.date.today().isoformat(), 'commit': commit()}
  kind = ''.join([f'_{row["signal"].lower()}' if row['signal'] != 'SIGKILL' else '',
                  f'_workers{row["workers"]}' if row['workers'] else ''])
  path = folder / f'{row["system"]}_{mode}{kind}.json'
  path.write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')
  kept = [json.loads(path.read_text()) for path in sorted(folder.glob('*.json'))]
  folder.with_suffix('.md').write_text(page(kept), encoding='utf-8')


def commit():
  """The commit that runs."""
  git = lambda *args: subprocess.run(['git', *args], capture_output=True, text=True).stdout.strip()
  changed = git('status', '--porcelain', '--untracked-files=no', '--', ':!docs')
  return git('rev-parse', '--short', 'HEAD') + ('+changes' if changed else '')


def page(rows):
  """The kept rows as Markdown."""
  rows = sorted(rows, key=lambda r: (
    list(SYSTEMS).index(r['system']), not r['deterministic'], r.get('signal', 'SIGKILL'),
    r.get('workers', 0)))
  lines = [
    '# Killed with signal 9, and ended by SIGTERM', '',
    'Written by `scripts/test_kill9.sh --keep docs/kill9` from the files there. A tiny training',
    'run of each system was killed at random moments and resumed by itself. Every third kill',
    'waits until a checkpoint is being written; of the others many meet one too, because every',
    'second step saves. Data workers of a killed trainer must be gone within 20 s. SIGTERM goes to',
    'the whole process group: each time the run must save and end with status 0 within 60 s.',
    'Compared with an undisturbed run on the same machine: losses of all steps, and the bits of',
    'all batches.', '',
    '| system | mode | signal | data workers | times | while writing | steps | '
    'losses of equal bits | largest relative difference | batches that differ | CPU s per step | '
    'machine | date | commit |',
    '|---' * 14 + '|']
  for r in rows:
    lines.append('| ' + ' | '.join(map(str, (
      r['system'], 'deterministic' if r['deterministic'] else 'relaxed',
      r.get('signal', 'SIGKILL'), r.get('workers', 0), r['kills'],
      r['killed_while_writing'] if r.get('signal') != 'SIGTERM' else '-',
      r['steps'], r['equal_losses'],
      f'{r["largest_relative_difference"]:.1e}', len(r['batches_that_differ']),
      f'{r["cpu_seconds_per_step"]:.3f}', r['machine'], r['date'], r.get('commit', '')))) + ' |')
  costs = {}
  for r in rows:
    if r.get('workers') or r.get('signal') == 'SIGTERM':
      continue
    # Only what one machine gave on one day can be compared.
    cost = costs.setdefault((r['system'], r['machine'], r['date']), {})
    cost[r['deterministic']] = r['cpu_seconds_per_step']
  ratios = [f'{system} {cost[True] / cost[False]:.2f}' for (system, *_), cost in costs.items()
            if len(cost) == 2]
  if ratios:
    lines += ['', 'What `training.deterministic=True` costs here: CPU seconds of a step with it '
              f'over those without: {", ".join(ratios)}.']
  return '\n'.join(lines) + '\n'


def main(argv=None):
  """See the head of the file."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--systems', default=','.join(SYSTEMS))
  parser.add_argument('--relaxed', action='store_true', help='without training.deterministic')
  parser.add_argument('--workers', type=int, default=0, help='data.workers')
  parser.add_argument('--signal', choices=('KILL', 'TERM'), default='KILL')
  parser.add_argument('--seed', type=int, default=None, help='of the moments; default: the clock')
  parser.add_argument('--out', type=pathlib.Path, help='keeps the runs there')
  parser.add_argument('--keep', type=pathlib.Path, help='writes the rows and a page of them there')
  parser.add_argument('--machine', default=f'{os.cpu_count()} CPU cores', help='words for the page')
  arguments = parser.parse_args(argv)
  seed = int(time.time()) if arguments.seed is None else arguments.seed
  with tempfile.TemporaryDirectory() as temporary:
    root = arguments.out or pathlib.Path(temporary)
    write_data_apart(root / 'data')
    rows = []
    for system in arguments.systems.split(','):
      rows.append(check(system, root, arguments.kills, deterministic=not arguments.relaxed,
                        seed=seed, workers=arguments.workers,
                        number=signal.Signals[f'SIG{arguments.signal}']))
      print(json.dumps(rows[-1]), flush=True)
      if arguments.keep is not None:
        keep(rows[-1], arguments.keep, arguments.machine, seed)
  return 0 if all(row['good'] for row in rows) else 1


if __name__ == '__main__':
  sys.exit(main())
