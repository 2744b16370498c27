"""babysit: preemption and failure are different things and are counted apart."""

import re

import pytest

NAME = (
  '--name',
  'pod',
  '--zone',
  'us-east5-b',
  '--type',
  'v6e-8',
  '--run-name',
  'r',
  '--poll',
  '30',
)
JOB = ('--', 'python', '-m', 'hrvlm_jax.cli', 'train', '--workdir', 'gs://b/r')
GONE = ('', 'ERROR: NOT_FOUND: no such resource', 1)
LOST = ('', 'ERROR: [/usr/bin/ssh] exited with return code [255].', 255)
STOCKOUT = ('', 'ERROR: There is no more capacity in the zone', 1)


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
    'last': '-',
  } | more
  return f'status {worker} ' + ' '.join(f'{k}={v}' for k, v in words.items()) + '\n'


RUNNING = line(0, 'running') + line(1, 'running')
SUCCESS = line(0, 'success', exit=0) + line(1, 'success', exit=0)
FAILED = line(0, 'failed', exit=134, ended=120) + line(1, 'failed', exit=1, ended=100)


@pytest.fixture
def babysit(cloud, checkout):
  """babysit(status=[...], request=[...]) -> Result; other answers are those of a healthy cloud."""

  def go(
    *options,
    status,
    request=(GONE, 'ACTIVE'),
    node=('READY',),
    steps=('',),
    create=('',),
    setup=('',),
    hosts=2,
    log='Traceback: boom',
    job=JOB,
    extra=(),
  ):
    rules = [
      *extra,
      ('queued-resources describe .*state.state', list(request)),
      ('queued-resources create', list(create)),
      ('queued-resources delete', ['']),
      (r'value\(state\)', list(node)),
      ('networkEndpoints', [str(hosts)]),
      ('worker_run.sh status', list(status)),
      ('worker_run.sh logs', [log]),
      ('worker_setup', list(setup)),
      ('storage ls', list(steps)),
      ('storage cp', ['']),
      ('buckets describe', ['US-EAST5']),
      ('tpu-vm ssh', ['']),
    ]
    return cloud.launch(
      'babysit',
      *NAME,
      '--bucket',
      'gs://b',
      *options,
      *job,
      rules=rules,
      script=checkout / 'scripts' / 'launch.sh',
    )

  return go


def verbs(result):
  """The course of events in one word per call; questions left out."""
  found = []
  for call in result.calls:
    text = ' '.join(call)
    for word, sign in [
      ('create', 'queued-resources create'),
      ('delete', 'queued-resources delete'),
      ('setup', 'worker_setup'),
      ('start', 'worker_run.sh start'),
      ('stop', 'worker_run.sh stop'),
      ('logs', 'worker_run.sh logs'),
    ]:
      if sign in text:
        found.append(word)
  return found


def test_success_deletes(babysit):
  result = babysit(status=[RUNNING, RUNNING, SUCCESS])
  assert result.code == 0, result.err
  assert verbs(result) == ['create', 'setup', 'start', 'delete']
  assert result.naps == [30, 30, 30]


def test_keep(babysit):
  result = babysit('--keep', status=[SUCCESS])
  assert result.code == 0 and verbs(result) == ['create', 'setup', 'start']


ACTIVE = ['ACTIVE']
# create asks once, wait once, each look once.
TAKEN = [GONE, 'ACTIVE', 'ACTIVE', 'SUSPENDED', GONE, 'ACTIVE', 'ACTIVE']


def test_suspended_is_preemption_and_the_run_resumes(babysit):
  result = babysit(status=[RUNNING, SUCCESS], request=TAKEN)
  assert result.code == 0, result.err
  assert verbs(result) == [
    'create',
    'setup',
    'start',
    'delete',
    'create',
    'setup',
    'start',
    'delete',
  ]
  assert 'preemption 1' in result.err and 'failed' not in result.err
  starts = result.lines('worker_run.sh start')
  starts = [re.sub(r' --attempt \S+', '', start) for start in starts]
  assert starts[0] == starts[1] and 'start r ' in starts[0]  # same run name, same workdir
  # The very same source: it went to the bucket once.
  assert len(result.lines('storage cp .*/src.tgz gs://b/r/src.tgz')) == 1
  assert len(result.lines('ssh .*gcloud storage cp gs://b/r/src.tgz')) == 2


@pytest.mark.parametrize('states', ['PREEMPTED', 'TERMINATED', 'STOPPED', GONE])
def test_a_node_that_is_gone_is_preemption(babysit, states):
  request = [GONE, 'ACTIVE', 'ACTIVE', GONE, 'ACTIVE']
  result = babysit(status=[SUCCESS], request=request, node=[states, 'READY'])
  assert result.code == 0 and 'preemption 1' in result.err


@pytest.mark.parametrize(
  'sign', [{'marker': 'PREEMPTED', 'exit': 0}, {'preempted': 'TRUE', 'exit': 0}]
)
def test_exit_0_with_a_marker_is_preemption_never_success(babysit, sign):
  marked = line(0, 'success', **sign) + line(1, 'success', exit=0)
  request = [GONE, 'ACTIVE', 'ACTIVE', GONE, 'ACTIVE']
  result = babysit(status=[marked, SUCCESS], request=request)
  assert result.code == 0 and 'preemption 1' in result.err
  assert verbs(result).count('start') == 2


def test_crashes_caused_by_preemption_do_not_use_up_the_failure_budget(babysit):
  crash = line(0, 'failed', exit=134, ended=9) + line(1, 'running', preempted='TRUE')
  request = [GONE, 'ACTIVE', 'ACTIVE'] + [GONE, 'ACTIVE', 'ACTIVE'] * 4
  result = babysit(status=[crash] * 4 + [SUCCESS], request=request)
  assert result.code == 0 and 'preemption 4' in result.err


def test_the_api_is_asked_again_before_a_crash_counts_as_failure(babysit):
  request = [GONE, 'ACTIVE', 'ACTIVE', 'SUSPENDING', GONE, 'ACTIVE']
  result = babysit(status=[FAILED, SUCCESS], request=request)
  assert (
    result.code == 0
    and 'preemption 1' in result.err
    and 'without a new checkpoint' not in result.err
  )


def test_three_failures_without_progress(babysit):
  result = babysit(status=[FAILED])
  assert result.code == 5
  assert verbs(result) == ['create', 'setup'] + ['start', 'logs', 'stop'] * 3
  # Worker 1 failed first although worker 0 is first in the list.
  assert 'worker 1 failed first' in result.err and 'boom' in result.out
  assert all(
    '--worker=1' in text and '--lines 50' in text for text in result.lines('worker_run.sh logs')
  )
  assert 'pod in us-east5-b is still there (ACTIVE)' in result.err and KEPT in result.err


def test_progress_resets_the_failure_counter(babysit):
  # Two questions an attempt: at its start and when it failed.
  newest = lambda *steps: ''.join(f'gs://b/r/checkpoints/{s}/\n' for s in steps)
  steps = [
    '',
    newest(100),
    newest(100),
    newest(100, 200),
    newest(200),
    newest(200),
    newest(200),
    newest(200),
  ]
  result = babysit(status=[FAILED], steps=steps)
  assert result.code == 5
  counts = [
    text.split('(')[1].split(' ')[0] for text in result.err.splitlines() if 'in a row' in text
  ]
  assert counts == ['1', '1', '2', '3']


def test_progress_in_a_local_workdir_comes_from_the_workers(babysit):
  job = ('--', 'python', 't.py', '--workdir=out')
  at = lambda n: line(0, 'failed', exit=1, ended=1, step=n) + line(1, 'failed', exit=1, ended=2)
  result = babysit(status=[at(5), at(9), at(9), at(9)], job=job)
  assert result.code == 5 and verbs(result).count('start') == 4


def test_a_worker_that_dies_without_an_exit_code_is_a_failure(babysit):
  dead = line(0, 'running') + line(1, 'dead')
  result = babysit(status=[dead, SUCCESS])
  assert result.code == 0 and 'failed on healthy machines (1 in a row' in result.err
  assert verbs(result) == ['create', 'setup', 'start', 'logs', 'stop', 'start', 'delete']


def test_retries_used_up(babysit):
  request = [GONE, 'ACTIVE', 'SUSPENDED'] * 4
  result = babysit('--max-retries', '2', status=[RUNNING], request=request)
  assert result.code == 6
  assert verbs(result).count('create') == 3 and verbs(result)[-1] == 'delete'


def test_stockout_backs_off_and_tries_the_next_zone(babysit):
  result = babysit(
    '--zones',
    'us-east5-b,us-east1-d',
    status=[SUCCESS],
    request=[GONE] * 3 + ['ACTIVE'],
    create=[STOCKOUT, STOCKOUT, ''],
  )
  assert result.code == 0
  assert result.naps[:2] == [60, 120]
  zones = [
    w
    for text in result.lines('queued-resources create')
    for w in text.split()
    if w.startswith('--zone=')
  ]
  assert zones == ['--zone=us-east5-b', '--zone=us-east1-d', '--zone=us-east5-b']


def test_stockout_ends_with_code_3(babysit):
  result = babysit('--max-retries', '5', status=[RUNNING], request=[GONE], create=[STOCKOUT])
  assert result.code == 3 and result.naps == [60, 120, 240, 480, 900]


def test_stockout_found_while_waiting(babysit):
  reason = ('failedData', ['There is no more capacity in the zone'])
  result = babysit(status=[SUCCESS], request=[GONE, 'FAILED', 'FAILED', 'ACTIVE'], extra=[reason])
  assert result.code == 0
  assert verbs(result)[:3] == ['create', 'delete', 'create']


def test_quota_does_not_wait(babysit):
  result = babysit(status=[RUNNING], request=[GONE], create=[('', 'Quota limit exceeded', 1)])
  assert result.code == 3 and not result.naps


KEPT = 'Delete it with: scripts/launch.sh delete --name pod --zone us-east5-b --type v6e-8'


def test_setup_failure(babysit):
  """Tried again for --patience, then given up; the machines are named."""
  broken = ('', 'FAILED at: installing', 1)
  result = babysit('--patience', '1m', status=[RUNNING], setup=[broken])
  assert result.code == 4 and verbs(result) == ['create'] + ['setup'] * 4
  assert result.naps == [15, 30, 15] and KEPT in result.err and '(--patience)' in result.err


def test_setup_that_cannot_pass_is_not_repeated(babysit):
  broken = ('', 'setup h0: FAILED at: the check (hrvlm doctor)', 1)
  result = babysit(status=[RUNNING], setup=[broken])
  assert result.code == 4 and verbs(result) == ['create', 'setup'] and KEPT in result.err


gcloud = lambda words: ('', f'ERROR: (gcloud.compute.tpus) {words}', 1)
B503 = gcloud('UNAVAILABLE: The service is currently unavailable.')
DNS = gcloud('There was a problem refreshing your auth tokens: (NameResolutionError); '
             'run: gcloud auth login')  # fmt: skip
INTERNAL = gcloud('INTERNAL: Internal error encountered.')
RATE = gcloud("RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Write requests' and limit "
              "'Write requests per minute' of service 'tpu.googleapis.com'")  # fmt: skip
COPY = ('storage cp', [('', 'ERROR: HTTPError 503: Service unavailable', 1), ''])
CASES = {
  'first look': (dict(request=[B503, GONE, 'ACTIVE']), []),
  'look without an answer': (dict(request=[GONE, '', 'ACTIVE']), []),
  'create, rate': (dict(request=[GONE, GONE, 'ACTIVE'], create=[RATE, '']), ['create']),
  'create, INTERNAL': (dict(request=[GONE, GONE, 'ACTIVE'], create=[INTERNAL, '']), ['create']),
  'endpoints': (dict(extra=[('networkEndpoints', [B503, '', '2'])]), []),
  'copy': (dict(extra=[COPY]), []),
  'package install': (dict(setup=[('', 'FAILED at: installing the package', 1), '']), ['setup']),
  'start': (dict(extra=[('worker_run.sh start', [INTERNAL, 'started'])]), ['start']),
  'checkpoints': (dict(steps=[B503, '']), []),
}


@pytest.mark.parametrize('where', CASES)
def test_what_fails_in_passing_is_tried_again(babysit, where):
  answers, twice = CASES[where]
  result = babysit(status=[RUNNING, SUCCESS], **answers)
  assert result.code == 0, result.err
  expected = [v for v in ['create', 'setup', 'start'] for _ in range(1 + (v in twice))]
  assert verbs(result) == [*expected, 'delete'] and 'preemption' not in result.err
  if where == 'start':  # the same request, by which a worker knows that it has started already
    assert len(set(result.lines('worker_run.sh start'))) == 1


@pytest.mark.parametrize('words', [B503, DNS, RATE])
def test_asking_again_after_a_preemption_outlives(babysit, words):
  request = [GONE, 'ACTIVE', 'ACTIVE', 'SUSPENDED', words, GONE, 'ACTIVE', 'ACTIVE']
  result = babysit(status=[RUNNING, SUCCESS], request=request)
  assert result.code == 0 and verbs(result).count('create') == 2, result.err


def test_the_budget_ends_and_machines_that_may_be_there_are_named(babysit):
  result = babysit('--patience', '2m', status=[RUNNING], request=[B503])
  assert result.code == 2 and sum(result.naps) == 120
  request = [GONE, 'ACTIVE', B503]
  result = babysit('--patience', '1m', status=[RUNNING], request=request,
                   extra=[('networkEndpoints', [B503])])  # fmt: skip
  assert result.code == 4 and 'does not say whether pod' in result.err and KEPT in result.err
  denied = gcloud('PERMISSION_DENIED: no')
  result = babysit('--project', 'p', status=[RUNNING], setup=[denied])
  assert result.code == 4 and verbs(result).count('setup') == 1
  assert f'{KEPT} --project p' in result.err


def test_a_running_job_is_not_started_over_when_its_host_cannot_be_asked(babysit):
  result = babysit(status=[B503, B503, B503, RUNNING, SUCCESS], request=['ACTIVE'])
  assert result.code == 0 and verbs(result) == ['delete'], result.err


@pytest.mark.parametrize('state', ['REPAIRING', 'RESTARTING', 'STARTING', ''])
def test_a_node_that_comes_back_is_no_preemption(babysit, state):
  result = babysit(status=[RUNNING, SUCCESS], node=[state, 'READY'])
  assert result.code == 0 and 'preemption' not in result.err


def test_hosts_that_all_stay_silent_are_not_deleted(babysit):
  result = babysit('--patience', '2m', '--ssh-tries', '1', status=[RUNNING] + [LOST] * 99)
  assert result.code == 7 and 'delete' not in verbs(result) and KEPT in result.err
  result = babysit('--ssh-tries', '1', status=[B503] * 30 + [SUCCESS])  # gcloud, not the hosts
  assert result.code == 0 and 'preemption' not in result.err


def test_a_config_that_is_not_sent_is_found_before_machines(babysit, checkout):
  (checkout / 'configs').mkdir()
  (checkout / 'configs/mine.py').write_text('x')
  (checkout / 'runs/own.py').write_text('x')
  told = {
    'configs/mine.py': 'configs/mine.py would not be there on the machines: git does not know it',
    'configs/mine.py:a,b': 'git add configs/mine.py',
    'mine:a': 'git add configs/mine.py',
    'runs/own.py': 'never sent',
    'configs/typo.py': 'no file configs/typo.py',
    'key.pem': 'key.pem',
  }
  for config, sentence in told.items():
    for words in (['--config', config], [f'--config={config}']):
      result = babysit(status=[SUCCESS], job=(*JOB, *words))
      assert result.code == 2 and sentence in result.err and not verbs(result), config
  result = babysit(status=[SUCCESS], job=(*JOB, '--config', 'a b.py:x,y'))
  assert result.code == 0 and 'untracked files are not sent: configs/mine.py' in result.err


def test_machines_lost_during_setup_are_preemption(babysit):
  result = babysit(
    status=[SUCCESS],
    setup=[LOST, LOST, LOST, LOST, ''],
    request=[GONE, 'ACTIVE', 'SUSPENDED', GONE, 'ACTIVE'],
  )
  assert result.code == 0 and 'preemption 1' in result.err


def test_a_host_that_stays_silent_is_lost(babysit):
  one = line(0, 'running')
  request = [GONE, 'ACTIVE'] + ['ACTIVE'] * 5 + [GONE, 'ACTIVE']
  result = babysit('--ssh-tries', '1', status=[one] * 15 + [SUCCESS], request=request)
  assert result.code == 0 and 'five looks' in result.err and 'preemption 1' in result.err


def test_gcloud_that_does_not_answer_is_no_verdict(babysit):
  offline = ('', 'ERROR: network is unreachable', 1)
  result = babysit(status=[SUCCESS], request=[GONE, 'ACTIVE'] + [offline] * 20 + ['ACTIVE'])
  assert result.code == 0 and verbs(result) == ['create', 'setup', 'start', 'delete']


def test_a_second_babysit_watches_the_job_that_runs(babysit):
  result = babysit(status=[RUNNING, RUNNING, SUCCESS], request=['ACTIVE'])
  assert result.code == 0 and verbs(result) == ['delete']


def test_slices_are_one_job(babysit):
  """One slice lost ends all: everything is deleted and starts again."""
  one = lambda slice_, state, **more: line(f'{slice_}.0', state, **more)
  extra = [
    ('ssh pod-0 .*worker_run.sh status', [one(0, 'running'), one(0, 'success', exit=0)]),
    ('ssh pod-1 .*worker_run.sh status', [one(1, 'running'), one(1, 'success', exit=0)]),
    (r'tpu-vm describe pod-1 .*value\(state\)', ['READY', 'PREEMPTED', 'READY']),
  ]
  request = [GONE, 'ACTIVE', 'ACTIVE', 'ACTIVE', GONE, 'ACTIVE']
  result = babysit('--slices', '2', status=[''], hosts=1, extra=extra, request=request)
  assert result.code == 0
  assert verbs(result).count('start') == 4 and verbs(result).count('create') == 2


def test_hints_for_known_messages(babysit):
  log = 'RuntimeError: The TPU is already in use by process with pid 12'
  result = babysit(status=[FAILED], log=log)
  assert 'run scripts/launch.sh stop' in result.err


def test_a_log_that_stands_still_is_a_failure(babysit):
  """All hosts silent for --stall: ended and started again; one that still writes keeps the job."""
  still = ''.join(line(n, 'running', age='3600s') for n in (0, 1))
  one = line(0, 'running', age='9000s') + line(1, 'running', age='599s')
  result = babysit(status=[RUNNING, one, still, SUCCESS])
  assert result.code == 0, result.err
  assert verbs(result) == ['create', 'setup', 'start', 'logs', 'stop', 'start', 'delete']
  assert '1h (--stall): the job stands still' in result.err
  result = babysit('--stall', '0', status=[still, SUCCESS])
  assert result.code == 0 and verbs(result) == ['create', 'setup', 'start', 'delete']
  result = babysit('--stall', 'soon', status=[SUCCESS])
  assert result.code == 2 and '--stall' in result.err
