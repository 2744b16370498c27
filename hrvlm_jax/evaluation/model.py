"""A model of this library as the functions that `runner.evaluate` asks for."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import copy
import dataclasses
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np
from PIL import Image

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation.analysis.attention import global_share
from hrvlm_jax.evaluation.runner import Answer, Model, Picture, Setup
from hrvlm_jax.language.chat import ASSISTANT, USER, Message
from hrvlm_jax.language.generate import bucket
from hrvlm_jax.language.prompt import IGNORE, pad_batch
from hrvlm_jax.language.sampling import Sampling
from hrvlm_jax.parallel.distributed import to_host
from hrvlm_jax.serving.queue import Queue, suits
from hrvlm_jax.training.losses import shifted_targets
from hrvlm_jax.vlm.answer import Answerer
from hrvlm_jax.vlm.cut import placed


@dataclasses.dataclass(frozen=True)
class OptionScore:
  """Log-probability of a given answer: sum over its tokens, their number, whether greedy decoding
  would have written it."""

  log_probability: float
  tokens: int
  greedy: bool

  @property
  def mean_loss(self) -> float:
    """Mean token cross-entropy; what V*Bench compares."""
    return -self.log_probability / self.tokens


class EvaluatedModel:
  """Answers, likelihoods and overlays of one model.

  Args:
    answerer: a loaded model.
    sampling: fields of `Sampling`; greedy unless they say otherwise.
    max_new_tokens: longest answer.

  Questions are answered by continuous batching (`serving.queue`); by beams, or with a method laid
  over the model, in fixed batches. The rows of a batch are cut over the answerer's layout, and
  every part of it owns slots. Where it spans several processes, all of them answer every question
  together; else every process has its own samples.
  """

  def __init__(self, answerer: Answerer, *, max_new_tokens: int,
               sampling: Mapping[str, Any] | None = None):
    self.answerer = answerer
    self.sampling = {'max_new_tokens': max_new_tokens, **(sampling or {})}
    self._programs: dict[str, Any] = {}  # these two are shared by `with_longest`
    self._queues: dict[int, Queue] = {}

  def with_longest(self, max_new_tokens: int) -> 'EvaluatedModel':
    """The same model with other longest answers; what is compiled for either is kept for both."""
    other = copy.copy(self)
    other.sampling = {**self.sampling, 'max_new_tokens': max_new_tokens}
    return other

  def described(self, *, name: str, checkpoint: str = '', checkpoint_hash: str = '') -> Model:
    """What `runner.evaluate` asks, with the model's side of a result's provenance."""
    config = to_dict(self.answerer.config)
    setup = Setup(
      model=name, system=self.answerer.config.system, checkpoint=checkpoint,
      checkpoint_hash=checkpoint_hash, config=config,
      generation={**self.sampling, **self.answerer.methods},
      preprocessing={'encoder': config['encoder'], 'exif': self.answerer.exif})
    suited = suits(self.answerer, self.answerer.sampling(**self.sampling))
    return Model(setup=setup, answer=self.answer, likelihood=self.likelihood, overlay=self.overlay,
                 queue=self.queue if suited else None)

  def answer(self, pairs: Sequence[tuple[Picture, str]]) -> list[Answer]:
    """Generated answers with the number of visual and new tokens."""
    model = self.answerer
    items = model.shown([(_images(picture), question) for picture, question in pairs])
    batch = model.placed(items)
    sampling = model.sampling(**self.sampling)
    made = model.generated(model.generator.prompt(batch), sampling)
    return [self._answer(row, self._visual(images), sampling)  # rows up to the shards
            for row, (images, _) in zip(made.rows(), items, strict=False)]

  def queue(self, pairs: Iterable[tuple[int, Callable[[], tuple[Picture, str]]]], slots: int
            ) -> Iterator[list[tuple[int, Answer | UserError]]]:
    """The same answers by continuous batching, those that are complete at the same time together.

    Args:
      pairs: (number, function that gives the picture and the question), taken as slots are free.
      slots: questions at a time.

    Raises:
      UserError: a question that the model cannot be asked. (The error of a function is its
        question's answer.)
    """
    model, sampling = self.answerer, self.answerer.sampling(**self.sampling)
    if slots not in self._queues:
      self._queues[slots] = Queue(model, slots=slots)
    visual: dict[int, int] = {}
    broken: dict[int, UserError] = {}

    def opened(number: int, make: Callable[[], tuple[Picture, str]]):
      try:
        picture, question = make()
      except UserError as error:
        broken[number] = error
        raise
      visual[number] = self._visual(_images(picture))
      return _images(picture), question

    items = ((number, functools.partial(opened, number, make)) for number, make in pairs)
    for group in self._queues[slots].run(items, sampling):
      answers: list[tuple[int, Answer | UserError]] = []
      for done in group:
        if done.error is not None and done.index not in broken:
          raise done.error
        answers.append((done.index, broken.pop(done.index) if done.error is not None else
                        self._answer(done.tokens, visual.pop(done.index), sampling)))
      yield answers

  def _visual(self, images: Sequence[Image.Image]) -> int:
    model = self.answerer
    return sum(model.system.count(*image.size, model.config.encoder).tokens for image in images)

  def _answer(self, row: Sequence[int], visual: int, sampling: Sampling) -> Answer:
    ended = bool(row) and row[-1] in sampling.stop_ids
    return Answer(self.answerer.decode(row), 'eos' if ended else 'length', visual, len(row))

  def likelihood(self, triples: Sequence[tuple[Picture, str, str]]) -> list[float]:
    """Mean token cross-entropy of each (image, question, option), the stop token included."""
    return [score.mean_loss for score in self.score(triples)]

  def score(self, triples: Sequence[tuple[Picture, str, str]], *,
            stop: bool = True) -> list[OptionScore]:
    """Log-probabilities of given answers after their questions, in the training template.

    Args:
      stop: the token that ends an answer belongs to it.

    Raises:
      UserError: a method that only generation knows (FastV, pruning).
    """
    for name in ('fastv', 'prune'):
      if name in self.answerer.methods:
        raise UserError(f'{name} prunes tokens while a model generates; likelihoods of given '
                        f'answers are taken without it: leave --{name} out')
    rows, batch = self._answered(triples, stop)
    chosen, best, wanted = to_host(self._scores()(self.answerer.generator.params, batch))
    return [OptionScore(float(log[mask].sum()), int(mask.sum()), bool(top[mask].all()))
            for log, top, mask in zip(chosen, best, wanted)]

  def global_attention(
      self, triples: Sequence[tuple[Picture, str, str]], *, predicting: bool = False
  ) -> Float[np.ndarray, 'n l']:
    """Share of cross-attention on the global view, per (image, question, answer) and layer.

    Pheye's appendix C: the mean over the places of the answer's tokens, the stop token excluded,
    after one run over prompt and answer; see `analysis.attention`.

    Args:
      predicting: the places that predict the answer's tokens instead, each one before its token:
        the only ones that chose it, and all there are of an answer of one token.

    Raises:
      UserError: the model does not read images by cross-attention.
    """
    config = self.answerer.config
    if config.fusion.in_prompt:
      raise UserError(f'{config.system}: has no cross-attention, so there is no global share of it')
    rows, batch = self._answered(triples, stop=False)
    if 'attention' not in self._programs:
      fn, ex = self.answerer.generator.fn, self.answerer.generator.ex
      ranges = config.encoder.sub_images
      self._programs['attention'] = jax.jit(lambda params, batch: fn.apply(
          params, batch, ranges=ranges, ex=ex, method='attention'))
    probabilities = to_host(
      self._programs['attention'](self.answerer.generator.params, batch))
    shares = []
    for i, row in enumerate(rows):
      places = np.flatnonzero(row['labels'] != IGNORE)
      places = places - predicting
      seen = probabilities[:, i, :, :places[-1] + 1]
      shares.append(global_share(seen, first_row=int(places[0]), global_tokens=1))
    return np.stack(shares)

  def _answered(self, triples, stop: bool):
    """(rows, batch) of questions with given answers, labels on the answers."""
    model = self.answerer
    shown = model.shown([(_images(picture), question) for picture, question, _ in triples])
    views = [model.system.views(images, model.config.encoder) for images, _ in shown]
    rows = []
    for (images, question), (*_, option), view in zip(shown, triples, views):
      counts = view['tokens'].tolist() if 'tokens' in view else [0] * len(images)
      turns = [Message(USER, question), Message(ASSISTANT, option)]
      row = model.text.conversation(turns, counts)
      rows.append(row if stop else _without_stop(row, model.text.stop_ids()))
    length = bucket(max(len(row['tokens']) for row in rows))
    batch = self._place(pad_batch(rows, length, 'right') | {
        'views': model.system.batch(views, model.config.encoder)})
    return rows, batch

  def overlay(self, picture: Picture, question: str) -> Image.Image:
    """Where the model looked, drawn on the (first) image."""
    return self.answerer.overlay(_images(picture)[0], question)

  def _place(self, batch):
    """The batch cut over the devices; arrays that do not divide are copied to all."""
    layout = self.answerer.layout
    return batch if layout is None else placed(batch, layout)

  def _scores(self):
    """Compiled: (log-probability, is the best token, counts) of every target, [b t] each."""
    if 'scores' not in self._programs:
      fn, ex = self.answerer.generator.fn, self.answerer.generator.ex

      def run(params, batch):
        module = fn.bind(params)
        logits = module.logits(module(batch, ex=ex)).astype(jnp.float32)
        targets = shifted_targets(jnp.asarray(batch['labels']))
        wanted = targets != IGNORE
        safe = jnp.where(wanted, targets, 0)[..., None]
        log = jnp.take_along_axis(jax.nn.log_softmax(logits), safe, axis=-1)[..., 0]
        return log, logits.argmax(-1) == safe[..., 0], wanted

      self._programs['scores'] = jax.jit(run)
    return self._programs['scores']


def array_hash(params) -> str:
  """SHA-256 of parameters in memory: names, types, shapes and bytes of all leaves, in order."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    value = np.asarray(leaf)
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    digest.update(f'{name} {value.dtype} {value.shape}\n'.encode())
    digest.update(np.ascontiguousarray(value).tobytes())
  return digest.hexdigest()


def _images(picture: Picture) -> tuple[Image.Image, ...]:
  if picture is None:
    return ()
  return picture if isinstance(picture, tuple) else (picture,)


def _without_stop(row: Mapping[str, np.ndarray], stop_ids: Sequence[int]) -> dict[str, np.ndarray]:
  """The row without a target on the last labelled token when that ends an answer."""
  labels = row['labels'].copy()
  places = np.flatnonzero(labels != IGNORE)
  while len(places) > 1 and labels[places[-1]] in stop_ids:
    labels[places[-1]] = IGNORE
    places = places[:-1]
  return {**row, 'labels': labels}



