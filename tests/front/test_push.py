"""Pushed and loaded by name over HTTP, with the real client of the hub against a hub of our own."""

import json
import os
import subprocess
import sys

import pytest

import hrvlm_jax
from hrvlm_jax import UserError
from hrvlm_jax.cli.main import main
from hrvlm_jax.interop import hub
from tests.front.fake_hub import FakeHub

# One process of a user who is online: push, load by name, by commit, and what cannot be.
STORY = """
import json, sys, urllib.request
import hrvlm_jax
from hrvlm_jax.cli.main import main
export, photo, address = sys.argv[1:]
found = {'push': main(['push', export, 'someone/tiny', '--private'])}
model = hrvlm_jax.load('someone/tiny')
found |= {'origin': model.origin, 'answer': model.ask(photo, 'What?', max_new_tokens=4),
          'repr': repr(model)}
urllib.request.urlopen(f'{address}/api/models/someone/tiny/revision/main?mark')
pinned = hrvlm_jax.load('someone/tiny', revision=model.origin['revision'])
found['pinned'] = pinned.origin
for name in ('someone/nothing', 'someone/tiny@nobranch'):
  try:
    hrvlm_jax.load(name)
  except hrvlm_jax.UserError as error:
    found[name] = str(error)
print('STORY ' + json.dumps(found))
"""


@pytest.fixture
def fake():
  made = FakeHub()
  yield made
  made.close()


def test_pushed_and_loaded_by_name(world, model, fake, tmp_path):
  hrvlm_jax.export(world / 'runs/quickstart/checkpoint', tmp_path / 'out')
  environment = os.environ | {
    'HF_ENDPOINT': fake.address, 'HF_TOKEN': 'right', 'HF_HOME': str(tmp_path / 'home'),
    'HF_HUB_OFFLINE': '0', 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1'}
  words = [str(tmp_path / 'out'), str(world / 'photo.png'), fake.address]
  run = subprocess.run([sys.executable, '-c', STORY, *words], env=environment, capture_output=True,
                       text=True, timeout=300)
  assert run.returncode == 0, run.stderr[-3000:]
  commit = fake.heads['someone/tiny']['main']
  assert f"load it: hrvlm_jax.load('someone/tiny@{commit}')" in run.stdout
  found = json.loads(run.stdout.split('STORY ')[1])
  assert found['push'] == 0
  assert set(fake.files['someone/tiny'][commit]) == {
    path.relative_to(tmp_path / 'out').as_posix() for path in (tmp_path / 'out').rglob('*')
    if path.is_file()}
  assert found['origin'] == {'name': 'someone/tiny', 'revision': commit, 'asked': 'main'}
  assert found['answer'] == model.ask(world / 'photo.png', 'What?', max_new_tokens=4)
  assert f'someone/tiny@{commit[:12]}' in found['repr']
  # What was loaded by its commit came from the cache: nothing was asked.
  mark = max(i for i, line in enumerate(fake.asked)
             if line == 'GET /api/models/someone/tiny/revision/main')
  assert found['pinned'] == {'name': 'someone/tiny', 'revision': commit}
  assert not [line for line in fake.asked[mark + 1:] if f'/{commit}' in line]
  assert 'the hub refuses' in found['someone/nothing']
  assert 'the hub refuses' in found['someone/tiny@nobranch']

  # Another process: a wrong token, then a hub that is not there; one sentence each, and soon.
  lines = ('from hrvlm_jax.cli.main import main; import sys; '
           "code = main(['push', sys.argv[1], 'someone/other']); sys.exit(code)")
  wrong = subprocess.run([sys.executable, '-c', lines, words[0]], capture_output=True, text=True,
                         env=environment | {'HF_TOKEN': 'wrong'}, timeout=120)
  assert wrong.returncode == 2 and 'hf auth login' in wrong.stderr, wrong.stderr[-2000:]
  lines = ("import hrvlm_jax\ntry:\n  hrvlm_jax.load('someone/unknown')\n"
           'except hrvlm_jax.UserError as error:\n  print(error)')
  gone = subprocess.run([sys.executable, '-c', lines], capture_output=True, text=True, timeout=120,
                        env=environment | {'HF_ENDPOINT': 'http://localhost:9'})
  assert 'main is not in the local cache, and the hub cannot be reached; go online' in gone.stdout


def test_what_is_not_pushed(world, tmp_path, capsys):
  checkpoint = world / 'runs/quickstart/checkpoint'
  with pytest.raises(UserError, match='is a checkpoint.*hrvlm export --checkpoint'):
    hub.push(checkpoint, 'me/x')
  with pytest.raises(UserError, match='no such folder'):
    hub.push(tmp_path / 'none', 'me/x')
  with pytest.raises(UserError, match='has no config.json'):
    hub.push(tmp_path, 'me/x')
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(UserError, match='expected owner/name'):
    hub.push(tmp_path, 'x')
  assert main(['export', '--checkpoint', str(checkpoint), '--to', 'hf://me/x']) == 2
  assert 'export to a folder, then hrvlm push FOLDER me/x' in capsys.readouterr().err
