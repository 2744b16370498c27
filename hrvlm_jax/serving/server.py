"""`hrvlm serve`: an OpenAI-compatible server over one loaded model.

The routes are few: `/v1/models`, `/v1/chat/completions`, `/health`, `/metrics`. One process, one
event loop, one thread that drives the device, a few that prepare images.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
import contextlib
import signal
import socket
import threading
import time
from typing import Any

from fastapi import FastAPI, Request as HttpRequest, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send
import uvicorn

from hrvlm_jax import __version__
from hrvlm_jax.serving.chat import ApiError
from hrvlm_jax.serving.completions import Completions
from hrvlm_jax.serving.guard import LOOPBACK, Guard


class _Later(Response):
  """A response that is made while it is sent."""

  def __init__(self, completions: Completions):
    super().__init__()
    self._completions = completions

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    await self._completions(scope, receive, send)


def application(completions: Completions, *, hosts: Iterable[str] | None = LOOPBACK,
                keys: Iterable[str] = ()) -> FastAPI:
  """The routes.

  Args:
    hosts, keys: see `guard.Guard`.
  """
  name = completions.name

  @contextlib.asynccontextmanager
  async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    del app
    yield
    completions.close()

  # No pages that fetch scripts from elsewhere.
  app = FastAPI(title='hrvlm', version=__version__, lifespan=lifespan, docs_url=None,
                redoc_url=None, openapi_url=None)
  app.add_middleware(Guard, hosts=hosts, keys=tuple(keys))
  model = {'id': name, 'object': 'model', 'created': int(time.time()), 'owned_by': 'hrvlm'}

  @app.exception_handler(ApiError)
  async def refused(request: HttpRequest, error: ApiError) -> JSONResponse:
    del request
    return JSONResponse(error.body(), error.status, headers=error.headers)

  @app.exception_handler(HTTPException)
  async def missing(request: HttpRequest, error: HTTPException) -> JSONResponse:
    del request
    said = ApiError(error.status_code, str(error.detail))
    return JSONResponse(said.body(), said.status, headers=error.headers)

  @app.exception_handler(Exception)
  async def failed(request: HttpRequest, error: Exception) -> JSONResponse:
    del request, error  # uvicorn writes its traceback
    return JSONResponse(ApiError(500, 'an error of this server').body(), 500)

  @app.get('/health')
  async def health() -> JSONResponse:
    stopping = completions.draining
    return JSONResponse({'status': 'stopping' if stopping else 'ok'}, 503 if stopping else 200)

  @app.get('/metrics')
  async def metrics() -> Response:
    return Response(completions.metrics.text(), media_type='text/plain; version=0.0.4')

  @app.get('/v1/models')
  async def models() -> dict[str, Any]:
    return {'object': 'list', 'data': [model]}

  @app.get('/v1/models/{which:path}')
  async def one_model(which: str) -> dict[str, Any]:
    if which != name:
      raise ApiError(404, f'there is no model {which[:80]!r} here; this server has {name!r}',
                     param='model', code='model_not_found')
    return model

  @app.post('/v1/chat/completions')
  async def chat() -> Response:
    return _Later(completions)

  return app


class Server(uvicorn.Server):
  """A uvicorn server that says it is stopping while requests on their way finish."""

  def __init__(self, app: FastAPI, completions: Completions, *, drain_seconds: float = 30.0):
    super().__init__(uvicorn.Config(
      app, log_level='warning', access_log=False, ws='none',
      server_header=False, proxy_headers=False, timeout_keep_alive=30, http='h11',
      timeout_graceful_shutdown=max(1, round(drain_seconds))))
    self._completions = completions

  def handle_exit(self, sig: int, frame: Any) -> None:
    """SIGTERM and SIGINT: no new requests; a second time: at once."""
    self._completions.draining = True
    super().handle_exit(sig, frame)

  def serve_until_stopped(self, listening: socket.socket) -> None:
    """Runs until a signal, lets requests finish, ends the driver.

    Args:
      listening: where clients come in.
    """
    if threading.current_thread() is threading.main_thread():
      # uvicorn hands signals on to whoever was there before when it is done.
      for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    try:
      self.run(sockets=[listening])
    finally:
      self._completions.driver.close(timeout=1.0)
