"""`hrvlm serve`: see `serving.server` and docs/serving.md."""

from __future__ import annotations

import argparse
import os
import pathlib
import socket
import sys
from typing import TYPE_CHECKING, Any

from hrvlm_jax.cli.arguments import Parser
from hrvlm_jax.cli.ask import take_knobs
from hrvlm_jax.core import installed
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.images import MAX_PIXELS

if TYPE_CHECKING:
  from hrvlm_jax.front.model import Model


def main(argv: list[str]) -> int:
  """Serves one model over HTTP as OpenAI's chat completions, until it is stopped."""
  argv, knobs = take_knobs(argv, ('encoder',))
  parser = Parser('serve', f'{main.__doc__} Ask with any OpenAI client, see docs/serving.md. '
                  '--encoder.KEY=VALUE sets a knob of the system (max_crops, num_tokens, ...).')
  add = parser.add_argument
  add('checkpoint', help="checkpoint, work directory of a run, folder in an original's layout, or "
      'a name on the hub (owner/name@revision)')
  add('--host', default='127.0.0.1', help='address to listen on; default: this machine alone')
  add('--port', type=int, default=8000, help='0: any free one, which is printed')
  add('--name', help="the model's name for clients; default: the last part of its path")
  add('--api-key-file', metavar='FILE', help='keys, one a line; clients must send one of them')
  add('--allow-host', action='append', default=[], metavar='NAME',
      help='further name under which clients may speak to this server; * for all')
  add('--slots', type=int, default=8, help='requests at a time')
  add('--length', type=int, help='places of a slot: prompt and answer together')
  add('--queue', type=int, default=32, help='requests that may wait; more are told 429')
  add('--tensor', type=int, default=1, help='devices over which heads are cut')
  add('--fsdp', type=int, default=1, help='devices over which parameters are spread')
  add('--max-tokens', type=int, help='most new tokens of a request; default: the room of a slot')
  add('--default-tokens', type=int, default=512, help='where a request names no number')
  add('--max-images', type=int, default=8, help='of one request')
  add('--max-pixels', type=int, default=MAX_PIXELS, help='of one image')
  add('--max-body', type=int, default=32, metavar='MB', help='of one request')
  add('--allow-remote-images', action='store_true',
      help='fetch images that clients name by http(s), from public addresses')
  add('--workers', type=int, default=2, help='threads that prepare images')
  add('--drain-seconds', type=float, default=30.0, help='for requests on their way, after SIGTERM')
  add('--exif', choices=('apply', 'ignore'), default='apply',
      help='turn photographs upright as their EXIF block says, or not')
  add('--alpha', choices=('drop', 'white'), default='drop',
      help='put transparent pictures on a white page, or forget transparency')
  add('--page', action=argparse.BooleanOptionalAction, default=None,
      help="a page to try the model at / (extra 'page'); default: where Gradio is installed")
  add('--beside', metavar='CHECKPOINT', help='a second model, beside the first on the page')
  add('--dtype', choices=('float32', 'bfloat16'), default='float32')
  arguments = parser.parse(argv)
  for name, least in (('slots', 1), ('length', 2), ('queue', 0), ('max_tokens', 1),
                      ('default_tokens', 1), ('max_images', 0), ('max_pixels', 1), ('max_body', 1),
                      ('workers', 1), ('port', 0), ('tensor', 1), ('fsdp', 1)):
    value = getattr(arguments, name)
    if value is not None and value < least:
      raise UserError(f'--{name.replace("_", "-")} {value}: expected at least {least}')
  if arguments.port > 65535:  # the resolver would take what is left of it modulo 65536
    raise UserError(f'--port {arguments.port}: expected at most 65535')
  _one_process()
  try:
    from hrvlm_jax.serving import guard
    from hrvlm_jax.serving.completions import Completions, Limits
    from hrvlm_jax.serving.pictures import PictureLimits
    from hrvlm_jax.serving.server import Server, application
  except ModuleNotFoundError as error:
    if (error.name or '').partition('.')[0] == 'hrvlm_jax':
      raise
    raise UserError(f'{error.name} is missing; install it with {installed.add("serve")}'
                    ) from error

  page = _page(arguments)
  keys = guard.read_keys(arguments.api_key_file) if arguments.api_key_file else ()
  listening = _bind(arguments.host, arguments.port)  # before a large checkpoint is read
  port = listening.getsockname()[1]
  open_to_all = arguments.host not in guard.LOOPBACK
  if open_to_all and not keys:
    print(f'listening on {arguments.host} without --api-key-file: whoever reaches this machine can '
          'ask', file=sys.stderr)

  from hrvlm_jax.serving.driver import Driver
  from hrvlm_jax.serving.engine import Engine

  model = _loaded(arguments, arguments.checkpoint, knobs.get('encoder', {}))
  engine = Engine(model.answerer, slots=arguments.slots, length=arguments.length)
  name = arguments.name or _named(arguments.checkpoint)
  limits = Limits(
    body=arguments.max_body << 20, tokens=arguments.max_tokens,
    default_tokens=arguments.default_tokens,
    pictures=PictureLimits(images=arguments.max_images, pixels=arguments.max_pixels,
                           remote=arguments.allow_remote_images, exif=arguments.exif,
                           alpha=arguments.alpha))
  driver = Driver(engine, queue=arguments.queue)
  completions = Completions(driver, name=name, workers=arguments.workers, limits=limits)
  hosts = None
  if not open_to_all and '*' not in arguments.allow_host:
    hosts = (*guard.LOOPBACK, *(host.lower() for host in arguments.allow_host))
  elif arguments.allow_host and '*' not in arguments.allow_host:
    hosts = (arguments.host, *guard.LOOPBACK, *(host.lower() for host in arguments.allow_host))
  app, second = application(completions, hosts=hosts, keys=keys), None
  if page is not None:
    shown_models = [page.Shown(name, model, driver)]
    if arguments.beside:
      beside = _loaded(arguments, arguments.beside, {})
      second = Driver(Engine(beside.answerer, slots=min(2, arguments.slots),
                             length=arguments.length), queue=arguments.queue)
      shown_models.append(page.Shown(_named(arguments.beside), beside, second))
    page.mount(app, shown_models, limits=limits.pictures, body=limits.body)
  server = Server(app, completions, drain_seconds=arguments.drain_seconds)
  shown = f'[{arguments.host}]' if ':' in arguments.host else arguments.host
  print(f'{name}: {engine.count} slots of {engine.length} places, http://{shown}:{port}/v1',
        flush=True)
  if page is not None:
    print(f'a page to try it: http://{shown}:{port}/', flush=True)
  try:
    server.serve_until_stopped(listening)
  finally:
    if second is not None:
      second.close(timeout=1.0)
  return 0


def _named(checkpoint: str) -> str:
  return pathlib.Path(os.path.abspath(checkpoint)).name


def _page(arguments: argparse.Namespace) -> Any:
  """The module of the page; None where there is to be none."""
  if arguments.page is False:
    if arguments.beside:
      raise UserError('--beside: is shown on the page; leave --no-page out')
    return None
  try:
    from hrvlm_jax.front import page

    return page
  except ModuleNotFoundError as error:
    if (error.name or '').partition('.')[0] == 'hrvlm_jax':
      raise
    if arguments.page or arguments.beside:
      raise UserError(f"{error.name} is missing, which the page is made with; install it with pip "
                      "install 'hrvlm-jax[page]'") from error
    return None


def _loaded(arguments: argparse.Namespace, checkpoint: str, options: dict[str, Any]) -> Model:
  from hrvlm_jax.front.loading import load
  from hrvlm_jax.front.model import Model

  if arguments.tensor * arguments.fsdp > 1:
    from hrvlm_jax.serving.loading import load_over_mesh

    answerer = load_over_mesh(checkpoint, dtype=arguments.dtype, exif=arguments.exif,
                              alpha=arguments.alpha,
                              encoder_options=options, tensor=arguments.tensor,
                              fsdp=arguments.fsdp)
    return Model(answerer.config, answerer=answerer, ex=answerer.generator.ex, name=checkpoint)
  model = load(checkpoint, dtype=arguments.dtype, exif=arguments.exif, alpha=arguments.alpha,
               encoder=options)
  if model.answerer is None:
    raise UserError(f'{checkpoint}: is an encoder alone, which answers nothing; use '
                    '`hrvlm encode`')
  return model


def _one_process() -> None:
  """Refuses a run of several processes, which could not answer from one queue."""
  from hrvlm_jax.parallel.distributed import detect

  found = detect()
  if found is not None and found.processes != 1:
    raise UserError(f'serve runs on the devices of one process, but several belong together here '
                    f'({found.source}); start it on one machine, whose devices may form a mesh '
                    '(--tensor, --fsdp), or one server per machine behind a load balancer')


def _bind(host: str, port: int) -> socket.socket:
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(address)
    made.listen(128)
    return made
  except (OSError, OverflowError) as error:
    raise UserError(f'--host {host} --port {port}: cannot be listened on ({error}); choose another '
                    'port') from error
