"""Processes of a run find each other before JAX starts, and say whom they wait for.

JAX alone waits in silence and then dies with a message that names nobody. Here process 0 listens on
the port after the coordinator's; the others report in with their host name. Everybody prints who is
missing, and a time-out is one sentence. Plain sockets: JAX is not touched before all are there.

Whoever else reaches the port learns and changes nothing. Every message is signed with the run's
secret (`parallel.secret`) over random numbers of both sides; what is not signed is dropped. A line
is bounded, a greeting has seconds, so many connections may be without one, and one deadline ends
all. Process 0 listens on the coordinator's own address, where that is one of this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import errno
import hashlib
import hmac
import json
import logging
import secrets
import selectors
import socket
import time
from typing import Any

from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel.addresses import own_addresses, split_address
from hrvlm_jax.parallel.secret import VARIABLE, run_secret

_log = logging.getLogger(__name__)

# Seconds between two messages about who is missing.
REPORT_EVERY = 30.0
_RETRY = 0.25
_GREETING = 5.0  # seconds in which a connection must have greeted
_SPARE = 16  # connections without a greeting, beside those of all processes
_LINE, _ANSWER = 4096, 1 << 20  # bytes of a line to process 0, and of one from it
_HOST = 255  # letters of a host name


def meet(coordinator: str, *, processes: int, process: int, timeout: float,
         secret: Callable[[], bytes] | None = None, hosts: Mapping[int, str] | None = None,
         report_every: float = REPORT_EVERY, report: Callable[[str], None] | None = None
         ) -> dict[int, str]:
  """Returns when all processes are there: {process: host name}.

  Args:
    coordinator: HOST:PORT of the JAX coordinator; the meeting uses PORT + 1.
    timeout: seconds after which waiting ends.
    secret: gives what all processes of the run know and nobody else does; default: `run_secret`.
    hosts: names of the expected hosts by process, where they are known beforehand.
    report: called with a sentence every `report_every` seconds; default: the log.

  Raises:
    UserError: not all processes came in time (the missing ones are named), two processes have the
      same number, they were started with different numbers of processes, or there is no secret.
  """
  secret = secret or run_secret(coordinator, process)
  if secret is None:
    raise UserError(f'{coordinator}: processes on several hosts meet by a secret; give all of them '
                    f'the same {VARIABLE}, such as of: openssl rand -hex 16')
  host, port = split_address(coordinator)
  waiting = _Waiting(processes, dict(hosts or {}), timeout, time.monotonic(), report_every,
                     report or _log.warning)
  if process == 0:
    return _Meeting(waiting, secret()).run(host, port + 1)
  return _attend((host, port + 1), process, secret, waiting)


@dataclasses.dataclass
class _Waiting:
  """How long and for whom; the same for process 0 and the others."""

  processes: int
  expected: Mapping[int, str]
  timeout: float
  started: float
  every: float
  report: Callable[[str], None]
  told: float = 0.0

  @property
  def spent(self) -> float:
    return time.monotonic() - self.started

  @property
  def over(self) -> bool:
    return self.spent >= self.timeout

  def due(self) -> bool:
    """Whether it is time for a message, at most once per `every` seconds."""
    if self.spent - self.told < self.every:
      return False
    self.told = self.spent
    return True

  def names(self, missing) -> str:
    named = [f'{self.expected[p]} (process {p})' if p in self.expected else f'process {p}'
             for p in missing]
    shown = ', '.join(named[:8])
    return shown if len(named) <= 8 else f'{shown} and {len(named) - 8} more'


class _Line:
  """One side of a connection: signed lines, the k-th of each direction signed as such."""

  def __init__(self, sock: socket.socket, secret: bytes, *, server: bool):
    self.socket, self._secret, self._server = sock, secret, server
    self.nonce, self.theirs = secrets.token_hex(16), ''
    self._sent = self._read = 0

  def sign(self, body: str, *, server: bool, number: int) -> str:
    both = (self.nonce, self.theirs) if self._server else (self.theirs, self.nonce)
    text = '\n'.join((*both, 'answer' if server else 'greeting', str(number), body))
    return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()

  def send(self, message: Mapping) -> bool:
    body = json.dumps(message)
    mac = self.sign(body, server=self._server, number=self._sent)
    self._sent += 1
    try:
      self.socket.sendall(f'{mac} {body}\n'.encode())
    except OSError:
      return False
    return True

  def open(self, line: bytes) -> dict[str, Any] | None:
    """The message of a line; None where it is not signed as the next one of the other side."""
    try:
      mac, _, body = line.decode('ascii').rstrip('\n').partition(' ')
      right = self.sign(body, server=not self._server, number=self._read)
      if not hmac.compare_digest(mac, right):
        return None
      self._read += 1
      message = json_text.loads(body)
    except (ValueError, RecursionError):
      return None
    return message if isinstance(message, dict) else None


class _Guest:
  """A connection to process 0."""

  def __init__(self, sock: socket.socket, secret: bytes):
    self.line = _Line(sock, secret, server=True)
    self.since, self.buffer, self.process = time.monotonic(), b'', None

  def close(self) -> None:
    self.line.socket.close()


class _Meeting:
  """Process 0: takes greetings until all are there."""

  def __init__(self, waiting: _Waiting, secret: bytes):
    self._waiting, self._secret = waiting, secret
    self._selector = selectors.DefaultSelector()
    self._present = {0: socket.gethostname()}
    self._guests: dict[socket.socket, _Guest] = {}

  def run(self, host: str, port: int) -> dict[int, str]:
    servers: list[socket.socket] = []
    try:
      servers = _listen(host, port, self._waiting.processes)
      for server in servers:
        self._selector.register(server, selectors.EVENT_READ)
      return self._run(servers)
    finally:
      for one in (*servers, *self._guests):
        one.close()
      self._selector.close()

  def _run(self, servers) -> dict[int, str]:
    waiting, everybody = self._waiting, range(self._waiting.processes)
    while missing := [p for p in everybody if p not in self._present]:
      sentence = (f'{len(missing)} of {waiting.processes} processes: {waiting.names(missing)}')
      if waiting.over:
        self._fail(f'{len(missing)} of {waiting.processes} processes did not start within '
                   f'{waiting.timeout:g} s: {waiting.names(missing)}. Start the same command on '
                   f'every host, with the same {VARIABLE} where one is set (scripts/launch.sh '
                   'status shows who runs), or raise the time-out')
      if waiting.due():
        sentence = f'waiting for {sentence} ({waiting.spent:.0f} s)'
        waiting.report(sentence)
        self._tell({'wait': sentence})
      for key, _ in self._selector.select(min(_RETRY, waiting.timeout)):
        if key.fileobj in servers:
          self._accept(key.fileobj)
        elif key.fileobj in self._guests:
          self._hear(self._guests[key.fileobj])
      for guest in [g for g in self._guests.values()
                    if g.process is None and time.monotonic() - g.since > _GREETING]:
        self._drop(guest)
    self._tell({'go': self._present})
    return self._present

  def _accept(self, server: socket.socket) -> None:
    try:
      sock, _ = server.accept()
    except OSError:
      return
    sock.settimeout(_GREETING)  # of a write; it is read only when there is something
    unknown = [g for g in self._guests.values() if g.process is None]
    if len(unknown) >= self._waiting.processes + _SPARE:
      self._drop(unknown[0])  # the oldest: one of ours greets at once
    guest = self._guests[sock] = _Guest(sock, self._secret)
    self._selector.register(sock, selectors.EVENT_READ)
    try:
      sock.sendall(f'{guest.line.nonce}\n'.encode())
    except OSError:
      self._drop(guest)

  def _hear(self, guest: _Guest) -> None:
    try:
      got = guest.line.socket.recv(_LINE)
    except OSError:
      got = b''
    guest.buffer += got
    if not got or len(guest.buffer) > _LINE or guest.process is not None:
      self._drop(guest)  # gone, or one that says more than its greeting
      return
    if b'\n' not in guest.buffer:
      return
    guest.line.theirs, _, rest = guest.buffer[:-1].decode('latin-1').partition(' ')
    hello = guest.line.open(rest.encode('latin-1'))
    if hello is None:
      self._drop(guest)
      return
    number, count, host = (hello.get(key) for key in ('process', 'processes', 'host'))
    if type(number) is not int or type(count) is not int or not isinstance(host, str):
      self._drop(guest)
      return
    host = host[:_HOST]
    problem = _refusal(number, count, host, self._waiting.processes, self._present)
    guest.process = number
    if problem:
      self._fail(problem)
    self._present[number] = host

  def _drop(self, guest: _Guest) -> None:
    """Forgets a connection; a process that died while waiting may come again under its number."""
    self._selector.unregister(guest.line.socket)
    self._guests.pop(guest.line.socket).close()
    if guest.process is not None:
      self._present.pop(guest.process, None)

  def _tell(self, message: Mapping) -> None:
    for guest in list(self._guests.values()):
      if guest.process is not None:
        guest.line.send(message)

  def _fail(self, sentence: str) -> None:
    self._tell({'error': sentence})
    raise UserError(sentence)


def _listen(host: str, port: int, processes: int) -> list[socket.socket]:
  """Sockets on `own_addresses(host)`, or one on all."""
  servers: list[socket.socket] = []
  own = own_addresses(host)
  if not own:
    _log.warning('coordinator: %s is no address of this machine alone; listening on all of them',
                 host)
  try:
    for address in own or ['']:
      family = socket.AF_INET6 if ':' in address else socket.AF_INET
      servers.append(socket.create_server((address, port), family=family, reuse_port=False,
                                          backlog=max(processes, 8)))
  except OSError as error:
    for server in servers:
      server.close()
    taken = 'taken' if error.errno == errno.EADDRINUSE else 'not to be had'
    raise UserError(f"coordinator: port {port} (the one after the coordinator's) is {taken}: "
                    f'{error}; another run may still be alive, or choose another port') from error
  return servers


def _refusal(number: int, count: int, host: str, processes: int, present: Mapping[int, str]
             ) -> str | None:
  if count != processes:
    return (f'process {number} on {host} was started for {count} processes, process 0 on '
            f'{present[0]} for {processes}; start all with the same number')
  if not 0 <= number < processes:
    return f'found process number {number} on {host}, expected 0 to {processes - 1}'
  if number in present:
    return (f'process number {number} was given to {present[number]} and to {host}; every process '
            'needs a number of its own')
  return None


def _attend(address: tuple[str, int], process: int, secret: Callable[[], bytes], waiting: _Waiting
            ) -> dict[int, str]:
  name = f'{address[0]}:{address[1]}'
  greeting = {'process': process, 'processes': waiting.processes, 'host': socket.gethostname()}
  while True:
    try:
      with socket.create_connection(address, timeout=_GREETING) as connection:
        answer = _conversation(connection, secret(), greeting, waiting)
      if answer is not None:
        return answer
    except (OSError, ValueError) as error:
      if isinstance(error, UserError):
        raise
    if waiting.over:
      raise UserError(
        f'process 0 did not answer at {name} within {waiting.timeout:g} s. Start the same command '
        'on every host, check that the address is that of process 0 and that the network lets it '
        'through')
    if waiting.due():
      waiting.report(f'waiting for process 0 at {name} ({waiting.spent:.0f} s)')
    time.sleep(_RETRY)


def _conversation(connection: socket.socket, secret: bytes, greeting: Mapping, waiting: _Waiting
                  ) -> dict[int, str] | None:
  """What process 0 decides; None where the other side is not, or no longer, process 0."""
  line, lines = _Line(connection, secret, server=False), _Lines(connection)
  line.theirs = lines.read(_LINE, _GREETING).decode('ascii')
  body = json.dumps(greeting)
  mac = line.sign(body, server=False, number=0)
  connection.sendall(f'{line.nonce} {mac} {body}\n'.encode())
  while True:
    # Process 0 reports every so often; silence beyond its own deadline means it is gone.
    message = line.open(lines.read(_ANSWER, max(1.0, waiting.timeout - waiting.spent + 10)))
    if message is None:
      return None
    if 'error' in message:
      raise UserError(str(message['error']))
    if 'go' in message:
      return {int(number): host for number, host in message['go'].items()}
    waiting.report(str(message.get('wait')))


class _Lines:
  """Lines of a connection, none of which may take longer, or more bytes, than allowed."""

  def __init__(self, sock: socket.socket):
    self._socket, self._buffer = sock, b''

  def read(self, most: int, seconds: float) -> bytes:
    """The next line, without its end.

    Raises:
      OSError: too slow, too long, or the other side has gone.
    """
    deadline = time.monotonic() + seconds
    while b'\n' not in self._buffer:
      self._socket.settimeout(max(deadline - time.monotonic(), 0.01))
      got = self._socket.recv(1 << 16)
      self._buffer += got
      if not got or len(self._buffer) > most or time.monotonic() > deadline:
        raise OSError('no line')
    line, _, self._buffer = self._buffer.partition(b'\n')
    return line
