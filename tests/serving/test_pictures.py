"""Images of strangers: what is fetched, and what never is."""

import base64
import http.server
import socket
import threading
import time

from PIL import Image
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.serving import pictures
from hrvlm_jax.serving.pictures import PictureLimits, fetch, is_public, open_url
from tests.serving.running import encoded, png

REMOTE = PictureLimits(remote=True, bytes=10_000, seconds=1.0)


def test_only_addresses_of_the_public_internet():
  private = ('127.0.0.1', '10.1.2.3', '172.16.0.1', '192.168.1.1', '169.254.169.254', '0.0.0.0',
             '100.64.0.1', '224.0.0.1', '255.255.255.255', '::1', '::', 'fe80::1', 'fe80::1%eth0',
             'fd00:ec2::254', 'ff02::1', '::ffff:127.0.0.1', '::ffff:169.254.169.254',
             '64:ff9b::7f00:1', '2002:7f00:1::', '::127.0.0.1', '198.18.0.1', '240.0.0.1')
  assert [address for address in private if is_public(address)] == []
  assert all(map(is_public, ('8.8.8.8', '93.184.216.34', '2606:4700:4700::1111')))


@pytest.mark.parametrize('url', [
  'http://127.0.0.1/', 'http://localhost/a.png', 'http://[::1]/', 'http://169.254.169.254/latest',
  'http://2130706433/', 'http://0x7f.1/', 'http://8.8.8.8:22/', 'http://user@8.8.8.8/',
  'http://8.8.8.8:99999/', 'http:///a', 'http://', 'https://[::ffff:127.0.0.1]/'])
def test_what_only_the_server_reaches_is_not_read(url, monkeypatch):
  reached = []
  monkeypatch.setattr(socket, 'create_connection', lambda *a, **k: reached.append(a))
  with pytest.raises(UserError, match='^image 1: '):
    open_url(url, REMOTE, name='image 1')
  assert not reached
  with pytest.raises(UserError, match='fetches no images from the web'):
    open_url(url, PictureLimits())


@pytest.mark.parametrize('url', [
  'file:///etc/passwd', '/etc/passwd', 'ftp://8.8.8.8/a', '', 'data:', 'data:image/png,abc',
  'data:image/png;base64,@@', 'gopher://x'])
def test_nothing_but_data_and_the_web(url):
  with pytest.raises(UserError):
    open_url(url, REMOTE)


def test_a_transparent_picture_lies_on_white_where_asked():
  url = 'data:image/png;base64,' + base64.b64encode(encoded(
    Image.new('RGBA', (4, 4), (10, 20, 30, 0)))).decode()
  assert open_url(url, PictureLimits()).getpixel((0, 0))[:3] == (10, 20, 30)
  assert open_url(url, PictureLimits(alpha='white')).getpixel((0, 0)) == (255, 255, 255)


class Pages(http.server.BaseHTTPRequestHandler):
  """Pictures, and ways to harm who asks for them."""

  def do_GET(self):
    path = self.path
    if path.startswith('/to/'):
      self.send_response(302)
      self.send_header('Location', path.removeprefix('/to/'))
      self.end_headers()
    elif path == '/gone':
      self.send_error(404)
    else:
      self.send_response(200)
      self.end_headers()
      try:
        for _ in range(10**6):
          self.wfile.write({'/drip': b'x', '/huge': b'x' * 1000}.get(path, png()))
          if path not in ('/drip', '/huge'):
            return
          if path == '/drip':
            self.wfile.flush()
            time.sleep(0.05)
      except OSError:
        pass  # cut off

  def log_message(self, *_):
    """Quiet."""


@pytest.fixture(scope='module')
def web():
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Pages)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  yield server.server_port
  server.shutdown()
  thread.join()
  server.server_close()


def test_fetching_ends_whatever_the_other_side_does(web, monkeypatch):
  """The names of this test resolve to a public address, which leads to a server of its own."""
  asked = []
  names = {'good.example': ['93.184.216.34'], 'inside.example': ['10.0.0.1'],
           'both.example': ['93.184.216.34', '127.0.0.1']}
  monkeypatch.setattr(socket, 'getaddrinfo', lambda host, port, **_: [
    (2, 1, 6, '', (address, port)) for address in names[host]])

  def connect(address, timeout):
    asked.append(address)
    made = socket.socket()
    made.settimeout(timeout)
    made.connect(('127.0.0.1', web))
    return made

  monkeypatch.setattr(pictures.socket, 'create_connection', connect)
  assert open_url('http://good.example/a.png', REMOTE).size == (60, 40)
  assert asked == [('93.184.216.34', 80)]  # the address that was looked at, not the name again
  assert open_url('http://good.example/to//b.png', REMOTE).size == (60, 40)
  seen = len(asked)
  for bad in ('http://inside.example/', 'http://both.example/',
              'http://good.example/to/http://inside.example/',
              'http://good.example/to/file:///etc/passwd', 'http://good.example/to/http://x:22/'):
    with pytest.raises(UserError):
      fetch(bad, REMOTE)
  assert len(asked) == seen + 3  # the first page of the last three
  for path, sentence in (('gone', 'status 404'), ('huge', 'more than 10,000 bytes'),
                         ('drip', 'takes too long|cannot be fetched'),
                         ('to//to//to//to//to//x', 'leads on more than 3 times')):
    begin = time.monotonic()
    with pytest.raises(UserError, match=sentence):
      fetch(f'http://good.example/{path}', REMOTE)
    assert time.monotonic() - begin < 5
