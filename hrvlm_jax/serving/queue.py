"""Many questions to one model by continuous batching: `ask --questions`, `eval`, `Model.batch`.

    queue = Queue(answerer, slots=8)
    for group in queue.run(items, answerer.sampling(max_new_tokens=64)):
      for done in group:
        print(done.index, answerer.decode(done.tokens))

The slots are those of the server (`serving.slots`); here nobody waits for one answer, so they need
not be sized for what might come: they grow when a question wants more room. On a mesh every part of
a batch (a data row of the mesh) owns an equal share of the slots, and prompts are read in groups of
one for each part. Which slot reads what and when follows from the order of the questions, their
shapes and the tokens drawn so far, which every process of a run holds whole: all of them compute
the same schedule, and each prepares the pictures of its own parts alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language.sampling import Sampling
from hrvlm_jax.parallel.distributed import to_host
from hrvlm_jax.serving import slots as device
from hrvlm_jax.serving.draw import Settings, penalties
from hrvlm_jax.serving.requests import Counts, shape_of
from hrvlm_jax.vlm.answer import Answerer
from hrvlm_jax.vlm.cut import Item, cut_batch, filled_up
from hrvlm_jax.vlm.room import check_memory

# Reading a group is taken to cost as much as this many steps of all slots: while parts without a
# free slot would only read along, free slots wait until that is the smaller loss.
_PATIENCE = 16
_STEP = 16  # places for new tokens are rounded up to it, as in `language.generate`


@dataclasses.dataclass(frozen=True)
class Done:
  """A question that is answered.

  Attributes:
    index: its number among those given.
    tokens: all new tokens, an end token included.
    counts: what had been done by then.
    error: why there is no answer.
  """

  index: int
  tokens: tuple[int, ...]
  counts: Counts
  error: UserError | None = None


@dataclasses.dataclass
class _Taken:
  """The host's side of a slot."""

  index: int
  limit: int
  prompt_tokens: int
  tokens: list[int] = dataclasses.field(default_factory=list)


Opened = Callable[[], Item]


def suits(answerer: Answerer, sampling: Sampling) -> bool:
  """Whether a model and settings can be answered this way: no beams, no method laid over it."""
  return sampling.beams == 1 and not answerer.methods


class Queue:
  """Answers questions of one model; its programs are compiled for the shapes they first meet.

  Args:
    answerer: which `suits`.
    slots: questions at a time; on a mesh rounded up to a multiple of its parts. Where the mesh
      spans several processes, all of them call every method alike.
  """

  def __init__(self, answerer: Answerer, *, slots: int):
    self.answerer, self.layout = answerer, answerer.layout
    self.parts = 1 if self.layout is None else self.layout.shards
    self.count = slots if self.layout is None else filled_up(slots, self.layout)
    self._params, self._ex = answerer.generator.params, answerer.generator.ex
    fn, ex = answerer.generator.fn, self._ex
    self._whole = None if ex.devices == 1 else jax.sharding.NamedSharding(
      ex.mesh, jax.sharding.PartitionSpec())
    self._shapes: dict[tuple, Any] = {}
    self._seen = functools.partial(device.read, fn, ex=ex)

    def first(params, slots, batch, chosen, places, *, usual):
      if self.layout is None:
        slots, drawn = device.admit(fn, params, slots, batch, chosen, places[0], ex=ex, usual=usual)
      else:
        slots, drawn = device.admit_group(fn, params, slots, batch, chosen, places, ex=ex,
                                          usual=usual)
      return device.laid(slots, ex), self._told(drawn.token)

    def step(params, slots, *, usual):
      slots, drawn = device.step(fn, params, slots, ex=ex, usual=usual)
      return device.laid(slots, ex), self._told(drawn.token)

    compiled = functools.partial(jax.jit, donate_argnums=1, static_argnames=('usual',),
                                 compiler_options=ex.options)
    self._first, self._step = compiled(first), compiled(step)
    self._grown: dict[tuple, Any] = {}

  def compilations(self) -> int:
    """Programs so far: it does not grow with questions of shapes that were met before."""
    return self._first._cache_size() + self._step._cache_size() + len(self._grown)

  def run(self, items: Iterable[tuple[int, Opened]], sampling: Sampling, *, key=None,
          limits: Mapping[int, int] | None = None) -> Iterator[list[Done]]:
    """Answers all questions; yields those that became complete at the same time.

    An answer is that of the question alone: its randomness is `key` folded with the number of each
    token. A question that cannot be asked is `Done` with its error; on a mesh over several
    processes the error of a picture's preparation is raised.

    Args:
      items: (number, function that gives the opened images and the question), taken as slots
        become free.
      sampling: without beams.
      key: default: that of seed 0.
      limits: by number, fewer new tokens than `sampling.max_new_tokens`.

    Raises:
      UserError: more keys and values than the devices hold.
    """
    usual, limits = penalties(sampling), limits or {}
    chosen = _settings(sampling, key, self.parts)
    source, counts = iter(items), Counts()
    rows: list[_Taken | None] = [None] * self.count
    ahead: deque[tuple[int, Any]] = deque()
    slots, lost = None, 0.0
    with ThreadPoolExecutor(2, 'prepare') as pool:
      try:
        while True:
          ahead.extend(self._ahead(source, pool, max(self.count, self.parts) - len(ahead)))
          if not ahead and not any(rows):
            return
          able = self._able(rows)
          wanted = min(self.parts, len(ahead))
          if wanted and able and (
              not any(rows) or lost >= (1 - min(len(able), wanted) / wanted) * _PATIENCE):
            group, batch, wrong = self._group(ahead, able)
            if wrong:
              yield [Done(index, (), counts, error) for index, error in wrong]
            if not group:
              continue
            length, seen = self._room(batch, sampling)
            slots = self._fitting(slots, length, seen, sampling)
            places, lost = np.full(self.parts, -1, np.int32), 0.0
            prompts = to_host(batch['valid']).sum(axis=1)
            for index, part in group:
              places[part] = able[part]
              rows[self._row(part, able[part])] = _Taken(
                index, limits.get(index, sampling.max_new_tokens),
                int(prompts[part]))
            slots, drawn = self._first(self._params, slots, batch, chosen, places, usual=usual)
            drawn = np.asarray(drawn.addressable_data(0))
            counts = counts.add(prompts=len(group), tokens=len(group))
            tokens = {self._row(part, able[part]): int(drawn[part]) for _, part in group}
          else:
            slots, drawn = self._step(self._params, slots, usual=usual)
            drawn = np.asarray(drawn.addressable_data(0))
            tokens = {row: int(drawn[row]) for row, held in enumerate(rows) if held is not None}
            counts = counts.add(steps=1, tokens=len(tokens))
            lost += (self.count - len(tokens)) / self.count if wanted else 0.0
          if done := self._ended(rows, tokens, sampling, counts):
            yield done
      finally:
        for _, prepared in ahead:
          if self.layout is None:
            prepared.cancel()

  def _told(self, tokens):
    """The tokens whole on every device, so that every process reads them without a message."""
    return tokens if self._whole is None else jax.lax.with_sharding_constraint(tokens, self._whole)

  def _row(self, part: int, place: int) -> int:
    return part * (self.count // self.parts) + place

  def _able(self, rows: Sequence[Any]) -> dict[int, int]:
    """The first free slot of every part that has one."""
    each = self.count // self.parts
    return {part: place for part in range(self.parts)
            if (place := next((i for i in range(each) if rows[part * each + i] is None), None))
            is not None}

  def _ahead(self, source: Iterator, pool: ThreadPoolExecutor, room: int) -> Iterator:
    """The next questions; on one device their arrays are made in threads while it works."""
    for index, opened in itertools.islice(source, max(room, 0)):
      if self.layout is None:
        yield index, pool.submit(lambda opened=opened: self._batch([opened()]))
      else:
        yield index, opened

  def _group(self, ahead: deque, able: Mapping[int, int]
             ) -> tuple[list[tuple[int, int]], Any, list[tuple[int, UserError]]]:
    """([(number, part)], their batch, those that cannot be asked): at most one for every part."""
    wrong: list[tuple[int, UserError]] = []
    if self.layout is None:
      index, prepared = ahead.popleft()
      try:
        return [(index, 0)], prepared.result(), wrong
      except UserError as error:
        return [], None, [(index, error)]
    opened: list[tuple[int, Item]] = []
    while ahead and len(opened) < len(able):
      index, make = ahead.popleft()
      try:
        opened.append((index, make()))
        if self.layout.own and self.parts > 1:
          self._check(opened[-1][1])
      except UserError as error:
        wrong.append((index, error))
    if not opened:
      return [], None, wrong
    parts = list(able)[:len(opened)]
    asked = [opened[0][1]] * self.parts  # parts without a question read one along
    for part, (_, item) in zip(parts, opened, strict=True):
      asked[part] = item
    try:
      batch = self._batch(asked)
    except UserError as error:
      if len(opened) > 1 or not self.layout.own:
        raise
      return [], None, [*wrong, (opened[0][0], error)]
    return [(index, part) for part, (index, _) in zip(parts, opened, strict=True)], batch, wrong

  def _check(self, item: Item) -> None:
    """Raises:
      UserError: more images or another conversation than the system takes.
    """
    images, question = item
    answerer = self.answerer
    counts = [answerer.system.count(*image.size, answerer.config.encoder).tokens
              for image in images]
    answerer.text.prompt(question, counts)

  def _batch(self, items: Sequence[Item]) -> Any:
    answerer = self.answerer
    items = answerer.shown([answerer.opened(item) for item in items])
    batch = answerer.batch(items) if self.layout is None else cut_batch(
      answerer.system, answerer.config.encoder, answerer.text, range(len(items)),
      items.__getitem__, self.layout)
    batch.pop('labels', None)
    return batch

  def _room(self, batch: Any, sampling: Sampling) -> tuple[int, Any]:
    """(places of a slot for this prompt and its answer, shapes of what is seen of its images)."""
    name = shape_of(batch)
    if name not in self._shapes:
      *_, held, valid = jax.eval_shape(self._seen, self._params, batch)
      self._shapes[name] = valid.shape[1], held
    prompt, held = self._shapes[name]
    check_memory(self.answerer.config.text, self.count, prompt, sampling, ex=self._ex)
    return prompt + -(-sampling.max_new_tokens // _STEP) * _STEP, held

  def _fitting(self, slots: device.Slots | None, length: int, held: Any, sampling: Sampling
               ) -> device.Slots:
    """Slots with so much room at least: new ones, the same, or the same requests in larger ones."""
    row = lambda shape: jax.ShapeDtypeStruct((1, *shape.shape[1:]), shape.dtype)
    held = jax.tree.map(row, held)
    if slots is not None:
      length = max(length, slots.valid.shape[1])
      held = jax.tree.map(lambda one, other: jax.ShapeDtypeStruct(
        tuple(map(max, one.shape, (1, *other.shape[1:]))), one.dtype), held, slots.held)
    written = -(-sampling.max_new_tokens // _STEP) * _STEP if sampling.counts else 0
    make = functools.partial(device.empty, self.answerer.config.text, self.count, length, held,
                             written=written, ex=self._ex)
    shapes = jax.eval_shape(make)
    sizes = lambda tree: tuple(leaf.shape for leaf in jax.tree.leaves(tree))
    if slots is not None and sizes(slots) == sizes(shapes):
      return slots
    name = (None if slots is None else sizes(slots), sizes(shapes))
    if name not in self._grown:
      places = device.shardings(shapes, self._ex)
      options = {} if places is None else {'out_shardings': places}
      self._grown[name] = (jax.jit(make, **options) if slots is None else jax.jit(
        lambda old: device.grown(old, shapes), **options))
    return self._grown[name](*(() if slots is None else (slots,)))

  def _ended(self, rows: list[_Taken | None], tokens: Mapping[int, int], sampling: Sampling,
             counts: Counts) -> list[Done]:
    """Hands every token on; the answers that are complete with it, their slots free again."""
    done = []
    for row, token in tokens.items():
      held = rows[row]
      held.tokens.append(token)
      if token in sampling.stop_ids or len(held.tokens) == held.limit:
        self.answerer.context.check(np.ones((1, held.prompt_tokens), bool), len(held.tokens))
        done.append(Done(held.index, tuple(held.tokens), counts))
        rows[row] = None
    return done


def _settings(sampling: Sampling, key: Any, rows: int) -> Settings:
  """How every row draws: all by the same key, each as if it were alone."""
  data = np.asarray(jax.random.key_data(jax.random.key(0) if key is None else key), np.uint32)
  full = lambda value, kind: np.full(rows, value, kind)
  return Settings(np.tile(data, (rows, 1)), full(sampling.temperature, np.float32),
                  full(sampling.top_k, np.int32), full(sampling.top_p, np.float32),
                  full(sampling.min_p, np.float32), full(False, bool))
