"""What the pages ask of other programs, by those: xpk, SkyPilot, XProf, a linter of images.

They live in an environment of their own, which `test_full.sh pages` makes and names in
$HRVLM_OTHERS.
"""

import gzip
import json
import os
import pathlib
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from hrvlm_jax.cli.main import main
from tests import pages

ROOT = pages.ROOT
pytestmark = pytest.mark.full('pages')
XPK = """
import argparse, json, sys
from xpk.parser.core import set_parser
parser = argparse.ArgumentParser()
set_parser(parser)
print(json.dumps(vars(parser.parse_args(sys.argv[1:])), default=str))
"""
SKY = """
import sys
import sky, yaml
from sky.client.cli import command
words = sys.argv[1:]
group = command.cli
while words[0] in getattr(group, 'commands', {}):
  group = group.commands[words.pop(0)]
asked = group.make_context(group.name, words).params
task = sky.Task.from_yaml_config(yaml.safe_load(open(asked['entrypoint'][0])),
                                 env_overrides=list(asked['env']))
print(task.envs['CONFIG'], task.num_nodes, sorted(map(str, task.resources)), bool(task.run))
"""


@pytest.fixture(scope='module')
def others() -> pathlib.Path:
  folder = pathlib.Path(os.environ['HRVLM_OTHERS'])  # test_full.sh pages sets it
  assert (folder / 'bin/python').exists()
  return folder


def commands(page: str, program: str) -> list[list[str]]:
  """The commands of a program in a page's blocks."""
  found = [words for block in pages.blocks(ROOT / page) if block.language == 'bash'
           for words in pages.commands(block.text) if words[0] == program]
  assert found
  return found


def run(others: pathlib.Path, program: str, words: list[str]) -> subprocess.CompletedProcess:
  return subprocess.run([others / 'bin/python', '-c', program, *words], cwd=ROOT, text=True,
                        capture_output=True, timeout=300, env=os.environ | {'PYTHONPATH': ''})


def test_xpk_takes_the_command_lines(others):
  told = {}
  for words in commands('tpu/schedulers.md', 'xpk'):
    done = run(others, XPK, words[1:])
    assert done.returncode == 0, f'{shlex.join(words)}\n{done.stderr}'
    told[' '.join(words[1:3])] = json.loads(done.stdout.splitlines()[-1])
  assert told['workload create']['num_slices'] == 2
  assert 'hrvlm train' in told['workload create']['command']
  assert run(others, XPK, ['workload', 'create', '--tpu-kind=v6e-16']).returncode == 2


def test_skypilot_takes_the_task(others):
  [words] = commands('tpu/schedulers.md', 'sky')
  done = run(others, SKY, words[1:])
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1].startswith('configs/C.py 1 ')
  assert 'tpu-v6e-8' in done.stdout


def test_the_dockerfile_by_hadolint(others):
  done = subprocess.run([others / 'bin/hadolint', ROOT / 'Dockerfile'], capture_output=True,
                        text=True)
  assert done.returncode == 0, done.stdout


def test_xprof_opens_a_profile(others, tmp_path, monkeypatch):
  """docs/profiles.md: a run with `training.profile`, then the page's command on its folder."""
  monkeypatch.chdir(tmp_path)
  config = f'{ROOT / "tests/launch/run.py"}:{tmp_path / "data"}'
  assert main(['train', '--config', config, '--workdir', 'W', '--quiet',
               '--config.training.steps=4', '--config.training.profile=(2,3)',
               '--config.mesh.fsdp=1']) == 0
  [traced] = pathlib.Path('W/profile').rglob('*.xplane.pb')
  [words] = commands('docs/profiles.md', 'xprof')
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  words = [str(port) if word == '8791' else word.replace('WORKDIR', 'W') for word in words]
  server = subprocess.Popen([others / 'bin' / words[0], *words[1:]], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env=os.environ | {'PYTHONPATH': ''})
  try:
    def ask(path):  # as a browser is told: packed, whatever was asked for
      address = f'http://localhost:{port}/data/plugin/profile/{path}'
      said = urllib.request.urlopen(address, timeout=120)
      body = said.read()
      return json.loads(gzip.decompress(body) if said.headers['Content-Encoding'] == 'gzip'
                        else body)

    for _ in range(120):
      try:
        found = ask('runs')
        break
      except (urllib.error.URLError, ConnectionError):
        assert server.poll() is None, server.stdout.read().decode()
        time.sleep(1)
    assert found == [traced.parent.name]
    tools = set(ask(f'run_tools?run={found[0]}'))
    assert {'overview_page', 'memory_viewer'} <= tools or tools & {'trace_viewer', 'trace_viewer@'}
    host = traced.name.removesuffix('.xplane.pb')
    trace = ask(f'data?run={found[0]}&tag=trace_viewer&host={host}')
    assert len(trace['traceEvents']) > 100  # what ran, and when
  finally:
    server.terminate()
    server.wait()
