"""The worker script and the set-up script on this machine, as on a TPU VM; and `simulate`."""

import json
import os
import pathlib
import re
import signal
import sys
import time

import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]
STANDIN = pathlib.Path(__file__).with_name('standin.py')


@pytest.fixture
def host(cloud):
  """worker_run.sh on one host, with real time."""
  (cloud.bin / 'sleep').unlink()
  cloud.environment = {'HRVLM_METADATA_URL': '', 'HRVLM_WORKER': '3'}

  def go(*args, rules=()):
    return cloud.run('bash', str(REPO / 'scripts' / 'worker_run.sh'), *args, rules=rules)

  go.runs = cloud.home / 'runs'
  go.cloud = cloud
  yield go
  for pid in go.runs.glob('*/pid'):
    try:
      os.killpg(int(pid.read_text()), signal.SIGKILL)
    except ProcessLookupError:
      continue


def wait_for(condition):
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline, 'waited 20 s in vain'
    time.sleep(0.05)


def fields(text):
  assert text.startswith('status 3 '), text
  head, last = text.rstrip('\n').split(' last=', 1)
  return dict(word.split('=', 1) for word in head.split()[2:]) | {'last': last}


@pytest.mark.parametrize(
  'command, state, code, words',
  [
    (['true'], 'success', '0', ''),
    (['sh', '-c', 'echo one; exit 7'], 'failed', '7', 'exit code 7'),
    (['sh', '-c', 'kill -9 $$'], 'failed', '137', 'killed (signal 9)'),
    (['sh', '-c', 'kill -6 $$'], 'failed', '134', 'another host of the run died'),
  ],
)
def test_how_a_job_ended(host, command, state, code, words):
  started = host('start', 'r', '--', *command)
  assert started.code == 0 and 'worker 3: started run r' in started.out
  wait_for((host.runs / 'r' / 'exit_code').exists)
  found = fields(host('status', 'r').out)
  assert (found['state'], found['exit'], found['marker']) == (state, code, '-')
  assert words in found['last']
  assert (host.runs / 'r' / 'log.3').is_file()


def test_busy_force_and_stop(host):
  assert host('start', 'r', '--', 'sleep', '100').code == 0
  first = (host.runs / 'r' / 'pid').read_text()
  assert fields(host('status', 'r').out)['state'] == 'running'
  busy = host('start', 'other', '--', 'sleep', '100')
  assert busy.code == 9 and 'already running here: run r' in busy.err
  assert host('start', 'r', '--force', '--', 'sleep', '100').code == 0
  assert (host.runs / 'r' / 'pid').read_text() not in ('', first)
  assert fields(host('status', 'r').out)['state'] == 'running'
  stopped = host('stop', 'r', '--grace', '5')
  assert stopped.code == 0 and 'stopped' in stopped.out
  assert fields(host('status', 'r').out)['exit'] == '143'
  assert 'nothing runs' in host('stop', 'r').out


def test_a_start_waits_for_the_last_words_of_the_run_before(host):
  """The supervisor still sends the log away when the job is over (the upload takes a second)."""
  slow = '#!/bin/sh\ntouch "$FAKE_CLOUD/uploading"; sleep 1\n'
  host.cloud.program('gcloud', slow)
  bucket = ('--bucket', 'gs://b/r')
  assert host('start', 'r', *bucket, '--', 'sh', '-c', 'exit 7').code == 0
  wait_for((host.cloud.path / 'uploading').exists)
  again = host('start', 'r', '--', 'sleep', '100')
  assert again.code == 0, again.err
  found = fields(host('status', 'r').out)
  assert found['state'] == 'running' and found['exit'] == '-'
  host('stop', 'r', '--grace', '1')


def test_the_same_request_twice_starts_once(host):
  job = ('--', 'sleep', '100')
  assert host('start', 'r', '--attempt', '1.2', *job).code == 0
  first = (host.runs / 'r' / 'pid').read_text()
  again = host('start', 'r', '--attempt', '1.2', '--force', *job)
  assert again.code == 0 and f'pid {first}' in again.out
  assert (host.runs / 'r' / 'pid').read_text() == first
  assert host('start', 'r', '--attempt', '1.3', *job).code == 9
  assert host('start', 'r', '--attempt', '1.3', '--force', '--grace', '1', *job).code == 0
  assert (host.runs / 'r' / 'pid').read_text() != first


def test_of_two_starts_at_once_one_is_busy(host):
  script = str(REPO / 'scripts' / 'worker_run.sh')
  start = lambda name: f'bash {script} start {name} -- sleep 100'
  both = f'{start("a")} & one=$!; {start("b")}; two=$?; wait $one; echo $? $two'
  codes = host.cloud.run('bash', '-c', both).out.split('\n')[-2].split()
  assert sorted(codes) == ['0', '9']


def test_a_supervisor_that_fails_is_no_started_job(host):
  result = host('start', 'r', '--env-file', '/nowhere/secrets', '--', 'true')
  assert result.code == 1 and 'the job did not start' in result.err
  assert '/nowhere/secrets' in result.err


def test_stop_ends_children_and_deaf_programs(host):
  program = "trap '' TERM; sleep 100 & echo $!; while true; do sleep 1; done"
  host('start', 'r', '--', 'bash', '-c', program)
  log = host.runs / 'r' / 'log.3'
  wait_for(lambda: re.search(r'^\d+$', log.read_text(), re.MULTILINE))
  child = int(re.search(r'^\d+$', log.read_text(), re.MULTILINE).group())
  assert host('stop', 'r', '--grace', '1').code == 0
  state = pathlib.Path(f'/proc/{child}/stat')
  wait_for(lambda: not state.exists() or state.read_text().split()[2] == 'Z')


def test_a_job_without_its_supervisor_is_dead(host):
  host('start', 'r', '--', 'sleep', '100')
  directory = host.runs / 'r'
  pid = int((directory / 'pid').read_text())
  supervisor = int(pathlib.Path(f'/proc/{pid}/stat').read_text().split()[3])
  os.kill(supervisor, signal.SIGKILL)
  assert fields(host('status', 'r').out)['state'] == 'running'
  assert (
    host('start', 'r', '--', 'true').code == 9
  )  # still alive: refused although the lock is free
  os.killpg(pid, signal.SIGKILL)
  wait_for(lambda: fields(host('status', 'r').out)['state'] == 'dead')
  # A number that another process has got since is not taken for the job.
  (directory / 'pid').write_text(str(os.getpid()))
  assert fields(host('status', 'r').out)['state'] == 'dead'
  (directory / 'pid').unlink()


@pytest.mark.parametrize('where', ['run', 'workdir'])
def test_preempted_marker(host, tmp_path, where):
  work = tmp_path / 'work dir'
  work.mkdir()
  target = '"$HRVLM_RUN_DIR/PREEMPTED"' if where == 'run' else '"$2/PREEMPTED"'
  command = ['sh', '-c', f'touch {target}; exit 0', 'sh', '--unused', '--workdir', str(work)]
  command[4:5] = []  # sh -c TEXT sh --workdir DIR: $1 is --workdir, $2 the directory
  host('start', 'r', '--', *command)
  wait_for((host.runs / 'r' / 'exit_code').exists)
  found = fields(host('status', 'r').out)
  assert (found['exit'], found['marker']) == ('0', 'PREEMPTED')
  # The next attempt starts clean: worker 0 removes the old marker of the working directory.
  host.cloud.environment['HRVLM_WORKER'] = '0'
  host('start', 'r', '--', 'true', '--workdir', str(work))
  wait_for((host.runs / 'r' / 'exit_code').exists)
  assert 'marker=-' in host('status', 'r').out and not (work / 'PREEMPTED').exists()


def test_newest_checkpoint_in_the_status(host, tmp_path):
  for name in ('3', '40', '40.orbax-checkpoint-tmp', 'x'):
    (tmp_path / 'w' / 'checkpoints' / name).mkdir(parents=True)
  host('start', 'r', '--', 'true', f'--workdir={tmp_path / "w"}')
  wait_for((host.runs / 'r' / 'exit_code').exists)
  assert fields(host('status', 'r').out)['step'] == '40'


def test_environment_and_slice(host):
  secrets = host.cloud.home / '.hrvlm' / 'env'
  secrets.parent.mkdir()
  secrets.write_text('# comment\nHF_TOKEN=a b$(touch /nowhere)\n')
  (host.cloud.path / 'RUN_TOKEN').write_text('f' * 32)  # came with the source
  show = 'echo "$HF_TOKEN|$FLAG|$HRVLM_WORKER_LABEL|$HRVLM_RUN_TOKEN"'
  options = ['--slice', '1', '--env', 'FLAG=x y', '--env-file', '.hrvlm/env']
  host('start', 'r', *options, '--', 'sh', '-c', show)
  wait_for((host.runs / 'r' / 'exit_code').exists)
  assert f'a b$(touch /nowhere)|x y|1.3|{"f" * 32}' in (host.runs / 'r' / 'log.1.3').read_text()
  assert host('status', 'r', '--slice', '1').out.startswith('status 1.3 ')


def test_settings_are_read_as_a_shell_reads_them(host):
  secrets = host.cloud.home / 'env'
  lines = ['\ufeffexport A="a b"', "B='x$y #1'", 'C=plain # comment', 'D=a#b', r'E="q\"r\$s\n"',
           r'F=a\ b', """  export G=x"y z"'w'""", 'H=', 'N=x=y==', '# no', '']  # fmt: skip
  secrets.write_bytes('\r\n'.join(lines).encode())
  names = 'ABCDEFGHN'
  show = 'for n in ' + ' '.join(names) + '; do eval "printf \'%s|\' \\"\\$$n\\""; done; echo'
  host('start', 'r', '--env-file', 'env', '--', 'sh', '-c', show)
  wait_for((host.runs / 'r' / 'exit_code').exists)
  log = (host.runs / 'r' / 'log.3').read_text()
  assert r'a b|x$y #1|plain|a#b|q"r$s\n|a b|xy zw||x=y==|' in log, log


def test_a_job_killed_after_its_grace_is_said(host):
  host('start', 'r', '--', 'bash', '-c', "trap '' TERM; while true; do sleep 1; done")
  host('stop', 'r', '--grace', '1')
  assert 'asked to end, did not' in fields(host('status', 'r').out)['last']


def test_logs(host):
  host('start', 'r', '--', 'sh', '-c', 'echo a; echo b; sleep 0.5; echo c')
  followed = host('logs', 'r', '--follow')
  assert followed.code == 0 and followed.out.splitlines()[-3:] == ['a', 'b', 'c']
  assert host('logs', 'r', '--lines', '1').out == 'c\n'
  missing = host('logs', 'none')
  assert missing.code == 2 and 'no log of run none' in missing.err


def test_logs_and_markers_in_the_bucket(host):
  found = [('storage rm', ['']), ('storage ls gs://b/w/PREEMPTED', ['']), ('storage cp', [''])]
  options = ['--bucket', 'gs://b/r', '--', 'true', '--workdir', 'gs://b/w']
  host('start', 'r', *options, rules=found)
  wait_for((host.runs / 'r' / 'exit_code').exists)
  calls = [json.loads(line) for line in (host.cloud.path / 'calls').read_text().splitlines()]
  assert calls[-1][:2] == ['storage', 'cp'] and calls[-1][-1] == 'gs://b/r/logs/log.3'
  assert 'marker=PREEMPTED' in host('status', 'r').out


@pytest.mark.parametrize(
  'args', [[], ['start', 'a b'], ['start', 'r'], ['dance', 'r'], ['status', 'r', '--x']]
)
def test_usage(host, args):
  result = host(*args)
  assert result.code == 2 and 'worker_run.sh:' in result.err


def test_a_whole_run_over_two_hosts(cloud, checkout):
  """The launcher's own words, executed: quoting survives both shells."""
  for name in ('0', '1'):
    home = cloud.path / 'hosts' / 'pod' / name
    home.mkdir(parents=True)
    (home / 'hrvlm').symlink_to(checkout)
  (cloud.bin / 'sleep').unlink()
  here = ('', '', 0, True)
  rules = [('networkEndpoints', ['2']), ('tpu-vm ssh', [here])]
  name = ('--name', 'pod', '--zone', 'z-1-a', '--type', 'v6e-8')
  program = 'import sys, time; print(sys.argv[1:], flush=True); time.sleep(60)'
  words = ['a  b', "it's", '$HOME', '"q"']
  result = cloud.launch('run', *name, '--', sys.executable, '-c', program, *words, rules=rules)
  assert result.code == 0, result.err
  assert sorted(line.split(',')[0] for line in result.out.splitlines()) == [
    'worker 0: started run pod',
    'worker 1: started run pod',
  ]
  logs = [cloud.path / 'hosts' / 'pod' / n / 'runs' / 'pod' / f'log.{n}' for n in '01']
  wait_for(lambda: all(str(words) in log.read_text() for log in logs))
  status = cloud.launch('status', *name, rules=rules).out
  assert len(re.findall('running', status)) == 2
  again = cloud.launch('run', *name, '--', 'true', rules=rules)
  assert again.code == 2 and 'already running' in again.err
  assert cloud.launch('stop', *name, rules=rules).out.count('stopped') == 2
  assert len(re.findall('143', cloud.launch('status', *name, rules=rules).out)) == 2


# --- worker_setup.sh ---------------------------------------------------------------------------


@pytest.fixture
def setup(cloud, tmp_path):
  """worker_setup.sh with programs that only write down what they were asked."""
  note = '#!/bin/sh\necho "$(basename "$0") $*" >>"$FAKE_CLOUD/programs"\n'
  for name in ('uv', 'systemctl'):
    cloud.program(name, note)
  cloud.program(
    'sudo',
    note
    + 'case $1 in tee) cat >>"$FAKE_CLOUD/environment" ;; '
    + 'lsof) cat "$FAKE_CLOUD/holders" ;; esac\n',
  )
  python = cloud.home / 'hrvlm-venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text(note + 'exit "$(cat "$FAKE_CLOUD/doctor")"\n')
  python.chmod(0o700)
  source = tmp_path / 'hrvlm'
  source.mkdir()
  (source / 'requirements.lock').write_text('jax==0.10.2\n')
  (source / 'pyproject.toml').write_text('')
  (tmp_path / 'holders').write_text('')
  (tmp_path / 'doctor').write_text('0')

  def go(*args, rules=(('storage cp', ['']),)):
    (tmp_path / 'programs').unlink(missing_ok=True)
    script = str(REPO / 'scripts' / 'worker_setup.sh')
    result = cloud.run('bash', script, *args, cwd=source, rules=rules)
    file = tmp_path / 'programs'
    return result, file.read_text().splitlines() if file.exists() else []

  go.source, go.path, go.cloud = source, tmp_path, cloud
  return go


def test_setup_once_then_only_the_check(setup):
  result, programs = setup('--extra', 'tpu', '--bucket', 'gs://b/r')
  assert result.code == 0, result.err
  (install,) = [p for p in programs if p.startswith('uv pip install')]
  assert install.endswith('--constraint requirements.lock --editable .[tpu]')
  assert programs[-1] == 'python -m hrvlm_jax.cli doctor'
  assert [call[-1].startswith('gs://b/r/.write_test.') for call in result.calls] == [True]
  assert 'sudo rm -f /tmp/libtpu_lockfile' in programs
  assert 'TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES=1024' in (setup.path / 'environment').read_text()
  result, programs = setup('--extra', 'tpu', '--bucket', 'gs://b/r')
  assert result.code == 0 and not any(p.startswith('uv') for p in programs)
  assert programs[-1] == 'python -m hrvlm_jax.cli doctor'
  (setup.source / 'requirements.lock').write_text('jax==0.10.3\n')
  assert any(p.startswith('uv pip install') for p in setup('--extra', 'tpu')[1])


def test_setup_failures_name_the_step(setup):
  (setup.path / 'doctor').write_text('1')
  result, _ = setup()
  assert result.code == 1 and 'FAILED at: the check' in result.err
  (setup.path / 'doctor').write_text('0')
  denied = [('storage cp', [('', 'ERROR: 403', 1)])]
  result, _ = setup('--bucket', 'gs://b/r', rules=denied)
  assert result.code == 1 and 'FAILED at: writing to gs://b/r' in result.err
  assert len(result.calls) == 3
  setup.cloud.program('uv', '#!/bin/sh\nexit 1\n')
  (setup.source / 'pyproject.toml').write_text('changed')
  result, _ = setup()
  assert result.code == 1 and 'FAILED at: installing the package' in result.err
  assert result.naps == [10, 15]


def test_setup_frees_the_chip_but_spares_a_live_job(setup):
  (setup.path / 'holders').write_text('123456789\n')
  _, programs = setup()
  assert 'sudo kill -9 123456789 ' in [p + ' ' for p in programs]
  run = setup.cloud.home / 'runs' / 'r'
  run.mkdir(parents=True)
  (run / 'pid').write_text(str(os.getpid()))
  result, programs = setup()
  assert result.code == 0 and not any('kill' in p or 'doctor' in p for p in programs)


# --- simulate ----------------------------------------------------------------------------------


@pytest.fixture
def simulate(cloud):
  (cloud.bin / 'sleep').unlink()
  cloud.program('python', f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')

  def go(*options, job=()):
    command = ['simulate', '--kill-at-step', '6', '--end-within', '30', *options, '--']
    return cloud.launch(*command, 'python', '-S', str(STANDIN), *job)

  return go


def test_simulate_kills_one_host_and_resumes(simulate, tmp_path):
  result = simulate('--workdir', str(tmp_path / 'sim'))
  assert result.code == 0, result.err
  assert 'killed host 1' in result.err and 'host 0 has ended' in result.err
  assert 'resumed at step 5' in result.err or 'resumed at step 9' in result.err
  assert '20 steps, largest relative difference 0' in result.out
  assert 'another host of the run died' in (tmp_path / 'sim/host.0/simulate/log.0').read_text()
  again = simulate('--workdir', str(tmp_path / 'sim'))
  assert again.code == 2 and 'earlier simulation' in again.err


@pytest.mark.parametrize(
  'job, options, code, words',
  [
    (['--forgetful'], [], 5, 'instead of resuming'),
    (['--drift'], [], 5, 'the undisturbed'),
    (['--deaf'], ['--end-within', '1'], 7, 'is ended now'),
    (['--no-such-option'], [], 5, 'unrecognized arguments'),
  ],
)
def test_simulate_finds_out(simulate, job, options, code, words):
  result = simulate(*options, job=job)
  assert result.code == code, result.err
  if job == ['--drift']:
    assert re.search(r'step \d+: \S+ undisturbed, \S+ resumed', result.out)
  else:
    assert words in result.err


@pytest.mark.parametrize(
  'options, words',
  [
    (['--hosts', '1'], 'at least 2'),
    (['--kill-host', '2'], 'a host below 2'),
    (['--kill-at-step', 'x'], 'whole number'),
  ],
)
def test_simulate_usage(simulate, options, words):
  result = simulate(*options)
  assert result.code == 2 and words in result.err


def test_simulate_adds_the_directory_itself(simulate):
  result = simulate(job=['--workdir', 'x'])
  assert result.code == 2 and 'leave it out' in result.err
  dry = simulate('--dry-run')
  assert dry.code == 0 and '--process-id 1' in dry.out
