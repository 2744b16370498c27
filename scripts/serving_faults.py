"""Many requests to a server, half of them broken on purpose: cancelled, cut, garbage, huge, slow.

    python scripts/serving_faults.py CHECKPOINT --requests 10000 --out result.json

starts `hrvlm serve`, asks, and says how many answers of each kind came, whether all that could be
right were, whether a slot is stuck, and how much memory the server held after a fifth of the
requests and at the end. Status 1: something of that is not as it should be.
"""

from __future__ import annotations

import argparse
import base64
import collections
from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import http.client
import io
import json
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from PIL import Image

from hrvlm_jax.core import machine
from hrvlm_jax.evaluation.provenance import git_commit

KINDS = ('right', 'stream', 'cancel', 'cut', 'garbage', 'huge', 'slow', 'image')
WEIGHTS = (30, 20, 12, 10, 10, 3, 5, 10)
MEMORY = 1.1  # most growth after the first fifth


@dataclasses.dataclass(frozen=True)
class Place:
  """A server: its port on this machine, the model's name, the most bytes of a body."""

  port: int
  model: str
  limit: int


def question(number: int, model: str, **more: Any) -> dict[str, Any]:
  """One of a few questions whose answers are known."""
  image = io.BytesIO()
  Image.new('RGB', (40 + number, 60), (37 * number % 256, 90, 200)).save(image, 'png')
  url = f'data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}'
  return {'model': model, 'max_tokens': 2 + number, 'messages': [{'role': 'user', 'content': [
    {'type': 'image_url', 'image_url': {'url': url}},
    {'type': 'text', 'text': f'Question {number}?'}]}], **more}


def ask(place: Place, body: bytes, read: Callable[[http.client.HTTPResponse], Any]) -> Any:
  """(status, what `read` makes of the answer); asks again while the queue is full."""
  while True:
    connection = http.client.HTTPConnection('127.0.0.1', place.port, timeout=120)
    with contextlib.closing(connection) as one:
      one.request('POST', '/v1/chat/completions', body, {'Content-Type': 'application/json'})
      answer = one.getresponse()
      if answer.status != 429:
        return answer.status, read(answer)
    time.sleep(0.05)


def whole(answer: http.client.HTTPResponse) -> str:
  """The text of an answer, '' where there is none."""
  value = json.loads(answer.read())
  return value['choices'][0]['message']['content'] if 'choices' in value else ''


def streamed(answer: http.client.HTTPResponse, *, pause: float = 0.0, most: int = 1 << 30) -> str:
  """The text of a stream; after `most` events it is left."""
  text, events = '', 0
  for line in answer:
    if line.startswith(b'data: {'):
      for choice in json.loads(line[6:])['choices']:
        text += choice['delta'].get('content') or ''
      events += 1
      time.sleep(pause)
    if events >= most:
      break
  return text


def one(kind: str, place: Place, rng: random.Random, known: Sequence[str]) -> bool:
  """Sends one request of a kind; whether what came back is right."""
  number = rng.randrange(len(known))
  make = lambda **more: json.dumps(question(number, place.model, **more)).encode()
  if kind == 'right':
    return ask(place, make(), whole) == (200, known[number])
  if kind in ('stream', 'slow'):
    pause = 0.05 if kind == 'slow' else 0.0
    return ask(place, make(stream=True), lambda a: streamed(a, pause=pause)) == (200, known[number])
  if kind == 'cancel':
    most = rng.randrange(1, 5)
    found = ask(place, make(stream=True, max_tokens=100, temperature=2.0),
                lambda a: streamed(a, most=most))
    return found[0] == 200
  if kind == 'cut':
    body = make()
    head = (f'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: '
            f'application/json\r\nContent-Length: {len(body)}\r\n\r\n').encode()
    with socket.create_connection(('127.0.0.1', place.port)) as raw:
      raw.sendall((head + body)[:rng.randrange(1, len(head) + len(body) + 1)])
    return True
  if kind == 'garbage':
    body = bytearray(make())
    if rng.random() < 0.5:
      body = bytearray(rng.randbytes(rng.randrange(200)))
    else:
      body[rng.randrange(3)] = 0
    return ask(place, bytes(body), whole)[0] == 400
  if kind == 'huge':
    body = b'{"model": "' + b'x' * (place.limit + rng.randrange(1, place.limit))
    return ask(place, body, whole)[0] == 413
  broken = question(number, place.model)
  url = broken['messages'][0]['content'][0]['image_url']
  url['url'] = url['url'][:30 + rng.randrange(60)]
  return ask(place, json.dumps(broken).encode(), whole)[0] == 400


def storm(place: Place, requests: int, known: Sequence[str], *, threads: int = 8, seed: int = 0,
          end: float = float('inf'), at: Callable[[int], None] = lambda done: None
          ) -> tuple[dict[str, int], list[str]]:
  """Sends so many requests.

  Args:
    known: the right answers of the first questions.
    end: reading of the monotonic clock after which no more are sent.
    at: told how many are done.

  Returns:
    (how many of each kind, sentences about what was wrong).
  """
  plan = random.Random(seed).choices(KINDS, WEIGHTS, k=requests)
  lock, numbers, problems = threading.Lock(), iter(enumerate(plan)), []
  sent: list[str] = []

  def work() -> None:
    while True:
      with lock:
        number, kind = next(numbers, (None, ''))
        if number is None or time.monotonic() > end:
          return
        sent.append(kind)
      try:
        right = one(kind, place, random.Random(f'{seed} {number}'), known)
        said = f'request {number} ({kind}): wrong answer'
      except (OSError, http.client.HTTPException, ValueError) as error:
        # A body that nobody reads to its end may break the connection before the answer is read.
        right, said = kind == 'huge', f'request {number} ({kind}): {error!r}'
      if not right:
        problems.append(said)
      at(number + 1)

  workers = [threading.Thread(target=work) for _ in range(threads)]
  [worker.start() for worker in workers]
  [worker.join() for worker in workers]
  return dict(collections.Counter(sent)), problems


def numbers_of(place: Place) -> dict[str, float]:
  """The server's metrics."""
  with contextlib.closing(http.client.HTTPConnection('127.0.0.1', place.port, timeout=60)) as one_:
    one_.request('GET', '/metrics')
    lines = one_.getresponse().read().decode().splitlines()
  pairs = (line.rsplit(' ', 1) for line in lines if not line.startswith('#'))
  return {name: float(value) for name, value in pairs}


def idle(place: Place, seconds: float = 60.0) -> bool:
  """Whether no request is on its way, after waiting for it."""
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    found = numbers_of(place)
    if found['hrvlm_pending'] == found['hrvlm_slots_busy'] == 0:
      return True
    time.sleep(0.1)
  return False


def resident(process: int) -> int:
  """Bytes of memory that a process holds."""
  text = pathlib.Path(f'/proc/{process}/status').read_text()
  return int(text.partition('VmRSS:')[2].split()[0]) << 10


def main() -> int:
  """See the head of this file."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('checkpoint')
  parser.add_argument('--requests', type=int, default=10_000)
  parser.add_argument('--threads', type=int, default=16)
  parser.add_argument('--minutes', type=float, default=float('inf'),
                      help='no more are sent after so many')
  parser.add_argument('--out', type=pathlib.Path)
  arguments = parser.parse_args()
  command = [sys.executable, '-m', 'hrvlm_jax.cli.main', 'serve', arguments.checkpoint, '--port',
             '0', '--name', 'm', '--max-body', '1']
  server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  try:
    line = server.stdout.readline()
    place = Place(int(line.rsplit(':', 1)[1].partition('/')[0]), 'm', 1 << 20)
    known = [ask(place, json.dumps(question(n, 'm')).encode(), whole)[1] for n in range(8)]
    memory: dict[int, int] = {}

    begin, first = time.monotonic(), arguments.requests // 5

    def at(done: int) -> None:
      if done % max(1, arguments.requests // 10) == 0:
        memory[done] = resident(server.pid)
        print(f'{done} after {time.monotonic() - begin:.0f} s, {memory[done] >> 20} MiB',
              file=sys.stderr, flush=True)

    kinds, problems = storm(place, arguments.requests, known, threads=arguments.threads, at=at,
                            end=begin + 60 * arguments.minutes)
    stuck = not idle(place)
    sent = sum(kinds.values())
    memory[sent] = resident(server.pid)
    held = [found for done, found in sorted(memory.items()) if done >= min(sent, first)]
    result = {
      'date': time.strftime('%Y-%m-%d'), 'commit': git_commit(), 'machine': machine.here().title,
      'requests': sent, 'kinds': kinds,
      'problems': problems[:20], 'stuck': stuck,
      'memory_mb': {done: round(found / 1e6) for done, found in sorted(memory.items())},
      'seconds': round(time.monotonic() - begin),
      'metrics': {k: v for k, v in numbers_of(place).items()
                  if '_bucket' not in k and '_created' not in k}}
  finally:
    server.send_signal(signal.SIGTERM)
    status = server.wait(60)
  result['status'] = status
  text = json.dumps(result, indent=2)
  print(text)
  if arguments.out:
    arguments.out.write_text(f'{text}\n')
  return int(bool(problems or stuck or status or held[-1] > MEMORY * held[0]))


if __name__ == '__main__':
  sys.exit(main())
