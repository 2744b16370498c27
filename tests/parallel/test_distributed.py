"""Start-up of several processes: it names whom it waits for and ends in a sentence."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel import distributed
from hrvlm_jax.parallel.addresses import bind_address, own_addresses
from hrvlm_jax.parallel.mesh import make_mesh
from hrvlm_jax.parallel.rendezvous import meet
from hrvlm_jax.parallel.secret import run_secret

REPO = pathlib.Path(__file__).resolve().parents[2]


def run_all(calls):
  """Runs the calls in threads; returns their results or exceptions."""
  results = [None] * len(calls)

  def one(i, call):
    try:
      results[i] = call()
    except UserError as error:
      results[i] = error

  threads = [threading.Thread(target=one, args=(i, call)) for i, call in enumerate(calls)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  return results


def attend(port, process, processes=3, **options):
  options = {'timeout': 30} | options
  address = f'localhost:{port}'
  return lambda: meet(address, processes=processes, process=process, **options)


def test_all_meet_in_any_order(port):
  def late():
    time.sleep(0.5)
    return attend(port, 0)()

  results = run_all([attend(port, 2), attend(port, 1), late])
  assert all(isinstance(found, dict) and sorted(found) == [0, 1, 2] for found in results), results


def test_the_missing_are_named_to_everybody(port):
  said = []
  hosts = {0: 'tpu-w0', 1: 'tpu-w1', 2: 'tpu-w2'}
  options = {'timeout': 1.2, 'report_every': 0.3, 'hosts': hosts, 'report': said.append}
  results = run_all([attend(port, 0, **options), attend(port, 1, timeout=20, report=said.append)])
  for error in results:
    assert '1 of 3 processes did not start within 1.2 s: tpu-w2 (process 2)' in str(error)
  waiting = [text for text in said if text.startswith('waiting for')]
  assert any('waiting for 1 of 3 processes: tpu-w2 (process 2)' in text for text in waiting)


def test_a_missing_coordinator_is_a_sentence(port):
  said = []
  begun = time.monotonic()
  (error,) = run_all([attend(port, 1, timeout=1, report_every=0.3, report=said.append)])
  assert time.monotonic() - begun < 10
  assert f'process 0 did not answer at localhost:{port + 1} within 1 s' in str(error)
  assert any('waiting for process 0' in text for text in said)


def test_contradictions(port):
  results = run_all([attend(port, 0), attend(port, 1, processes=4)])
  assert all('was started for 4 processes' in str(error) for error in results)


def test_the_same_number_twice(port):
  results = run_all([attend(port, 0), attend(port, 1), attend(port, 1)])
  assert all('process number 1 was given to' in str(error) for error in results), results


def test_a_process_that_dies_while_waiting_may_come_again(port):
  code = (
    'from hrvlm_jax.parallel.rendezvous import meet\n'
    f'meet("localhost:{port}", processes=3, process=1, timeout=60)'
  )
  said = []
  first = subprocess.Popen([sys.executable, '-c', code], cwd=REPO)
  results = []
  host = threading.Thread(
    target=lambda: results.append(attend(port, 0, report_every=0.2, report=said.append)())
  )
  host.start()
  wait_until(lambda: any('1 of 3 processes: process 2' in text for text in said))
  first.kill()
  first.wait()
  wait_until(lambda: '2 of 3 processes' in said[-1])
  run_all([attend(port, 1), attend(port, 2)])
  host.join(30)
  assert sorted(results[0]) == [0, 1, 2]


def wait_until(condition):
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline, 'waited 60 s in vain'
    time.sleep(0.05)


def test_strangers_neither_end_nor_hang_nor_fill_nor_join_a_start(port):
  """All at once, before and while the real ones come; without the run's secret."""
  said, results, kept = [], [], []
  host = threading.Thread(target=lambda: results.append(
    attend(port, 0, report_every=0.2, report=said.append)()))
  host.start()
  wait_until(lambda: said)

  def hello(process, processes=3):
    return json.dumps({'process': process, 'processes': processes, 'host': 'evil'}).encode() + b'\n'

  signed = b'0' * 32 + b' ' + b'0' * 64 + b' '
  junk = [b'GET / HTTP/1.0\r\n\r\n', b'[1]\n', b'', b'\xff\xfe\x00\n', b'{', b'[' * 100_000 + b'\n',
          hello(1), hello(2), hello(1, processes=9), hello('x'), hello([1]), hello(1.5),
          signed + hello(1), signed + hello(1, processes=9), b'a' * (4 << 20)]
  for data in [*junk, *[b''] * 60]:
    connection = socket.create_connection(('127.0.0.1', port + 1), timeout=5)
    kept.append(connection)
    with contextlib.suppress(OSError):  # it is closed at once
      connection.sendall(data)
  time.sleep(0.5)
  assert host.is_alive() and '2 of 3 processes: process 1, process 2' in said[-1]
  got = run_all([attend(port, 1), attend(port, 2)])
  host.join(30)
  own = {number: socket.gethostname() for number in range(3)}
  assert results == [own] and got == [own, own]
  for connection in kept:  # all are closed
    connection.settimeout(5)
    with contextlib.suppress(ConnectionError):
      while connection.recv(1 << 16):
        pass
    connection.close()


def test_one_deadline_for_what_drips(port):
  """Neither process 0 nor one that waits for it is held by a byte now and then."""
  begun, stop = time.monotonic(), threading.Event()

  def drip(connection):
    with contextlib.suppress(OSError):
      while not stop.wait(0.2):
        connection.sendall(b' ')

  with socket.create_server(('127.0.0.1', port + 3)) as impostor:  # of another run
    threading.Thread(target=lambda: drip(impostor.accept()[0]), daemon=True).start()
    meeting = attend(port, 0, timeout=2)
    threading.Thread(target=lambda: wait_until(lambda: _drip_into(port + 1, drip)),
                     daemon=True).start()
    results = run_all([meeting, attend(port + 2, 1, timeout=2, secret=lambda: b's' * 16)])
  stop.set()
  assert 'did not start within 2 s: process 1, process 2' in str(results[0])
  assert f'process 0 did not answer at localhost:{port + 3} within 2 s' in str(results[1])
  assert time.monotonic() - begun < 10


def _drip_into(port, drip):
  try:
    connection = socket.create_connection(('127.0.0.1', port), timeout=5)
  except OSError:
    return False
  threading.Thread(target=drip, args=(connection,), daemon=True).start()
  return True


def test_it_listens_on_its_own_address_only(port, monkeypatch):
  assert own_addresses('127.0.0.1') == ['127.0.0.1'] and own_addresses('192.0.2.7') == []
  assert bind_address(f'127.0.0.1:{port}') == f'127.0.0.1:{port}'
  # Debian writes a machine's own name down as 127.0.1.1; the other hosts know a real address.
  monkeypatch.setattr(socket, 'getaddrinfo', lambda *_, **__: [(2, 1, 6, '', ('127.0.1.1', 0))])
  assert own_addresses('myhost') == [] and bind_address('myhost:1') is None
  monkeypatch.undo()
  host = threading.Thread(target=lambda: run_all([attend(port, 0, timeout=2)]))
  host.start()
  wait_until(lambda: _poke(port + 1, b''))
  listening = [line.split()[1] for name in ('tcp', 'tcp6')
               for line in pathlib.Path(f'/proc/net/{name}').read_text().splitlines()[1:]
               if line.split()[3] == '0A' and line.split()[1].endswith(f':{port + 1:04X}')]
  assert listening and all(address in ('0100007F', '00000000000000000000000001000000')
                           for address, _, _ in (one.partition(':') for one in listening))
  host.join(30)


def test_the_secret_of_a_run(port, monkeypatch):
  assert run_secret('10.0.0.1:8482', 0) is None
  with pytest.raises(UserError, match='HRVLM_RUN_TOKEN'):
    meet('10.0.0.1:8482', processes=2, process=1, timeout=1)
  assert run_secret(f'localhost:{port}', 0)() == run_secret(f'localhost:{port}', 1)()
  folder = pathlib.Path(f'/tmp/hrvlm-meetings-{os.getuid()}')
  assert stat.S_IMODE(folder.stat().st_mode) == 0o700
  assert stat.S_IMODE((folder / f'meeting.{port}').stat().st_mode) == 0o600
  monkeypatch.setenv('HRVLM_RUN_TOKEN', 'short')
  with pytest.raises(UserError, match='has 5 letters, expected at least 16'):
    run_secret('10.0.0.1:8482', 0)
  monkeypatch.setenv('HRVLM_RUN_TOKEN', 'a' * 32)
  assert run_secret('10.0.0.1:8482', 1)() == b'a' * 32
  # Another secret is a stranger's.
  results = run_all([attend(port, 0, processes=2, timeout=1.5),
                     attend(port, 1, processes=2, timeout=1, secret=lambda: b'b' * 32)])
  assert 'process 1' in str(results[0]) and 'process 0 did not answer' in str(results[1])


def _poke(port, junk):
  try:
    with socket.create_connection(('localhost', port), timeout=5) as connection:
      connection.sendall(junk)
      return True
  except OSError:
    return False


def test_a_port_that_is_taken(port):
  with socket.create_server(('', port + 1)):
    (error,) = run_all([attend(port, 0)])
  assert f'port {port + 1}' in str(error) and 'taken' in str(error)


# --- which processes belong together ---


def test_alone_on_a_laptop():
  assert distributed.detect(env={}) is None
  assert distributed.detect(env={'TPU_WORKER_HOSTNAMES': 'localhost', 'SLURM_NTASKS': '1'}) is None
  assert distributed.detect(env={'SLURM_NTASKS': '8'}) is None  # a batch script, not srun
  batch = {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '8', 'SLURM_NNODES': '2', 'SLURM_PROCID': '0',
           'SLURM_LOCALID': '0', 'SLURM_JOB_NODELIST': 'n[1-2]'}  # fmt: skip
  assert distributed.detect(env=batch) is None  # the process number does not make it a step
  assert distributed.detect(env=batch | {'SLURM_STEP_NUM_TASKS': '1'}) is None
  assert distributed.detect(env=batch | {'SLURM_NTASKS': '1'}) is None
  assert distributed.detect(env=batch | {'SLURM_STEP_NUM_TASKS': '8'}) is not None  # srun
  with pytest.raises(UserError, match=r"OMPI_COMM_WORLD_SIZE: found 'x'"):
    distributed.detect(env={'OMPI_COMM_WORLD_SIZE': 'x'})
  assert distributed.initialize() is False and distributed.initialize('off') is False
  with pytest.raises(UserError, match='--coordinator HOST:PORT'):
    distributed.initialize('on')
  with pytest.raises(UserError, match="found 'maybe'"):
    distributed.initialize('maybe')


@pytest.mark.parametrize(
  'env, source',
  [
    (
      {'SLURM_NTASKS': '2', 'SLURM_PROCID': '1', 'SLURM_JOB_NODELIST': 'n'},
      r'Slurm \(hosts n',
    ),
    ({'OMPI_COMM_WORLD_SIZE': '4'}, 'Open MPI'),
    ({'MEGASCALE_NUM_SLICES': '2'}, 'several slices'),
    ({'TPU_WORKER_HOSTNAMES': 'a, b'}, 'TPU_WORKER_HOSTNAMES'),
  ],
)
def test_surroundings(env, source):
  import re

  assert re.match(source, distributed.detect(env=env).source)


def test_tpu_slice_by_environment():
  cluster = distributed.detect(env={'TPU_WORKER_HOSTNAMES': 'a, b,c', 'TPU_WORKER_ID': '2'})
  assert (cluster.coordinator, cluster.processes, cluster.process) == ('a:8482', 3, 2)
  assert cluster.hosts == {0: 'a', 1: 'b', 2: 'c'}


def test_a_number_beyond_the_processes(monkeypatch):
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'a,b')
  monkeypatch.setenv('TPU_WORKER_ID', '2')
  with pytest.raises(UserError, match='found process number 2 of 2 processes, expected 0 to 1'):
    distributed.initialize()


def test_arguments_belong_together():
  with pytest.raises(UserError, match='--num-processes, --process-id missing'):
    distributed.detect(coordinator='a:1')
  with pytest.raises(UserError, match='expected HOST:PORT'):
    distributed.detect(coordinator='a', num_processes=2, process_id=0)
  with pytest.raises(UserError, match='expected 0 to 1'):
    distributed.detect(coordinator='a:1', num_processes=2, process_id=2)


def test_one_process_needs_no_meeting():
  assert distributed.initialize(coordinator='nowhere:1', num_processes=1, process_id=0) is False


# --- two processes for real (gloo on CPU) --------------------------------------------------------

PROGRAM = textwrap.dedent("""
  import sys, time
  import jax, numpy as np
  from hrvlm_jax.parallel import distributed
  from hrvlm_jax.parallel.mesh import make_mesh
  port, process, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
  assert distributed.initialize(
    coordinator=f'localhost:{port}', num_processes=2, process_id=process, timeout=60, heartbeat=4)
  assert jax.device_count() == 4 and distributed.is_main() == (process == 0)
  for shape in ({'data': 4}, {'data': 2, 'tensor': 2}, {'fsdp': 2, 'data': 2},
                {'data': 1, 'tensor': 4}):
    mesh = make_mesh(shape)
    whole = {'a': np.arange(24.).reshape(8, 3), 'crops': np.arange(16)}
    rows = {name: distributed.host_rows(mesh, len(x)) for name, x in whole.items()}
    batch = distributed.global_batch({name: x[rows[name]] for name, x in whole.items()}, mesh)
    assert batch['a'].shape == (8, 3) and batch['crops'].shape == (16,)
    mean = jax.jit(lambda b: (b['a'] @ np.arange(3.)).mean() + b['crops'].sum())(batch)
    assert float(mean) == (whole['a'] @ np.arange(3.)).mean() + whole['crops'].sum()
    for name in whole:
      np.testing.assert_array_equal(distributed.to_host(batch[name]), whole[name])
    micro = {'a': whole['a'].reshape(2, 4, 3)[:, distributed.host_rows(mesh, 4)]}
    micro = distributed.global_batch(micro, mesh, leading=1)
    np.testing.assert_array_equal(distributed.to_host(micro['a']), whole['a'].reshape(2, 4, 3))
    everywhere = distributed.replicate(np.arange(3), mesh)
    np.testing.assert_array_equal(distributed.to_host(everywhere), np.arange(3))
  distributed.check_same('config', what='the config')
  try:
    distributed.check_same(f'config {process}', what='the config')
  except ValueError as error:
    print('SAID', error, flush=True)
  distributed.barrier('end')
  if what == 'die':
    step = jax.jit(lambda x: x.sum())
    for i in range(10_000):
      step(batch['a']).block_until_ready()
      if i == 3:
        print('STEPPING', flush=True)
      time.sleep(0.01)
  distributed.shutdown()
  print('DONE', flush=True)
""")


def start(port, what, tmp_path):
  environment = dict(os.environ, JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES='2', PYTHONPATH=str(REPO))
  environment.pop('XLA_FLAGS', None)
  return [
    subprocess.Popen(
      [sys.executable, '-c', PROGRAM, str(port), str(i), what],
      env=environment,
      cwd=tmp_path,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]


def test_two_processes_make_global_arrays(port, tmp_path):
  outputs = [process.communicate(timeout=150)[0] for process in start(port, 'live', tmp_path)]
  for output in outputs:
    assert output.endswith('DONE\n'), output
    assert 'SAID the config differs between hosts: process(es) [1]' in output


def test_the_other_process_ends_when_one_is_killed(port, tmp_path):
  survivor, victim = start(port, 'die', tmp_path)
  for line in victim.stdout:
    if 'STEPPING' in line:
      break
  begun = time.monotonic()
  victim.send_signal(signal.SIGKILL)
  output = survivor.communicate(timeout=90)[0]
  assert survivor.returncode != 0 and 'DONE' not in output
  assert time.monotonic() - begun < 60, 'the heartbeat of 4 s did not end it'
  victim.wait()


# --- one process ---------------------------------------------------------------------------------


def test_one_process_arrays():
  mesh = make_mesh({'data': 1}, devices=jax.devices()[:1])
  batch = distributed.global_batch({'a': np.arange(6).reshape(3, 2)}, mesh)
  np.testing.assert_array_equal(distributed.to_host(batch['a']), np.arange(6).reshape(3, 2))
  np.testing.assert_array_equal(distributed.host_rows(mesh, 5), np.arange(5))
  distributed.check_same('x', what='y')
  distributed.barrier('b')
  distributed.shutdown()
