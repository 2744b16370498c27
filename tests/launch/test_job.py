"""setup, sync, run, logs, status, ssh, stop, up: commands, retries, secrets, dry runs."""

import re
import subprocess
import tarfile

import pytest

NAME = ('--name', 'pod', '--zone', 'us-east5-b', '--type', 'v6e-8')
STATE = ('queued-resources describe .*state.state', ['ACTIVE'])
HOSTS = lambda n: (r'tpu-vm describe .*networkEndpoints', [str(n)])
SSH = ('tpu-vm ssh', [''])
SCP = ('tpu-vm scp', [''])
LOST = ('', 'ERROR: [/usr/bin/ssh] exited with return code [255].', 255)
JOB = (
  '--',
  'python',
  '-m',
  'hrvlm_jax.cli',
  'train',
  '--config',
  'a b.py',
  '--workdir',
  'gs://b/r',
)


def commands(result):
  """What was sent to the workers, in order."""
  words = [word for call in result.calls for word in call if word.startswith('--command=')]
  # The number of a request to start differs every time.
  return [re.sub(r' --attempt \S+', '', word[len('--command=') :]) for word in words]


def launch(cloud, checkout, *args, rules):
  return cloud.launch(*args, rules=rules, script=checkout / 'scripts' / 'launch.sh')


def snapshot(cloud):
  (archive,) = cloud.home.glob('.cache/hrvlm/launch/*/*/src.tgz')
  with tarfile.open(archive) as tar:
    return {name: tar.extractfile(name).read().decode() for name in tar.getnames()}


def test_sync_sends_what_git_knows_and_no_secrets(cloud, checkout):
  (checkout / 'pkg/data/a.py').write_text('changed')
  (checkout / 'untracked.py').write_text('no')
  (checkout / 'scripts/launch.env.txt').unlink()
  result = launch(cloud, checkout, 'sync', *NAME, rules=[HOSTS(2), SSH, SCP])
  assert result.code == 0, result.err
  files = snapshot(cloud)
  assert files['pkg/data/a.py'] == 'changed'
  assert not {
    '.env',
    'deep/.env.local',
    'data/photo.jpg',
    'checkpoints/1/x',
    'runs/x',
    'key.pem',
    'untracked.py',
    'scripts/launch.env.txt',
  } & set(files)
  for name in ('.env', 'deep/.env.local', 'key.pem'):
    assert name in result.err.split('look like credentials')[1].splitlines()[0]
  assert 'commit=' in files['SOURCE_STATE'] and 'diff=clean' not in files['SOURCE_STATE']
  assert re.fullmatch('[0-9a-f]{32}', files['RUN_TOKEN'])  # of this run, and nowhere else
  assert files['RUN_TOKEN'] not in result.err + result.out + str(result.calls)
  assert 'not committed' in result.err
  kinds = [call[3] for call in result.calls]
  assert kinds == ['describe', 'scp', 'ssh']
  assert '--worker=all' in result.calls[1] and result.calls[1][5] == 'pod:src.tgz'


def test_sync_through_the_bucket(cloud, checkout):
  rules = [HOSTS(4), SSH, ('storage cp', [''])]
  result = launch(
    cloud, checkout, 'sync', *NAME, '--bucket', 'gs://b/', '--run-name', 'r1', rules=rules
  )
  assert result.code == 0
  assert [call[:2] for call in result.calls] == [
    ['compute', 'tpus'],
    ['storage', 'cp'],
    ['compute', 'tpus'],
  ]
  assert result.calls[1][-1] == 'gs://b/r1/src.tgz'
  assert commands(result)[0].startswith('gcloud storage cp gs://b/r1/src.tgz src.tgz && ')
  assert 'diff=clean' in snapshot(cloud)['SOURCE_STATE']


def test_setup_warms_up_every_worker_then_sends_and_installs(cloud, checkout):
  rules = [HOSTS(2), SSH, SCP]
  result = launch(cloud, checkout, 'setup', *NAME, rules=rules)
  assert result.code == 0
  sent = commands(result)
  assert sent[:2] == ['true', 'true']
  assert [call for call in result.calls if '--worker=1' in call]
  assert sent[-1] == 'cd hrvlm && bash scripts/worker_setup.sh --python 3.12 --extra tpu'
  assert any('ServerAliveInterval=30' in word for call in result.calls for word in call)


def test_setup_failure_is_code_4(cloud, checkout):
  rules = [HOSTS(1), ('worker_setup', [('', 'setup host: FAILED at: installing uv', 1)]), SSH, SCP]
  result = launch(cloud, checkout, 'setup', *NAME, rules=rules)
  assert result.code == 4 and 'FAILED at: installing uv' in result.err and 'Cloud NAT' in result.err


def test_lost_connections_are_tried_again_then_named(cloud, checkout):
  rules = [HOSTS(2), ('--worker=1 .*--command=true', [LOST, LOST, '']), SSH, SCP]
  result = launch(cloud, checkout, 'setup', *NAME, rules=rules)
  assert result.code == 0 and result.naps == [5, 10]
  rules[1] = ('--worker=1 .*--command=true', [LOST])
  result = launch(cloud, checkout, 'setup', *NAME, rules=rules)
  assert result.code == 4 and result.naps == [5, 10, 20]
  assert 'worker 1 of pod cannot be reached' in result.err


def test_unwritable_bucket(cloud, checkout):
  denied = ('', 'ERROR: HTTPError 403: no storage.objects.create access', 1)
  rules = [HOSTS(1), ('storage cp', [denied]), SSH]
  result = launch(cloud, checkout, 'setup', *NAME, '--bucket', 'gs://b', rules=rules)
  assert result.code == 2 and 'gs://b cannot be written to' in result.err


def test_bucket_elsewhere_is_a_warning(cloud, checkout):
  rules = [HOSTS(1), ('storage cp', ['']), ('buckets describe', ['EUROPE-WEST4']), SSH]
  result = launch(cloud, checkout, 'setup', *NAME, '--bucket', 'gs://b', rules=rules)
  assert result.code == 0 and 'lies in EUROPE-WEST4' in result.err
  rules[2] = ('buckets describe', ['US-EAST5'])
  result = launch(cloud, checkout, 'setup', *NAME, '--bucket', 'gs://b', rules=rules)
  assert 'lies in' not in result.err


def test_run_is_detached_on_all_workers(cloud):
  result = cloud.launch('run', *NAME, '--env', 'A=x y', *JOB, rules=[HOSTS(2), SSH])
  assert result.code == 0
  assert commands(result) == [
    'cd hrvlm && bash scripts/worker_run.sh start pod --env A=x\\ y -- '
    'python -m hrvlm_jax.cli train --config a\\ b.py --workdir gs://b/r'
  ]
  assert '--worker=all' in result.calls[-1]


def test_multi_slice_run_tells_each_slice_its_number(cloud):
  rules = [HOSTS(2), SSH]
  result = cloud.launch('run', *NAME, '--slices', '2', *JOB, rules=rules)
  assert [call[4] for call in result.calls if 'ssh' in call] == ['pod-0', 'pod-1']
  assert [
    'start pod --slice 0 --' in commands(result)[0],
    'start pod --slice 1 --' in commands(result)[1],
  ]


def test_run_refuses_when_busy(cloud):
  busy = ('', 'worker_run.sh: a job is already running here: run pod, pid 7.', 9)
  result = cloud.launch('run', *NAME, *JOB, rules=[HOSTS(1), ('tpu-vm ssh', [busy])])
  assert result.code == 2 and '--force' in result.err
  result = cloud.launch('run', *NAME, '--force', *JOB, rules=[HOSTS(1), SSH])
  assert result.code == 0 and ' --force ' in commands(result)[0]


SECRET = 'hf_averysecretvalue'


def test_secrets_never_in_argv_or_metadata(cloud, checkout):
  file = cloud.path / 'secrets'
  file.write_text(f'# tokens\nHF_TOKEN={SECRET}\n')
  file.chmod(0o600)
  cloud.environment = {'HF_TOKEN': SECRET, 'WANDB_API_KEY': SECRET}
  missing = ('', 'NOT_FOUND', 1)
  rules = [
    ('queued-resources describe .*state.state', [missing, 'ACTIVE']),
    ('queued-resources create', ['']),
    HOSTS(1),
    SSH,
    SCP,
    ('storage', ['']),
  ]
  result = launch(
    cloud, checkout, 'up', *NAME, '--env-file', str(file), '--bucket', 'gs://b', *JOB, rules=rules
  )
  assert result.code == 0, result.err
  assert all(SECRET not in word for call in result.calls for word in call)
  assert SECRET not in result.out + result.err
  assert all(SECRET not in text for text in snapshot(cloud).values())
  order = commands(result)
  assert (
    'umask 077 && mkdir -p .hrvlm && chmod 700 .hrvlm' in order and 'chmod 600 .hrvlm/env' in order
  )
  copies = [call for call in result.calls if 'scp' in call]
  assert [call[4:6] for call in copies] == [[str(file), 'pod:.hrvlm/env']]
  assert '--env-file .hrvlm/env' in order[-1]
  uploads = [call for call in result.calls if call[0] == 'storage' and str(file) in call]
  assert not uploads


@pytest.mark.parametrize('job', [['env', 'HF_TOKEN=x', 'python'], ['x', f'--key=hf_{"a" * 34}']])
def test_secrets_in_the_job_are_refused(cloud, job):
  result = cloud.launch('run', *NAME, '--', *job)
  assert result.code == 2 and 'looks like a secret' in result.err and not result.calls
  assert 'a' * 34 not in result.err


def test_a_start_whose_answer_was_lost_is_asked_for_again(cloud):
  lost = ('', 'ERROR: (gcloud...ssh) exited with return code [255].', 255)
  rules = [HOSTS(1), ('worker_run.sh', [lost, 'worker 0: started run pod, pid 7'])]
  result = cloud.launch('run', *NAME, *JOB, rules=rules)
  assert result.code == 0 and 'started run pod' in result.out
  first, second = result.lines('worker_run.sh start')
  assert first == second and '--attempt' in first  # by which the worker knows it


@pytest.mark.parametrize('name', ['HF_TOKEN', 'WANDB_API_KEY', 'my_password', 'CLIENT_SECRET'])
def test_secrets_on_the_command_line_are_refused(cloud, name):
  result = cloud.launch('run', *NAME, '--env', f'{name}=x', *JOB)
  assert result.code == 2 and '--env-file' in result.err and not result.calls


@pytest.mark.parametrize(
  'pair',
  ['TOKENIZERS_PARALLELISM=false', 'MAX_TOKENS=5', 'HF_TOKEN_PATH=/t', 'KEYRING=0',
   'PAD_TOKEN=0', 'SORT_KEY=id', 'GOOGLE_APPLICATION_CREDENTIALS=/sa.json'],
)  # fmt: skip
def test_names_that_hold_no_secret_pass(cloud, pair):
  result = cloud.launch('run', *NAME, '--env', pair, *JOB, rules=[HOSTS(1), SSH])
  assert result.code == 0, result.err
  assert f'--env {pair}' in commands(result)[0]


def test_messages_never_show_a_secret(cloud):
  secret = 'hf_' + 'q' * 34
  file = cloud.path / 'secrets'
  file.write_text(f'A=1\n{secret}\n')
  file.chmod(0o600)
  for args in (['--env', secret, *JOB], ['--env', f'PLAIN={secret}', *JOB], ['--', 'x', secret],
               ['--', f'{secret}=x'], ['--env-file', str(file), *JOB]):  # fmt: skip
    result = cloud.launch('run', *NAME, *args)
    assert result.code == 2 and not result.calls
    assert 'q' * 34 not in result.out + result.err, args


@pytest.mark.parametrize('text, sentence', [
  ('A="x\n', 'line 1: A: the quote " is never closed'),
  ('B=1\nA = x\n', 'line 2: expected KEY=VALUE'),
  ('A="$HOME/x"\n', 'line 1: A: a shell would fill in'),
])  # fmt: skip
def test_env_files_that_a_shell_reads_otherwise_are_refused(cloud, text, sentence):
  file = cloud.path / 'secrets'
  file.write_text(text)
  file.chmod(0o600)
  result = cloud.launch('run', *NAME, '--env-file', str(file), *JOB)
  assert result.code == 2 and sentence in result.err and not result.calls


def test_credentials_are_left_out_by_name_and_by_content(cloud, checkout):
  account = '{\n "type": "service_account", "project_id": "p"\n}'
  hidden = {
    '.netrc': 'machine',
    'keys/id_rsa': 'k',
    'sa.json': account,
    'hf_token': 'x',
    'my.txt': '-----BEGIN PRIVATE KEY-----',
    '.aws/config': 'x',
    'my secrets/kaggle.json': 'x',
    'conf/hub.yaml': f'token: hf_{"a" * 34}',
    'api_key.txt': 'x',
    'wandb.key': 'x',
  }
  kept = dict.fromkeys(['pkg/tokenizer.json', 'pkg/token.py', 'pkg/key.py', 'tokenizer.model',
                        'pkg/api_key.py'], 'x')  # fmt: skip
  for name, text in (hidden | kept).items():
    (checkout / name).parent.mkdir(parents=True, exist_ok=True)
    (checkout / name).write_text(text)
  subprocess.run(['git', '-C', checkout, 'add', '-A', '-f'], check=True)
  result = launch(cloud, checkout, 'sync', *NAME, rules=[HOSTS(1), SSH, SCP])
  assert result.code == 0, result.err
  files = snapshot(cloud)
  assert set(kept) <= set(files) and not set(hidden) & set(files)
  (told,) = [text for text in result.err.splitlines() if 'look like credentials' in text]
  assert all(name in told for name in hidden)


def test_env_file_must_be_private(cloud):
  file = cloud.path / 'secrets'
  result = cloud.launch('run', *NAME, '--env-file', str(file), *JOB)
  assert result.code == 2 and 'there is no file' in result.err
  file.write_text('A=1\n')
  file.chmod(0o644)
  result = cloud.launch('run', *NAME, '--env-file', str(file), *JOB)
  assert result.code == 2 and 'chmod 600' in result.err
  file.chmod(0o600)
  file.write_text('nonsense\n')
  assert 'expected KEY=VALUE' in cloud.launch('run', *NAME, '--env-file', str(file), *JOB).err


def line(worker, state, **more):
  words = {
    'host': f'h{worker}',
    'pid': 7,
    'state': state,
    'exit': '-',
    'ended': '-',
    'age': '3s',
    'marker': '-',
    'preempted': 'FALSE',
    'step': '-',
    'last': 'step 5 loss 1.0',
  } | more
  return f'status {worker} ' + ' '.join(f'{k}={v}' for k, v in words.items()) + '\n'


def test_status_of_two_slices(cloud):
  rules = [
    HOSTS(1),
    ('ssh pod-0', [line('0.0', 'running')]),
    ('ssh pod-1', [line('1.0', 'failed', exit=1)]),
  ]
  result = cloud.launch('status', *NAME, '--slices', '2', rules=rules)
  rows = result.out.splitlines()
  assert rows[1].split()[:4] == ['0.0', 'h0.0', '7', 'running'] and 'step 5 loss 1.0' in rows[1]
  assert rows[2].split()[:5] == ['1.0', 'h1.0', '7', 'failed', '1']


def test_status_names_a_dead_worker(cloud):
  rules = [
    HOSTS(2),
    ('--worker=all', [LOST]),
    ('--worker=0', [line('0', 'running')]),
    ('--worker=1', [LOST]),
  ]
  result = cloud.launch('status', *NAME, '--ssh-tries', '2', rules=rules)
  assert result.code == 0
  assert result.out.splitlines()[1].split()[3] == 'running'
  assert result.out.splitlines()[2].split()[:4] == ['1', '-', '-', 'unreachable']


def test_logs(cloud):
  rules = [HOSTS(2), ('--worker=0', ['a\nb\n']), ('--worker=1', ['c\n'])]
  result = cloud.launch('logs', *NAME, rules=rules)
  assert result.out == 'a\nb\n'
  assert commands(result) == ['cd hrvlm && bash scripts/worker_run.sh logs pod --lines +1 --follow']
  result = cloud.launch('logs', *NAME, '--worker', 'all', '--prefix', '--no-follow', rules=rules)
  assert sorted(result.out.splitlines()) == ['[0] a', '[0] b', '[1] c']
  result = cloud.launch('logs', *NAME, '--worker', '7', rules=rules)
  assert result.code == 2 and "no worker '7'" in result.err


def test_stop_and_ssh(cloud):
  result = cloud.launch('stop', *NAME, '--slices', '2', rules=[HOSTS(1), SSH])
  assert [c.split('worker_run.sh ')[1] for c in commands(result)] == [
    'stop pod --slice 0',
    'stop pod --slice 1',
  ]
  result = cloud.launch('ssh', *NAME, '--worker', '3', rules=[SSH])
  assert '--worker=3' in result.calls[0] and not commands(result)
  result = cloud.launch('ssh', *NAME, '--internal-ip', '--', 'ls', 'a b', rules=[SSH])
  assert commands(result) == ['ls a\\ b'] and '--internal-ip' in result.calls[0]


def test_nodes_that_cannot_be_read(cloud):
  result = cloud.launch('run', *NAME, *JOB, rules=[('tpu-vm describe', [('', 'NOT_FOUND', 1)])])
  assert result.code == 2 and 'is it ACTIVE' in result.err
  result = cloud.launch('run', *NAME, *JOB, rules=[('tpu-vm describe', ['\n'])])
  assert result.code == 2


def test_up_order(cloud, checkout):
  missing = ('', 'NOT_FOUND', 1)
  rules = [
    ('queued-resources describe', [missing, 'PROVISIONING', 'ACTIVE']),
    ('queued-resources create', ['']),
    HOSTS(1),
    SSH,
    SCP,
  ]
  result = launch(cloud, checkout, 'up', *NAME, *JOB, rules=rules)
  assert result.code == 0
  steps = [' '.join(call[2:4]) for call in result.calls]
  assert (
    steps[:4]
    == ['queued-resources describe', 'queued-resources create'] + ['queued-resources describe'] * 2
  )
  sent = [c.split(' -- ')[0] for c in commands(result)]
  assert sent[0] == 'true' and 'worker_setup' in sent[-2] and 'worker_run.sh start' in sent[-1]


@pytest.mark.parametrize(
  'verb',
  [
    'create',
    'wait',
    'setup',
    'sync',
    'run',
    'logs',
    'status',
    'ssh',
    'stop',
    'delete',
    'up',
    'babysit',
  ],
)
@pytest.mark.parametrize('backend', ['qr', 'gce'])
def test_dry_run_calls_nothing(cloud, verb, backend):
  result = cloud.launch(verb, *NAME, '--backend', backend, '--dry-run', '--bucket', 'gs://b', *JOB)
  assert result.code == 0, result.err
  assert not result.calls and not result.naps
  assert '+ gcloud ' in result.out


def test_interrupt_leaves_the_machines_and_says_how_to_delete_them(cloud):
  cloud.program('sleep', '#!/bin/sh\nkill -INT "$PPID"\n')
  result = cloud.launch('wait', *NAME, rules=[('describe', ['CREATING'])])
  assert result.code == 130
  assert 'scripts/launch.sh delete --name pod --zone us-east5-b --type v6e-8' in result.err
