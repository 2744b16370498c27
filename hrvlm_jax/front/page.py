"""A page to try models at `/` of `hrvlm serve`: pictures, questions, what was looked at.

Made with Gradio (extra `page`), which only this module imports. A question under the model's own
knobs takes a slot of the server like any request; one under other knobs, or about a part that was
marked by hand, runs the same weights beside it, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import itertools
import logging
import os
from typing import Any
import urllib.parse

from fastapi import FastAPI, Request as HttpRequest
from PIL import Image

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.images import open_image
from hrvlm_jax.front.trying import BUSY, EMPTY, Kept, Knob, Shown
from hrvlm_jax.serving.chat import ApiError
from hrvlm_jax.serving.pictures import PictureLimits

os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'  # before Gradio looks
os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')

import gradio as gr

_log = logging.getLogger(__name__)
FONTS = ('system-ui', 'sans-serif')
CSS = """
footer {display: none !important}
.gradio-container {max-width: 1280px !important; margin: auto}
#problem {border-left: 4px solid #c0392b; padding: .4em .8em}
@media (max-width: 640px) {.gradio-container {padding: 8px !important}}
"""
UNSEEN = 'The model failed on this question. The log of the server says more.'


def own_only(upload: gr.Image) -> gr.Image:
  """The same component, which takes pictures of the visitor's machine and fetches none by address:
  a server that fetches what visitors name reads what only it can reach."""
  store = upload.async_move_resource_to_block_cache

  async def stored(url_or_file_path: Any) -> str | None:
    if isinstance(url_or_file_path, str) and urllib.parse.urlsplit(url_or_file_path).netloc:
      raise gr.Error('This server fetches no pictures from the web; drop the picture itself.')
    return await store(url_or_file_path)

  upload.async_move_resource_to_block_cache = stored
  return upload


def mount(app: FastAPI, shown: Sequence[Shown], *, limits: PictureLimits, body: int) -> None:
  """Puts the page at `/` of the server, behind its other routes.

  Args:
    shown: one model, or two side by side.
    limits: of a picture.
    body: bytes of an upload.
  """
  @app.api_route('/v1/{rest:path}', methods=['GET', 'POST', 'PUT', 'PATCH', 'DELETE', 'OPTIONS'])
  async def missing(rest: str, request: HttpRequest) -> None:
    # The page takes every address that is left; those of the API keep their own errors.
    if rest in ('chat/completions', 'models'):
      raise ApiError(405, f'{request.method} is not allowed here')
    raise ApiError(404, 'Not Found')

  theme = gr.themes.Default(font=FONTS, font_mono=('monospace',))
  gr.mount_gradio_app(
    app, page(shown, limits), path='/', theme=theme, css=CSS, footer_links=[], run_history=False,
    show_error=False, max_file_size=body, ssr_mode=False, enable_monitoring=False, pwa=False,
    mcp_server=False, app_kwargs={'docs_url': None, 'redoc_url': None, 'openapi_url': None})


def page(shown: Sequence[Shown], limits: PictureLimits) -> gr.Blocks:
  """The page itself."""
  knobs = list(dict.fromkeys(knob for one in shown for knob in one.knobs))
  asking = _Asking(shown, knobs, limits)
  with gr.Blocks(title='hrvlm', analytics_enabled=False, delete_cache=(600, 3600)) as made:
    turns, marks = gr.State([], time_to_live=3600), gr.State([], time_to_live=3600)
    gr.Markdown('# Ask a picture\n' + ' · '.join(f'`{one.name}` ({one.model.config.system})'
                                                 for one in shown))
    with gr.Row():
      with gr.Column(scale=2, min_width=300):
        picture = own_only(gr.Image(
          type='filepath', sources=['upload', 'clipboard'], label='Picture',
          buttons=['fullscreen'], elem_id='picture', height=280))
        marked = gr.Markdown('', elem_id='marked')
        question = gr.Textbox(label='Question', placeholder='What does the red sign say?',
                              lines=2, submit_btn=False, elem_id='question')
        with gr.Row():
          ask = gr.Button('Ask', variant='primary', elem_id='ask', min_width=80)
          clear = gr.Button('New', elem_id='new', min_width=80)
          share = gr.Button('Link', elem_id='share', min_width=80)
        problem = gr.Markdown(visible=False, elem_id='problem')
        link = gr.Textbox(label='Link to this question', visible=False, buttons=['copy'],
                          elem_id='link')
        with gr.Accordion('Knobs', open=False, elem_id='knobs'):
          fields = [_field(knob) for knob in knobs]
          tokens = gr.Slider(1, 256, value=64, step=1, label='new tokens')
          warmth = gr.Slider(0, 2, value=0, step=0.1, label='temperature (0: the same every time)')
      columns = []
      for number, one in enumerate(shown):
        with gr.Column(scale=3, min_width=300):
          chat = gr.Chatbot(label=one.name, height=300, buttons=['copy'], feedback_options=None,
                            render_markdown=False, elem_id=f'answers-{number}')
          gr.Markdown(f'What `{one.name}` looked at')
          columns += [chat, gr.Image(show_label=False, interactive=False, format='png',
                                     buttons=['fullscreen', 'download'],
                                     elem_id=f'overlay-{number}')]
    said = [turns, problem, question, *columns]
    asked = [picture, question, turns, marks, tokens, warmth, *fields]
    kept: dict[str, Any] = dict(api_visibility='private')
    once = dict(concurrency_limit=4, concurrency_id='ask', show_progress='hidden', **kept)
    gr.on([ask.click, question.submit], asking.ask, asked, said, **once)
    fresh = [turns, marks, marked, problem, link, *columns]
    for begin in (clear.click, picture.input, *(chat.clear for chat in columns[::2])):
      begin(asking.nothing, None, fresh, **kept)
    picture.select(asking.mark, [picture, marks], [marks, marked], **kept)
    share.click(asking.link, [picture, question, *fields], [link, problem], **kept)
    made.load(asking.opened, None, [picture, question, problem, *fields], **kept)
  made.queue(max_size=64)
  return made


def _field(knob: Knob) -> Any:
  if knob.choices is not None:
    return gr.Dropdown(list(knob.choices), value=str(knob.value), label=knob.name)
  if isinstance(knob.value, bool):
    return gr.Checkbox(knob.value, label=knob.name)
  return gr.Textbox(str(knob.value), label=knob.name, max_lines=1)


class _Asking:
  """What the parts of the page do; what changes with a visitor is in their arguments."""

  def __init__(self, shown: Sequence[Shown], knobs: Sequence[Knob], limits: PictureLimits):
    self.shown, self.knobs, self.limits, self.kept = shown, knobs, limits, Kept()

  def nothing(self) -> list[Any]:
    """A new conversation."""
    return [[], [], '', gr.update(visible=False), gr.update(visible=False),
            *[None] * (2 * len(self.shown))]

  def ask(self, path: str | None, question: str, turns: list[dict], marks: list, tokens: float,
          warmth: float, *fields: Any) -> Iterator[list[Any]]:
    """The answers of all models, as they grow, then what they looked at."""
    columns: list[Any] = [gr.skip()] * (2 * len(self.shown))
    try:
      if not (question or '').strip():
        raise UserError('Write a question first.')
      options, image = self._options(fields), self._open(path)
      box = _box(marks, image)
      runs = [one.answer(image, [*turns], question, number, box=box, options=options,
                         max_new_tokens=int(tokens), temperature=float(warmth))
              for number, one in enumerate(self.shown)]
      texts = [''] * len(runs)
      for pieces in itertools.zip_longest(*runs, fillvalue=''):
        texts = [text + piece for text, piece in zip(texts, pieces)]
        for number, text in enumerate(texts):
          columns[2 * number] = _said(turns, question, number, text)
        yield [gr.skip(), gr.update(visible=False), gr.skip(), *columns]
      answers = [text.strip() or EMPTY for text in texts]
      for number, text in enumerate(answers):
        columns[2 * number] = _said(turns, question, number, text)
      turns = [*turns, {'question': question, 'answers': answers}]
      yield [turns, gr.update(visible=False), '', *columns]
      if image is not None:
        for number, one in enumerate(self.shown):
          columns[2 * number + 1] = one.overlay(image, question, box=box, options=options)
        yield [turns, gr.skip(), gr.skip(), *columns]
    except UserError as error:
      yield [gr.skip(), _problem(str(error)), gr.skip(), *columns]
    except BUSY:
      yield [gr.skip(), _problem('Too many questions are waiting; try again in a moment.'),
             gr.skip(), *columns]
    except Exception:  # noqa: BLE001 - whatever it was: a visitor gets a sentence, the log the rest
      _log.exception('a question of the page failed')
      yield [gr.skip(), _problem(UNSEEN), gr.skip(), *columns]

  def mark(self, path: str | None, marks: list, event: gr.SelectData) -> tuple[list, str]:
    """A corner of the part to look at; a third one begins anew."""
    marks = [*marks, list(event.index)][-2:] if len(marks) < 2 else [list(event.index)]
    if path is None:
      return [], ''
    if len(marks) == 1:
      return marks, 'One corner is set. Click the opposite corner of the part to look at.'
    (x0, y0), (x1, y1) = marks
    return marks, (f'Looks at {min(x0, x1)}, {min(y0, y1)} to {max(x0, x1)}, {max(y0, y1)}. '
                   'Click again to mark another part, New to forget it.')

  def link(self, request: gr.Request, path: str | None, question: str, *fields: Any) -> list[Any]:
    """An address that brings picture, question and knobs back while the server remembers it."""
    try:
      values = {'question': question or ''} | {
        knob.name: str(field) for knob, field in zip(self.knobs, fields)
        if str(field) != str(knob.value)}
      if path is not None:
        values['picture'] = self.kept.keep(path)
    except UserError as error:
      return [gr.skip(), _problem(str(error))]
    origin = request.headers.get('origin') or f'http://{request.headers.get("host", "")}'
    address = f'{origin}/?{urllib.parse.urlencode(values)}'
    return [gr.update(value=address, visible=True), gr.update(visible=False)]

  def opened(self, request: gr.Request) -> list[Any]:
    """What a link asks for, where the page was opened by one."""
    values: Mapping[str, str] = dict(request.query_params)
    path, problem = None, gr.update(visible=False)
    if 'picture' in values:
      path = self.kept.path(values['picture'])
      if path is None:
        problem = _problem('The picture of this link is no longer kept here; drop it again.')
    return [path, values.get('question', ''), problem,
            *(_typed(knob, values.get(knob.name)) for knob in self.knobs)]

  def _open(self, path: str | None) -> Image.Image | None:
    return None if path is None else open_image(
      path, exif=self.limits.exif, alpha=self.limits.alpha, max_pixels=self.limits.pixels,
      name='The picture')

  def _options(self, fields: Sequence[Any]) -> dict[str, Any]:
    return {knob.name: value for knob, field in zip(self.knobs, fields)
            if (value := knob.read(field)) != knob.value}


def _typed(knob: Knob, text: str | None) -> Any:
  if text is None:
    return gr.skip()
  return text == 'True' if isinstance(knob.value, bool) else text


def _problem(text: str) -> Any:
  return gr.update(value=text, visible=True)


def _said(turns: Sequence[dict], question: str, number: int, text: str) -> list[dict[str, str]]:
  """The messages of a conversation with one of the models."""
  found = []
  for turn in (*turns, {'question': question, 'answers': {number: text}}):
    found += [{'role': 'user', 'content': turn['question']},
              {'role': 'assistant', 'content': turn['answers'][number]}]
  return found


def _box(marks: Sequence[Sequence[float]], image: Image.Image | None
         ) -> tuple[int, int, int, int] | None:
  """The marked part in pixels of the image; None: nothing, or less than a pixel."""
  if image is None or len(marks) != 2:
    return None
  (xa, ya), (xb, yb) = marks
  box = (max(0, int(min(xa, xb))), max(0, int(min(ya, yb))),
         min(image.width, int(max(xa, xb))), min(image.height, int(max(ya, yb))))
  return box if box[2] > box[0] and box[3] > box[1] else None
