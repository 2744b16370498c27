"""create, wait, delete: every command, retry and exit code of both backends."""

import pytest

NAME = ('--name', 'pod', '--zone', 'us-east5-b', '--type', 'v6e-16')
GONE = ('', 'ERROR: (gcloud) NOT_FOUND: Resource pod was not found', 1)
STATE = 'queued-resources describe .*state.state'
CREATE = 'queued-resources create'
DELETE = 'queued-resources delete'
STOCKOUT = ('', 'ERROR: { "code": 8, "message": "There is no more capacity in the zone" }', 1)


def words(result, pattern):
  (call,) = [call for call in result.calls if pattern in ' '.join(call)]
  return call


def test_create_asks_once_with_these_flags(cloud):
  result = cloud.launch('create', *NAME, '--project', 'p', rules=[(STATE, [GONE]), (CREATE, [''])])
  assert result.code == 0
  call = words(result, CREATE)
  startup = next(word for word in call if word.startswith('--metadata-from-file='))
  assert startup.endswith('/tpu/startup.sh')
  call.remove(startup)
  assert call == [
    'compute',
    'tpus',
    'queued-resources',
    'create',
    'pod',
    '--zone=us-east5-b',
    '--project=p',
    '--accelerator-type=v6e-16',
    '--runtime-version=v2-alpha-tpuv6e',
    '--node-id=pod',
    '--labels=run=pod',
    '--async',
  ]


@pytest.mark.parametrize(
  'options, expected, absent',
  [
    (['--spot'], ['--spot'], ['--reserved', '--node-count=1']),
    (
      ['--reserved', '--valid-until', '6h'],
      ['--reserved', '--valid-until-duration=6h'],
      ['--spot'],
    ),
    (['--slices', '3'], ['--node-count=3', '--node-prefix=pod'], ['--node-id=pod']),
    (
      [
        '--internal-ip',
        '--network',
        'n',
        '--subnet',
        's',
        '--service-account',
        'a@b',
        '--labels',
        'k=v',
      ],
      [
        '--internal-ips',
        '--network=n',
        '--subnetwork=s',
        '--service-account=a@b',
        '--labels=run=pod,k=v',
      ],
      [],
    ),
    (
      ['--flex', '--max-run-duration', '4h'],
      ['alpha', '--provisioning-model=FLEX_START', '--max-run-duration=4h'],
      ['--spot'],
    ),
    (['--runtime', 'v2-alpha-tpuv6e-x'], ['--runtime-version=v2-alpha-tpuv6e-x'], []),
    (['--on-demand'], [], ['--spot', '--reserved']),
  ],
)
def test_create_options(cloud, options, expected, absent):
  result = cloud.launch('create', *NAME, *options, rules=[(STATE, [GONE]), (CREATE, [''])])
  assert result.code == 0, result.err
  call = words(result, CREATE)
  assert set(expected) <= set(call)
  assert not set(absent) & set(call)


@pytest.mark.parametrize(
  'kind, api, runtime',
  [
    ('v4-16', 'v4-16', 'tpu-ubuntu2204-base'),
    ('v5e-16', 'v5litepod-16', 'v2-alpha-tpuv5-lite'),
    ('v5litepod-256', 'v5litepod-256', 'v2-alpha-tpuv5-lite'),
    ('v5p-128', 'v5p-128', 'v2-alpha-tpuv5'),
  ],
)
def test_types(cloud, kind, api, runtime):
  result = cloud.launch(
    'create',
    '--name=pod',
    '--zone=z-1-a',
    f'--type={kind}',
    rules=[(STATE, [GONE]), (CREATE, [''])],
  )
  call = words(result, CREATE)
  assert f'--accelerator-type={api}' in call and f'--runtime-version={runtime}' in call


@pytest.mark.parametrize(
  'state', ['ACTIVE', 'WAITING_FOR_RESOURCES', 'CREATING', 'PROVISIONING', 'ACCEPTED']
)
def test_second_create_is_a_no_op(cloud, state):
  result = cloud.launch('create', *NAME, rules=[(STATE, [state])])
  assert result.code == 0 and len(result.calls) == 1
  assert state in result.err


def test_created_in_between(cloud):
  exists = ('', 'ERROR: ALREADY_EXISTS: Resource already exists', 1)
  result = cloud.launch('create', *NAME, rules=[(STATE, [GONE]), (CREATE, [exists])])
  assert result.code == 0


@pytest.mark.parametrize('state', ['SUSPENDED', 'FAILED', 'SUSPENDING'])
def test_the_name_of_a_lost_request_is_freed_first(cloud, state):
  rules = [
    (STATE, [state]),
    (DELETE, [('', 'ERROR: FAILED_PRECONDITION busy', 1), '']),
    (CREATE, ['']),
  ]
  result = cloud.launch('create', *NAME, rules=rules)
  assert result.code == 0
  order = [call[3] for call in result.calls]
  assert order == ['describe', 'delete', 'delete', 'create']
  assert result.calls[1][-2:] == ['--force', '--quiet']
  assert result.naps == [10]


@pytest.mark.parametrize(
  'complaint, code, sentence',
  [
    (
      'There is no more capacity in the zone "us-east5-b"',
      3,
      'no capacity for v6e-16 in us-east5-b',
    ),
    ('RESOURCE_EXHAUSTED: stockout', 3, '--zones'),
    ("Quota limit 'TPUV6EPerProject' has been exceeded. Limit: 0", 3, 'no quota for v6e-16'),
    (
      'SERVICE_DISABLED: Cloud TPU API has not been used in project 1',
      2,
      'gcloud services enable tpu.googleapis.com',
    ),
    ('unrecognized arguments: --node-count=2', 2, 'gcloud components update'),
    (
      'There was a problem refreshing your auth tokens; run: gcloud auth login',
      2,
      'gcloud auth login',
    ),
    ('PERMISSION_DENIED: tpu.nodes.create', 2, 'roles/tpu.admin'),
    (
      'INVALID_ARGUMENT: Accelerator type v6e-16 is not available',
      2,
      'accelerator-types list --zone=us-east5-b',
    ),
    ('INTERNAL: something', 2, 'its own words'),
  ],
)
def test_complaints_become_sentences(cloud, complaint, code, sentence):
  rules = [
    (STATE, [GONE]),
    (CREATE, [('', f'ERROR: {complaint}', 1)]),
    ('--version', ['Google Cloud SDK 400.0.0']),
  ]
  result = cloud.launch('create', *NAME, rules=rules)
  assert result.code == code
  assert sentence in result.err and complaint in result.err


def test_wait_prints_changes_and_backs_off(cloud):
  states = ['WAITING_FOR_RESOURCES'] * 6 + ['PROVISIONING', 'ACTIVE']
  result = cloud.launch('wait', *NAME, rules=[(STATE, states)])
  assert result.code == 0
  assert result.naps == [10, 15, 22, 33, 49, 60, 60]
  assert 'WAITING_FOR_RESOURCES -> PROVISIONING after 189 s' in result.err
  assert 'PROVISIONING -> ACTIVE' in result.err


@pytest.mark.parametrize(
  'answers, reason, code',
  [
    (['FAILED'], 'There is no more capacity in the zone', 3),
    (['FAILED'], 'Quota limit exceeded', 3),
    (['FAILED'], '', 3),
    (['CREATING', 'SUSPENDED'], '', 6),
    ([GONE], '', 6),
    (['WAITING_FOR_RESOURCES'], '', 7),
    ([('', 'ERROR: connection reset by peer', 1)], '', 7),
  ],
)
def test_wait_exit_codes(cloud, answers, reason, code):
  rules = [(STATE, answers), ('failedData', [reason])]
  result = cloud.launch('wait', *NAME, '--wait-timeout', '10m', rules=rules)
  assert result.code == code, result.err
  assert sum(result.naps) <= 600 + 60


def test_wait_survives_a_question_that_fails(cloud):
  result = cloud.launch('wait', *NAME, rules=[(STATE, [('', 'ERROR: no network', 1), 'ACTIVE'])])
  assert result.code == 0


def test_a_failed_question_is_not_taken_for_gone(cloud):
  result = cloud.launch('create', *NAME, rules=[(STATE, [('', 'ERROR: PERMISSION_DENIED', 1)])])
  assert result.code == 2 and len(result.calls) == 1


def test_delete(cloud):
  result = cloud.launch('delete', *NAME, '--yes', rules=[(DELETE, [''])])
  assert result.code == 0
  assert result.calls == [
    [
      'compute',
      'tpus',
      'queued-resources',
      'delete',
      'pod',
      '--zone=us-east5-b',
      '--force',
      '--quiet',
    ]
  ]
  assert cloud.launch('delete', *NAME, '--yes', rules=[(DELETE, [GONE])]).code == 0
  unsure = cloud.launch('delete', *NAME)
  assert unsure.code == 2 and '--yes' in unsure.err and not unsure.calls


GCE = ('--name', 'pod', '--zone', 'us-east5-b', '--backend', 'gce')
VM_STATE, VM_CREATE = 'instances describe', 'instances create'


def test_gce_create(cloud):
  result = cloud.launch(
    'create', *GCE, '--type', 'v6e-4', '--spot', rules=[(VM_STATE, [GONE]), (VM_CREATE, [''])]
  )
  assert result.code == 0
  call = words(result, VM_CREATE)
  assert call[:4] == ['compute', 'instances', 'create', 'pod']
  assert {
    '--machine-type=ct6e-standard-4t',
    '--maintenance-policy=TERMINATE',
    '--image-project=ubuntu-os-accelerator-images',
    '--image-family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e',
    '--provisioning-model=SPOT',
    '--instance-termination-action=DELETE',
    '--zone=us-east5-b',
  } <= set(call)


@pytest.mark.parametrize(
  'kind, machine',
  [
    ('v5e-8', 'ct5lp-hightpu-8t'),
    ('v5p-8', 'ct5p-hightpu-4t'),
    ('v6e-8', 'ct6e-standard-8t'),
    ('tpu7x-8', 'tpu7x-standard-4t'),
  ],
)
def test_gce_machine_types(cloud, kind, machine):
  result = cloud.launch(
    'create', *GCE, '--type', kind, rules=[(VM_STATE, [GONE]), (VM_CREATE, [''])]
  )
  assert f'--machine-type={machine}' in words(result, VM_CREATE)


def test_gce_is_the_default_for_tpu7x_and_flex_asks_for_a_duration(cloud):
  result = cloud.launch(
    'create',
    '--name=pod',
    '--zone=z-1-a',
    '--type=tpu7x-8',
    '--flex',
    '--max-run-duration=4h',
    rules=[(VM_STATE, [GONE]), (VM_CREATE, [''])],
  )
  assert {
    '--provisioning-model=FLEX_START',
    '--request-valid-for-duration=2h',
    '--max-run-duration=4h',
    '--image-family=ubuntu-accel-2404-amd64-tpu-tpu7x',
  } <= set(words(result, VM_CREATE))


def test_gce_wait_and_delete(cloud):
  rules = [(VM_STATE, ['STAGING', 'RUNNING']), ('instances delete', [''])]
  assert cloud.launch('wait', *GCE, '--type', 'v6e-4', rules=rules).code == 0
  assert cloud.launch('wait', *GCE, '--type', 'v6e-4', rules=[(VM_STATE, ['TERMINATED'])]).code == 6
  assert cloud.launch('delete', *GCE, '--type', 'v6e-4', '--yes', rules=rules).code == 0


@pytest.mark.parametrize(
  'args, sentence',
  [
    ([], 'usage'),
    (['launch'], "unknown command 'launch'"),
    (['create', '--zone', 'z', '--type', 'v6e-8'], '--name is required'),
    (['create', '--name', 'n', '--type', 'v6e-8'], '--zone is required'),
    (['create', '--name', 'n', '--zone', 'z'], '--type is required'),
    (['create', '--name', 'N', '--zone', 'z', '--type', 'v6e-8'], "--name: found 'N'"),
    (['create', *NAME[:4], '--type', 'h100-8'], "found 'h100-8'"),
    (['create', *NAME[:4], '--type', 'v6e-many'], 'expected a number'),
    (['create', *NAME, '--backend', 'gke'], "found 'gke'"),
    (['create', *NAME, '--backend', 'gce'], 'single host'),
    (
      ['create', *NAME[:4], '--type', 'v6e-8', '--backend', 'gce', '--slices', '2'],
      '--slices needs',
    ),
    (['create', *NAME[:4], '--type', 'tpu7x-8', '--backend', 'qr'], 'not in the Cloud TPU API'),
    (['create', *NAME, '--slices', 'two'], "--slices: found 'two'"),
    (['create', *NAME, '--wait-timeout', 'soon'], "--wait-timeout: found 'soon'"),
    (['create', *NAME, '--bucket', 'b'], "--bucket: found 'b'"),
    (['create', *NAME, '--zonee', 'z'], 'unknown option --zonee'),
    (['create', *NAME, '--project'], '--project needs a value'),
    (['create', *NAME, 'extra'], "unexpected word 'extra'"),
    (['run', *NAME], "needs the job's command"),
    (['run', *NAME, '--run-name', 'a b', '--', 'x'], "--run-name: found 'a b'"),
  ],
)
def test_usage_errors(cloud, args, sentence):
  result = cloud.launch(*args)
  assert result.code == 2 and sentence in result.err and not result.calls


def test_help_and_no_cloud_needed_for_it(cloud):
  result = cloud.launch('--help')
  assert result.code == 0 and 'exit codes' in result.out
  assert cloud.launch('create', '--help').out == result.out


def test_options_from_environment_and_file(cloud):
  file = cloud.path / 'launch.env'
  file.write_text('# defaults\nHRVLM_ZONE=from-file-a\nHRVLM_TYPE=v6e-8\n')
  cloud.environment = {
    'HRVLM_LAUNCH_ENV': str(file),
    'HRVLM_NAME': 'env-pod',
    'HRVLM_TYPE': 'v6e-16',
  }
  rules = [(STATE, [GONE]), (CREATE, [''])]
  call = words(cloud.launch('create', '--type', 'v6e-32', rules=rules), CREATE)
  assert {'env-pod', '--zone=from-file-a', '--accelerator-type=v6e-32'} <= set(call)
  file.write_text('ZONE=x\n')
  result = cloud.launch('create', rules=rules)
  assert result.code == 2 and 'HRVLM_' in result.err
