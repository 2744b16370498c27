"""Who may speak to the server: host names, keys, and how much a body may hold."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable
import hashlib
import hmac
import json
import os
import pathlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.serving.chat import ApiError

LOOPBACK = ('localhost', '127.0.0.1', '::1')
_OPEN = ('/health',)  # a load balancer has no key


def read_keys(path: str | os.PathLike) -> tuple[str, ...]:
  """The keys of a file, one a line.

  Raises:
    UserError: no such file, no key in it, one that no header can carry.
  """
  try:
    lines = pathlib.Path(path).read_text(encoding='utf-8').splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'--api-key-file {path}: cannot be read ({error})') from error
  keys = tuple(line.strip() for line in lines if line.strip())
  if not keys:
    raise UserError(f'--api-key-file {path}: holds no key; write one a line')
  if not all(key.isascii() and key.isprintable() and ' ' not in key for key in keys):
    raise UserError(f'--api-key-file {path}: a key holds a space or a sign that no header carries')
  return keys


class Guard:
  """ASGI middleware: refuses other host names, other origins, wrong keys and web sockets.

  A page of the web can make a browser send requests to `localhost`; under a name of its own it
  could even read the answers. Hence only the names of `hosts` are answered.

  Args:
    hosts: names that may stand in the Host header; None: all.
    keys: one of them is wanted as `Authorization: Bearer KEY`, or as the password of a browser
      where it is not the API that is asked for; none: everybody is welcome. They
      are compared as digests in constant time, and kept as digests.
  """

  def __init__(self, app: ASGIApp, *, hosts: Iterable[str] | None = None,
               keys: Iterable[str] = ()):
    self.app = app
    self._hosts = None if hosts is None else frozenset(hosts)
    self._keys = tuple(_digest(key.encode()) for key in keys)

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] == 'lifespan':
      await self.app(scope, receive, send)
    elif scope['type'] == 'http':
      error = self._refused(scope)
      if error is None:
        await self.app(scope, receive, send)
      else:
        await respond(error, send)
    else:
      await send({'type': 'websocket.close', 'code': 1008})

  def _refused(self, scope: Scope) -> ApiError | None:
    headers = {}
    for name, value in scope['headers']:
      headers.setdefault(name, value)
    if self._hosts is not None and _name(headers.get(b'host', b'')) not in self._hosts:
      return ApiError(400, 'this server is not known by that name; say --allow-host NAME when you '
                      'start it')
    api = scope['path'].startswith('/v1/')
    origin = headers.get(b'origin')
    if not api and origin is not None and (
        origin.partition(b'://')[2].lower() != headers.get(b'host', b'').lower()):
      return ApiError(403, 'a page of another address may not ask this server')
    if not self._keys or scope['path'] in _OPEN:
      return None
    kind, _, key = headers.get(b'authorization', b'').partition(b' ')
    if not api and kind.lower() == b'basic':  # a browser asks its user: any name, a key as password
      kind, key = b'bearer', _password(key)
    given = _digest(key.strip())
    right = [hmac.compare_digest(given, own) for own in self._keys]  # all of them, always
    if kind.lower() == b'bearer' and any(right):
      return None
    error = ApiError(401, 'no valid API key was given; send Authorization: Bearer KEY',
                     code='invalid_api_key')
    error.headers['WWW-Authenticate'] = 'Bearer' if api else 'Basic realm="hrvlm", charset="UTF-8"'
    return error


def _password(text: bytes) -> bytes:
  try:
    return base64.b64decode(text.strip(), validate=True).partition(b':')[2]
  except ValueError:
    return b''


def _digest(key: bytes) -> bytes:
  return hashlib.sha256(key).digest()


def _name(host: bytes) -> str:
  """The name of a Host header without its port."""
  text = host.decode('latin-1').lower()
  if text.startswith('['):
    return text[1:].partition(']')[0]
  return text.partition(':')[0]


async def respond(error: ApiError, send: Send) -> None:
  """Sends an error as a whole answer."""
  body = json.dumps(error.body()).encode()
  headers = {'content-type': 'application/json', 'content-length': str(len(body)), **error.headers}
  await send({'type': 'http.response.start', 'status': error.status, 'headers': [
    (name.lower().encode(), value.encode()) for name, value in headers.items()]})
  await send({'type': 'http.response.body', 'body': body})


async def read_body(scope: Scope, receive: Receive, *, limit: int, seconds: float) -> bytes:
  """The body of a request.

  What is over the limit is read and thrown away for a while: a client that is cut off while it
  sends sees a broken connection and not the answer.

  Raises:
    ApiError: 415 not JSON, 413 too long, 408 too slow, 499 the client went away.
  """
  headers = dict(scope['headers'])
  kind = headers.get(b'content-type', b'').partition(b';')[0].strip().lower()
  if kind != b'application/json':
    raise ApiError(415, 'expected a body of application/json')
  too_long = ApiError(413, f'the body is longer than {limit} bytes, the limit of this server; send '
                      'fewer or smaller images', code='request_too_large')
  try:
    async with asyncio.timeout(seconds):
      parts, size = [], 0
      async for part in _parts(receive):
        size += len(part)
        if size <= limit:
          parts.append(part)
        elif size > 8 * limit:
          raise too_long
  except TimeoutError:
    raise ApiError(408, f'the body did not come within {seconds:g} seconds') from None
  if size > limit:
    raise too_long
  return b''.join(parts)


async def _parts(receive: Receive):
  while True:
    message: Message = await receive()
    if message['type'] == 'http.disconnect':
      raise ApiError(499, 'the client went away')
    yield message.get('body', b'')
    if not message.get('more_body', False):
      return
