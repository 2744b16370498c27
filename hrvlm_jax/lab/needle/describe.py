"""Everything a picture of `relate` or `page` shows, in words: a turn to train on beside questions.

A question teaches a word or two about one place. LLaVA trains on captions before it trains on
questions; here a caption says what stands where, row by row.
"""

from __future__ import annotations

from hrvlm_jax.lab.needle.config import NeedleConfig
from hrvlm_jax.lab.needle.kinds import CUES
from hrvlm_jax.lab.needle.tasks import TaskPlan, Thing

ASKED = 'Describe it.'
ASKED_WHOLE = 'What is it like as a whole?'


def description(config: NeedleConfig, made: TaskPlan) -> list[dict[str, str]]:
  """A turn of LLaVA's JSON: the cue, all signs, words and things, row by row from the top left.

  "in rain: largest circle, smallest circle; red C, arrow left, green D; red C, house, green Z"; of
  a page "on ruled paper: N, L, T; U, W, K". Without a cue nothing stands before the rows.
  """
  rows: dict[int, list[tuple[int, str]]] = {}
  largest = max((_width(thing) for thing in made.things if thing.name == 'circle'), default=0)
  for shown in (*made.signs, *made.things):
    x0, y0, _, y1 = shown.box
    if not isinstance(shown, Thing):
      said = shown.text if config.task == 'page' else f'{shown.colour} {shown.text}'
    elif shown.name == 'circle':
      said = f'{"largest" if _width(shown) == largest else "smallest"} circle'
    else:
      said = f'{shown.name} {shown.note}'.strip()
    row = y0 if config.task == 'page' else (y0 + y1) * config.grid[1] // (2 * config.height)
    rows.setdefault(row, []).append((x0, said))
  text = '; '.join(', '.join(said for _, said in sorted(rows[row])) for row in sorted(rows))
  if made.cue is not None:  # questions alone teach it late: half of the time a guess is right
    text = f'{_cue(config, made)}: {text}'
  return _turn(ASKED, text)


def cue_description(config: NeedleConfig, made: TaskPlan) -> list[dict[str, str]]:
  """A turn about the cue alone, for systems that see a part of the rest; [] without a cue."""
  return [] if made.cue is None else _turn(ASKED_WHOLE, _cue(config, made))


def _cue(config: NeedleConfig, made: TaskPlan) -> str:
  return CUES[config.task][made.cue.kind][made.cue.state]


def _turn(asked: str, told: str) -> list[dict[str, str]]:
  return [{'from': 'human', 'value': asked}, {'from': 'gpt', 'value': told}]


def _width(thing: Thing) -> int:
  return thing.box[2] - thing.box[0]
