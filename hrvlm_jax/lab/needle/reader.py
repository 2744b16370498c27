"""Readers of records: one who sees everything, one who misses the cue, one who guesses.

What they score is what a model's score is to be read against. The perfect reader gets a record's
question and what its picture shows (signs, things, cue), not its answer, and finds the answer by
where things stand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any

from hrvlm_jax.lab.needle import kinds
from hrvlm_jax.lab.needle.config import PLACES, SHAPES, NeedleConfig
from hrvlm_jax.lab.needle.documents import asked
from hrvlm_jax.lab.needle.generate import plan, record

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Worth:
  """What readers score on a kind of question (0 to 1).

  Attributes:
    chance: the best guess by the question alone, by going through all cases.
    prior: a guesser who always gives the most frequent answer of other images.
    perfect: the reader who sees everything.
    decided: share of the questions that another state of the cue gives another answer.
    blind: one who reads all but the cue, and takes either reading. questions: how many were asked.
  """

  chance: float
  prior: float
  perfect: float
  decided: float
  blind: float
  questions: int


def read(record: Record) -> list[str]:
  """The answers to a record's questions by a reader who sees everything."""
  shown = _shown(record)
  return [_READERS.get(kind, _sign)(shown, text, _reading(shown, text))
          for kind, text in zip(shown['kinds'], _said(record, 'human'), strict=True)]


def questions(record: Record) -> list[tuple[str, str]]:
  """(kind, text) of a record's questions."""
  return list(zip(_shown(record)['kinds'], _said(record, 'human'), strict=True))


def _shown(record: Record) -> Mapping[str, Any]:
  """What the picture of a record shows, and the kinds of its questions."""
  if 'task' in record:
    return record['task']
  plain = record['needle']
  count = len(plain['turns'])
  return {'name': 'needle', 'kinds': [plain['asked']] * count, 'others': [None] * count,
          'cue': None, 'signs': plain['signs'], 'things': []}


def _said(record: Record, who: str) -> list[str]:
  return [turn['value'].removeprefix('<image>\n')
          for turn in record['conversations'] if turn['from'] == who]


def worth(config: NeedleConfig, *, seed: int, images: int) -> dict[str, Worth]:
  """By kind of question, what readers score on `images` images."""
  rows: dict[str, list[tuple[str, str, str | None]]] = {kind: [] for kind in config.ask}
  before: dict[str, Counter] = {kind: Counter() for kind in config.ask}
  for index in range(images):
    made, other = (record(plan(config, s, index), '') for s in (seed, seed + 1))
    shown = _shown(made)
    for kind, *found in zip(shown['kinds'], _said(made, 'gpt'), read(made), shown['others'],
                            strict=True):
      rows[kind].append(tuple(found))
    for kind, answer in zip(_shown(other)['kinds'], _said(other, 'gpt'), strict=True):
      before[kind][answer] += 1
  result = {}
  for kind, asked_ in rows.items():
    if not asked_:
      continue
    guess = max(sorted(before[kind]), key=before[kind].__getitem__, default='')
    mean = lambda values: sum(values) / len(values)
    decided = mean([other is not None and other != right for right, _, other in asked_])
    result[kind] = Worth(
      kinds.chance(config, kind), mean([guess == right for right, _, _ in asked_]),
      mean([found == right for right, found, _ in asked_]), decided, 1 - decided / 2, len(asked_))
  return result


def _reading(shown: Mapping[str, Any], text: str) -> str:
  """The part of a question that counts under the cue of the picture."""
  cue = shown['cue']
  if cue is None:
    return text
  one, two = kinds.CUES[shown['name']][cue['kind']]
  first, second = text.split(one, 1)
  return second.split(two)[0] if cue['state'] else first


def _centre(box: Sequence[int]) -> tuple[float, float]:
  return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _thing(shown, name: str) -> Mapping[str, Any]:
  return next(thing for thing in shown['things'] if thing['name'] == name)


def _beside(shown, box: Sequence[int], left: bool) -> str:
  """What the sign on one side of a thing says: the nearest at its height."""
  x, y = _centre(box)
  side = [sign for sign in shown['signs'] if (_centre(sign['box'])[0] < x) == left]
  level = [s for s in side if abs(_centre(s['box'])[1] - y) < 0.85 * (box[3] - box[1])]
  return min(level or side, key=lambda s: abs(_centre(s['box'])[0] - x))['text']


def _side(shown, text, reading) -> str:
  return _beside(shown, _thing(shown, 'house')['box'], 'left of' in reading)


def _arrow(shown, text, reading) -> str:
  arrow = _thing(shown, 'arrow')
  return _beside(shown, arrow['box'], (arrow['note'] == 'left') == ('points' in reading))


def _circle(shown, text, reading) -> str:
  circles = sorted((thing['box'] for thing in shown['things'] if thing['name'] == 'circle'),
                   key=lambda box: box[2] - box[0])
  x, y = _centre(circles[-1] if 'largest' in reading else circles[0])
  # The circles stand two columns apart.
  near = abs(_centre(circles[0])[0] - _centre(circles[1])[0]) / 6
  column = [(_centre(sign['box'])[1], sign['text']) for sign in shown['signs']
            if abs(_centre(sign['box'])[0] - x) <= near]
  return min((at, text) for at, text in column if at > y)[1]


def _agree(shown, text, reading) -> str:
  colour = re.search(r'the two (\w+) signs', reading).group(1)
  one, two = (sign['text'] for sign in shown['signs'] if sign['colour'] == colour)
  return 'yes' if one == two else 'no'


def _count(shown, text, reading) -> str:
  said = reading.strip(' ,?').split()[-1]
  return str(sum(sign['text'] == said for sign in shown['signs']))


def _rows(shown) -> list[list[Mapping[str, Any]]]:
  """Words that share most of their height, by columns; rows by height."""
  rows: list[list[Mapping[str, Any]]] = []
  for word in sorted(shown['signs'], key=lambda word: _centre(word['box'])[1]):
    y0, y1 = word['box'][1::2]
    for row in rows:
      top, bottom = row[0]['box'][1::2]
      if min(bottom, y1) - max(top, y0) > 0.5 * min(bottom - top, y1 - y0):
        row.append(word)
        break
    else:
      rows.append([word])
  return [sorted(row, key=lambda word: word['box'][0]) for row in rows]


def _word(text: str) -> str:
  return re.search(r'the word (\w+)', text).group(1)


def _after(shown, text, reading) -> str:
  step = 1 if 'follows' in reading else -1
  for row in _rows(shown):
    words = [asked(word['text']) for word in row]
    if _word(text) in words:
      return words[words.index(_word(text)) + step]
  raise ValueError(f'no word {_word(text)}')


def _row(shown, text, reading) -> str:
  rows = _rows(shown)
  at = next(i for i, row in enumerate(rows)
            if _word(text) in [asked(word['text']) for word in row])
  return str(at + 1 if 'top' in reading else len(rows) - at)


def _sign(shown, text, reading) -> str:
  """The sign that a needle question names."""
  def named(sign):
    return (f'the {sign["colour"]} sign', f'the {SHAPES[sign["shape"]]} sign',
            f'the sign {PLACES[sign["place"]]}')

  said = reading.strip(' ,?')
  return next(sign['text'] for sign in shown['signs'] if said.endswith(named(sign)))


_READERS = {'side': _side, 'arrow': _arrow, 'circle': _circle, 'agree': _agree, 'count': _count,
            'after': _after, 'row': _row}
