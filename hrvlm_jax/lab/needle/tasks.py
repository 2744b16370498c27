"""What is known about an image of a composed task: signs or words, things, cue, questions."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from hrvlm_jax.lab.needle import kinds
from hrvlm_jax.lab.needle.config import NeedleConfig
from hrvlm_jax.lab.needle.signs import Box, Sign


@dataclasses.dataclass(frozen=True)
class Cue:
  """What decides between two readings: `kind` in `kinds.CUES`, `state` 0 or 1 (which reading)."""

  kind: str
  state: int


@dataclasses.dataclass(frozen=True)
class Thing:
  """Something without a text: `name` 'house', 'circle' or 'arrow'; `note` 'left' or 'right'.

  The note is where an arrow points, else ''.
  """

  name: str
  box: Box
  note: str = ''


@dataclasses.dataclass(frozen=True)
class Question:
  """One question about an image.

  Attributes:
    kind: in `kinds.KINDS`.
    text, answer: as a conversation has them.
    other: the answer if the cue said the opposite; None without a cue.
    evidence: boxes of the signs, words or things that must be read, the one asked for first.
    relative_area: of the smallest text that must be read, relative to the canvas.
  """

  kind: str
  text: str
  answer: str
  other: str | None
  evidence: tuple[Box, ...]
  relative_area: float

  @property
  def box(self) -> Box:
    """The box around all evidence."""
    x0, y0, x1, y1 = zip(*self.evidence)
    return min(x0), min(y0), max(x1), max(y1)


class Asked:
  """What every plan says of its first question and its signs."""

  @property
  def question(self) -> str:
    return self.questions[0]

  @property
  def answer(self) -> str:
    return self.answers[0]

  @property
  def boxes(self) -> tuple[Box, ...]:
    """Bounding boxes of all signs or words, (x0, y0, x1, y1) in pixels."""
    return tuple(sign.box for sign in self.signs)


@dataclasses.dataclass(frozen=True)
class TaskPlan(Asked):
  """All that is known about an example before it is painted.

  Attributes:
    seed, index: what it was made from.
    signs: signs, or the words of a page in reading order.
    things: house, arrow, circles.
    cue: what decides between readings, or None.
    turns: the questions, in order.
    source: page of a document that is shown (`documents.Shown`), or None.
  """

  seed: int
  index: int
  task: str
  signs: tuple[Sign, ...]
  things: tuple[Thing, ...]
  cue: Cue | None
  turns: tuple[Question, ...]
  source: Any = None

  @property
  def target(self) -> Sign:
    """A sign or word of the picture, for probes of single signs."""
    return self.signs[self.index % len(self.signs)]

  @property
  def questions(self) -> tuple[str, ...]:
    return tuple(turn.text for turn in self.turns)

  @property
  def answers(self) -> tuple[str, ...]:
    return tuple(turn.answer for turn in self.turns)

  @property
  def relative_area(self) -> float:
    """Of the first question."""
    return self.turns[0].relative_area


@dataclasses.dataclass(frozen=True)
class TaskExample(TaskPlan):
  """A plan and its picture: `image`, RGB, as large as the canvas."""

  image: Image.Image | None = None


def draw_cue(config: NeedleConfig, rng: np.random.Generator) -> tuple[Cue | None, int]:
  """(the cue of an image, which of two readings counts)."""
  state = int(rng.integers(2))
  if not config.cues:
    return None, state
  return Cue(config.cues[int(rng.integers(len(config.cues)))], state), state


def words_of(config: NeedleConfig, cue: Cue | None, state: int, first: str, second: str) -> str:
  """The part of a question that names the readings: both with their cues, or what counts."""
  if cue is None:
    return (first, second)[state]
  one, two = kinds.CUES[config.task][cue.kind]
  return f'{first} {one}, {second} {two}'


def turn(kind: str, text: str, cue: Cue | None, state: int, answers: tuple[str, str],
         evidence: tuple[tuple[Box, ...], tuple[Box, ...]], areas: tuple[float, float]) -> Question:
  """A question whose readings have these answers, boxes and areas."""
  return Question(kind, text, answers[state], None if cue is None else answers[1 - state],
                  evidence[state], areas[state])
