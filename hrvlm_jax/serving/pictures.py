"""Images of a request or a command: data URLs, and pages of the web where they are allowed.

A server (or a script over other people's questions) that fetches what it is given could be made to
read what only it can reach. Hence no address is fetched unless it is allowed, and then only over
http(s) on the usual ports, from addresses of the public internet: the name is resolved once, every
address it has is looked at, and the connection goes to that address, whatever the name says a
moment later. No proxy is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from typing import Literal
import urllib.parse

from PIL import Image

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.images import MAX_PIXELS, data_url, open_image

_REDIRECTS = 3
# Addresses that stand for others: a public one of these may lead to a private one.
_TRANSLATED = tuple(map(ipaddress.ip_network, (
  '64:ff9b::/96', '64:ff9b:1::/48', '2002::/16', '2001::/32', '::ffff:0:0/96', '::/96')))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureLimits:
  """What images may cost.

  Attributes:
    images: of one request.
    pixels: of one image.
    remote: whether http(s) addresses are fetched.
    private: also from this machine and its own network, and from any port.
    bytes: of one, fetched or in a data URL. seconds: of one that is fetched, all in all.
    exif, alpha: see `core.images.open_image`.
  """

  images: int = 8
  pixels: int = MAX_PIXELS
  remote: bool = False
  private: bool = False
  bytes: int = 20 << 20
  seconds: float = 10.0
  exif: Literal['apply', 'ignore'] = 'apply'
  alpha: Literal['drop', 'white'] = 'drop'


def open_url(url: str, limits: PictureLimits, *, name: str = 'image') -> Image.Image:
  """The image that a URL holds or names.

  Raises:
    UserError: what is wrong with it; the URL itself is not repeated.
  """
  scheme = url[:8].partition(':')[0].lower()
  if scheme == 'data':
    data = data_url(url, max_bytes=limits.bytes, name=name)
  elif scheme in ('http', 'https'):
    if not limits.remote:
      raise UserError(f'{name}: this server fetches no images from the web; send the image itself, '
                      'as data:image/png;base64,...')
    data = fetch(url, limits, name=name)
  else:
    raise UserError(f'{name}: expected a data URL (data:image/png;base64,...); files of the server '
                    'are not read')
  return open_image(data, exif=limits.exif, alpha=limits.alpha, max_pixels=limits.pixels,
                    name=name)


def is_public(address: str) -> bool:
  """Whether an IP address belongs to the public internet, and stands for itself."""
  found = ipaddress.ip_address(address.partition('%')[0])
  if found.version == 6 and any(found in network for network in _TRANSLATED):
    return False
  return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


def fetch(url: str, limits: PictureLimits, *, name: str = 'image') -> bytes:
  """The body behind an http(s) address; redirections are checked like the address itself.

  Raises:
    UserError: an address that may not be read, an answer that is not 200, too much, too slow.
  """
  end = time.monotonic() + limits.seconds
  for _ in range(_REDIRECTS + 1):
    try:
      body, onward = _get(url, limits, end, name)
    except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:
      if isinstance(error, UserError):
        raise
      raise UserError(f'{name}: cannot be fetched ({type(error).__name__})') from error
    if onward is None:
      return body
    url = urllib.parse.urljoin(url, onward)
  raise UserError(f'{name}: its address leads on more than {_REDIRECTS} times')


def _get(url: str, limits: PictureLimits, end: float, name: str) -> tuple[bytes, str | None]:
  parts = urllib.parse.urlsplit(url)
  secure = parts.scheme == 'https'
  port = parts.port or (443 if secure else 80)
  if parts.scheme not in ('http', 'https') or not parts.hostname or parts.username is not None:
    raise UserError(f'{name}: expected an http or https address without a user name')
  if port not in (80, 443) and not limits.private:
    raise UserError(f'{name}: only ports 80 and 443 are read')
  with _connect(parts.hostname, port, secure, limits, end, name) as sock, \
      _deadline(sock, end, name):
    connection = http.client.HTTPConnection(parts.hostname, port)
    connection.sock = sock
    path = urllib.parse.quote(parts.path or '/', safe="/%:@!$&'()*+,;=~")
    query = f'?{urllib.parse.quote(parts.query, safe="%/?:@!$&()*+,;=~")}' if parts.query else ''
    host = parts.hostname if port in (80, 443) else f'{parts.hostname}:{port}'
    connection.request('GET', path + query, headers={
      'Host': host, 'Accept': 'image/*', 'User-Agent': 'hrvlm', 'Connection': 'close'})
    response = connection.getresponse()
    if response.status in (301, 302, 303, 307, 308) and response.headers.get('Location'):
      return b'', response.headers['Location']
    if response.status != 200:
      raise UserError(f'{name}: its address answers with status {response.status}')
    return _read(response, limits, name), None


def _connect(host: str, port: int, secure: bool, limits: PictureLimits, end: float, name: str
             ) -> socket.socket:
  addresses = [found[4][0] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
  if not addresses or not (limits.private or all(map(is_public, addresses))):
    raise UserError(f'{name}: its address does not belong to the public internet')
  sock = socket.create_connection((addresses[0], port), timeout=_left(end, name))
  if not secure:
    return sock
  try:
    return ssl.create_default_context().wrap_socket(sock, server_hostname=host)
  except BaseException:
    sock.close()
    raise


@contextlib.contextmanager
def _deadline(sock: socket.socket, end: float, name: str) -> Iterator[None]:
  """Cuts the connection at `end`: a server that sends a byte now and then is never timed out."""
  def cut():
    with contextlib.suppress(OSError):
      sock.shutdown(socket.SHUT_RDWR)

  timer = threading.Timer(_left(end, name), cut)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
  _left(end, name)  # what was cut is no whole answer


def _read(response: http.client.HTTPResponse, limits: PictureLimits, name: str) -> bytes:
  parts, size = [], 0
  while True:
    part = response.read1(1 << 16)
    if not part:
      return b''.join(parts)
    size += len(part)
    if size > limits.bytes:
      raise UserError(f'{name}: has more than {limits.bytes:,} bytes, the limit')
    parts.append(part)


def _left(end: float, name: str) -> float:
  left = end - time.monotonic()
  if left <= 0:
    raise UserError(f'{name}: takes too long to fetch')
  return left
