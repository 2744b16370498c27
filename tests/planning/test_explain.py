"""`hrvlm plan --explain`, and programs that are stored as text."""

import json
import lzma
import pathlib

import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.planning import explain, schedule

STORED = pathlib.Path(__file__).with_name('programs')


def test_explain_verb(tmp_path, capsys):
  from hrvlm_jax.cli import main

  out = tmp_path / 'tables.json'
  command = ['plan', '--explain', str(STORED / 'fsdp.txt.xz'), '--chip', 'v5p', '--json', str(out)]
  assert main.run(command) == 0
  printed = capsys.readouterr().out
  assert 'by class:' in printed and 'the 10 dearest places:' in printed
  assert 'optimistic' in printed and 'likely' in printed and 'cases.py:' in printed
  assert json.loads(out.read_text())['chip'] == 'v5p'


def test_a_stored_program_has_no_folders_and_no_machine_code(tmp_path):
  text = lzma.decompress((STORED / 'splash.txt.xz').read_bytes()).decode()
  text = text.replace('FileNames\n', 'FileNames\n98 "/home/me/x/hrvlm_jax/a/b.py"\n'
                                  '99 "/opt/lib/site-packages/p/q.py"\n97 "/opt/lib/enum.py"\n')
  text = text.replace('"custom_call_config":{', '"custom_call_config":{"body":"QUJD+/=",')
  for name in ('a.txt', 'a.txt.xz'):
    explain.store(tmp_path / name, text)
    kept = explain.load(tmp_path / name)
    assert '98 "hrvlm_jax/a/b.py"' in kept and '99 "site-packages/p/q.py"' in kept
    assert '97 "enum.py"' in kept and 'QUJD' not in kept and '"/' not in kept
    assert schedule.read(kept, 'v5e').cycles == schedule.read(text, 'v5e').cycles
  assert (tmp_path / 'a.txt.xz').stat().st_size < (tmp_path / 'a.txt').stat().st_size / 4
  with pytest.raises(UserError, match='cannot be written'):
    explain.store(tmp_path / 'no' / 'a.txt', text)


def test_files_that_cannot_be_read(tmp_path):
  with pytest.raises(UserError, match='cannot be read'):
    explain.load(tmp_path / 'nothing.txt')
  (tmp_path / 'broken.xz').write_bytes(b'no archive')
  with pytest.raises(UserError, match='cannot be read'):
    explain.load(tmp_path / 'broken.xz')
