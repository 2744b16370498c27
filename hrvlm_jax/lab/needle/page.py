"""`page`: rows of words, made here or shown from a PDF file, and questions about their order."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

from jaxtyping import UInt8
import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.lab.needle import backgrounds, documents, font as fonts_lib, kinds, presets
from hrvlm_jax.lab.needle.config import COLOURS, WORD, NeedleConfig
from hrvlm_jax.lab.needle.signs import Box, Sign, log_uniform, place_of
from hrvlm_jax.lab.needle.tasks import Question, TaskPlan, draw_cue, turn, words_of

_TRIES = 48  # heights drawn for all rows before the rest of the rows get the smallest
_WORDS = 8  # of a row, at most
PAPER = (246, 244, 238)


def plan(config: NeedleConfig, rng: np.random.Generator, seed: int, index: int) -> TaskPlan:
  """What example `index` shows and asks.

  Raises:
    UserError: documents without words that can be asked about.
  """
  cue, state = draw_cue(config, rng)
  if config.documents:
    source, rows = documents.draw(config, rng)
    made = [[_document_word(config, text, box, size) for text, box, size in row] for row in rows]
  else:
    source, made = None, _written(config, rng)
  turns = _turns(config, rng, made, cue, state)
  return TaskPlan(seed=seed, index=index, task='page', things=(), cue=cue, source=source,
                  signs=tuple(word for row in made for word in row), turns=turns)


def paper(config: NeedleConfig, rng: np.random.Generator, width: int, height: int
          ) -> UInt8[np.ndarray, 'h w 3']:
  """An empty page; with photographs it lies on one, a twentieth of the canvas inside its edges."""
  shade = (np.array(PAPER) + rng.integers(-6, 7)).astype(np.uint8)
  if not config.photographs:
    return np.tile(shade, (height, width, 1))
  canvas = backgrounds.photograph(rng, width, height, folder=config.photographs)
  edge = min(width, height) // 20
  canvas[edge:height - edge, edge:width - edge] = shade
  return canvas


def _written(config: NeedleConfig, rng: np.random.Generator) -> list[list[Sign]]:
  """Rows of different words."""
  low, high = config.signs
  count = int(rng.integers(low, high + 1))
  edge = config.margin + (min(config.width, config.height) // 20 if config.photographs else 0)
  room = config.width - 2 * edge, config.height - 2 * edge
  fonts = [config.fonts[i] for i in rng.integers(len(config.fonts), size=count)]
  areas = _areas(config, rng, fonts, room[1])
  heights = [config.text_height(area, name) for area, name in zip(areas, fonts)]
  if config.photographs:  # the paper is smaller than the canvas the config was checked for
    heights = [min(h, room[1] * h // max(room[1], sum(map(presets.row_height, heights))))
               for h in heights]
  words = kinds.vocabulary(config.alphabet, config.length)
  words = [words[i] for i in rng.permutation(len(words))]
  spare = len(words) - 3 * count  # words beyond three a row
  spaces = _parts(rng, room[1] - sum(map(presets.row_height, heights)), count)
  rows, y = [], edge
  for name, height, space in zip(fonts, heights, spaces):
    y += space
    row, x, gap = [], edge, presets.word_gap(height)
    most = 3 + min(spare, int(rng.integers(_WORDS - 2)))
    line = fonts_lib.line(name, config.alphabet)
    while len(row) < most:
      text = words.pop()
      width = fonts_lib.text(name, text, height, line).shape[1]
      if x + width > config.width - edge:
        words.insert(0, text)
        break
      row.append(_word(config, rng, text, name, (x, y, x + width, y + height), height))
      x += width + gap
    spare -= max(0, len(row) - 3)
    # The row as a whole stands anywhere between the edges.
    rows.append(_shifted(config, row, int(rng.integers(config.width - edge - (x - gap) + 1))))
    y += presets.row_height(height)
  return rows


def _areas(config, rng, fonts: Sequence[str], room: int) -> list[float]:
  """A relative area for every row, log-uniform, so that all rows fit below each other."""
  low = config.relative_area[0]
  taken = lambda areas: sum(presets.row_height(config.text_height(area, name))
                            for area, name in zip(areas, fonts))
  for _ in range(_TRIES):
    areas = [log_uniform(rng, *config.relative_area) for _ in fonts]
    if taken(areas) <= room:
      return areas
  for i in range(len(areas)):  # what does not fit becomes small, from the top
    if taken(areas) > room:
      areas[i] = low
  return areas


def _parts(rng, total: int, n: int) -> list[int]:
  """n spaces in front of rows that take at most `total` pixels together."""
  ends = sorted(rng.integers(max(1, total + 1), size=n).tolist())
  return [b - a for a, b in zip([0, *ends[:-1]], ends)]


def _word(config, rng, text, font, box: Box, height: int) -> Sign:
  colour = config.colours[int(rng.integers(len(config.colours)))]
  shade = rng.integers(-12, 13, 3)
  width = config.text_size(height, font)[0]
  return Sign(text=text, colour=colour, shape=WORD, font=font, box=box, text_box=box,
              place=place_of(config, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2),
              rgb=tuple(int(v) for v in np.clip(np.array(COLOURS[colour]) + shade, 0, 255)),
              relative_area=width * height / (config.width * config.height))


def _shifted(config, row: list[Sign], by: int) -> list[Sign]:
  moved = []
  for word in row:
    x0, y0, x1, y1 = word.box
    box = (x0 + by, y0, x1 + by, y1)
    moved.append(dataclasses.replace(
      word, box=box, text_box=box, place=place_of(config, (box[0] + box[2]) / 2, (y0 + y1) / 2)))
  return moved


def _document_word(config, text: str, box: Box, area: float) -> Sign:
  """A word of a document, which is part of the picture and not drawn."""
  return Sign(text=text, colour=config.colours[0], shape=WORD, font='', box=box, text_box=box,
              place=place_of(config, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2),
              rgb=COLOURS[config.colours[0]], relative_area=area)


def _turns(config, rng, rows: list[list[Sign]], cue, state) -> tuple[Question, ...]:
  """Questions about different words that are there once."""
  spoken = [documents.asked(word.text) for row in rows for word in row]
  once = {text for text in spoken if text and spoken.count(text) == 1}
  say = lambda one, two: words_of(config, cue, state, one, two)
  every = [(kind, r, c) for kind in config.ask for r, row in enumerate(rows)
           for c, word in enumerate(row) if documents.asked(word.text) in once and (
             kind == 'row' or (0 < c < len(row) - 1
                               and all(documents.asked(row[c + d].text) for d in (-1, 1))))]
  turns, used = [], set()
  for _ in range(config.turns):
    kind = config.ask[int(rng.integers(len(config.ask)))]
    open_ = [place for place in every if place[1:] not in used]
    found = [place for place in open_ if place[0] == kind] or open_
    if not found:
      if turns:  # a short page: its last question is asked again
        turns.append(turns[-1])
        continue
      raise UserError(f'documents: {config.documents}: a page has no word between two others that '
                      'is there once; choose another file')
    kind = kind if found[0][0] == kind else found[0][0]
    mine = [place for place in found if place[0] == kind]
    # A row first, then a word in it, so that the answer to `row` is uniform over rows.
    numbers = sorted({place[1] for place in mine})
    row = numbers[int(rng.integers(len(numbers)))]
    in_row = [place for place in mine if place[1] == row]
    r, c = in_row[int(rng.integers(len(in_row)))][1:]
    used.add((r, c))
    word, name = rows[r][c], documents.asked(rows[r][c].text)
    if kind == 'after':
      two = rows[r][c + 1], rows[r][c - 1]
      said = say(f'follows the word {name}', 'stands before it') if cue else (
        f'{("follows", "stands before")[state]} the word {name}')
      turns.append(turn(kind, f'What {said}?', cue, state,
                        tuple(documents.asked(w.text) for w in two),
                        tuple((w.box, word.box) for w in two),
                        tuple(min(w.relative_area, word.relative_area) for w in two)))
    else:
      two = r + 1, len(rows) - r
      said = say('counted from the top', 'from the bottom') if cue else (
        f'counted from the {("top", "bottom")[state]}')
      turns.append(turn(kind, f'Which row holds the word {name}, {said}?', cue, state,
                        tuple(map(str, two)), ((word.box,),) * 2, (word.relative_area,) * 2))
  return tuple(turns)
