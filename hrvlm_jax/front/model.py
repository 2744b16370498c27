"""A loaded model: ask, chat, batch, stream, score, overlay, encode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import copy
import dataclasses
import functools
import itertools
import math
import numbers
from typing import Any

import jax
import numpy as np
from PIL import Image

from hrvlm_jax.core import heap
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError, unknown
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.core.images import MAX_PIXELS
from hrvlm_jax.evaluation.model import EvaluatedModel, OptionScore
from hrvlm_jax.front.images import MAX_BYTES, as_image
from hrvlm_jax.language.chat import ASSISTANT, USER, Dialogue, Message
from hrvlm_jax.language.generate import Sampling
from hrvlm_jax.language.messages import dialogue, is_messages
from hrvlm_jax.serving.queue import Queue, suits
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer, Question
from hrvlm_jax.vlm.encode import ImageEncoder

MAX_NEW_TOKENS = 128
# What may be said about an answer: fields of `Sampling` but those that belong to the model.
SETTINGS = tuple(field.name for field in dataclasses.fields(Sampling)
                 if field.name not in ('stop_ids', 'pad_id'))
Item = tuple[list[Image.Image], Question]


class Model:
  """A model that is ready to be asked; `hrvlm_jax.load` makes it.

  An image is a path, an address (where `load(..., urls=True)` allows them), bytes, a PIL image or a
  NumPy array; several are a list. A question is text, or messages in the form of OpenAI or Hugging
  Face, which may bring their images with them and hold earlier turns; the images of a message stand
  in front of its text. Settings of an answer are the fields of `language.generate.Sampling`
  (`max_new_tokens`, `temperature`, `top_k`, `top_p`, `beams`, ...) and `seed`.

  Programs are compiled for the shapes they first meet (the second question of the same shape
  compiles nothing); `compilations` counts them.

  Attributes:
    config: the whole model's `ModelConfig`.
    name: what it was loaded from.
    origin: {'name', 'revision'}: name on the hub and its commit, or the folder's name and None.
    answerer: the `vlm.answer.Answerer` behind it; None for an encoder alone.

  >>> import hrvlm_jax
  >>> model = hrvlm_jax.load('runs/quickstart/checkpoint')
  >>> model
  Model(mc_llava, runs/quickstart/checkpoint: 1.0 M parameters (vision ... k, projector 29 k,
  language ... k), float32, on cpu:0)
  """

  def __init__(self, config: ModelConfig, *, answerer: Answerer | None = None,
               encoder: ImageEncoder | None = None, ex: Execution, name: str = '',
               origin: Mapping[str, Any] | None = None, exif: str = 'apply',
               urls: bool | str = False, max_bytes: int = MAX_BYTES, alpha: str = 'drop',
               max_pixels: int = MAX_PIXELS):
    heap.trim_after_compiling()
    self.config, self.answerer, self.name = config, answerer, name
    self.origin = dict(origin or {})
    self._ex, self._reading = ex, dict(
      exif=exif, urls=urls, max_bytes=max_bytes, alpha=alpha, max_pixels=max_pixels)
    self._encoder, self._scorer = encoder, None
    self._queues: dict[int, Queue] = {}
    if answerer is not None and encoder is None:
      self._encoder = ImageEncoder(config, answerer.generator.params)

  def __repr__(self) -> str:
    params = self._encoder.params if self.answerer is None else self.answerer.generator.params
    leaves = jax.tree.leaves(params)
    count = lambda part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part))
    parts = ', '.join(f'{name} {_short(count(params[name]))}'
                      for name in ('vision', 'projector', 'fusion', 'language') if name in params)
    kinds = sorted({str(leaf.dtype) for leaf in leaves})
    devices = sorted({f'{device.platform}:{device.id}' for leaf in leaves
                      for device in getattr(leaf, 'devices', set)()})
    stored = '' if kinds == [self._ex.dtype] else f' (weights {", ".join(kinds)})'
    shown = f', {self.name}' if self.name else ''
    if revision := self.origin.get('revision'):
      shown += f'@{revision[:12]}'
    return (f'Model({self.config.system}{shown}: {_short(count(params))} parameters ({parts}), '
            f'{self._ex.dtype}{stored}, on {", ".join(devices)})')

  def ask(self, image: Any = None, question: Any = None, **settings: Any) -> str:
    """The answer to a question about an image, about several (a list), or about none (None).

    Messages alone may stand in place of the image.

    Raises:
      UserError: no question, no usable image, settings that do not exist or contradict each other,
        more images or turns than the system takes.

    >>> isinstance(model.ask('photo.png', 'What does the red sign say?', max_new_tokens=4), str)
    True
    >>> two = model.ask(['photo.png', 'other.png'], 'Which is larger?', max_new_tokens=4)
    >>> messages = [{'role': 'user', 'content': [{'type': 'image', 'image': 'photo.png'},
    ...                                          {'type': 'text', 'text': 'What is this?'}]}]
    >>> answer = model.ask(messages, max_new_tokens=4)
    """
    return self._answers([self.item(image, question)], settings)[0]

  def batch(self, items: Iterable[Any], *, batch_size: int = 8, **settings: Any) -> list[str]:
    """Answers to many questions, `batch_size` at a time, in their order.

    Each begins as soon as another is complete (beams, and methods laid over the model, wait for
    whole batches). An answer is that of `ask` with the same settings, its seed among them.

    Args:
      items: (image, question) pairs, messages, or mappings with 'image' or 'images' and 'question'
        or 'messages'.

    Raises:
      UserError: see `ask`; the message names the item.

    >>> items = [('photo.png', 'What?'), ('other.png', 'And this?'), (None, 'No image?')]
    >>> answers = model.batch(items, max_new_tokens=4)
    >>> len(answers), answers[0] == model.ask(*items[0], max_new_tokens=4)
    (3, True)
    """
    read = []
    for number, item in enumerate(items):
      try:
        read.append(self.item(*parts(item)))
      except UserError as error:
        raise UserError(f'item {number}: {error}') from error
    if batch_size < 1:
      raise UserError(f'batch_size: found {batch_size}, expected at least 1')
    self.check(settings)
    if len(read) == 1:
      return self._answers(read, settings)
    asked = ((number, lambda item=item: item) for number, item in enumerate(read))
    found = dict(self._each(asked, min(batch_size, max(len(read), 1)), settings))
    for number, answer in sorted(found.items()):
      if isinstance(answer, UserError):
        raise UserError(f'item {number}: {answer}') from answer
    return [str(found[number]) for number in range(len(read))]

  def stream(self, image: Any = None, question: Any = None, **settings: Any) -> Iterator[str]:
    """The same answer piece by piece, as it is made (beams excepted).

    Raises:
      UserError: see `ask`; before the first piece.

    >>> ''.join(model.stream('photo.png', 'What is this?', max_new_tokens=4)).strip() == \
        model.ask('photo.png', 'What is this?', max_new_tokens=4)
    True
    """
    images, asked = self.item(image, question)
    sampling, key = self._sampling(settings)
    if sampling['beams'] > 1:
      raise UserError('beams: beam search knows its answer only at the end; use ask')
    return self._asking().stream(images, asked, key=key, **sampling)

  def chat(self, *, system: str | None = None) -> Chat:
    """A conversation with memory: several turns, images with any of them.

    Args:
      system: in place of the system text of the model's template.

    Raises:
      UserError: an encoder alone.

    >>> chat = model.chat(system='Answer with one word.')
    >>> first = chat.ask('What does the red sign say?', 'photo.png', max_new_tokens=4)
    >>> second = chat.ask('And the blue one?', max_new_tokens=4)
    >>> [message['role'] for message in chat.messages]
    ['system', 'user', 'assistant', 'user', 'assistant']
    """
    self._asking()
    return Chat(self, system=system)

  def score(self, image: Any, question: str, answers: Sequence[str]) -> list[OptionScore]:
    """How likely each of some given answers is: log-probability, tokens, `mean_loss`, `greedy`.

    Raises:
      UserError: see `ask`; a conversation; FastV, which only generation knows.

    >>> found = model.score('photo.png', 'What is written?', ['STOP', 'A'])
    >>> [round(score.log_probability + score.mean_loss * score.tokens, 3) for score in found]
    [0.0, 0.0]
    """
    images, asked = self.item(image, question)
    if not isinstance(asked, str):
      raise UserError('score: found a conversation, expected one question')
    if isinstance(answers, str) or not answers:
      raise UserError(f'score: found {answers!r} as answers, expected a list of texts')
    if self._scorer is None:
      self._scorer = EvaluatedModel(self._asking(), max_new_tokens=1)
    return self._scorer.score([(tuple(images), asked, answer) for answer in answers])

  def overlay(self, image: Any, question: Any = None) -> Image.Image:
    """The picture with what the model looked at for a question: crops, selection, gates.

    Raises:
      UserError: see `ask`.

    >>> model.overlay('photo.png').size
    (120, 90)
    """
    picture = self._open(image)
    if self.answerer is None:
      return self._encoder.overlay(picture, self._encoder(picture, question, ex=self._ex))
    asked = None if question is None else self.item(picture, question)[1]
    return self.answerer.overlay(picture, asked if asked is None or isinstance(asked, str)
                                 else asked.messages[-1].text)

  def encode(self, image: Any, prompt: str | None = None) -> np.ndarray:
    """Visual tokens float32 [n d] of an image, in the encoder's width.

    Args:
      prompt: text that says where to look (PS3).

    Raises:
      UserError: no usable image; a prompt for a system that takes none.

    >>> model.encode('photo.png').shape
    (24, 96)
    """
    tokens = self._encoder(self._open(image), prompt, ex=self._ex)
    return np.asarray(tokens.values[0], np.float32)[np.asarray(tokens.valid[0])]

  def item(self, image: Any = None, question: Any = None) -> Item:
    """(decoded images, question or turns) of what `ask` takes.

    Raises:
      UserError: no question, no usable image.
    """
    if question is None and is_messages(image):
      image, question = None, image
    given = () if image is None else image if isinstance(image, (list, tuple)) else (image,)
    if isinstance(question, str):
      asked: Question = question
    elif isinstance(question, Dialogue):
      asked = question
    elif question is None:
      raise UserError("there is no question; ask(image, 'What is this?'), or messages alone")
    else:
      given, spoken = dialogue(question, given)
      asked = spoken if spoken.plain is None else spoken.plain
    return [self._open(one) for one in given], asked

  def with_encoder(self, **options: Any) -> Model:
    """The same weights under other knobs of the system; nothing is loaded again.

    Args:
      options: settings of the encoder, as `load(..., encoder=...)` takes them.

    Raises:
      UserError: settings that do not exist or change the parameters, a method laid over the model,
        a model that lies on several devices.

    >>> model.with_encoder(max_crops=4, num_tokens=20).encode('photo.png').shape
    (20, 96)
    """
    values = to_dict(self.config)
    config = from_dict(ModelConfig, values | {'encoder': dict(values['encoder']) | options},
                       path='model', title=self.name)
    answerer = self.answerer
    if answerer is not None and (answerer.methods or answerer.layout is not None):
      raise UserError('with_encoder: needs a model on one device, without methods laid over it; '
                      'use load(..., encoder=...)')
    if vlm.build(config).abstract != vlm.build(self.config).abstract:
      raise UserError(f'{", ".join(options)}: changes the parameters of the model, which are '
                      'those of its checkpoint')
    made = copy.copy(self)
    made.config, made._scorer, made._queues = config, None, {}
    if answerer is None:
      made._encoder = ImageEncoder(config, self._encoder.params, self._encoder.tokenizer)
    else:
      made.answerer = answerer.with_config(config)
      made._encoder = ImageEncoder(config, answerer.generator.params)
    return made

  def compilations(self) -> int:
    """How many programs were compiled so far; it does not grow with questions of known shape.

    >>> before = [model.ask('photo.png', 'What?', max_new_tokens=4), model.compilations()][1]
    >>> answer = model.ask('photo.png', 'Who?', max_new_tokens=4)
    >>> model.compilations() == before
    True
    """
    return self._encoder.compilations() + sum(
      queue.compilations() for queue in self._queues.values()) + (
      0 if self.answerer is None else self.answerer.generator.compilations())

  def check(self, settings: Mapping[str, Any]) -> None:
    """Refuses settings of an answer that do not exist or contradict each other, before any work.

    Raises:
      UserError: all of them.

    >>> model.check({'max_new_tokens': 4, 'seed': 1})
    """
    self._sampling(settings)

  def _open(self, image: Any) -> Image.Image:
    return as_image(image, **self._reading)

  def _asking(self) -> Answerer:
    if self.answerer is None:
      raise UserError(f'{self.name or self.config.system}: is an encoder alone, without a language '
                      'model; use encode or overlay')
    return self.answerer

  def _answers(self, items: Sequence[Item], settings: Mapping[str, Any]) -> list[str]:
    sampling, key = self._sampling(settings)
    return self._asking().answer(items, key=key, **sampling)

  def _each(self, items: Iterable[tuple[int, Callable[[], Item]]], size: int,
            settings: Mapping[str, Any]) -> Iterator[tuple[int, str | UserError]]:
    """(number, answer) of every question as it is complete; of one that cannot be asked, the error.

    Args:
      items: (number, function that gives what is asked), `size` at a time.
    """
    options, key = self._sampling(settings)
    asking = self._asking()
    sampling = asking.sampling(**options)
    if suits(asking, sampling):
      if size not in self._queues:
        self._queues[size] = Queue(asking, slots=size)
      for group in self._queues[size].run(items, sampling, key=key):
        for done in group:
          yield done.index, asking.decode(done.tokens) if done.error is None else done.error
      return
    source, rows = iter(items), 0
    while part := list(itertools.islice(source, size)):
      opened: list[tuple[int, Item]] = []
      for number, make in part:
        try:
          opened.append((number, make()))
        except UserError as error:
          yield number, error
      if opened:
        rows = max(rows, len(opened))  # the last batch is filled up, so that it compiles nothing
        asked = [item for _, item in opened]
        try:
          answers = self._answers(asked + asked[-1:] * (rows - len(asked)), settings)[:len(asked)]
        except UserError:  # of one of them: which one is found by asking each
          answers = map(functools.partial(self._answer_or_error, settings), asked)
        yield from zip((number for number, _ in opened), answers, strict=True)

  def _answer_or_error(self, settings: Mapping[str, Any], item: Item) -> str | UserError:
    try:
      return self._answers([item], settings)[0]
    except UserError as error:
      return error

  def _sampling(self, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """(fields of `Sampling`, key), checked."""
    known = (*SETTINGS, 'seed')
    wrong = [unknown(name, known, what='setting') for name in settings if name not in known]
    if wrong:
      raise UserError('; '.join(wrong))
    sampling = {'max_new_tokens': MAX_NEW_TOKENS, 'beams': 1} | dict(settings)
    seed = sampling.pop('seed', 0)
    if not isinstance(seed, numbers.Integral) or not -2**63 <= seed < 2**63:
      raise UserError(f'seed: found {seed!r}, expected a whole number of 64 bits')
    try:
      Sampling(**sampling)
      return sampling, jax.random.key(int(seed))
    except (TypeError, ValueError) as error:  # settings of a wrong kind, or against each other
      raise UserError(str(error)) from error


class Chat:
  """A conversation with a model; `Model.chat` begins it.

  Attributes:
    system: system text, None for the template's own.

  >>> chat = model.chat()
  >>> answer = chat.ask('What is this?', 'photo.png', max_new_tokens=4)
  >>> answer = ''.join(chat.stream('And this?', 'other.png', max_new_tokens=4))
  >>> len(chat.messages), len(chat.images)
  (4, 2)
  >>> chat.clear()
  >>> chat.messages
  []
  """

  def __init__(self, model: Model, *, system: str | None = None):
    self.model, self.system = model, system
    self.clear()

  def clear(self) -> None:
    """Forgets the turns and images; the system text stays."""
    self._turns: list[Message] = []
    self._counts: list[int] = []
    self.images: list[Image.Image] = []

  @property
  def messages(self) -> list[dict[str, Any]]:
    """What was said, in OpenAI's form; images stand as PIL images."""
    said = [] if self.system is None else [{'role': 'system', 'content': self.system}]
    images = iter(self.images)
    for turn, count in zip(self._turns, self._counts, strict=True):
      parts_ = [{'type': 'image', 'image': next(images)} for _ in range(count)]
      content = [*parts_, {'type': 'text', 'text': turn.text}] if count else turn.text
      said.append({'role': turn.role, 'content': content})
    return said

  def ask(self, question: str, image: Any = None, **settings: Any) -> str:
    """The answer; both join the history. A turn that fails leaves the history as it was.

    Raises:
      UserError: see `Model.ask`; a template that knows one turn only.
    """
    images, asked = self._next(question, image)
    answer = self.model._answers([(images, asked)], settings)[0]
    self._keep(asked, images, answer)
    return answer

  def stream(self, question: str, image: Any = None, **settings: Any) -> Iterator[str]:
    """The answer piece by piece; the turn joins the history when it is complete.

    Raises:
      UserError: see `ask`.
    """
    images, asked = self._next(question, image)
    pieces = []
    for piece in self.model.stream(images, asked, **settings):
      pieces.append(piece)
      yield piece
    self._keep(asked, images, ''.join(pieces).strip())

  def overlay(self, image: Any = None) -> Image.Image:
    """What the model looked at in the last image (or another one) for the last question.

    Raises:
      UserError: no image yet.
    """
    if image is None and not self.images:
      raise UserError('this conversation has no image yet')
    asked = [turn.text for turn in self._turns if turn.role == USER]
    return self.model.overlay(self.images[-1] if image is None else image,
                              asked[-1] if asked else None)

  def _next(self, question: str, image: Any) -> tuple[list[Image.Image], Dialogue]:
    if not isinstance(question, str) or not question.strip():
      raise UserError('the question is empty; write what you want to know')
    own, _ = self.model.item(image, question)
    asked = Dialogue((*self._turns, Message(USER, question)), (*self._counts, len(own)),
                     self.system)
    return [*self.images, *own], asked

  def _keep(self, asked: Dialogue, images: list[Image.Image], answer: str) -> None:
    self._turns = [*asked.messages, Message(ASSISTANT, answer)]
    self._counts, self.images = [*asked.images, 0], images


def parts(item: Any) -> tuple[Any, Any]:
  """(image, question) of an item of `Model.batch`.

  Raises:
    UserError: nothing of these forms.
  """
  if isinstance(item, Mapping):
    question = item.get('question', item.get('messages', item.get('prompt')))
    return item.get('image', item.get('images')), question
  if is_messages(item):
    return None, item
  if isinstance(item, (tuple, list)) and len(item) == 2:
    return item[0], item[1]
  raise UserError(f'found {type(item).__name__}, expected (image, question), messages, or a '
                  "mapping with 'image' and 'question'")


def _short(count: int) -> str:
  if count < 1e6:
    return f'{count / 1e3:,.0f} k'
  return f'{count / 1e6:,.1f} M' if count < 1e9 else f'{count / 1e9:,.2f} B'
