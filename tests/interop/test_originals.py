"""scripts/originals.sh: what it refuses, what it keeps; docs/originals.md has the real runs."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from scripts.originals import keep

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments, **environment):
  return subprocess.run([ROOT / 'scripts' / 'originals.sh', *map(str, arguments)],
                        capture_output=True, text=True, env=os.environ | environment)


def test_folders_and_packages_that_are_not_there(tmp_path):
  """Nothing is fetched: what is missing is named, with the command that gets it."""
  for arguments in ((), (tmp_path / 'none',)):
    out = run(*arguments)
    assert out.returncode == 2 and 'the checkout of an original' in out.stderr
  out = run(tmp_path)
  assert out.returncode == 2 and 'expected a checkout of visheratin/mc-llava' in out.stderr
  (tmp_path / 'modeling_mc_llava.py').write_text('raise SystemExit("never run")')
  out = run(tmp_path, HRVLM_WHEELS=str(tmp_path / 'none'), HRVLM_ORIGINAL_PYTHON='',
            HRVLM_ORIGINAL_TORCH='torch==9.9')
  assert out.returncode == 2 and "pip download -d WHEELS 'torch==9.9'" in out.stderr


def kept(tmp_path, theirs):
  (tmp_path / 'asked.json').write_text(json.dumps({'asked': [{'tokens': [1, 2]},
                                                             {'tokens': [3, 4, 5]}]}))
  (tmp_path / 'theirs.json').write_text(json.dumps({'tokens': theirs, 'versions': {'torch': '9'}}))
  page = tmp_path / 'page.md'
  return keep.main('pheye', str(tmp_path), str(tmp_path), str(page)), page.read_text()


def test_a_run_is_kept_with_its_commit(tmp_path):
  code, page = kept(tmp_path, [[1, 2], [3, 9]])
  assert code == 1 and '| pheye | no repository |' in page
  assert page.rstrip().endswith('| torch 9 | 1 of 2 | 3 of 5 |')
  for command in (['init', '-q'], ['-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-q',
                                   '--allow-empty', '-m', 'x']):
    (tmp_path / 'code.py').write_text('')  # not in the commit
    subprocess.run(['git', '-C', tmp_path, *command], check=True)
  code, page = kept(tmp_path, [[1, 2], [3, 4, 5]])
  assert code == 0 and page.count('| pheye |') == 1 and '+changes |' in page
  assert page.rstrip().endswith('| 2 of 2 | 5 of 5 |')


def test_equal_choices_with_other_features_are_no_equal_answer(tmp_path):
  """PS3: the places of its patches alone would hide other pixels."""
  for number, theirs in enumerate((np.ones(3), np.array([1, 1, 1.01]))):
    np.save(tmp_path / f'{number}.ours.npy', np.ones(3))
    np.save(tmp_path / f'{number}.theirs.npy', theirs)
  code, page = kept(tmp_path, [[1, 2], [3, 4, 5]])
  assert code == 1 and page.rstrip().endswith('| torch 9 | 1 of 2 | 5 of 5 |')


@pytest.mark.full('interop')
def test_a_made_up_original_with_other_names_keeps_nothing(tmp_path):
  (tmp_path / 'modeling_mc_llava.py').write_text(
    'import torch\nclass LlavaConfig(dict):\n  pass\n'
    'class LlavaForCausalLM(torch.nn.Module):\n'
    '  def __init__(self, config):\n    super().__init__()\n'
    '    self.other = torch.nn.Linear(2, 3)\n')
  (tmp_path / 'processing_mc_llava.py').write_text('MultiCropImageProcessor = None\n')
  page = tmp_path / 'page.md'
  out = run(tmp_path, HRVLM_ORIGINAL_PYTHON=sys.executable, HRVLM_ORIGINALS_PAGE=str(page))
  assert out.returncode == 1, out.stdout + out.stderr
  assert 'missing other.weight' in out.stderr and 'unexpected language_model' in out.stderr
  assert not page.exists()
