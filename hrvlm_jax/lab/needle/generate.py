"""Examples of the needle task, each a function of (config, seed, index) alone.

An image shows several signs. The question picks one by something that is still visible at low
resolution (its colour, shape or place); the answer is what is written on it, which is not.

Randomness: NumPy's Philox generator, keyed by (seed, index, stream). Stream 0 decides what is
asked and where the signs stand, stream 1 paints the background, so that annotations
can be made without painting.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.lab.needle import backgrounds
from hrvlm_jax.lab.needle.config import NeedleConfig
from hrvlm_jax.lab.needle.signs import Box, Sign, arrange, draw

_LAYOUT, _PAINT = 0, 1


@dataclasses.dataclass(frozen=True)
class NeedlePlan:
  """All that is known about an example before it is painted.

  Attributes:
    seed, index: what it was made from.
    signs: all signs; `turns`: indices of those asked for, one question each, in order.
    asked: the property that the questions use ('colour', 'shape' or 'place').
  """

  seed: int
  index: int
  signs: tuple[Sign, ...]
  turns: tuple[int, ...]
  asked: str

  @property
  def target(self) -> Sign:
    """The sign of the first question."""
    return self.signs[self.turns[0]]

  @property
  def questions(self) -> tuple[str, ...]:
    return tuple(f'What is written on {self.signs[i].phrase(self.asked)}?' for i in self.turns)

  @property
  def answers(self) -> tuple[str, ...]:
    return tuple(self.signs[i].text for i in self.turns)

  @property
  def question(self) -> str:
    return self.questions[0]

  @property
  def answer(self) -> str:
    return self.answers[0]

  @property
  def boxes(self) -> tuple[Box, ...]:
    """Bounding boxes of all signs, (x0, y0, x1, y1) in pixels."""
    return tuple(sign.box for sign in self.signs)

  @property
  def relative_area(self) -> float:
    """Area of the target's text, relative to the canvas: the size of the thing asked for."""
    return self.target.relative_area


@dataclasses.dataclass(frozen=True)
class NeedleExample(NeedlePlan):
  """A plan and its picture: `image`, RGB, as large as the canvas."""

  image: Image.Image


def plan(config: NeedleConfig, seed: int, index: int) -> NeedlePlan:
  """What example `index` shows and asks, without painting it (about 0.1 ms).

  Raises:
    UserError: a negative seed or index.
  """
  rng = _generator(seed, index, _LAYOUT)
  asked = config.ask[int(rng.integers(len(config.ask)))]
  signs = arrange(config, rng, asked)
  turns = tuple(int(i) for i in rng.permutation(len(signs))[:config.turns])
  return NeedlePlan(seed=seed, index=index, signs=signs, turns=turns, asked=asked)


def paint(config: NeedleConfig, planned: NeedlePlan) -> Image.Image:
  """The picture of a plan made with the same config."""
  rng = _generator(planned.seed, planned.index, _PAINT)
  canvas = background(config, rng, config.width, config.height)
  for sign in planned.signs:
    draw(canvas, sign, config.alphabet)
  return Image.fromarray(canvas)


def generate(config: NeedleConfig, seed: int, index: int) -> NeedleExample:
  """Example `index` of the task that `config` and `seed` define.

  Any index can be made on its own, in any order and process. With procedural backgrounds the
  pixels are the same on every machine.

  Raises:
    UserError: a negative seed or index; an unusable font or folder of photographs.
  """
  planned = plan(config, seed, index)
  fields = {f.name: getattr(planned, f.name) for f in dataclasses.fields(planned)}
  return NeedleExample(**fields, image=paint(config, planned))


def background(config: NeedleConfig, rng: np.random.Generator, width: int, height: int):
  """An empty canvas uint8 [h, w, 3] of the config's kind."""
  if config.photographs:
    return backgrounds.photograph(rng, width, height, folder=config.photographs)
  return backgrounds.procedural(rng, width, height, kinds=config.backgrounds, grain=config.grain)


def record(planned: NeedlePlan, image: str) -> dict[str, Any]:
  """The example as a record of LLaVA's training JSON.

  Format: haotian-liu/LLaVA: docs/Finetune_Custom_Data.md.
  Keys of LLaVA: `id`, `image` (path relative to the image folder), `conversations` (turns `from`
  human or gpt, the first one with `<image>` in front). Further keys: `question`, `answer`,
  `boxes` (box of the sign of each turn, pixels), `box` (of the first turn, whose question steers
  systems that learn where to look), `relative_area` (of the first turn's text) and `needle`
  (everything about all signs).
  """
  turns = []
  for number, (question, answer) in enumerate(zip(planned.questions, planned.answers)):
    turns.append({'from': 'human', 'value': f'<image>\n{question}' if number == 0 else question})
    turns.append({'from': 'gpt', 'value': answer})
  signs = [
    {f.name: getattr(sign, f.name) for f in dataclasses.fields(sign)} for sign in planned.signs
  ]
  return {
    'id': f'needle-{planned.seed}-{planned.index}',
    'image': image,
    'conversations': turns,
    'question': planned.question,
    'answer': planned.answer,
    'boxes': [list(planned.signs[i].box) for i in planned.turns],
    'box': list(planned.target.box),
    'relative_area': planned.relative_area,
    'needle': {
      'seed': planned.seed,
      'index': planned.index,
      'asked': planned.asked,
      'target': planned.turns[0],
      'turns': list(planned.turns),
      'signs': [{k: list(v) if isinstance(v, tuple) else v for k, v in s.items()} for s in signs],
    },
  }


def single_turns(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The questions of all records as rows of their own, each with the box it is about."""
  rows = []
  for record in records:
    turns = record['conversations']
    for number, box in enumerate(record['boxes']):
      question, answer = turns[2 * number], turns[2 * number + 1]
      text = question['value'].removeprefix('<image>\n')
      rows.append({'id': f'{record["id"]}-{number}', 'image': record['image'], 'box': list(box),
                   'conversations': [{**question, 'value': f'<image>\n{text}'}, dict(answer)]})
  return rows


def _generator(seed: int, index: int, stream: int) -> np.random.Generator:
  if seed < 0 or index < 0:
    raise UserError(f'needle: seed {seed}, index {index}: expected whole numbers of at least 0')
  return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, index, stream))))
