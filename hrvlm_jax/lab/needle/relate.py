"""`relate`: questions that need a detail and where things stand.

The canvas is a grid of cells. Two blocks of three cells in a row are placed on it: a sign, the
house, a sign; and a sign, the arrow, a sign. Above the two signs of one block are a large and a
small circle. Further signs stand in other rows, so that nothing else is beside house or arrow.
"""

from __future__ import annotations

import functools

import numpy as np

from hrvlm_jax.lab.needle import kinds
from hrvlm_jax.lab.needle.config import NeedleConfig
from hrvlm_jax.lab.needle.signs import Box, Sign, log_uniform, make_sign
from hrvlm_jax.lab.needle.tasks import Question, TaskPlan, Thing, draw_cue, turn, words_of

Cell = tuple[int, int]  # row, column


@functools.lru_cache(maxsize=64)
def places(columns: int, rows: int, circles: bool) -> tuple[tuple[Cell, Cell, Cell | None], ...]:
  """All (first cell of the house's block, of the arrow's, cell of the left circle)."""
  found = []
  starts = [(row, column) for row in range(rows) for column in range(columns - 2)]
  for house in starts:
    for arrow in starts:
      apart = abs(house[1] - arrow[1]) >= 3 if rows == 1 else house[0] != arrow[0]
      if not apart:
        continue
      if not circles:
        found.append((house, arrow, None))
        continue
      found += [(house, arrow, (row - 1, column)) for row, column in (house, arrow)
                if row >= 1 and row - 1 not in (house[0], arrow[0])]
  return tuple(found)


def plan(config: NeedleConfig, rng: np.random.Generator, seed: int, index: int) -> TaskPlan:
  """What example `index` shows and asks."""
  cue, state = draw_cue(config, rng)
  columns, rows = config.grid
  possible = places(columns, rows, 'circle' in config.ask)
  house, arrow, circle = possible[int(rng.integers(len(possible)))]
  taken = [(row, column + step) for row, column in (house, arrow) for step in (0, 2)]
  free = [(row, column) for row in range(rows) for column in range(columns)
          if row not in (house[0], arrow[0]) and not (
            circle and (row, column) in (circle, (circle[0], circle[1] + 2)))]
  low, high = config.signs
  more = min(int(rng.integers(low, high + 1)) - 4, len(free))
  cells = taken + [free[i] for i in rng.permutation(len(free))[:more]]

  order = _order(rng)
  names = sorted({*kinds.PATTERN, kinds.ABSENT}) + [f'more {i}' for i in range(more)]
  texts = dict(zip(names, _texts(config, rng, len(names))))
  colours = [config.colours[i] for i in rng.permutation(len(config.colours))[:2 + more]]
  under = () if circle is None else ((circle[0] + 1, circle[1]), (circle[0] + 1, circle[1] + 2))
  signs: list[Sign] = []
  for number, cell in enumerate(cells):
    said = kinds.PATTERN[order[number]] if number < 4 else f'more {number - 4}'
    colour = colours[order[number] // 2] if number < 4 else colours[number - 2]
    signs.append(_sign(config, rng, texts[said], colour, _area(config, cell, columns, rows),
                       (0, 1) if cell in under or number >= 4 else (1,)))
  right = bool(rng.integers(2))
  middle = lambda block: _area(config, (block[0], block[1] + 1), columns, rows)
  things = [Thing('house', _figure(rng, middle(house), 0.62, 0.8)),
            Thing('arrow', _figure(rng, middle(arrow), 0.62, 0.8), 'right' if right else 'left')]
  swapped = bool(rng.integers(2))
  if circle:
    for step in (0, 2):
      large = (step == 0) != swapped
      cell = _area(config, (circle[0], circle[1] + step), columns, rows)
      low, high = (0.8, 0.95) if large else (0.36, 0.48)
      things.append(Thing('circle', _figure(rng, cell, low, high, (0,))))

  pairs = {
    'side': (signs[0], signs[1]),
    'arrow': (signs[3], signs[2]) if right else (signs[2], signs[3]),
  }
  if circle:
    above = signs[:2] if (circle[0] + 1, circle[1]) == house else signs[2:4]
    pairs['circle'] = (above[1], above[0]) if swapped else (above[0], above[1])
  turns = []
  for i in rng.permutation(len(config.ask))[:config.turns].tolist():
    kind = config.ask[i]
    say = lambda one, two: words_of(config, cue, state, one, two)
    if kind in pairs:
      text = f'What is written on the sign {say(*_PHRASES[kind])}?'
      two = pairs[kind]
      turns.append(turn(kind, text, cue, state, (two[0].text, two[1].text),
                        ((two[0].box,), (two[1].box,)),
                        (two[0].relative_area, two[1].relative_area)))
    elif kind == 'agree':
      turns.append(_agree(signs, order, colours, int(rng.integers(2)), cue, state, say))
    else:
      counted = kinds.counted()
      names = counted[int(rng.integers(len(counted)))]
      turns.append(_count(signs, [texts[name] for name in names], cue, state, say))
  return TaskPlan(seed=seed, index=index, task='relate', signs=tuple(signs), things=tuple(things),
                  cue=cue, turns=tuple(turns))


_PHRASES = {
  'side': ('just left of the house', 'just right of the house'),
  'circle': ('under the largest circle', 'under the smallest circle'),
  'arrow': ('the arrow points to', 'the arrow comes from'),
}


def _order(rng) -> list[int]:
  """The letter of the pattern of each sign: the two of a block say different texts."""
  one, two = ([pair[i] for i in rng.permutation(2)] for pair in ((0, 1), (2, 3)))
  blocks = [[one[0], two[0]], [one[1], two[1]]]
  return [block[i] for block in blocks for i in rng.permutation(2)]


def _agree(signs, order, colours, first, cue, state, say) -> Question:
  """Two signs of a colour say the same, two of another do not; `first` is which is asked first."""
  pairs = [[sign for sign, place in zip(signs, order) if place // 2 == pair] for pair in (0, 1)]
  asked = [pairs[first], pairs[1 - first]]
  names = [f'the two {colours[pair]} signs' for pair in (first, 1 - first)]
  text = f'Do {names[state]} agree?' if cue is None else f'Do {say(f"{names[0]} agree", names[1])}?'
  return turn('agree', text, cue, state,
              tuple('yes' if a.text == b.text else 'no' for a, b in asked),
              tuple(tuple(sign.box for sign in pair) for pair in asked),
              tuple(min(sign.relative_area for sign in pair) for pair in asked))


def _count(signs, texts, cue, state, say) -> Question:
  """How many signs say a text; all have to be read."""
  boxes, smallest = tuple(s.box for s in signs), min(s.relative_area for s in signs)
  numbers = [sum(sign.text == text for sign in signs) for text in texts]
  return turn('count', f'How many signs say {say(*texts)}?', cue, state,
              tuple(map(str, numbers)), (boxes, boxes), (smallest, smallest))


def _texts(config, rng, n) -> list[str]:
  """n different texts, each alone uniform over all."""
  found: list[str] = []
  while len(found) < n:
    text = ''.join(config.alphabet[i] for i in rng.integers(len(config.alphabet),
                                                            size=config.length))
    if text not in found:
      found.append(text)
  return found


def _area(config, cell: Cell, columns: int, rows: int) -> Box:
  """The box of a cell."""
  row, column = cell
  return (config.width * column // columns, config.height * row // rows,
          config.width * (column + 1) // columns, config.height * (row + 1) // rows)


def _sign(config, rng, text, colour, area: Box, near: tuple[int, ...]) -> Sign:
  """A sign in a cell, near its middle along the axes `near`."""
  shape = config.shapes[int(rng.integers(len(config.shapes)))]
  font = config.fonts[int(rng.integers(len(config.fonts)))]
  size = config.text_size(
    config.text_height(log_uniform(rng, *config.relative_area), font), font)
  corner = _corner(rng, area, config.sign_size(size, shape), config.gap, near)
  return make_sign(config, rng, text=text, colour=colour, shape=shape, font=font, text_size=size,
                   corner=corner)


def _figure(rng, area: Box, low: float, high: float, near: tuple[int, ...] = (1,)) -> Box:
  """A square box in a cell: its side is a share of the cell's shorter side."""
  short = min(area[2] - area[0], area[3] - area[1])
  side = max(6, int(short * (low + (high - low) * rng.random())))
  x, y = _corner(rng, area, (side, side), 1, near)
  return x, y, x + side, y + side


def _corner(rng, area: Box, size: tuple[int, int], gap: int, near: tuple[int, ...]
            ) -> tuple[int, int]:
  """Where something of a size stands in a cell, `gap` pixels from the right and the bottom.

  Its centre keeps within an eighth of the cell's shorter side from the middle along the axes
  `near`: what is beside something is at its height, what is above something in its column.
  """
  at, most = [], min(area[2] - area[0], area[3] - area[1]) // 8
  for number, (start, end) in enumerate(((area[0], area[2]), (area[1], area[3]))):
    slack = max(0, end - start - size[number] - gap)
    low, high = 0, slack
    if number in near:
      low, high = max(0, slack // 2 - most), min(slack, slack // 2 + most)
    at.append(start + int(rng.integers(low, high + 1)))
  return at[0], at[1]
