"""A cloud made of files: a fake `gcloud` that records its calls and plays back answers."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import stat
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]

# Answers by rules: the first whose pattern is found in the call. A rule's replies are used one
# after the other, the last one again and again. A call without a rule fails and fails the test.
FAKE_GCLOUD = r"""
import fcntl, json, os, pathlib, re, subprocess, sys
home = pathlib.Path(os.environ['FAKE_CLOUD'])
call = sys.argv[1:]
with open(home / 'lock', 'w') as lock:
  fcntl.flock(lock, fcntl.LOCK_EX)
  with open(home / 'calls', 'a') as calls:
    calls.write(json.dumps(call) + '\n')
  rules = json.loads((home / 'rules').read_text())
  used = json.loads((home / 'used').read_text()) if (home / 'used').exists() else {}
  for number, (pattern, replies) in enumerate(rules):
    if re.search(pattern, ' '.join(call)):
      n = used.get(str(number), 0)
      used[str(number)] = n + 1
      reply = replies[min(n, len(replies) - 1)]
      break
  else:
    with open(home / 'unexpected', 'a') as file:
      file.write(' '.join(call) + '\n')
    sys.exit('fake gcloud: unexpected call')
  (home / 'used').write_text(json.dumps(used))
out, err, code, here = reply
if here:  # run the remote command on this machine, in a home directory that stands for the host
  node = call[call.index('ssh') + 1]
  worker = re.search(r'--worker=(\S+)', ' '.join(call)).group(1)
  command = next(a for a in call if a.startswith('--command='))[len('--command='):]
  for host in sorted((home / 'hosts' / node).iterdir()):
    if worker in ('all', host.name):
      env = dict(os.environ, HOME=str(host), HRVLM_WORKER=host.name, HRVLM_METADATA_URL='')
      done = subprocess.run(['bash', '-c', command], cwd=host, env=env)
      code = code or done.returncode
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""

NOT_FOUND = ('', 'ERROR: NOT_FOUND: Resource was not found', 1)
HERE = ('', '', 0, True)


def reply(answer):
  """str, (out, err, code) or (out, err, code, here) -> the full form."""
  if isinstance(answer, str):
    return (answer, '', 0, False)
  return (*answer, False)[:4]


@dataclasses.dataclass
class Result:
  code: int
  out: str
  err: str
  calls: list[list[str]]
  naps: list[float]

  def lines(self, pattern: str = '') -> list[str]:
    """The calls as text, those in which the pattern is found."""
    return [' '.join(call) for call in self.calls if re.search(pattern, ' '.join(call))]


class Cloud:
  """Runs scripts of the repository against the fake cloud."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.bin = path / 'bin'
    self.home = path / 'home'
    self.bin.mkdir()
    self.home.mkdir()
    self.environment = {}
    self._script('gcloud', f'#!{sys.executable} -IS\n{FAKE_GCLOUD}')
    # Time costs nothing here, but how long was slept is known.
    self._script('sleep', '#!/bin/sh\necho "$1" >>"$FAKE_CLOUD/naps"\n')

  def _script(self, name: str, text: str) -> None:
    (self.bin / name).write_text(text)
    (self.bin / name).chmod(stat.S_IRWXU)

  def program(self, name: str, text: str) -> None:
    """Puts another program on the PATH."""
    self._script(name, text)

  def run(self, *command: str, rules=(), stdin=subprocess.DEVNULL, cwd=None) -> Result:
    """rules: (pattern, [answer, ...]) pairs."""
    full = [(pattern, [reply(a) for a in answers]) for pattern, answers in rules]
    (self.path / 'rules').write_text(json.dumps(full))
    for name in ('used', 'calls', 'naps', 'unexpected'):
      (self.path / name).unlink(missing_ok=True)
    environment = {
      'PATH': f'{self.bin}:{os.environ["PATH"]}',
      'HOME': str(self.home),
      'FAKE_CLOUD': str(self.path),
      'TMPDIR': str(self.path),
      'HRVLM_LAUNCH_ENV': str(self.path / 'no_file'),
    } | self.environment
    done = subprocess.run(
      list(command),
      # A shell cannot trap a signal that its parent ignored (a test run in the background).
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
      env=environment,
      cwd=cwd or self.path,
      stdin=stdin,
      text=True,
      timeout=120,
      capture_output=True,
    )
    read = lambda name: (self.path / name).read_text() if (self.path / name).exists() else ''
    assert not read('unexpected'), f'calls without a rule:\n{read("unexpected")}\n{done.stderr}'
    calls = [json.loads(line) for line in read('calls').splitlines()]
    naps = [float(line) for line in read('naps').split()]
    return Result(done.returncode, done.stdout, done.stderr, calls, naps)

  def launch(self, *args: str, rules=(), script=None) -> Result:
    return self.run('bash', str(script or REPO / 'scripts' / 'launch.sh'), *args, rules=rules)


@pytest.fixture
def cloud(tmp_path):
  return Cloud(tmp_path)


@pytest.fixture
def checkout(tmp_path):
  """A small git checkout with the launcher in it, so that `sync` has little to send."""
  root = tmp_path / 'checkout'
  shutil.copytree(REPO / 'scripts', root / 'scripts')
  shutil.copytree(REPO / 'tpu', root / 'tpu')
  files = {
    'pkg/data/a.py': 'A',
    'a b.py': 'the config of some jobs',
    'data/photo.jpg': 'x',
    '.env': 'HF_TOKEN=hf_secret',
    'deep/.env.local': 's',
    'scripts/launch.env.txt': 'n',
    'checkpoints/1/x': 'x',
    'runs/x': 'x',
    'key.pem': 's',
  }
  for name, text in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
  git = lambda *args: subprocess.run(['git', '-C', root, *args], check=True, capture_output=True)
  git('init', '-q')
  git('add', '-A', '-f')
  git('-c', 'user.name=n', '-c', 'user.email=e@e', 'commit', '-q', '-m', 'm')
  return root
