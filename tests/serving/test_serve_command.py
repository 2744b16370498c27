"""`hrvlm serve` as a user types it: the page's example, draining, what is refused before a model is
read; and 300 requests with faults."""

import contextlib
import http.client
import io
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import openai
from PIL import Image
import pytest

from hrvlm_jax.checkpoint import store
from hrvlm_jax.cli.main import main
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.serving.engine import Engine
from hrvlm_jax.serving.requests import Request
from hrvlm_jax.vlm.answer import Answerer
from scripts import serving_faults as faults
from tests import levels
from tests.serving.running import NAME, Running, asks, png, tiny_answerer

PAGE = pathlib.Path(__file__).parents[2] / 'docs/serving.md'


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  answerer = tiny_answerer()
  folder = tmp_path_factory.mktemp('model') / 'small'
  params = answerer.generator.params
  from hrvlm_jax.core.module import restack
  params = params | {'language': params['language'] | {
    'blocks': restack(params['language']['blocks'])}}
  store.save_params(folder, params, {'model': to_dict(answerer.config)})
  (folder / 'tokenizer').mkdir()
  answerer.text.tokenizer.save(folder / 'tokenizer')
  return folder


@contextlib.contextmanager
def serve(checkpoint, *options, devices=1):
  """(process, address) of a server in a process of its own."""
  flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices}'
  process = subprocess.Popen(
    [sys.executable, '-m', 'hrvlm_jax.cli.main', 'serve', str(checkpoint), '--port', '0',
     '--slots', '2', '--length', '512', *options],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    env={**os.environ, 'XLA_FLAGS': flags})
  try:
    line = process.stdout.readline()
    if not line:
      raise AssertionError(process.stderr.read())
    yield process, line.split()[-1]
  finally:
    process.kill()
    process.communicate()


@pytest.mark.parametrize('tensor', levels.rows('systems', [1, 2], first=[1]))
def test_the_pages_example_runs_and_a_stopped_server_finishes(checkpoint, tmp_path, monkeypatch,
                                                              tensor):
  monkeypatch.chdir(tmp_path)
  photo = Image.open(io.BytesIO(png()))
  photo.putalpha(Image.linear_gradient('L').resize(photo.size))
  photo.save('photo.png')
  code = re.search(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)[1]
  with serve(checkpoint, '--tensor', str(tensor), '--alpha', 'white', devices=tensor) as (
      process, address):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      exec(code.replace('http://127.0.0.1:8000/v1', address), {})
    answerer = Answerer.load(checkpoint, alpha='white')
    expected, other = answerer.answer([
      ([one], 'What does the red sign say?') for one in ('photo.png', photo.convert('RGB'))],
      max_new_tokens=16)
    assert expected != other
    assert out.getvalue().startswith(expected) and expected
    client = openai.OpenAI(base_url=address, api_key='none', max_retries=0)
    stream = iter(client.chat.completions.create(
      model='small', messages=asks('What?', png()), max_tokens=200, stream=True, temperature=3.0,
      seed=2))
    next(stream)
    process.send_signal(signal.SIGTERM)
    chunks = list(stream)  # to the end
    assert chunks[-1].choices[0].finish_reason in ('stop', 'length') and len(chunks) > 3
    assert process.wait(30) == 0
    assert process.stderr.read() == ''
  with pytest.raises(openai.APIConnectionError):
    client.models.list()


def test_what_is_refused_before_a_model_is_read(tmp_path, capsys, monkeypatch):
  nowhere, empty = str(tmp_path / 'nowhere'), tmp_path / 'keys'
  empty.write_text('\n \n')
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = str(taken.getsockname()[1])
    for options, sentence in (
        (['--port', port], 'cannot be listened on'), (['--port', '99999'], 'at most 65535'),
        (['--api-key-file', str(empty)], 'holds no key'), (['--slots', '0'], 'expected at least 1'),
        (['--api-key-file', nowhere], 'cannot be read'), (['--port', '0'], 'nowhere')):
      assert main(['serve', nowhere, *options]) == 2
      assert sentence in capsys.readouterr().err
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '2')
  assert main(['serve', nowhere]) == 2
  assert 'serve runs on the devices of one process' in capsys.readouterr().err


def test_an_engine_refuses_several_processes_and_methods(monkeypatch):
  answerer = tiny_answerer()
  monkeypatch.setattr('jax.process_count', lambda: 2)
  with pytest.raises(UserError, match='found 2 processes'):
    Engine(answerer)
  monkeypatch.undo()
  monkeypatch.setattr(answerer, 'methods', {'fastv': {}})
  with pytest.raises(UserError, match='fastv: continuous batching'):
    Engine(answerer)


def test_three_hundred_requests_with_faults():
  served = Running(tiny_answerer(), slots=4, queue=6)
  try:
    place = faults.Place(served.port, NAME, 1 << 20)
    known = []
    for number in range(8):
      image = Image.new('RGB', (40 + number, 60), (37 * number % 256, 90, 200))
      request = Request(images=[image], question=f'Question {number}?', max_new_tokens=2 + number)
      known.append(next(served.engine.run([request])).text)
    assert len(set(known)) > 4
    begun = threading.active_count()
    kinds, problems = faults.storm(place, 300, known)
    assert sum(kinds.values()) == 300 and kinds.keys() == set(faults.KINDS)
    assert problems == []
    assert served.idle() and served.driver.snapshot().failures == 0
    found = faults.numbers_of(place)
    assert found['hrvlm_slots_busy'] == found['hrvlm_waiting'] == 0
    assert found['hrvlm_requests_total{status="200"}'] >= kinds['right'] + kinds['stream']
    assert 'hrvlm_requests_total{status="500"}' not in found
    end = time.monotonic() + 10
    while threading.active_count() > begun + 2 and time.monotonic() < end:
      time.sleep(0.05)
    assert threading.active_count() <= begun + 2  # those that prepare images
    with contextlib.closing(http.client.HTTPConnection('127.0.0.1', served.port)) as one:
      one.request('GET', '/health')
      assert one.getresponse().status == 200
  finally:
    served.stop()
