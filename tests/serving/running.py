"""A tiny model behind a real socket, for clients that nobody here wrote."""

import base64
import contextlib
import functools
import http.client
import io
import json
import socket
import threading
import time

import jax
import numpy as np
from PIL import Image

from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.serving.completions import Completions, Limits
from hrvlm_jax.serving.driver import Driver
from hrvlm_jax.serving.engine import Engine
from hrvlm_jax.serving.pictures import PictureLimits
from hrvlm_jax.serving.server import Server, application
from hrvlm_jax.systems.mc_llava.encoder import tiny
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer

NAME = 'tiny'
LENGTH = 512


class Running:
  """A server in a thread of this process."""

  def __init__(self, answerer, *, slots=4, queue=16, keys=(), limits=None):
    self.answerer = answerer
    self.engine = Engine(answerer, slots=slots, length=LENGTH)
    self.driver = Driver(self.engine, queue=queue)
    self.completions = Completions(
      self.driver, name=NAME, limits=limits or Limits(
        body=1 << 20, body_seconds=5, send_seconds=5,
        pictures=PictureLimits(images=2, pixels=1 << 20)))
    self.server = Server(application(self.completions, keys=keys), self.completions)
    self.socket = socket.create_server(('127.0.0.1', 0))
    self.port = self.socket.getsockname()[1]
    self.url = f'http://127.0.0.1:{self.port}/v1'
    self._thread = threading.Thread(target=self.server.serve_until_stopped, args=(self.socket,))
    self._thread.start()
    while not self.server.started:
      time.sleep(0.01)

  def stop(self):
    """Ends it, and waits."""
    self.server.should_exit = True
    self._thread.join()
    self.socket.close()

  def idle(self, seconds=20.0):
    """Whether no request is on its way, after waiting for it."""
    end = time.monotonic() + seconds
    while self.driver.snapshot().pending:
      if time.monotonic() > end:
        return False
      time.sleep(0.01)
    return True

  def get(self, path, **headers):
    """(status, headers, body) of a GET."""
    return self.send('GET', path, None, headers)

  def post(self, body, **headers):
    """(status, headers, JSON) of a question; the body is bytes or a value."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, found, text = self.send('POST', '/v1/chat/completions', data,
                                    {'Content-Type': 'application/json', **headers})
    return status, found, json.loads(text)

  def send(self, method, path, body, headers):
    """(status, headers, body)."""
    with contextlib.closing(http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)) as one:
      one.request(method, path, body, {k.replace('_', '-'): v for k, v in headers.items()})
      answer = one.getresponse()
      return answer.status, answer.headers, answer.read()


@functools.cache
def tiny_answerer():
  """A tiny MC-LLaVA whose answers depend on what it sees."""
  config = tiny(max_crops=2, num_tokens=20)
  params = jax.jit(vlm.build(config).init)(jax.random.key(0))
  params['language'] = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params['language'])
  return Answerer(config, params, tokenizer_of('byte'))


def png(seed=0, size=(60, 40)):
  """Bytes of a picture of noise."""
  pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
  return encoded(Image.fromarray(pixels))


def encoded(image):
  """Bytes of a picture."""
  out = io.BytesIO()
  image.save(out, 'png')
  return out.getvalue()


def asks(text='What?', *images):
  """Messages of one question."""
  url = lambda data: f'data:image/png;base64,{base64.b64encode(data).decode()}'
  parts = [{'type': 'image_url', 'image_url': {'url': url(image)}} for image in images]
  return [{'role': 'user', 'content': [*parts, {'type': 'text', 'text': text}]}]
