"""A contact sheet of a task for the eye: pictures, questions, answers, boxes; and tables."""

from __future__ import annotations

from collections.abc import Sequence
import io
import string

import numpy as np
from PIL import Image

from hrvlm_jax.core import images
from hrvlm_jax.lab.needle import font as fonts_lib, kinds
from hrvlm_jax.lab.needle.config import NeedleConfig
from hrvlm_jax.lab.needle.generate import NeedlePlan, Plan, paint, plan, record
from hrvlm_jax.lab.needle.presets import PRESETS
from hrvlm_jax.lab.needle.reader import questions, worth
from hrvlm_jax.lab.needle.signs import Box

_FONT, _LINE, _GAP = 'DejaVuSans-Bold', 13, 12
_WIDEST = 480  # pixels of a picture on the sheet
_BOX, _OTHER = (255, 0, 200), (0, 190, 255)
_COLOURS = 192  # of the file's palette
_LOOKED = 200  # examples among which a sheet chooses


def sheet(config: NeedleConfig, *, seed: int = 0, images_: int = 12, columns: int = 4) -> bytes:
  """A PNG with examples of all kinds of questions, cues and states in turn.

  Under a picture stands its first question, the answer and, where a cue decides, what the answer
  would be under the opposite. What must be read has a box.
  """
  tiles = [_tile(config, made) for made in _chosen(config, seed, images_)]
  width = max(tile.shape[1] for tile in tiles) + _GAP
  rows = []
  for start in range(0, len(tiles), columns):
    row = tiles[start:start + columns]
    height = max(tile.shape[0] for tile in row) + _GAP
    line = np.full((height, columns * width + _GAP, 3), 255, np.uint8)
    for number, tile in enumerate(row):
      left = _GAP + number * width
      line[_GAP // 2:_GAP // 2 + tile.shape[0], left:left + tile.shape[1]] = tile
    rows.append(line)
  picture = Image.fromarray(np.concatenate(rows))
  buffer = io.BytesIO()
  picture.quantize(_COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
    buffer, 'PNG', optimize=True)
  return buffer.getvalue()


def _chosen(config: NeedleConfig, seed: int, count: int) -> list[Plan]:
  """Examples by turns of every kind and state, then with the cue that was shown least."""
  plans = [plan(config, seed, index) for index in range(_LOOKED)]
  if isinstance(plans[0], NeedlePlan):
    return plans[:count]
  shown: dict[str, int] = dict.fromkeys(config.cues, 0)
  found: list[Plan] = []
  for number in range(count):
    kind = config.ask[number % len(config.ask)]
    state = number // len(config.ask) % 2
    fits = [p for p in plans if p not in found and p.turns[0].kind == kind
            and (p.cue is None or p.cue.state == state)] or [p for p in plans if p not in found]
    best = min(fits, key=lambda p: shown[p.cue.kind] if p.cue else 0)
    if best.cue:
      shown[best.cue.kind] += 1
    found.append(best)
  return found


def _tile(config: NeedleConfig, made: Plan) -> np.ndarray:
  """A picture with the boxes of its first question, and the lines under it."""
  picture = paint(config, made)
  width = min(_WIDEST, picture.width * max(1, 240 // picture.width))
  height = picture.height * width // picture.width
  canvas = np.array(images.resize_exact(picture, (width, height)))
  scale = width / picture.width
  canvas[[0, -1]] = canvas[:, [0, -1]] = (150, 150, 150)
  if isinstance(made, NeedlePlan):
    boxes, other = [made.target.box], None
  else:
    boxes, other = made.turns[0].evidence, made.turns[0].other
  for number, box in enumerate(boxes):
    _outline(canvas, tuple(round(v * scale) for v in box), _OTHER if number else _BOX)
  lines = [*_wrapped(made.question, width), f'{made.answer}']
  if other is not None:
    states = kinds.CUES[config.task][made.cue.kind]
    lines[-1] = f'{made.answer} ({states[made.cue.state]})'
    lines.append(f'else {other} ({states[1 - made.cue.state]})')
  inks = [(0, 0, 0)] * (len(lines) - (2 if other is not None else 1)) + [(160, 0, 120)]
  inks += [(110, 110, 110)] * (len(lines) - len(inks))
  text = np.full(((_LINE + 5) * len(lines) + 6, width, 3), 255, np.uint8)
  for number, (line, ink) in enumerate(zip(lines, inks, strict=True)):
    _write(text, line, 4 + number * (_LINE + 5), ink)
  return np.concatenate([canvas, text])


def _outline(canvas: np.ndarray, box: Box, colour: tuple[int, int, int]) -> None:
  """A frame of two pixels around a box."""
  x0, y0, x1, y1 = box
  top, left = max(0, y0 - 2), max(0, x0 - 2)
  canvas[top:y0, left:x1 + 2] = canvas[y1:y1 + 2, left:x1 + 2] = colour
  canvas[top:y1 + 2, left:x0] = canvas[top:y1 + 2, x1:x1 + 2] = colour


def _extent() -> fonts_lib.Line:
  return fonts_lib.line(_FONT, string.printable[:94])


def _width(words: Sequence[str]) -> int:
  return sum(fonts_lib.width(_FONT, word, _LINE, _extent()) + 4 for word in words)


def _wrapped(text: str, width: int) -> list[str]:
  lines: list[list[str]] = [[]]
  for word in text.split():
    if lines[-1] and _width([*lines[-1], word]) > width:
      lines.append([])
    lines[-1].append(word)
  return [' '.join(line) for line in lines]


def _write(canvas: np.ndarray, text: str, top: int, ink: tuple[int, int, int]) -> None:
  """One line of text on white."""
  left = 0
  for word in text.split():
    word = ''.join(c if c in string.printable[:94] else '?' for c in word)
    mask = fonts_lib.text(_FONT, word, _LINE, _extent())[:, :max(0, canvas.shape[1] - left)]
    weight = mask[:, :, None].astype(np.uint16)
    part = canvas[top:top + mask.shape[0], left:left + mask.shape[1]]
    part[:] = (part * (255 - weight) + weight * np.array(ink, np.uint16) + np.uint16(127)) // 255
    left += mask.shape[1] + 4


def table(preset: str = 'medium', *, images_: int = 300) -> list[list[str]]:
  """A row for every kind of question of all tasks, after the header's: what readers score on it."""
  rows = [['task', 'kind', 'a question', 'chance', 'prior', 'perfect reader', 'cue decides',
           'without the cue']]
  made = getattr(NeedleConfig, preset)
  configs = [(task, made(task, turns=1 if task == 'needle' else 3)) for task in kinds.TASKS]
  configs.insert(1, ('needle, with cues', made(cues=tuple(kinds.PICTURE_CUES))))
  share = lambda value: f'{value:.1%}'
  for name, config in configs:
    asked = {kind: text for index in range(40)
             for kind, text in questions(record(plan(config, 0, index), ''))}
    for kind, found in worth(config, seed=0, images=images_).items():
      cue = [share(found.decided), share(found.blind)] if config.cues else ['', '']
      rows.append([name, kind, asked[kind], share(found.chance), share(found.prior),
                   share(found.perfect), *cue])
  return rows


def sizes() -> list[list[str]]:
  """A row for every task and preset, after the header's: canvas, texts, chance over all kinds."""
  rows = [['task', 'preset', 'canvas', 'text height in pixels', 'range of areas', 'chance']]
  for task in kinds.TASKS:
    for name in PRESETS:
      config = getattr(NeedleConfig, name)(task)
      low, high = config.relative_area
      heights = [[config.text_height(area, font) for font in config.fonts] for area in (low, high)]
      rows.append([task, name, f'{config.width} x {config.height}',
                   f'{min(heights[0])} to {max(heights[1])}', f'{high / low:.1f}-fold',
                   f'{config.chance:.1%}'])
  return rows
