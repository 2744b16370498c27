"""Processes of a run find each other before JAX starts, and say whom they wait for.

JAX alone waits in silence and then dies with a message that names nobody. Here process 0 listens on
the port after the coordinator's; the others report in with their host name. Everybody prints who is
missing, and a time-out is one sentence. Plain sockets: JAX is not touched before all are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import json
import logging
import socket
import time

from hrvlm_jax.core.errors import UserError

_log = logging.getLogger(__name__)

# Seconds between two messages about who is missing.
REPORT_EVERY = 30.0
_RETRY = 0.25


def meet(coordinator: str, *, processes: int, process: int, timeout: float,
         hosts: Mapping[int, str] | None = None, report_every: float = REPORT_EVERY,
         report: Callable[[str], None] | None = None) -> dict[int, str]:
  """Returns when all processes are there: {process: host name}.

  Args:
    coordinator: HOST:PORT of the JAX coordinator; the meeting uses PORT + 1.
    timeout: seconds after which waiting ends.
    hosts: names of the expected hosts by process, where they are known beforehand.
    report: called with a sentence every `report_every` seconds; default: the log.

  Raises:
    UserError: not all processes came in time (the missing ones are named), two processes have the
      same number, or they were started with different numbers of processes.
  """
  host, port = split_address(coordinator)
  expected = dict(hosts or {})
  report = report or _log.warning
  deadline = time.monotonic() + timeout
  if process == 0:
    return _host_meeting(port + 1, processes, deadline, timeout, expected, report_every, report)
  return _attend((host, port + 1), processes, process, deadline, timeout, report_every, report)


def split_address(address: str) -> tuple[str, int]:
  """'host:8482' -> ('host', 8482).

  Raises:
    UserError: not of that form.
  """
  host, _, port = address.rpartition(':')
  if not host or not port.isdigit():
    raise UserError(f"coordinator: found '{address}', expected HOST:PORT, such as localhost:8482")
  return host.strip('[]'), int(port)


def _names(missing, expected: Mapping[int, str]) -> str:
  named = [f'{expected[p]} (process {p})' if p in expected else f'process {p}' for p in missing]
  shown = ', '.join(named[:8])
  return shown if len(named) <= 8 else f'{shown} and {len(named) - 8} more'


def _send(connection: socket.socket, message: Mapping) -> bool:
  try:
    connection.sendall(json.dumps(message).encode() + b'\n')
  except OSError:
    return False
  return True


def _host_meeting(port, processes, deadline, timeout, expected, report_every, report):
  present = {0: socket.gethostname()}
  connections: dict[int, socket.socket] = {}
  started = time.monotonic()
  next_report = started + report_every
  try:
    server = socket.create_server(('', port), reuse_port=False, backlog=max(processes, 8))
  except OSError as error:
    raise UserError(f"coordinator: port {port} (the one after the coordinator's) is taken: "
                    f'{error}; another run may still be alive, or choose another port') from error
  with server:
    server.settimeout(_RETRY)
    while len(present) < processes:
      try:
        connection, _ = server.accept()
        connection.settimeout(5)
        hello = json.loads(connection.makefile().readline() or 'null')
      except (TimeoutError, OSError, ValueError):
        hello = None
      if isinstance(hello, dict) and {'process', 'processes', 'host'} <= set(hello):
        problem = _refusal(hello, processes, present)
        if problem:
          _send(connection, {'error': problem})
          for other in connections.values():
            _send(other, {'error': problem})
          raise UserError(problem)
        present[hello['process']] = hello['host']
        connections[hello['process']] = connection
      now = time.monotonic()
      # A process that died while waiting must come again under the same number.
      for number in [n for n, c in connections.items() if _closed(c)]:
        connections.pop(number).close()
        present.pop(number)
      missing = [p for p in range(processes) if p not in present]
      if not missing:
        break
      sentence = (f'waiting for {len(missing)} of {processes} processes: '
                  f'{_names(missing, expected)}')
      if now >= deadline:
        sentence = (f'{len(missing)} of {processes} processes did not start within '
                    f'{timeout:g} s: {_names(missing, expected)}. Start the same command on every '
                    'host (scripts/launch.sh status shows who runs), or raise the time-out')
        for connection in connections.values():
          _send(connection, {'error': sentence})
        raise UserError(sentence)
      if now >= next_report:
        next_report = now + report_every
        report(f'{sentence} ({now - started:.0f} s)')
        for connection in connections.values():
          _send(connection, {'wait': f'{sentence} ({now - started:.0f} s)'})
    for connection in connections.values():
      _send(connection, {'go': present})
  for connection in connections.values():
    connection.close()
  return present


def _refusal(hello: Mapping, processes: int, present: Mapping[int, str]) -> str | None:
  if hello['processes'] != processes:
    return (f'process {hello["process"]} on {hello["host"]} was started for {hello["processes"]} '
            f'processes, process 0 on {present[0]} for {processes}; start all with the same number')
  if not 0 <= hello['process'] < processes:
    return (f'found process number {hello["process"]} on {hello["host"]}, '
            f'expected 0 to {processes - 1}')
  if hello['process'] in present:
    return (f'process number {hello["process"]} was given to {present[hello["process"]]} and to '
            f'{hello["host"]}; every process needs a number of its own')
  return None


def _closed(connection: socket.socket) -> bool:
  """Whether the other side has gone (it never sends anything after its greeting)."""
  connection.setblocking(False)
  try:
    return connection.recv(1) == b''
  except (BlockingIOError, InterruptedError):
    return False
  except OSError:
    return True
  finally:
    connection.settimeout(5)


def _attend(address, processes, process, deadline, timeout, report_every, report):
  started = time.monotonic()
  next_report = started + report_every
  name = f'{address[0]}:{address[1]}'
  greeting = {'process': process, 'processes': processes, 'host': socket.gethostname()}
  while True:
    connection = None
    try:
      connection = socket.create_connection(address, timeout=5)
      if not _send(connection, greeting):
        raise OSError('connection lost')
      # Process 0 reports every so often; silence beyond its own deadline means it is gone.
      connection.settimeout(max(1.0, deadline - time.monotonic() + 10))
      for line in connection.makefile():
        message = json.loads(line)
        if 'error' in message:
          raise UserError(message['error'])
        if 'go' in message:
          return {int(number): host for number, host in message['go'].items()}
        report(message['wait'])
    except (OSError, ValueError) as error:
      if isinstance(error, UserError):
        raise
    finally:
      if connection is not None:
        connection.close()
    now = time.monotonic()
    if now >= deadline:
      raise UserError(
        f'process 0 did not answer at {name} within {timeout:g} s. Start the same command on every '
        'host, check that the address is that of process 0 and that the network lets it through')
    if now >= next_report:
      next_report = now + report_every
      report(f'waiting for process 0 at {name} ({now - started:.0f} s)')
    time.sleep(_RETRY)
