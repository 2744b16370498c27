"""Freshly drawn views of `relate` and `page` with labels, to pre-train a small vision encoder.

A view is a window or the whole picture, resized as systems resize it. `crops` draws single signs,
which is all that `needle` needs; here views show what those tasks ask about besides: houses, arrows
and circles, several words beside each other, the cue. Windows of `relate` are made like those of
`crops`, with more signs than windows of its pictures have.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from hrvlm_jax.core.images import resize_exact
from hrvlm_jax.lab.needle import cues, figures, kinds
from hrvlm_jax.lab.needle.config import NeedleConfig
from hrvlm_jax.lab.needle.crops import CUT, NOTHING, GlyphCrops, draw_signs
from hrvlm_jax.lab.needle.generate import background, plan
from hrvlm_jax.lab.needle.signs import draw, overlap
from hrvlm_jax.lab.needle.tasks import Thing, draw_cue

THINGS = ('house', 'circle', 'arrow left', 'arrow right')
PARTS = 3  # of a side of a view of a page, whose words are told apart by where they stand

_VIEWS_PER_CANVAS = 16
_VIEWS_PER_PLAN = 4  # windows of one page
_WITH_A_THING = 0.35
_WHOLLY_INSIDE = 0.75  # share of the windows that show all of what they are drawn for


def composed(config: NeedleConfig) -> bool:
  """Whether a task's pictures show more than signs that are told apart by their colours."""
  return config.task != 'needle' or bool(config.cues)


def states(config: NeedleConfig) -> list[tuple[str, int]]:
  """(kind, state) of all cues of a task."""
  return [(cue, state) for cue in kinds.CUES[config.task] for state in (0, 1)]


def slots(config: NeedleConfig) -> int:
  """By how many labels the texts of a view are told apart: colours; on pages, places."""
  return PARTS * PARTS if config.task == 'page' else len(config.colours)


def task_views(
  config: NeedleConfig, rng: np.random.Generator, n: int, *, window: int, size: int,
  whole: float = 0.0,
) -> GlyphCrops:
  """n views; `letters` has a row of labels per `slots`, `things` and `cues` are there.

  Args:
    config: a composed task. rng: source of all randomness.
    window: side in canvas pixels of the other views.
    size: side of the result in pixels. whole: share (0 to 1) of views of the whole picture.
  """
  pixels = np.empty((n, size, size, 3), np.uint8)
  letters = np.full((n, slots(config), config.length), NOTHING, np.int32)
  shown, things, lights = [], [], np.empty(n, np.int32)
  known, is_whole = states(config), rng.random(n) < whole
  for i in range(n):
    if i % _VIEWS_PER_CANVAS == 0:
      empty, cue = _empty(config, rng)
    if is_whole[i] or config.task == 'page' and i % _VIEWS_PER_PLAN == 0:
      made = plan(config, int(rng.integers(2**62)), i)
      scene = _painted(config, empty, made.signs, made.things)
    box = (0, 0, config.width, config.height)
    if is_whole[i] or config.task == 'page':
      picture, signs, beside = scene, made.signs, made.things
      box = box if is_whole[i] else _window(config, rng, made.boxes, window)
    else:
      x, y = (int(rng.integers(side - window + 1)) for side in (config.width, config.height))
      signs, box = draw_signs(config, rng, window), (0, 0, window, window)
      beside = _things(config, rng, window) if config.task == 'relate' else []
      signs = [sign for sign in signs if not any(overlap(sign.box, t.box, 1) for t in beside)]
      picture = _painted(config, empty[y:y + window, x:x + window], signs, beside)
    part = Image.fromarray(picture[box[1]:box[3], box[0]:box[2]])
    pixels[i] = np.asarray(resize_exact(part, (size, size)))
    texts = []
    for sign in signs:
      seen = _seen(sign.text_box, box)
      if seen is not None:
        values = [config.alphabet.index(c) for c in sign.text] if seen[0] else [CUT]
        slot = config.colours.index(sign.colour)
        texts.append((values[0], slot, seen[1]))
        _note(letters[i], _part(seen[1]) if config.task == 'page' else slot, values)
    shown.append(texts)
    things.append([(THINGS.index(f'{thing.name} {thing.note}'.strip()) if seen[0] else CUT, seen[1])
                   for thing in beside if (seen := _seen(thing.box, box)) is not None])
    lights[i] = NOTHING if cue is None else known.index((cue.kind, cue.state))
  return GlyphCrops(
    pixels=pixels, letters=letters, shown=shown, things=things, cues=lights,
    shapes=np.full(letters.shape[:2], -1, np.int32),
    boxes=np.zeros((*letters.shape[:2], 4), np.float32))


def _painted(config, canvas, signs, things):
  """A canvas with signs and things on it."""
  picture = canvas.copy()
  for thing in things:
    figures.draw_thing(picture, thing)
  for sign in signs:
    draw(picture, sign, config.alphabet)
  return picture


def _things(config, rng, window):
  """Up to one thing of `relate` in a window."""
  if rng.random() >= _WITH_A_THING:
    return []
  cell = min(config.width // config.grid[0], config.height // config.grid[1])
  name, _, note = THINGS[int(rng.integers(len(THINGS)))].partition(' ')
  low, high = (0.36, 0.95) if name == 'circle' else (0.62, 0.8)  # as in `relate.plan`
  side = min(window, max(6, int(cell * (low + (high - low) * rng.random()))))
  x, y = rng.integers(window - side + 1, size=2).tolist()
  return [Thing(name, (x, y, x + side, y + side), note)]


def _empty(config, rng):
  """(a canvas without signs, its cue)."""
  canvas = background(config, rng, config.width, config.height)
  cue, _ = draw_cue(config, rng)
  if cue is not None:
    cues.draw_cue(canvas, cue, config.task, rng)
  return canvas, cue


def _window(config, rng, places, side):
  """A square of the canvas around one of these boxes, mostly the whole of it."""
  box, inside = places[int(rng.integers(len(places)))], rng.random() < _WHOLLY_INSIDE
  corner = []
  for start, end, length in ((box[0], box[2], config.width), (box[1], box[3], config.height)):
    if not inside or end - start > side:
      start, end = (start + end) // 2, (start + end) // 2 + 1
    low, high = max(0, end - side), min(length - side, start)
    corner.append(int(rng.integers(min(low, high), max(low, high) + 1)))
  return (*corner, corner[0] + side, corner[1] + side)


def _seen(box, view):
  """(whether a box lies wholly in a view, the box relative to the view); None: it lies outside."""
  x0, y0, x1, y1 = view
  if box[2] <= x0 or box[3] <= y0 or box[0] >= x1 or box[1] >= y1:
    return None
  inside = box[0] >= x0 and box[1] >= y0 and box[2] <= x1 and box[3] <= y1
  at = (np.array(box, np.float32) - [x0, y0, x0, y0]) / [x1 - x0, y1 - y0, x1 - x0, y1 - y0]
  return inside, at.astype(np.float32)


def _part(box) -> int:
  """The part of a view, of `PARTS` x `PARTS`, that the middle of a box lies in."""
  column, row = (int(np.clip((a + b) / 2 * PARTS, 0, PARTS - 1))
                 for a, b in ((box[0], box[2]), (box[1], box[3])))
  return PARTS * row + column


def _note(row, slot: int, values) -> None:
  """Notes a text in its slot; where two differ, or one is cut, no answer is fair."""
  if row[slot, 0] != NOTHING and row[slot].tolist() != list(values):
    values = [CUT]
  row[slot] = values if len(values) == row.shape[1] else CUT
