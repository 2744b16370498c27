"""What the page asks of a model: answers in a conversation, knobs, a part marked by hand, links."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
import copy
import dataclasses
import hashlib
import pathlib
import tempfile
import threading
from typing import Any

from PIL import Image

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.front.model import Model
from hrvlm_jax.serving.driver import Closed, Driver, Full
from hrvlm_jax.serving.requests import Request
from hrvlm_jax.systems import registry

BUSY = (Full, Closed)
EMPTY = '(an empty answer)'
# Settings of encoders that may change from question to question: they decide how much is looked at
# and change no parameter.
KNOBS = ('max_crops', 'num_tokens', 'looks', 'tokens', 'smooth', 'mode')
_CHOICES = {'mode': ('after_prompt', 'after_image')}
_VARIANTS = 4  # knobs whose programs are kept
_PATIENCE = 60.0  # seconds to wait for the question before
Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Knob:
  """A setting of the encoder.

  Attributes:
    value: that of the checkpoint.
    choices: what it may be; None: a number (or nothing, or a word such as `all`).
  """

  name: str
  value: Any
  choices: tuple[str, ...] | None = None

  def read(self, field: Any) -> Any:
    """The value that a field of the page means.

    Raises:
      UserError: no whole number.
    """
    if isinstance(self.value, bool):
      return field is True or field == 'True'
    text = str(field).strip()
    if self.choices is not None or text == str(self.value):
      return self.value if text == str(self.value) else text
    if text in ('None', '', 'all'):
      return text if text == 'all' else None
    try:
      return int(text)
    except ValueError:
      raise UserError(f'{self.name}: found {text[:20]!r}, expected a whole number') from None


class Shown:
  """One model of the page.

  Args:
    name: what it is called there.
    driver: gives its answers under its own knobs, in slots that all clients share.
  """

  def __init__(self, name: str, model: Model, driver: Driver):
    self.name, self.model, self._driver = name, model, driver
    self._beside = threading.Semaphore(1)  # beside the slots one question at a time
    self._lock = threading.Lock()
    self._variants: OrderedDict[tuple, Model] = OrderedDict()

  @property
  def knobs(self) -> list[Knob]:
    """Those that its system has."""
    encoder = self.model.config.encoder
    return [Knob(name, getattr(encoder, name), _CHOICES.get(name)) for name in KNOBS
            if hasattr(encoder, name)]

  def answer(self, image: Image.Image | None, turns: Sequence[Mapping[str, Any]], question: str,
             number: int, *, box: Box | None, options: Mapping[str, Any], **settings: Any
             ) -> Iterator[str]:
    """The answer piece by piece.

    Args:
      turns: earlier ones, {'question', 'answers'}; the image belongs to the first.
      number: of this model among the answers of a turn.
      box: the part of the image to look at, in its pixels.
      options: knobs that are not the checkpoint's.

    Raises:
      UserError: what cannot be asked. Full, Closed: no place for it now.
    """
    model, seen = self._looking(image, box, options)
    messages = []
    for turn in turns:
      messages += [{'role': 'user', 'content': turn['question']},
                   {'role': 'assistant', 'content': turn['answers'][number]}]
    messages.append({'role': 'user', 'content': question})
    if seen is not None:
      messages[0]['content'] = [{'type': 'image', 'image': seen},
                                {'type': 'text', 'text': messages[0]['content']}]
    images, asked = model.item(messages)
    if model is self.model:
      engine = self._driver.engine
      request = Request(images=images, question=asked, **settings)
      yield from (piece.text for piece in self._driver.stream(lambda: engine.prepare(request)))
      return
    if not self._beside.acquire(timeout=_PATIENCE):
      raise Full
    try:
      yield from model.stream(images, asked, **settings)
    finally:
      self._beside.release()

  def overlay(self, image: Image.Image, question: str, *, box: Box | None,
              options: Mapping[str, Any]) -> Image.Image:
    """The picture with what was looked at."""
    model, seen = self._looking(image, box, options)
    return model.overlay(seen, question)

  def _looking(self, image: Image.Image | None, box: Box | None, options: Mapping[str, Any]
               ) -> tuple[Model, Image.Image | None]:
    """(the model that looks as it is told, the image it is given).

    A system that was trained to look into boxes looks there by itself; others are given that part
    of the picture alone.
    """
    known = {name: value for name, value in options.items()
             if hasattr(self.model.config.encoder, name)}
    boxes = box is not None and registry.get(self.model.config.system).boxes
    if box is not None and not boxes:
      image = image.crop(box)
    model = self._variant(known | ({'select_target': True} if boxes else {}))
    return (_pointed(model, box) if boxes else model), image

  def _variant(self, options: Mapping[str, Any]) -> Model:
    if not options:
      return self.model
    key = tuple(sorted(options.items(), key=str))
    with self._lock:
      if key not in self._variants:
        self._variants[key] = self.model.with_encoder(**options)
        if len(self._variants) > _VARIANTS:
          self._variants.popitem(last=False)
      self._variants.move_to_end(key)
      return self._variants[key]


def _pointed(model: Model, box: Box) -> Model:
  """The same model looking into a box of its images."""
  made, answerer = copy.copy(model), copy.copy(model.answerer)
  made.answerer, system = answerer, copy.copy(answerer.system)
  views = answerer.system.views
  system.views = lambda images, config: views(images, config, boxes=[box] * len(images))
  answerer.system = system
  return made


class Kept:
  """Pictures that links name: the last ones, in a folder that ends with the process.

  Args:
    most, size: pictures, and bytes of all of them.
  """

  def __init__(self, most: int = 64, size: int = 256 << 20):
    self._most, self._size = most, size
    self._folder = tempfile.TemporaryDirectory(prefix='hrvlm-links-')
    self._kept: OrderedDict[str, int] = OrderedDict()
    self._lock = threading.Lock()

  def keep(self, path: str) -> str:
    """The name under which a picture is found again.

    Raises:
      UserError: one that is larger than all of them may be.
    """
    data = pathlib.Path(path).read_bytes()
    if len(data) > self._size:
      raise UserError('The picture is too large to be kept for a link.')
    name = hashlib.sha256(data).hexdigest()[:32]
    with self._lock:
      (pathlib.Path(self._folder.name) / name).write_bytes(data)
      self._kept[name] = len(data)
      self._kept.move_to_end(name)
      while len(self._kept) > self._most or sum(self._kept.values()) > self._size:
        old, _ = self._kept.popitem(last=False)
        (pathlib.Path(self._folder.name) / old).unlink(missing_ok=True)
    return name

  def path(self, name: str) -> str | None:
    """Where it lies; None: it is kept no longer."""
    with self._lock:
      return str(pathlib.Path(self._folder.name) / name) if name in self._kept else None
