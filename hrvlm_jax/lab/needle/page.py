"""`page`: rows of words, made here or shown from a PDF file, and questions about their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jaxtyping import UInt8
import numpy as np

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
    source, rows = documents.draw(config, rng, lambda texts: _usable(config, texts))
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
    taken = max(room[1], sum(map(presets.row_height, heights)))
    heights = [_narrowed(config, name, room[1] * height // taken, room[0])
               for name, height in zip(fonts, heights)]
  words = kinds.vocabulary(config.alphabet, config.length)
  words = [words[i] for i in rng.permutation(len(words))]
  spare = len(words) - 3 * count  # words beyond three a row
  spaces = _parts(rng, room[1] - sum(map(presets.row_height, heights)), count)
  rows, y = [], edge
  for name, height, space in zip(fonts, heights, spaces):
    y += space
    row, x, gap = [], 0, presets.word_gap(height)
    most = 3 + min(spare, int(rng.integers(_WORDS - 2)))
    line = fonts_lib.line(name, config.alphabet)
    while len(row) < most:
      text = words.pop()
      width = fonts_lib.width(name, text, height, line)
      if x + width > room[0]:
        words.insert(0, text)
        break
      row.append((text, x, width))
      x += width + gap
    spare -= max(0, len(row) - 3)
    # The row as a whole stands anywhere between the edges.
    left = edge + int(rng.integers(room[0] - (x - gap) + 1))
    rows.append([_word(config, rng, text, name, (left + at, y, left + at + width, y + height))
                 for text, at, width in row])
    y += presets.row_height(height)
  return rows


def _narrowed(config, font: str, height: int, room: int) -> int:
  """The largest height up to one of which three words fit beside each other."""
  while height > 1 and 3 * config.text_size(height, font)[0] + 2 * presets.word_gap(height) > room:
    height -= 1
  return height


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


def _word(config, rng, text, font, box: Box) -> Sign:
  colour = config.colours[int(rng.integers(len(config.colours)))]
  shade = int(rng.integers(-12, 13))
  height = box[3] - box[1]
  return Sign(text=text, colour=colour, shape=WORD, font=font, box=box, text_box=box,
              place=place_of(config, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2),
              rgb=tuple(min(255, max(0, value + shade)) for value in COLOURS[colour]),
              relative_area=config.text_size(height, font)[0] * height / (
                config.width * config.height))


def _document_word(config, text: str, box: Box, area: float) -> Sign:
  """A word of a document, which is part of the picture and not drawn."""
  return Sign(text=text, colour=config.colours[0], shape=WORD, font='', box=box, text_box=box,
              place=place_of(config, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2),
              rgb=COLOURS[config.colours[0]], relative_area=area)


def _places(config: NeedleConfig, rows: list[list[str]]) -> list[tuple[str, int, int]]:
  """(kind, row, column) of all questions: about words that are there once."""
  rows = [[documents.asked(text) for text in row] for row in rows]
  spoken = Counter(text.casefold() for row in rows for text in row)
  return [(kind, r, c) for kind in config.ask for r, row in enumerate(rows)
          for c, text in enumerate(row) if text and spoken[text.casefold()] == 1
          and (kind == 'row' or (0 < c < len(row) - 1 and row[c - 1] and row[c + 1]))]


def _usable(config: NeedleConfig, rows: list[list[str]]) -> bool:
  """Whether every kind can be asked, and every turn about a word of its own."""
  places = _places(config, rows)
  words = {place[1:] for place in places}
  return {kind for kind, _, _ in places} == set(config.ask) and len(words) >= config.turns


def _turns(config, rng, rows: list[list[Sign]], cue, state) -> tuple[Question, ...]:
  """Questions about different words that are there once."""
  say = lambda one, two: words_of(config, cue, state, one, two)
  every = _places(config, [[word.text for word in row] for row in rows])
  turns, used = [], set()
  for _ in range(config.turns):
    kind = config.ask[int(rng.integers(len(config.ask)))]
    open_ = [place for place in every if place[1:] not in used]
    found = [place for place in open_ if place[0] == kind] or open_
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
