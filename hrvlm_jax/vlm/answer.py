"""Asking a model about images: the one path behind `ask`, `eval`, in-loop evaluation and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import copy
import importlib
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from hrvlm_jax.checkpoint import averages, layout, store
from hrvlm_jax.core.config import from_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.images import MAX_PIXELS, open_image
from hrvlm_jax.language.chat import Dialogue
from hrvlm_jax.language.generate import Generated, Generator, Sampling, bucket
from hrvlm_jax.language.generation import generation_of
from hrvlm_jax.language.prompt import Text, pad_batch, tokenizer_of
from hrvlm_jax.language.tokenizer import Tokenizer, load_tokenizer
from hrvlm_jax.parallel.distributed import to_host
from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vlm import laid, model as vlm
from hrvlm_jax.vlm.cut import cut_batch, filled_up
from hrvlm_jax.vlm.room import Context, check_memory

_SENTINEL = -200  # placeholder where the vocabulary has no image token (LLaVA)


def text_of(config: ModelConfig, tokenizer: Tokenizer) -> Text:
  """How this model's text is written: template, placeholder, stop tokens."""
  token = config.image_token
  own = token is not None and token in tokenizer.vocabulary
  return Text(tokenizer=tokenizer, chat=config.chat, image_token=token,
              image_sentinel=None if token is None or own else _SENTINEL,
              after_image=config.after_image)


# What is asked: a question, or the turns of a conversation whose last one is a question.
Question = str | Dialogue
Items = Sequence[tuple[Sequence[Image.Image], Question]]


def answer_all(answer: Callable[[list], Sequence], items: Sequence, *, batch_size: int
               ) -> Iterator[tuple[list, list]]:
  """Asks about all items, `batch_size` at a time; yields (items of a batch, their answers).

  The last batch is filled up with repetitions whose answers are dropped, so that one program serves
  all of them.

  Raises:
    UserError: `answer` gives another number of answers than it was asked for.
  """
  for start in range(0, len(items), batch_size):
    part = list(items[start:start + batch_size])
    answers = list(answer(part + part[-1:] * (batch_size - len(part))))
    if len(answers) != batch_size:
      raise UserError(
        f'the answer function gave {len(answers)} answers to {batch_size} questions')
    yield part, answers[:len(part)]


class Answerer:
  """A model ready to answer: parameters with layers unrolled, tokenizer, system.

  Args:
    params: parameters of `vlm.build(config)` (layers stacked).
    ex: execution of all programs.
    exif, alpha, max_pixels: how image files are opened, see `core.images.open_image`.
    layout: where parameters that were given in their places lie, with layers unrolled already; the
      rows of a batch are cut over it. On several processes every method is called on all of them.

  Attributes:
    methods: settings of inference methods laid over the model (`METHODS`), by name;
      they belong to what an answer was made from.
  """

  def __init__(self, config: ModelConfig, params, tokenizer: Tokenizer, *, ex: Execution = HERE,
               exif: str = 'apply', alpha: str = 'drop', max_pixels: int = MAX_PIXELS,
               layout: Layout | None = None):
    self.config, self.exif, self.layout = config, exif, layout
    self.reading = dict(exif=exif, alpha=alpha, max_pixels=max_pixels)
    if layout is not None:
      ex = ex.replace(mesh=layout.mesh)
    self.methods: dict[str, Mapping[str, Any]] = {}
    self.system, self.context = registry.get(config.system), Context(config.text)
    self.text = text_of(config, tokenizer)
    self.generator = Generator(vlm.build(config, unrolled=True),
                               vlm.unroll(config, params) if layout is None else params, ex=ex)

  @classmethod
  def load(cls, checkpoint: str | os.PathLike, *, ex: Execution = HERE, exif: str = 'apply',
           alpha: str = 'drop', max_pixels: int = MAX_PIXELS,
           encoder_options: dict[str, Any] | None = None,
           methods: Mapping[str, Mapping[str, Any]] | None = None,
           layout: Layout | None = None, weights: str | None = None) -> Answerer:
    """From a checkpoint folder or the work directory of a run.

    Args:
      encoder_options: settings of the encoder to override (`max_crops`, `num_tokens`, ...).
      methods: see `with_methods`.
      layout: the mesh that parameters are laid over, by the rules of training: every process reads
        what its devices hold, straight into its place.
      weights: 'raw' or 'ema', see `checkpoint.averages.which`.

    Raises:
      UserError: no checkpoint, no tokenizer, tensors that do not fit (all listed); a method that
        the model does not suit.
    """
    config = model_config(checkpoint, encoder_options)
    if layout is None or layout.mesh.size == 1:
      layout = None
      # A method may compute in float32 what answers do not.
      params = averages.load_params(checkpoint, vlm.build(config).abstract if methods else
                                    laid.held(config, ex.dtype), weights=weights)
    else:
      if methods:
        raise UserError(f'{", ".join(sorted(methods))}: answers on one device; leave out the mesh')
      params = laid.load(checkpoint, config, layout, dtype=ex.dtype, weights=weights)
    answerer = cls(config, params, find_tokenizer(checkpoint), ex=ex, exif=exif, alpha=alpha,
                   max_pixels=max_pixels, layout=layout)
    return with_methods(answerer, methods or {})

  def with_config(self, config: ModelConfig) -> Answerer:
    """The same weights under a config of the same parameters, on one device."""
    made = copy.copy(self)
    made.config = config
    made.generator = Generator(vlm.build(config, unrolled=True), self.generator.params,
                               ex=self.generator.ex)
    return made

  def shown(self, items: Items) -> list[tuple[tuple[Image.Image, ...], Question]]:
    """(images, question) as the model is asked them; a method may add to what it was given."""
    return [(tuple(images), question) for images, question in items]

  def batch(self, items: Items) -> dict[str, Any]:
    """Arrays of several (images, question), padded on the left to a bucket."""
    views = [self.system.views(images, self.config.encoder) for images, _ in items]
    rows = [self.text.prompt(question, view['tokens'].tolist())
            for (_, question), view in zip(items, views, strict=True)]
    length = bucket(max(len(row['tokens']) for row in rows))
    packed = self.system.batch(views, self.config.encoder)
    return pad_batch(rows, length, 'left') | {'views': packed}

  def sampling(self, **options) -> Sampling:
    """Generation settings with this model's stop and pad tokens; penalties of its release
    (generation_config.json) unless `options` say otherwise."""
    pad, own = self.text.tokenizer.pad_id, generation_of(self.text.tokenizer.files)
    usual = dict(repetition_penalty=own.repetition_penalty,
                 no_repeat_ngram_size=own.no_repeat_ngram_size)
    return Sampling(stop_ids=self.text.stop_ids(), pad_id=0 if pad is None else pad,
                    **usual | options)

  def answer(self, items: Sequence[tuple[Sequence[Any], Question]], *, key=None, **options
             ) -> list[str]:
    """Answers to several (images, question); an image is a PIL image, a path or bytes.

    options: fields of `Sampling` (max_new_tokens, temperature, beams, ...).
    """
    batch = self.placed(self.shown([self.opened(item) for item in items]))
    return self.answers(batch, key=key, **options)[:len(items)]

  def placed(self, items: Items) -> dict[str, Any]:
    """The `batch` of opened items where the model lies; on a mesh with rows up to its shards."""
    if self.layout is None:
      return self.batch(items)
    last = len(items) - 1
    return cut_batch(self.system, self.config.encoder, self.text,
                     [min(n, last) for n in range(filled_up(len(items), self.layout))],
                     items.__getitem__, self.layout)

  def answers(self, batch: dict[str, Any], *, key=None, **options) -> list[str]:
    """Answers to the rows of a `batch`, which may lie on several devices and processes."""
    sampling = self.sampling(**options)
    out = self.generated(self.generator.prompt(batch), sampling, key=key)
    return [self.decode(row) for row in out.rows()]

  def generated(self, prompt, sampling: Sampling, *, key=None) -> Generated:
    """New tokens after a prompt, (embeddings, valid, extras) of `Generator.prompt`.

    A prompt beyond the positions of the language model is said (`vlm.room`).

    Raises:
      UserError: more new tokens than the devices hold.
    """
    embeds, valid, extras = prompt
    check_memory(self.config.text, *valid.shape, sampling, ex=self.generator.ex)
    out = self.generator.generate(embeds, valid, sampling, key=key, extras=extras)
    self.context.check(to_host(valid), int(max(out.lengths, default=0)))
    return out

  def opened(self, item: tuple[Sequence[Any], Question]) -> tuple[list[Image.Image], Question]:
    """(images, question) with images that are PIL images."""
    images, text = item
    return [self._open(image) for image in images], text

  def stream(self, images: Sequence[Any], text: Question, *, key=None, **options) -> Iterator[str]:
    """The answer to one question, piece by piece."""
    opened = [self._open(image) for image in images]
    batch = self.placed(self.shown([(opened, text)]))
    embeds, valid, extras = self.generator.prompt(batch)
    sampling = self.sampling(**options)
    check_memory(self.config.text, *valid.shape, sampling, ex=self.generator.ex)
    self.context.check(to_host(valid))
    ids: list[int] = []
    shown = now = ''
    for token in self.generator.stream(embeds, valid, sampling, key=key, extras=extras):
      ids.append(int(token[0]))
      now = self.decode(ids)
      # A character may span several tokens; an unfinished one decodes to the replacement mark.
      if now.startswith(shown) and not now.endswith('\ufffd'):
        yield now[len(shown):]
        shown = now
    if now != shown and now.startswith(shown):  # the answer ends inside a character
      yield now[len(shown):]
    self.context.check(to_host(valid), len(ids))

  def decode(self, ids: Sequence[int]) -> str:
    """Text of new tokens, without special tokens and outer white space."""
    stops = set(self.text.stop_ids())
    kept = [i for i in ids if i not in stops]
    return self.text.tokenizer.decode(np.asarray(kept, np.int64).tolist()).strip()

  def overlay(self, image: Image.Image, question: Question | None = None) -> Image.Image:
    """The image with what the system looked at (crops, selection, gates)."""
    item = ([image], question or 'What is in the image?')
    info = self.generator.info(self.placed([item])) if self.system.overlay_needs_info else {}
    return self.system.overlay(image, self.config.encoder, info)

  def _open(self, image: Any) -> Image.Image:
    return image if isinstance(image, Image.Image) else open_image(image, **self.reading)


# Inference methods that stand in for a model: name -> module with the classes of its settings and
# of its answerer; laid over one another in this order.
METHODS = {'fastv': 'FastV', 'prune': 'Prune', 'vicrop': 'ViCrop', 'shrink': 'Shrink'}


def with_methods(answerer: Answerer, settings: Mapping[str, Mapping[str, Any]]) -> Answerer:
  """The model answering by the named methods (`METHODS`), each with its settings.

  Raises:
    UserError: unknown settings, or a method that the model does not suit.
  """
  for name, kind in METHODS.items():
    if name in settings:
      module = importlib.import_module(f'hrvlm_jax.vlm.{name}')
      config = from_dict(getattr(module, kind), settings[name], path=name)
      answerer = getattr(module, f'{kind}Answerer')(answerer, config)
  return answerer


def model_config(checkpoint, encoder_options: dict[str, Any] | None = None) -> ModelConfig:
  """The model of a checkpoint; `encoder_options` replace settings of the encoder, strictly."""
  values = store.load_config(checkpoint)
  values = dict(values.get('model', values))
  if encoder_options:
    values['encoder'] = dict(values['encoder']) | encoder_options
  return from_dict(ModelConfig, values, path='model', title=f'{checkpoint}')


def find_tokenizer(checkpoint) -> Tokenizer:
  """The tokenizer saved with a checkpoint: beside it, or in its run's work directory.

  Raises:
    UserError: none there.
  """
  folder = pathlib.Path(os.fspath(layout.resolve(checkpoint)))
  places = [folder / 'tokenizer', folder.parent.parent / 'tokenizer']
  for place in places:
    if place.is_dir():
      return load_tokenizer(place)
  config = store.load_config(checkpoint)
  named = config.get('data', {}).get('tokenizer') if isinstance(config.get('data'), dict) else None
  if named:
    return tokenizer_of(named)
  raise UserError(f'{checkpoint}: no tokenizer; expected a folder {places[0]} (copy the tokenizer '
                  'files of the language model there)')


def is_correct(prediction: str, answer: str) -> bool:
  """Whether an answer reads as the reference; case, surrounding space and a full stop are free."""
  return prediction.strip().removesuffix('.').rstrip().casefold() == answer.casefold()
