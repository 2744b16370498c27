"""One request from its body to its last byte: read, prepared, answered, and given up on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import json
import time
from typing import Any

from starlette.types import Receive, Scope, Send

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.serving.chat import DONE, ApiError, Asked, Writer, event, read_request
from hrvlm_jax.serving.driver import Closed, Driver, Full, Ticket
from hrvlm_jax.serving.engine import again
from hrvlm_jax.serving.guard import read_body, respond
from hrvlm_jax.serving.metrics import Metrics
from hrvlm_jax.serving.pictures import PictureLimits, open_url
from hrvlm_jax.serving.requests import Piece, Prepared

_STREAM = [(b'content-type', b'text/event-stream; charset=utf-8'), (b'cache-control', b'no-cache'),
           (b'x-accel-buffering', b'no')]

_CHARACTERS = 32  # of text per place of a slot, far above any tokenizer's mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What one request may cost.

  Attributes:
    body: bytes.
    body_seconds: until the body has arrived.
    tokens: new tokens that a request may ask for; None: what a slot has room for.
    default_tokens: new tokens where a request names no number, as far as there is room.
    send_seconds: a client that takes nothing for so long is gone.
  """

  body: int = 32 << 20
  body_seconds: float = 60.0
  tokens: int | None = None
  default_tokens: int = 512
  send_seconds: float = 60.0
  pictures: PictureLimits = PictureLimits()


class _Gone(Exception):
  """The client went away."""


class Completions:
  """Answers `POST /v1/chat/completions` over a driver.

  Args:
    name: of the model.
    workers: threads that decode and prepare images, off the event loop.
  """

  def __init__(self, driver: Driver, *, name: str, limits: Limits = Limits(), workers: int = 2):
    self.driver, self.name, self.limits = driver, name, limits
    self.metrics = Metrics(driver)
    self.draining = False
    self._pool = ThreadPoolExecutor(workers, 'images')

  def close(self) -> None:
    """Ends the threads."""
    self._pool.shutdown(wait=True, cancel_futures=True)

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    started = False

    async def sending(message: Any) -> None:
      nonlocal started
      started = True
      try:
        async with asyncio.timeout(self.limits.send_seconds):
          await send(message)
      except (TimeoutError, OSError):
        raise _Gone from None

    status = 200
    try:
      await self._answer(scope, receive, sending)
    except _Gone:
      status = 499
    except ApiError as error:
      status = error.status
      with contextlib.suppress(_Gone):
        if started:  # the status is gone; a stream can still say it
          await sending({'type': 'http.response.body', 'body': event(error.body()) + DONE})
        elif status != 499:
          await respond(error, sending)
    except asyncio.CancelledError:
      status = 499
      raise
    finally:
      self.metrics.requests.labels(str(status)).inc()

  async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
    if self.draining:
      raise ApiError(503, 'this server is being stopped')
    limits = self.limits
    body = await read_body(scope, receive, limit=limits.body, seconds=limits.body_seconds)
    begin = time.monotonic()
    with _said_to_the_client():
      asked = read_request(body, self.name)
    del body
    self._check(asked)
    events: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
    tickets = self._reserve(asked, events)
    gone = asyncio.create_task(_disconnected(receive))
    try:
      prepared = await self._prepared(asked, gone)
      self.metrics.prepared.observe(time.monotonic() - begin)
      self.metrics.prompt_tokens.inc(prepared.prompt_tokens)
      for number, ticket in enumerate(tickets):
        self.driver.submit(ticket, again(prepared, choice=number) if number else prepared)
      text = self.driver.engine.answerer.text
      writer = Writer(self.name, text.tokenizer, asked, prepared.prompt_tokens)
      pieces = self._pieces(events, len(tickets), gone, begin)
      answer = _stream if asked.stream else _whole
      await answer(pieces, writer, asked, send, text.stop_ids())
    finally:
      gone.cancel()
      for ticket in tickets:
        self.driver.cancel(ticket)

  def _check(self, asked: Asked) -> None:
    most, pictures = self.limits.tokens, self.limits.pictures
    if most is not None and (asked.tokens or 0) > most:
      raise ApiError(400, f'max_tokens: {asked.tokens} is more than {most}, the limit of this '
                     'server', param='max_tokens')
    if len(asked.urls) > pictures.images:
      raise ApiError(400, f'{len(asked.urls)} images are more than {pictures.images}, the limit of '
                     'this server', param='messages')

  def _reserve(self, asked: Asked, events: asyncio.Queue) -> list[Ticket]:
    loop = asyncio.get_running_loop()

    def teller(number: int) -> Callable[[Piece | Exception], None]:
      def tell(piece: Piece | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
          loop.call_soon_threadsafe(events.put_nowait, (number, piece))
      return tell

    try:
      return self.driver.reserve([teller(number) for number in range(asked.choices)])
    except Closed:
      raise ApiError(503, 'this server is being stopped') from None
    except Full:
      error = ApiError(429, 'too many requests are waiting; try again in a moment',
                       kind='rate_limit_error', code='rate_limit_exceeded')
      error.headers['Retry-After'] = '1'
      raise error from None

  async def _prepared(self, asked: Asked, gone: asyncio.Task) -> Prepared:
    work = asyncio.get_running_loop().run_in_executor(self._pool, self._prepare, asked)
    await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
      work.cancel()  # if it has begun it ends by itself, and is forgotten
      work.add_done_callback(lambda future: future.cancelled() or future.exception())
      raise _Gone
    with _said_to_the_client():
      return work.result()

  def _prepare(self, asked: Asked) -> Prepared:
    engine, limits = self.driver.engine, self.limits
    written = sum(len(message.text) for message in asked.dialogue.messages)
    if written > _CHARACTERS * engine.length:  # nobody's thread is to tokenise megabytes
      raise UserError(f'the conversation has {written} characters, more than a slot of '
                      f'{engine.length} places can hold; shorten it')
    images = [open_url(url, limits.pictures, name=f'image {number}')
              for number, url in enumerate(asked.urls, 1)]
    if asked.tokens is not None:
      return engine.prepare(asked.request(images, asked.tokens))
    prepared = engine.prepare(asked.request(images, 1))
    most = min(limits.default_tokens, limits.tokens or limits.default_tokens)
    return again(prepared, max_new_tokens=min(most, engine.room(prepared)))

  async def _pieces(self, events: asyncio.Queue, choices: int, gone: asyncio.Task, begin: float
                    ) -> AsyncIterator[tuple[int, Piece]]:
    """(choice, piece) until every choice is complete."""
    left, first = choices, True
    while left:
      waiting = asyncio.create_task(events.get())
      try:
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
          raise _Gone
        number, piece = waiting.result()
      finally:
        waiting.cancel()
      if isinstance(piece, Exception):
        raise ApiError(500, 'the model failed on this batch of requests; try again')
      if first:
        self.metrics.first_token.observe(time.monotonic() - begin)
        first = False
      left -= piece.reason is not None
      if not left:
        self.metrics.whole.observe(time.monotonic() - begin)
      yield number, piece


async def _whole(pieces: AsyncIterator[tuple[int, Piece]], writer: Writer, asked: Asked,
                 send: Send, hidden: tuple[int, ...]) -> None:
  found: list[list[Piece]] = [[] for _ in range(asked.choices)]
  async for number, piece in pieces:
    found[number].append(piece)
  body = json.dumps(writer.whole(found, hidden)).encode()
  await send({'type': 'http.response.start', 'status': 200, 'headers': [
    (b'content-type', b'application/json'), (b'content-length', str(len(body)).encode())]})
  await send({'type': 'http.response.body', 'body': body})


async def _stream(pieces: AsyncIterator[tuple[int, Piece]], writer: Writer, asked: Asked,
                  send: Send, hidden: tuple[int, ...]) -> None:
  part = lambda body, more=True: send(
    {'type': 'http.response.body', 'body': body, 'more_body': more})
  await send({'type': 'http.response.start', 'status': 200, 'headers': _STREAM})
  role = {'role': 'assistant', 'content': ''}
  await part(b''.join(writer.chunk(number, role) for number in range(asked.choices)))
  tokens = 0
  async for number, piece in pieces:
    tokens += 1
    reports = () if piece.report is None or piece.token in hidden else (piece,)
    if piece.text or reports:
      await part(writer.chunk(number, {'content': piece.text}, pieces=reports))
    if piece.reason:
      await part(writer.chunk(number, {}, reason=piece.reason))
  if asked.usage:
    await part(writer.usage(tokens))
  await part(DONE, more=False)


async def _disconnected(receive: Receive) -> None:
  """Returns when the client is gone."""
  while (await receive())['type'] != 'http.disconnect':
    pass


@contextlib.contextmanager
def _said_to_the_client():
  """A mistake of a user is an answer with status 400."""
  try:
    yield
  except UserError as error:
    raise ApiError(400, str(error)) from error
