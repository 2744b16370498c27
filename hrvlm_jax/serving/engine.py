"""Continuous batching over one loaded model: requests join and leave between tokens.

    engine = Engine(answerer, slots=8)
    for result in engine.run([Request(images=['a.png'], question='What is written there?')]):
      print(result.text)

The engine holds parameters and compiled programs and nothing that changes with requests; what does
is a `State`, which its caller holds and hands in (one thread at a time: the slots inside are given
away at every call). There is one program for a step and one for every shape of a prompt; prompts
are padded to the lengths of `language.generate.BUCKETS`, their images to the system's own buckets,
so that shapes are few. A request's answer does not depend on its batch mates: its numbers are rows
of their own in every product, its randomness comes from its own key.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
import dataclasses
import functools
import itertools
import threading
from typing import Any

import jax
import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language.generate import bucket
from hrvlm_jax.parallel.distributed import to_host
from hrvlm_jax.serving import slots as device
from hrvlm_jax.serving.draw import Drawn, Settings, penalties
from hrvlm_jax.serving.requests import Counts, Piece, Prepared, Report, Request, Result, shape_of
from hrvlm_jax.serving.spelling import Spelling
from hrvlm_jax.systems.packing import BLANK
from hrvlm_jax.vlm.answer import Answerer

_TEXT = 1024  # places for text, beside an image, where nobody says how long slots are
_CHOICE = 1 << 30  # keys of further choices lie far from those of tokens


@dataclasses.dataclass
class Running:
  """The host's side of one slot: the request, its tokens so far and their text."""

  prepared: Prepared
  spelling: Spelling
  tokens: list[int] = dataclasses.field(default_factory=list)
  reports: list[Report] = dataclasses.field(default_factory=list)

  def result(self, index: int, reason: str, counts: Counts) -> Result:
    """The answer of a slot that is complete."""
    return Result(index, self.spelling.text, tuple(self.tokens), reason,
                  self.prepared.prompt_tokens, tuple(self.reports), counts=counts)


@dataclasses.dataclass(frozen=True)
class State:
  """All requests in progress.

  Attributes:
    slots: the device's side.
    rows: the host's side of each slot; None: free.
  """

  slots: device.Slots
  rows: tuple[Running | None, ...]
  counts: Counts = Counts()

  @property
  def free(self) -> int | None:
    """The first free slot; None: all are taken."""
    return next((i for i, row in enumerate(self.rows) if row is None), None)

  @property
  def busy(self) -> int:
    """Slots with a request."""
    return sum(row is not None for row in self.rows)

  def release(self, row: int) -> State:
    """The same with slot `row` free: its answer is complete, or nobody waits for it."""
    rows = tuple(None if i == row else held for i, held in enumerate(self.rows))
    return dataclasses.replace(self, rows=rows)


class Engine:
  """One loaded model and its programs.

  Args:
    answerer: the model; its parameters may lie over the mesh of its execution.
    slots: requests at a time.
    length: places of a slot, prompt and answer together; default: room for one image of this model,
      text, and an answer of 1024 tokens, at most what the language model knows positions for.

  Raises:
    UserError: a method laid over the model (FastV, ViCrop), several processes, slots or a length
      that cannot be.
  """

  def __init__(self, answerer: Answerer, *, slots: int = 8, length: int | None = None):
    if answerer.methods:
      raise UserError(f'{", ".join(answerer.methods)}: continuous batching runs the model as it '
                      'is; leave the method out, or answer in fixed batches')
    if jax.process_count() > 1:
      raise UserError(f'continuous batching runs on the devices of one process, found '
                      f'{jax.process_count()} processes; start one process, with a mesh over its '
                      'devices, or one server per machine')
    if answerer.config.text is None:
      raise UserError(f'{answerer.config.system} without a language model cannot answer; use '
                      '`hrvlm encode`')
    self.answerer, self.count = answerer, slots
    generator = answerer.generator
    self._fn, self.params, self._ex = generator.fn, generator.params, generator.ex
    most = answerer.config.text.max_positions
    self.length = min(self._default_length(), most) if length is None else length
    if slots < 1 or self.length < 2:
      raise UserError(f'slots and their length: found {slots} of {self.length} places, expected at '
                      'least 1 of 2')
    self._lock = threading.Lock()
    self._readers: dict[tuple, Any] = {}
    self._places: dict[tuple, int] = {}
    blank = answerer.batch([([BLANK], 'What?')])
    blank.pop('labels')
    self._held = self._read_shapes(blank)[2]
    self._usual = penalties(answerer.sampling())  # those of the release
    make = functools.partial(device.empty, answerer.config.text, slots, self.length, self._held,
                             written=self.length if self._usual.counts else 0, ex=self._ex)
    self._shapes = jax.eval_shape(make)
    self._layout = device.shardings(self._shapes, self._ex)
    options = {} if self._layout is None else {'out_shardings': self._layout}
    self._empty = jax.jit(make, **options)
    self._step = self._compile(functools.partial(device.step, self._fn, ex=self._ex,
                                                 usual=self._usual))

  def compilations(self) -> int:
    """Programs so far, that of a step and one per shape of a prompt."""
    return 1 + len(self._readers)

  def start(self) -> State:
    """All slots free."""
    return State(self._empty(), (None,) * self.count)

  # The host's part: any thread may run it.

  def prepare(self, request: Request) -> Prepared:
    """The request as arrays, its program compiled if no request had this shape before.

    Raises:
      UserError: an image or a question that cannot be used, a prompt and an answer that do not fit
        a slot.
    """
    item = self.answerer.opened((request.images, request.question))
    batch = self.answerer.batch([item])
    batch.pop('labels', None)
    prepared = Prepared(request, batch, settings_of(request), int(batch['valid'].sum()),
                        shape_of(batch))
    room, asked = self.room(prepared), request.max_new_tokens
    if asked > room:
      raise UserError(
        f'the prompt takes {self.length - room} places ({prepared.prompt_tokens} tokens, filled '
        f'up) and the answer up to {asked}, but a slot has {self.length}; shorten the '
        'conversation, ask for fewer new tokens, or start with longer slots (--length)')
    self.reader(prepared)
    return prepared

  def room(self, prepared: Prepared) -> int:
    """Most new tokens after this prompt; 0 or less where not even the prompt fits a slot.

    Raises:
      UserError: more images than a slot keeps what is seen of.
    """
    if prepared.shape not in self._places:
      *_, held, valid = self._read_shapes(prepared.batch)
      room, found = jax.tree.leaves(self._held), jax.tree.leaves(held)
      if any(a > b for one, other in zip(found, room, strict=True)
             for a, b in zip(one.shape, other.shape, strict=True)):
        raise UserError(f'what is seen of {len(prepared.request.images)} images is more than a '
                        'slot holds, which is sized for one; ask about fewer images')
      self._places[prepared.shape] = valid.shape[1]
    return self.length - self._places[prepared.shape]

  def reader(self, prepared: Prepared) -> Any:
    """The compiled program that reads prompts of this shape."""
    found = self._readers.get(prepared.shape)
    if found is not None:  # whoever drives the device never waits for another shape
      return found
    with self._lock:
      if prepared.shape not in self._readers:
        self._readers[prepared.shape] = self._compile(
          functools.partial(device.admit, self._fn, ex=self._ex, usual=self._usual),
          prepared.batch, prepared.chosen, np.int32(0))
      return self._readers[prepared.shape]

  # The device's part: by whoever holds the state.

  def admit(self, state: State, prepared: Prepared) -> tuple[State, int, Piece]:
    """Reads a prompt into a free slot, which there must be.

    Returns:
      (state, the slot, the first token). The slot stays taken until it is released, also where the
      first token is the last.
    """
    row = state.free
    if row is None:
      raise ValueError('admit: no slot is free')
    slots, drawn = self.reader(prepared)(self.params, state.slots, prepared.batch, prepared.chosen,
                                         np.int32(row))
    spelling = Spelling(self.answerer.text.tokenizer, self.answerer.text.stop_ids(),
                        prepared.request.stop)
    running = Running(prepared, spelling)
    rows = tuple(running if i == row else held for i, held in enumerate(state.rows))
    piece = self._piece(running, to_host(drawn), 0)
    return State(slots, rows, state.counts.add(prompts=1, tokens=1)), row, piece

  def step(self, state: State) -> tuple[State, dict[int, Piece]]:
    """The next token of every slot that is taken: (state, {slot: piece})."""
    slots, drawn = self._step(self.params, state.slots)
    drawn = to_host(drawn)
    pieces = {i: self._piece(running, drawn, i) for i, running in enumerate(state.rows)
              if running is not None}
    counts = state.counts.add(steps=1, tokens=len(pieces))
    return State(slots, state.rows, counts), pieces

  def run(self, requests: Iterable[Request], *, workers: int = 2) -> Iterator[Result]:
    """Answers all requests; yields each as it is complete (`Result.index` says which it is).

    Images are prepared in threads while the device works, two rounds of slots ahead. What runs when
    depends on the requests and the answers alone. A request that cannot be answered is a result
    with an `error`.

    Args:
      requests: of a sequence those that may grow longest begin first, so that none of them is left
        to run alone at the end; others are taken as they come.
      workers: threads.
    """
    state = self.start()
    waiting: deque[tuple[int, Future]] = deque()
    source: Iterator[tuple[int, Request]] = enumerate(requests)
    if isinstance(requests, Sequence):
      source = iter(sorted(source, key=lambda pair: -pair[1].max_new_tokens))
    indices: dict[int, int] = {}
    with ThreadPoolExecutor(workers, 'prepare') as pool:
      try:
        while True:
          room = 2 * self.count - len(waiting)
          waiting.extend((index, pool.submit(self.prepare, request))
                         for index, request in itertools.islice(source, room))
          if not waiting and not indices:
            return
          if waiting and state.free is not None:
            index, future = waiting.popleft()
            try:
              prepared = future.result()
            except UserError as error:
              yield Result(index, '', (), 'error', 0, error=error, counts=state.counts)
              continue
            state, row, piece = self.admit(state, prepared)
            indices[row], pieces = index, {row: piece}
          else:
            state, pieces = self.step(state)
          for row, piece in pieces.items():
            if piece.reason:
              yield state.rows[row].result(indices.pop(row), piece.reason, state.counts)
              state = state.release(row)
      finally:
        for _, future in waiting:
          future.cancel()

  def _piece(self, running: Running, drawn: Drawn, row: int) -> Piece:
    request, token = running.prepared.request, int(drawn.token[row])
    running.tokens.append(token)
    report = None
    if request.logprobs is not None:
      best = zip(drawn.best[row].tolist(), drawn.best_logprobs[row].tolist(), strict=True)
      report = Report(token, float(drawn.logprob[row]),
                      tuple(itertools.islice(best, request.logprobs)))
      running.reports.append(report)
    stops = self.answerer.text.stop_ids() if request.stop_ids is None else request.stop_ids
    text, reason = running.spelling.add(token), None
    if token in stops or running.spelling.stopped:
      reason = 'stop'
    elif len(running.tokens) == request.max_new_tokens:
      reason = 'length'
    if reason:
      text += running.spelling.finish()
      reason = 'stop' if running.spelling.stopped else reason
    return Piece(text, token, report, reason)

  def _compile(self, function: Any, *arguments: Any) -> Any:
    """function(params, slots, *arguments) -> (slots, tokens), the slots given away."""
    shapes = self._shapes
    options = {}
    if self._layout is not None:
      shapes = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=place), shapes, self._layout)
      options['out_shardings'] = (self._layout, jax.sharding.NamedSharding(
        self._ex.mesh, jax.sharding.PartitionSpec()))
    jitted = jax.jit(function, donate_argnums=1, compiler_options=self._ex.options, **options)
    return jitted.lower(self.params, shapes, *arguments).compile()

  def _read_shapes(self, batch: Any) -> Any:
    return jax.eval_shape(functools.partial(device.read, self._fn, ex=self._ex), self.params,
                          batch)

  def _default_length(self) -> int:
    system, encoder = self.answerer.system, self.answerer.config.encoder
    visual = self.answerer.config.fusion.positions(system.packing(encoder).tokens)
    return bucket(visual + _TEXT) + _TEXT


def settings_of(request: Request) -> Settings:
  """How a request draws, as the settings of one slot."""
  key = jax.random.key(request.seed)
  if request.choice:
    key = jax.random.fold_in(key, _CHOICE + request.choice)
  return Settings(
    np.asarray(jax.random.key_data(key), np.uint32)[None],
    np.full(1, request.temperature, np.float32), np.full(1, request.top_k, np.int32),
    np.full(1, request.top_p, np.float32), np.zeros(1, np.float32),
    np.array([request.logprobs is not None]))


def again(prepared: Prepared, **changes: Any) -> Prepared:
  """The same prompt asked otherwise: other settings, another choice, another budget."""
  request = dataclasses.replace(prepared.request, **changes)
  return dataclasses.replace(prepared, request=request, chosen=settings_of(request))
