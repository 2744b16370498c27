"""One trainer per work directory; a run that stands still."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.training import lock
from hrvlm_jax.training.lock import Lock
from hrvlm_jax.training.watchdog import STACKS, STATUS, Watchdog


def elsewhere(path, age, **changes):
  """A lock that another host wrote so many seconds ago."""
  content = {'host': 'tpu-7', 'pid': 12, 'machine': 'tpu-7/x/1', 'born': '5', 'token': 't',
             'start': '2026-01-01T00:00:00+00:00', 'sign': time.time() - age} | changes
  (path / lock.NAME).write_text(json.dumps(content))


def test_the_second_trainer_is_refused_by_name(tmp_path):
  with Lock(str(tmp_path)):
    who = f'process {os.getpid()} on host .*, started .* trains there'
    with pytest.raises(UserError, match=who), Lock(str(tmp_path)):
      pass
    assert (tmp_path / lock.NAME).exists()
  assert not (tmp_path / lock.NAME).exists()
  with Lock(str(tmp_path)):  # given back
    pass
  elsewhere(tmp_path, 30)
  with pytest.raises(UserError, match='process 12 on host tpu-7, started 2026-01-01T00:00:00'), \
      Lock(str(tmp_path)):
    pass


def test_stale_locks_are_taken_over(tmp_path):
  elsewhere(tmp_path, 91)
  with Lock(str(tmp_path)):
    pass
  # This host, a process that is gone, or another one that got its number since.
  gone = subprocess.Popen([sys.executable, '-c', ''])
  gone.wait()
  for pid in (gone.pid, os.getpid()):
    elsewhere(tmp_path, 1, machine=lock._machine(), pid=pid)
    with Lock(str(tmp_path)):
      pass
  for text in ('', '{"sign"', '[]'):  # half written
    (tmp_path / lock.NAME).write_text(text)
    with Lock(str(tmp_path)):
      pass


def test_a_zombie_is_no_trainer(tmp_path):
  child = subprocess.Popen([sys.executable, '-c', ''])
  time.sleep(0.5)  # ended, not waited for
  assert lock._born(child.pid) is None and lock._born(os.getpid()) is not None
  child.wait()


def test_waiting_and_the_heartbeat(tmp_path):
  said = []
  elsewhere(tmp_path, 88.5)
  with Lock(str(tmp_path), wait=10, log=said.append, every=0.1):
    first = json.loads((tmp_path / lock.NAME).read_text())['sign']
    time.sleep(0.5)
    assert json.loads((tmp_path / lock.NAME).read_text())['sign'] > first
  assert len(said) == 1 and 'waiting until it ends' in said[0] and 'at most 10 s' in said[0]


def test_a_lock_that_was_lost_ends_the_run(tmp_path):
  with Lock(str(tmp_path), every=0.1) as held:
    held.check()
    elsewhere(tmp_path, 0)
    time.sleep(0.5)
    with pytest.raises(UserError, match='process 12 on host tpu-7.*has taken the work directory'):
      held.check()
  assert json.loads((tmp_path / lock.NAME).read_text())['pid'] == 12  # not ours to remove


def test_of_two_at_once_one_gets_a_stale_lock(tmp_path):
  """Both have read the stale lock; the store lets only the first write."""
  elsewhere(tmp_path, 100)
  one, two = Lock(str(tmp_path)), Lock(str(tmp_path))
  generation = one._store.read(lock.NAME).result().stamp.generation
  assert one._write(generation) and not two._write(generation)


def test_a_phase_that_stands_still_ends_the_run(tmp_path, capsys):
  ended = []
  with Watchdog(0.3 / 60, tmp_path, end=ended.append) as dog:
    dog.begin('compiling step 1')
    time.sleep(0.6)  # four times as long
    assert not ended
    dog.begin('evaluation eval of step 2')
    for _ in range(5):
      dog.beat()
      time.sleep(0.15)
    assert not ended
    dog.begin('waiting for data')
    time.sleep(0.8)
  assert ended == [STATUS]
  stacks = (tmp_path / STACKS).read_text()
  assert 'waiting for data has taken' in stacks and 'test_lock.py' in stacks
  assert 'training.stall_minutes' in capsys.readouterr().err
  with Watchdog(0, tmp_path, end=ended.append, sign=0.1):
    time.sleep(0.3)
  assert ended == [STATUS] and 'starting (for' in capsys.readouterr().err


def test_buckets_have_the_same_lock():
  """TensorStore's memory stands for a bucket: writes on condition of a generation."""
  import tensorstore as ts

  held = Lock.__new__(Lock)
  held._store = ts.KvStore.open('memory://bucket/').result()
  held._me, held._stamp = {'pid': 1}, None
  none = held._store.read(lock.NAME).result().stamp.generation
  assert held._write(none) and not held._write(none) and held._write(held._stamp)


def test_stale_is_longer_than_a_few_heartbeats():
  assert lock.STALE > 4 * lock.EVERY and lock.STALE < 120
  text = pathlib.Path(__file__).parents[2].joinpath('scripts/worker_run.sh').read_text()
  assert f'{lock.WAIT}=120' in text or f'{lock.WAIT}:-120' in text
