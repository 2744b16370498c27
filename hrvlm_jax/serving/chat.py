"""OpenAI's chat completions as data: what a client asks, and what it is told.

Source: the API reference of OpenAI, `POST /v1/chat/completions`. What this server does not do
(tools, penalties, formats) is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
import secrets
import time
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hrvlm_jax.language.chat import Dialogue
from hrvlm_jax.language.messages import dialogue
from hrvlm_jax.language.tokenizer import Tokenizer
from hrvlm_jax.serving.draw import TOP
from hrvlm_jax.serving.requests import Piece, Report, Request

CHOICES = 8


class ApiError(Exception):
  """An answer in OpenAI's form of an error.

  Args:
    kind: OpenAI's `type`; None: by the status.
    param: the field of the request that is wrong.
  """

  def __init__(self, status: int, message: str, *, kind: str | None = None,
               param: str | None = None, code: str | None = None):
    super().__init__(message)
    self.status, self.param, self.code = status, param, code
    self.kind = kind or ('server_error' if status >= 500 else 'invalid_request_error')
    self.headers: dict[str, str] = {}

  def body(self) -> dict[str, Any]:
    """{'error': ...}."""
    return {'error': {'message': str(self), 'type': self.kind, 'param': self.param,
                      'code': self.code}}


class _Strict(BaseModel):
  model_config = ConfigDict(extra='ignore', strict=True)


class StreamOptions(_Strict):
  """What a stream says beside the answer."""

  include_usage: bool = False


class ChatRequest(_Strict):
  """The body of a request. Without a `temperature` the answer is greedy, as that of `hrvlm ask`."""

  model: str
  messages: list[dict[str, Any]] = Field(min_length=1, max_length=1000)
  max_tokens: int | None = Field(None, ge=1, lt=2**31)
  max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
  temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
  top_p: float | None = Field(None, gt=0, le=1)
  top_k: int | None = Field(None, ge=0, lt=2**31)
  n: int | None = Field(None, ge=1, le=CHOICES)
  seed: int | None = Field(None, ge=-2**63, lt=2**63)
  stop: str | list[str] | None = Field(None, max_length=256)
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  logprobs: bool | None = None
  top_logprobs: int | None = Field(None, ge=0, le=TOP)
  # Not done here: refused unless they ask for nothing.
  tools: list[Any] | None = None
  functions: list[Any] | None = None
  response_format: dict[str, Any] | None = None
  logit_bias: dict[str, Any] | None = None
  presence_penalty: float | None = None
  frequency_penalty: float | None = None
  modalities: list[str] | None = None
  audio: dict[str, Any] | None = None

  def refused(self) -> str | None:
    """The first field that asks for what this server does not do."""
    done = {'response_format': ({'type': 'text'},), 'modalities': (['text'],)}
    return next((name for name in (
      'tools', 'functions', 'response_format', 'logit_bias', 'presence_penalty',
      'frequency_penalty', 'modalities', 'audio')
      if (value := getattr(self, name)) and value not in done.get(name, ())), None)


@dataclasses.dataclass(frozen=True)
class Asked:
  """A request that was read: its conversation, the URLs of its images, how it is answered.

  Attributes:
    tokens: most new tokens; None: as many as the server gives.
  """

  dialogue: Dialogue
  urls: tuple[str, ...]
  settings: Mapping[str, Any]
  tokens: int | None
  choices: int
  stream: bool
  usage: bool

  def request(self, images: Sequence[Image.Image], tokens: int) -> Request:
    """What the engine is asked."""
    plain = self.dialogue.plain
    return Request(images=images, question=self.dialogue if plain is None else plain,
                   max_new_tokens=tokens, **self.settings)


def read_request(body: bytes, model: str) -> Asked:
  """The request of a body.

  Args:
    model: the name of the model that is served.

  Raises:
    ApiError: no JSON, fields that are missing or wrong, another model, what is not done here.
    UserError: messages of another form, turns that do not alternate.
  """
  try:
    found = ChatRequest.model_validate_json(body)
  except ValidationError as error:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = '.'.join(str(part) for part in first['loc'])
    raise ApiError(400, f'{param or "body"}: {first["msg"]}', param=param or None) from None
  if found.model != model:
    raise ApiError(404, f'there is no model {found.model[:80]!r} here; this server has {model!r}',
                   param='model', code='model_not_found')
  if refused := found.refused():
    raise ApiError(400, f'{refused}: this server does not do that; leave it out', param=refused,
                   code='unsupported_parameter')
  if found.top_logprobs is not None and not found.logprobs:
    raise ApiError(400, 'top_logprobs needs logprobs: true', param='top_logprobs')
  stop = [found.stop] if isinstance(found.stop, str) else found.stop or []
  if len(stop) > 4 or any(not text or len(text) > 256 for text in stop):
    raise ApiError(400, 'stop: expected at most 4 texts of 1 to 256 characters', param='stop')
  settings = dict(
    temperature=found.temperature or 0.0, top_p=found.top_p or 1.0, top_k=found.top_k or 0,
    seed=secrets.randbits(62) if found.seed is None else found.seed, stop=tuple(stop),
    logprobs=(found.top_logprobs or 0) if found.logprobs else None)
  images, spoken = dialogue(found.messages)
  if not all(isinstance(url, str) for url in images):
    raise ApiError(400, 'an image is no text; expected a data URL (data:image/png;base64,...)',
                   param='messages')
  tokens = found.max_completion_tokens or found.max_tokens
  return Asked(spoken, tuple(images), settings, tokens, found.n or 1, bool(found.stream),
               bool(found.stream_options and found.stream_options.include_usage))


class Writer:
  """What a client is told of one request, as JSON values.

  Args:
    prompt_tokens: of the prompt.
  """

  def __init__(self, model: str, tokenizer: Tokenizer, asked: Asked, prompt_tokens: int):
    self._model, self._tokenizer, self._asked = model, tokenizer, asked
    self.id, self._created = f'chatcmpl-{secrets.token_hex(12)}', int(time.time())
    self.prompt_tokens = prompt_tokens

  def whole(self, pieces: Sequence[Sequence[Piece]], hidden: Sequence[int]) -> dict[str, Any]:
    """The complete answer, from the pieces of every choice.

    Args:
      hidden: ids that are no text; they have no place in the report.
    """
    choices = []
    for index, found in enumerate(pieces):
      choices.append({
        'index': index, 'finish_reason': found[-1].reason,
        'message': {'role': 'assistant', 'content': ''.join(p.text for p in found),
                    'refusal': None},
        'logprobs': self._logprobs([p for p in found if p.token not in hidden])})
    return {**self._head('chat.completion'), 'choices': choices,
            'usage': self._usage(sum(map(len, pieces)))}

  def chunk(self, index: int, delta: Mapping[str, Any], *, pieces: Sequence[Piece] = (),
            reason: str | None = None) -> bytes:
    """One event of a stream."""
    choice = {'index': index, 'delta': delta, 'finish_reason': reason,
              'logprobs': self._logprobs(pieces)}
    more = {'usage': None} if self._asked.usage else {}
    return event({**self._head('chat.completion.chunk'), 'choices': [choice], **more})

  def usage(self, tokens: int) -> bytes:
    """The event of a stream that says what it took."""
    return event({**self._head('chat.completion.chunk'), 'choices': [],
                  'usage': self._usage(tokens)})

  def _head(self, kind: str) -> dict[str, Any]:
    return {'id': self.id, 'object': kind, 'created': self._created, 'model': self._model}

  def _usage(self, tokens: int) -> dict[str, int]:
    return {'prompt_tokens': self.prompt_tokens, 'completion_tokens': tokens,
            'total_tokens': self.prompt_tokens + tokens}

  def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
    reports = [piece.report for piece in pieces if piece.report is not None]
    if self._asked.settings['logprobs'] is None or (pieces and not reports):
      return None
    return {'content': [self._reported(report) for report in reports], 'refusal': None}

  def _reported(self, report: Report) -> dict[str, Any]:
    return {**self._token(report.token, report.logprob),
            'top_logprobs': [self._token(*pair) for pair in report.best]}

  def _token(self, token: int, logprob: float) -> dict[str, Any]:
    text = self._tokenizer.decode([token], skip_special=False)
    # A part of a character is no text, and no bytes that would be known here.
    known = None if '\ufffd' in text else list(text.encode())
    return {'token': text, 'logprob': max(logprob, -9999.0), 'bytes': known}


def event(value: Mapping[str, Any]) -> bytes:
  """A value as one server-sent event."""
  return b'data: ' + json.dumps(value, separators=(',', ':')).encode() + b'\n\n'


DONE = b'data: [DONE]\n\n'
