"""Examples of the tasks, each a function of (config, seed, index) alone.

An image shows several signs. The question picks one by something that is still visible at low
resolution (its colour, shape or place); the answer is what is written on it, which is not.

Randomness: NumPy's Philox generator, keyed by (seed, index, stream). Stream 0 decides what is
asked and where the signs stand, stream 1 paints the background, so that annotations
can be made without painting.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any

import numpy as np
from PIL import Image

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.lab.needle import backgrounds, cues, documents, page, relate, tasks
from hrvlm_jax.lab.needle.config import NeedleConfig
from hrvlm_jax.lab.needle.figures import draw_thing
from hrvlm_jax.lab.needle.signs import Sign, arrange, draw
from hrvlm_jax.lab.needle.tasks import Asked, TaskExample, TaskPlan

_LAYOUT, _PAINT = 0, 1


@dataclasses.dataclass(frozen=True)
class NeedlePlan(Asked):
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
  def relative_area(self) -> float:
    """Area of the target's text, relative to the canvas: the size of the thing asked for."""
    return self.target.relative_area


@dataclasses.dataclass(frozen=True)
class NeedleExample(NeedlePlan):
  """A plan and its picture: `image`, RGB, as large as the canvas."""

  image: Image.Image


Plan = NeedlePlan | TaskPlan
_PLANS = {'relate': relate.plan, 'page': page.plan}


def plan(config: NeedleConfig, seed: int, index: int) -> Plan:
  """What example `index` shows and asks, without painting it (about 0.1 ms).

  Raises:
    UserError: a negative seed or index; documents that cannot be used.
  """
  rng = _generator(seed, index, _LAYOUT)
  if config.task != 'needle':
    return _PLANS[config.task](config, rng, seed, index)
  asked = config.ask[int(rng.integers(len(config.ask)))]
  signs = arrange(config, rng, asked)
  turns = tuple(int(i) for i in rng.permutation(len(signs))[:config.turns])
  if config.cues:
    return _cued(config, rng, seed, index, signs, turns, asked)
  return NeedlePlan(seed=seed, index=index, signs=signs, turns=turns, asked=asked)


def _cued(config, rng, seed, index, signs, turns, asked) -> TaskPlan:
  """The needle task whose questions name two signs."""
  cue, state = tasks.draw_cue(config, rng)
  questions = []
  for first in turns:
    second = (first + 1 + int(rng.integers(len(signs) - 1))) % len(signs)
    two = signs[first], signs[second]
    said = tasks.words_of(config, cue, state, *(f'on {sign.phrase(asked)}' for sign in two))
    questions.append(tasks.turn(
      asked, f'What is written {said}?', cue, state, (two[0].text, two[1].text),
      ((two[0].box,), (two[1].box,)), (two[0].relative_area, two[1].relative_area)))
  return TaskPlan(seed=seed, index=index, task='needle', signs=signs, things=(), cue=cue,
                  turns=tuple(questions))


def paint(config: NeedleConfig, planned: Plan) -> Image.Image:
  """The picture of a plan made with the same config."""
  rng = _generator(planned.seed, planned.index, _PAINT)
  if isinstance(planned, NeedlePlan):
    canvas = background(config, rng, config.width, config.height)
    for sign in planned.signs:
      draw(canvas, sign, config.alphabet)
    return Image.fromarray(canvas)
  canvas = background(config, rng, config.width, config.height) if planned.source is None else (
    documents.paint(config, planned.source))
  if planned.cue is not None:
    cues.draw_cue(canvas, planned.cue, planned.task, rng)
  for thing in planned.things:
    draw_thing(canvas, thing)
  for sign in planned.signs if planned.source is None else ():
    draw(canvas, sign, config.alphabet)
  return Image.fromarray(canvas)


def generate(config: NeedleConfig, seed: int, index: int) -> NeedleExample | TaskExample:
  """Example `index` of the task that `config` and `seed` define.

  Any index can be made on its own, in any order and process. With procedural backgrounds the
  pixels are the same on every machine.

  Raises:
    UserError: a negative seed or index; an unusable font, folder of photographs or document.
  """
  planned = plan(config, seed, index)
  fields = {f.name: getattr(planned, f.name) for f in dataclasses.fields(planned)}
  made = NeedleExample if isinstance(planned, NeedlePlan) else TaskExample
  return made(**fields, image=paint(config, planned))


def background(config: NeedleConfig, rng: np.random.Generator, width: int, height: int):
  """An empty canvas uint8 [h, w, 3] of the config's kind."""
  if config.task == 'page':
    return page.paper(config, rng, width, height)
  if config.photographs:
    return backgrounds.photograph(rng, width, height, folder=config.photographs)
  return backgrounds.procedural(rng, width, height, kinds=config.backgrounds, grain=config.grain)


def empty(config: NeedleConfig, rng: np.random.Generator):
  """A canvas uint8 [h, w, 3] without signs, with a random cue where the config has some."""
  canvas = background(config, rng, config.width, config.height)
  cue, _ = tasks.draw_cue(config, rng) if config.cues else (None, 0)
  if cue is not None:
    cues.draw_cue(canvas, cue, config.task, rng)
  return canvas


def record(planned: Plan, image: str) -> dict[str, Any]:
  """The example as a record of LLaVA's training JSON.

  Format: haotian-liu/LLaVA: docs/Finetune_Custom_Data.md.
  Keys of LLaVA: `id`, `image` (path relative to the image folder), `conversations` (turns `from`
  human or gpt, the first one with `<image>` in front). Further keys: `question`, `answer`,
  `boxes` (box of the sign of each turn, pixels), `box` (of the first turn, whose question steers
  systems that learn where to look), `relative_area` (of the first turn's text) and `needle`
  (everything about all signs). Other plans than the plain needle's have instead of `needle`:
  `evidence` (of each turn the boxes of what must be read; `boxes` has the box around them),
  `relative_areas` (of each turn) and `task` (signs, things, cue, kinds, the answers under the other
  cue).
  """
  turns = []
  for number, (question, answer) in enumerate(zip(planned.questions, planned.answers)):
    turns.append({'from': 'human', 'value': f'<image>\n{question}' if number == 0 else question})
    turns.append({'from': 'gpt', 'value': answer})
  if isinstance(planned, TaskPlan):
    return _record(planned, image, turns)
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


def _record(planned: TaskPlan, image: str, turns: list[dict[str, str]]) -> dict[str, Any]:
  plain = lambda parts: json.loads(json.dumps([dataclasses.asdict(part) for part in parts]))
  asked, first = plain(planned.turns), planned.turns[0]
  return {
    'id': f'{planned.task}-{planned.seed}-{planned.index}',
    'image': image,
    'conversations': turns,
    'question': planned.question,
    'answer': planned.answer,
    'boxes': [list(turn.box) for turn in planned.turns],
    'box': list(first.box),
    'relative_area': first.relative_area,
    'evidence': [turn['evidence'] for turn in asked],
    'relative_areas': [turn['relative_area'] for turn in asked],
    'task': {
      'name': planned.task, 'seed': planned.seed, 'index': planned.index,
      'kinds': [turn['kind'] for turn in asked], 'others': [turn['other'] for turn in asked],
      'cue': None if planned.cue is None else dataclasses.asdict(planned.cue),
      'signs': plain(planned.signs), 'things': plain(planned.things),
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
