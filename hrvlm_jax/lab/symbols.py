"""Pre-training of a tiny language model for the built-in task: signs as symbols, no pixels.

Real systems start from a language model that can already read; one drawn at random spends most of a
short run on learning to look up an answer at all, whatever its encoder shows. Here a decoder learns
that part once: in the places of the visual tokens stand learned vectors for "a sign of this colour
with this letter" among vectors for nothing, the text is the task's own. Of `relate` and `page` they
also say where it stands, and there are such for things. The cue covers a picture: its vector is
added to what some of the tokens show, as light is to a crop. What no pixel-free training can give
stays to be learned: what the visual tokens of an encoder mean.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.layers import Embedding, Linear, normal
from hrvlm_jax.core.module import List, Module, Rngs
from hrvlm_jax.lab.needle import (
  NOTHING,
  Cue,
  NeedleConfig,
  Plan,
  TaskPlan,
  description,
  plan,
  record,
)
from hrvlm_jax.lab.needle.kinds import CUES
from hrvlm_jax.lab.pretrain import Pretraining
from hrvlm_jax.language.chat import get_template
from hrvlm_jax.language.config import DecoderConfig
from hrvlm_jax.language.conversation import messages_from_llava
from hrvlm_jax.language.decoder import Decoder
from hrvlm_jax.language.prompt import Text, choose_bucket, pad_batch
from hrvlm_jax.systems.contract import VisualTokens
from hrvlm_jax.training.losses import chunked_cross_entropy
from hrvlm_jax.vlm.model import merge

PLACES = 16  # parts of a side that the places of symbols are told apart by
WAVES = 4  # sines that tell a place along a side, from half a turn over it to four


@dataclasses.dataclass(frozen=True, kw_only=True)
class SymbolsConfig(Pretraining):
  """The head for a decoder. The task asks `needle.turns` questions about a scene.

  Attributes:
    slots: numbers of visual tokens a scene may have; one is drawn for every step.
    spread: most tokens that show one sign.
    noise: standard deviation of what is added to every token's vector.
    lengths: buckets of text plus visual tokens.
    described: rows end with a question for all that is shown, and its answer, row by row: many
      words about where things stand, where a question teaches one. Of composed tasks.
    uncued: share of the steps, the first ones, whose questions have one reading and no cue.
    uncued_ask: kinds of questions of those steps; (): the task's own.
    writing: ways of writing (template and tokenizer), which take turns; image tokens must have
      positions in all of them. Whoever trains fills them in.
  """

  text: DecoderConfig
  slots: tuple[int, ...] = (25, 64)
  spread: int = 4
  noise: float = 0.05
  lengths: tuple[int, ...] = (64, 96, 128, 160, 192, 256, 384)
  described: bool = False
  uncued: float = 0.0
  uncued_ask: tuple[str, ...] = ()
  writing: tuple[Text, ...] = ()
  below: ClassVar[str] = 'language/'

  def reader(self, rngs: Rngs) -> Module:
    """The decoder with the vectors of its symbols."""
    return SymbolReader(self, rngs=rngs)

  def draw(self, step: int) -> dict[str, np.ndarray]:
    """One way of writing, one number of slots."""
    rng = self.rng(step)
    task = dataclasses.replace(self.needle, documents=None)  # it has no letters
    if task.task != 'needle' and step < self.uncued * self.steps:
      task = dataclasses.replace(task, cues=(), ask=self.uncued_ask or task.ask)
    text, slots = self.writing[step % len(self.writing)], int(rng.choice(self.slots))
    # Where the first question of a row says where to look, rows have one question.
    turns = 1 if get_template(text.chat).steers else self.needle.turns
    colours = np.full((self.batch_size, slots), NOTHING, np.int32)
    letters, places = colours.copy(), np.zeros((self.batch_size, slots, 2), np.int32)
    cues, lit = np.full(self.batch_size, NOTHING, np.int32), np.zeros(colours.shape, bool)
    examples = []
    for row in range(self.batch_size):
      made = plan(task, self.seed, step * self.batch_size + row)
      messages = messages_from_llava(record(made, '')['conversations'])[:2 * turns]
      if self.described and isinstance(made, TaskPlan):
        messages += messages_from_llava(description(task, made))
      examples.append(text.conversation(messages, [slots]))
      free = iter(rng.permutation(slots).tolist())
      shown = symbols_of(self.needle, made)
      spare = slots - len(shown)
      if spare < 0:
        raise UserError(f'symbols: an image of the task shows {len(shown)} signs and things, and '
                        f'there are {slots} slots; raise `slots`, or show fewer (signs)')
      for mark, letter, where in shown:
        more = min(spare, int(rng.integers(1, self.spread + 1)) - 1)
        spare -= more
        for slot in itertools.islice(free, 1 + more):
          colours[row, slot], letters[row, slot], places[row, slot] = mark, letter, where
      if isinstance(made, TaskPlan) and made.cue is not None:
        cues[row] = cue_of(self.needle, made.cue)
        lit[row] = rng.random(slots) < rng.random()
        lit[row, rng.integers(slots)] = True
    longest = max(len(example['tokens']) for example in examples)
    batch = pad_batch(examples, choose_bucket(longest, self.lengths))
    return {key: batch[key] for key in ('tokens', 'visual_index', 'valid', 'labels')} | {
      'answer': answers(batch['labels'], turns), 'colours': colours, 'letters': letters, **(
        {'places': places, 'cues': cues, 'lit': lit} if placed(self.needle) else {})}

  def loss(self, reader, batch, key):
    """(loss per target, share of the questions that are answered rightly).

    Most targets are words of descriptions and ends of turns: a decoder that guesses every answer
    has 97 % of them.
    """
    hidden = reader(batch, key)
    total, count = chunked_cross_entropy(hidden, batch['labels'], reader.logits)
    targets, answer = batch['labels'][:, 1:], batch['answer'][:, 1:]
    wrong = reader.logits(hidden[:, :-1]).argmax(-1) != targets
    own = answer[..., None] == jnp.arange(self.needle.turns)  # b t answers
    there = own.any(1)
    right = there & ~(own & wrong[..., None]).any(1)
    return total / jnp.maximum(count, 1), right.sum() / jnp.maximum(there.sum(), 1)


def answers(labels: np.ndarray, turns: int) -> np.ndarray:
  """int32 [b t]: to the answer of which question of its row a target belongs; -1: to none."""
  target = labels >= 0
  begins = target & ~np.pad(target, ((0, 0), (1, 0)))[:, :-1]
  number = np.cumsum(begins, axis=1) - 1
  return np.where(target & (number < turns), number, -1).astype(np.int32)


def placed(task: NeedleConfig) -> bool:
  """Whether a task's questions need places, things or a cue, which its symbols then show."""
  return task.task != 'needle' or bool(task.cues)


def marks(task: NeedleConfig) -> list[str]:
  """What a symbol may show beside its letter: a colour; with `placed` also a thing or a cue."""
  if not placed(task):
    return list(task.colours)
  states = [f'{cue} {state}' for cue in CUES[task.task] for state in (0, 1)]
  return [*task.colours, 'house', 'circle', 'large circle', 'arrow left', 'arrow right', *states]


def symbols_of(task: NeedleConfig, made: Plan) -> list[tuple[int, int, tuple[int, int]]]:
  """(mark, letter or NOTHING, place of the centre in `PLACES` parts of both sides) of signs and
  things."""
  if not placed(task):
    return [(task.colours.index(sign.colour), task.alphabet.index(sign.text[0]), (0, 0))
            for sign in made.signs]
  known = marks(task)
  where = lambda box: (PLACES * (box[0] + box[2]) // (2 * task.width),
                       PLACES * (box[1] + box[3]) // (2 * task.height))
  found = [(known.index(sign.colour), task.alphabet.index(sign.text[0]), where(sign.box))
           for sign in made.signs]
  size = lambda thing: thing.box[2] - thing.box[0]
  largest = max((size(thing) for thing in made.things if thing.name == 'circle'), default=0)
  for thing in made.things:
    name = f'{thing.name} {thing.note}'.strip()
    name = 'large circle' if name == 'circle' and size(thing) == largest else name
    found.append((known.index(name), NOTHING, where(thing.box)))
  return found


def cue_of(task: NeedleConfig, cue: Cue) -> int:
  """The mark of a cue."""
  return marks(task).index(f'{cue.kind} {cue.state}')


def waves(places: jax.Array) -> jax.Array:
  """int [...] places along a side, of `PLACES` -> [... 2 WAVES] sines and cosines."""
  angles = places[..., None] * (jnp.pi / PLACES * 2.0 ** jnp.arange(WAVES))
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class SymbolReader(Module):
  """The decoder, and the vectors that stand for what an encoder would show."""

  def __init__(self, config: SymbolsConfig, *, rngs: Rngs):
    self.config, width, std = config, config.text.width, config.text.init_std
    self.language = Decoder(config.text, rngs=rngs)
    self.colours = Embedding(len(marks(config.needle)), width, std=std, rngs=rngs)
    self.letters = Embedding(len(config.needle.alphabet), width, std=std, rngs=rngs)
    self.nothing = Embedding(1, width, std=std, rngs=rngs)
    # Sines, so that what is near is alike from the start.
    self.places = List([Linear(2 * WAVES, width, bias=False, kernel_init=normal(std), rngs=rngs)
                        for _ in range(2)]) if placed(config.needle) else None

  def __call__(self, batch: Mapping[str, Any], key) -> jax.Array:
    """Final-normed states [b t d].

    batch: of `pad_batch`, with `colours` and `letters` int32 [b n] of every visual token; of
      composed tasks `places` int32 [b n 2], `cues` int32 [b], `lit` bool [b n], which show it.
    """
    colours, letters = batch['colours'], batch['letters']
    shown = self.colours(jnp.clip(colours, 0)) + self.letters(jnp.clip(letters, 0))
    if self.places is not None:  # things have no letter
      shown -= jnp.where(letters[..., None] < 0, self.letters(jnp.clip(letters, 0)), 0)
      shown += sum(axis(waves(batch['places'][..., i])) for i, axis in enumerate(self.places))
    values = jnp.where(colours[..., None] >= 0, shown, self.nothing(jnp.zeros_like(colours)))
    if self.places is not None:
      light = self.colours(jnp.clip(batch['cues'], 0))[:, None]
      values += jnp.where(batch['lit'][..., None], light, 0)
    values += self.config.noise * jax.random.normal(key, values.shape)
    visual = VisualTokens(values, jnp.ones(colours.shape, bool))
    embeds = merge(self.language.embed(batch['tokens']), visual, batch['visual_index'])
    return self.language(embeds, jnp.asarray(batch['valid']))

  def logits(self, hidden: jax.Array) -> jax.Array:
    """float32 logits [... v]."""
    return self.language.logits(hidden)
