"""`hrvlm train` with data workers in a process group: signals, killed workers, a killed trainer."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from hrvlm_jax.checkpoint import store
from hrvlm_jax.data import workers
from hrvlm_jax.training import loop
from tests.training.test_sigterm import CONFIG, make_data

LIMIT = 240


class Trainer:
  """The command in a process group of its own, once it has made two steps."""

  def __init__(self, folder):
    make_data(folder)
    (folder / 'run.py').write_text(CONFIG)
    self.folder, self.log = folder, folder / 'log.txt'
    with self.log.open('w') as log:
      self.process = subprocess.Popen(
        [sys.executable, '-m', 'hrvlm_jax.cli', 'train', '--config', 'run.py', '--workdir', 'w',
         '--quiet', '--config.data.workers=2'], cwd=folder, stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True)
    metrics, until = folder / 'w' / 'metrics.jsonl', time.monotonic() + LIMIT
    while not metrics.exists() or metrics.read_bytes().count(b'\n') < 2:
      assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
      time.sleep(0.05)
    self.workers = [pid for pid in children(self.process.pid) if b'spawn_main' in command(pid)]
    assert len(self.workers) == 2

  def end(self) -> int:
    """Its status, within seconds."""
    return self.process.wait(60)


def children(pid):
  return [int(p.name) for p in pathlib.Path('/proc').iterdir() if p.name.isdigit()
          and fields(p.name)[1:2] == [str(pid)]]


def fields(pid):
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
  except OSError:
    return []


def command(pid):
  try:
    return pathlib.Path(f'/proc/{pid}/cmdline').read_bytes()
  except OSError:
    return b''


def alive(pid):
  return fields(pid)[:1] not in ([], ['Z'], ['X'])


@pytest.fixture
def trainer(tmp_path):
  made = Trainer(tmp_path)
  yield made
  if made.process.poll() is None:
    os.killpg(made.process.pid, signal.SIGKILL)
    made.process.wait()


def gone(pids, seconds):
  until = time.monotonic() + seconds
  while any(map(alive, pids)) and time.monotonic() < until:
    time.sleep(0.1)
  return not any(map(alive, pids))


def test_sigterm_to_the_process_group(trainer):
  os.killpg(trainer.process.pid, signal.SIGTERM)
  assert trainer.end() == 0, trainer.log.read_text()
  assert (trainer.folder / 'w' / loop.PREEMPTED).exists() and store.steps(trainer.folder / 'w')
  assert gone(trainer.workers, 5)
  assert 'Traceback' not in trainer.log.read_text()


def test_a_killed_worker_ends_the_run_with_a_sentence(trainer):
  os.kill(trainer.workers[0], signal.SIGKILL)
  assert trainer.end() == 2
  said = trainer.log.read_text()
  assert f'a data worker (process {trainer.workers[0]}) was ended by signal 9' in said
  assert 'Traceback' not in said and gone(trainer.workers, 5)


def test_a_killed_trainer_leaves_no_workers(trainer):
  trainer.process.kill()
  trainer.process.wait()
  assert gone(trainer.workers, 10)


def test_a_worker_that_comes_up_after_its_trainer_has_gone_ends(monkeypatch):
  """It is another process's child by then."""
  ended = threading.Event()
  gone_trainer = types.SimpleNamespace(pid=2**22 + 1)
  monkeypatch.setattr(multiprocessing, 'parent_process', lambda: gone_trainer)
  monkeypatch.setattr(workers.signal, 'signal', lambda *_: None)
  monkeypatch.setattr(workers.os, '_exit', lambda _: (ended.set(), sys.exit()))
  workers._settle()
  assert ended.wait(5)


def test_a_second_signal_ends_at_once(trainer):
  """Before the step at hand is over: nothing is saved."""
  for _ in range(2):
    trainer.process.send_signal(signal.SIGSTOP)
    trainer.process.send_signal(signal.SIGTERM)
    trainer.process.send_signal(signal.SIGINT)
    trainer.process.send_signal(signal.SIGCONT)
  assert trainer.end() in (-signal.SIGTERM, -signal.SIGINT)
  assert 'a second signal' in trainer.log.read_text() and gone(trainer.workers, 10)
