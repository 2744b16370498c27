"""A full disk in every verb that writes: one sentence, status 2, and nothing half-written.

The limit on the size of a file stands for the disk: writing beyond it fails in the middle of a file
as on a full disk, in Python and in native code alike.
"""

import contextlib
import json
import os
import resource

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint.files import whole_file
from hrvlm_jax.cli.main import main
from hrvlm_jax.core.errors import UserError


@contextlib.contextmanager
def full(size=700):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(folder):
  return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())


def test_every_verb_that_writes(world, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  world = world.root
  for name in ('photo.png', 'train.json'):
    (tmp_path / name).write_bytes((world / name).read_bytes())
  rows = json.loads((tmp_path / 'train.json').read_text())
  Image.effect_noise((60, 60), 90).convert('RGB').save('photo.png')
  (tmp_path / 'bad.json').write_text(json.dumps([row | {'image': 'none.png'} for row in rows] * 9))
  (tmp_path / 'run.json').write_bytes((world / 'run.json').read_bytes())
  (tmp_path / 'run.py').write_text(
    'import json, ml_collections\n'
    'def get_config():\n'
    "  return ml_collections.ConfigDict(json.load(open('run.json')))\n")
  (tmp_path / 'answers.jsonl').write_text('')
  (tmp_path / 'own.jsonl').write_text(''.join(
    json.dumps({'id': str(n), 'image': 'photo.png', 'question': 'What?', 'answer': 'x' * 50}) + '\n'
    for n in range(9)))
  before = files(tmp_path)
  commands = {
    'convert': ['convert', '--from', f'{world}/release/mc_llava', '--to', 'out'],
    'export': ['export', '--checkpoint', f'{world}/checkpoint', '--to', 'out'],
    'needle': ['needle', '--preset', 'panorama', '--train', '2', '--eval', '1', '--out', 'needle'],
    'show': ['data', 'show', '--config', 'run.py', '--out', 'show.png'],
    'check': ['data', 'check', 'bad.json', '--quiet', '--out', 'faults.jsonl'],
    'build': ['data', 'build', 'train.json', '--quiet', '--out', 'built'],
    'eval': ['eval', '--benchmark', 'own', '--data', 'own.jsonl', '--predictions', 'answers.jsonl',
             '--out', 'scored'],
    'train': ['train', '--config', 'run.py', '--workdir', 'work', '--quiet'],
  }
  for name, argv in commands.items():
    try:
      with full():
        status = main(argv)
    except Exception as error:
      raise AssertionError(name) from error
    said = capsys.readouterr().err
    sentence = [line for line in said.splitlines() if line.startswith(f'hrvlm {argv[0]}: ')]
    assert status == 2 and len(sentence) == 1 and 'Traceback' not in said, (name, status, said)
    assert 'larger than this system allows' in said or 'the disk is full' in said, (name, said)
    left = [file for file in files(tmp_path) if file not in before]
    assert not [file for file in left if 'part' in file or '.old-' in file], (name, left)
    # Folders that a later start goes on in may hold whole files; nothing else is there.
    assert all(file.startswith(('needle/', 'built/', 'scored/', 'work/')) for file in left), left
    for file in left:
      if file.endswith(('.png', '.jpg')):
        Image.open(file).load()
      elif file.endswith('.json'):
        json.loads((tmp_path / file).read_text())
  for name in ('needle', 'build', 'check', 'eval'):  # with room again, the same command does it
    assert main(commands[name]) == (1 if name == 'check' else 0), name


def test_a_file_is_whole_or_absent(tmp_path):
  big = np.zeros(5000)
  target = tmp_path / 'a.npy'
  target.write_text('old')
  for _ in range(2):
    with pytest.raises(UserError, match='cannot write .*a.npy: the disk is full'), full():
      with whole_file(target) as part:
        np.save(part, big)
    assert target.read_text() == 'old' and files(tmp_path) == ['a.npy']
  with pytest.raises(KeyError), whole_file(target) as part:
    part.write_text('half')
    raise KeyError
  assert target.read_text() == 'old' and files(tmp_path) == ['a.npy']
  with whole_file(target) as part:
    np.save(part, big)
  assert np.load(target).shape == (5000,) and files(tmp_path) == ['a.npy']
  for path, said in ((tmp_path, 'is a folder'), (tmp_path / 'no/a.npy', 'does not exist')):
    with pytest.raises(UserError, match=said), whole_file(path):
      pass
  with whole_file('/dev/null') as part:
    part.write_text('x')
  assert not os.path.isfile('/dev/null')


def test_standard_output_on_a_full_disk(capsys, monkeypatch):
  """`hrvlm completion bash > FILE` ends with a sentence, not with Python's last words."""
  class Full:
    def write(self, text):
      return len(text)

    def flush(self):
      raise OSError(28, 'No space left on device')

    def fileno(self):
      return os.open(os.devnull, os.O_WRONLY)

  monkeypatch.setattr('sys.stdout', Full())
  assert main(['--version']) == 2
  assert 'the disk is full' in capsys.readouterr().err
