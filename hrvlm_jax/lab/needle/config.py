"""What an image of a task (needle, relate, page) looks like: one frozen, self-validating dataclass.

Lengths are pixels of the canvas. A relative area is an area divided by the canvas' area.
"""

import dataclasses
import math
import string

from hrvlm_jax.core.errors import raise_all, unknown
from hrvlm_jax.lab.needle import font as fonts_lib, kinds, presets
from hrvlm_jax.lab.needle.presets import CLEAR_CHARACTERS

MAX_SIDE, MAX_PIXELS = 3840, 3840 * 2160
CHANCE_LIMIT = 0.05
MIN_TEXT_HEIGHT = 6  # below this even the full resolution does not separate all letters

COLOURS = {
  'red': (200, 30, 35),
  'green': (25, 140, 60),
  'blue': (30, 75, 200),
  'yellow': (245, 210, 45),
  'purple': (130, 50, 165),
  'white': (242, 242, 242),
  'black': (22, 22, 22),
  'orange': (240, 130, 25),
  'pink': (246, 150, 190),
  'turquoise': (40, 190, 190),
  'brown': (115, 70, 35),
}

# Shape -> how a question calls it.
SHAPES = {
  'rectangle': 'rectangular',
  'oval': 'oval',
  'diamond': 'diamond-shaped',
  'triangle': 'triangular',
  'cross': 'cross-shaped',
}

# Ninth of the canvas, row by row -> how a question calls it.
PLACES = {
  'top left': 'at the top left',
  'top': 'at the top',
  'top right': 'at the top right',
  'left': 'on the left',
  'centre': 'in the centre',
  'right': 'on the right',
  'bottom left': 'at the bottom left',
  'bottom': 'at the bottom',
  'bottom right': 'at the bottom right',
}

PROPERTIES = kinds.KINDS['needle']
WORD = 'word'  # the shape of a word on a page: no plate, ink on paper
BACKGROUNDS = ('clouds', 'gradient', 'blocks', 'tiles', 'stripes')

# Size of a sign's bounding box in units of its padded text box (signs.py draws the shapes).
SHAPE_SCALE = {
  'rectangle': (1.0, 1.0),
  'oval': (math.sqrt(2), math.sqrt(2)),
  'diamond': (2.0, 2.0),
  'triangle': (2.0, 2.0),
  'cross': (1.6, 1.8),
  WORD: (1.0, 1.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleConfig:
  """One task made on the spot: `needle`, `relate` or `page` (`kinds`).

  Attributes:
    width, height: canvas in pixels; at most 3840 a side and 3840 * 2160 pixels in all.
    signs: fewest and most signs of an image; of a page: rows.
    alphabet: characters of the answers; all texts of `length` characters are equally likely.
    length: characters of an answer. len(alphabet) ** -length, the chance level, must be below 5 %.
      Words of a page have one or two characters, or are words of at most so many.
    relative_area: smallest and largest area of a text, relative to the canvas. The difficulty:
      drawn log-uniformly for every sign. Counted for the widest text of the alphabet, so that
      neither it nor the sign's outline tells anything about the text.
    ask: kinds of questions (`kinds.KINDS`). Of needle: properties by which a question may pick its
      sign ('colour', 'shape', 'place'). The values of the property asked for are all different
      within an image. Of relate and page every turn of an image has a kind of its own.
    colours, shapes: what signs may have (`COLOURS`, `SHAPES`).
    fonts: names of TrueType fonts that matplotlib ships, or paths of font files.
    backgrounds: procedural kinds (`BACKGROUNDS`), used unless `photographs` is set.
    grain: largest deviation, in grey levels, of the pixel noise of procedural backgrounds.
    photographs: a folder of images to be used as backgrounds instead, or None.
    turns: questions per image: turns of one conversation, about different signs.
    task: 'needle', 'relate' or 'page'.
    cues: what may decide between the two readings of a question (`kinds.CUES`), one per image; ():
      questions have one reading.
    documents: page only: a PDF file, or a folder of such, whose pages are shown instead of made
      ones; needs the extra `pdf`.

  Raises:
    UserError: every field that does not fit, in one message.
  """

  width: int = 1024
  height: int = 1024
  signs: tuple[int, int] = (3, 5)
  alphabet: str = CLEAR_CHARACTERS
  length: int = 3
  relative_area: tuple[float, float] = (4e-4, 2.5e-3)
  ask: tuple[str, ...] = PROPERTIES
  colours: tuple[str, ...] = tuple(COLOURS)
  shapes: tuple[str, ...] = tuple(SHAPES)
  fonts: tuple[str, ...] = ('DejaVuSans-Bold', 'DejaVuSerif-Bold', 'DejaVuSansMono-Bold')
  backgrounds: tuple[str, ...] = BACKGROUNDS
  grain: int = 3
  photographs: str | None = None
  turns: int = 1
  task: str = 'needle'
  cues: tuple[str, ...] = ()
  documents: str | None = None

  def __post_init__(self):
    problems = [
      *self._canvas_problems(),
      *self._text_problems(),
      *self._choice_problems(),
    ]
    raise_all('NeedleConfig', problems)
    raise_all('NeedleConfig', self._room_problems())  # meaningful for valid fields only

  @classmethod
  def tiny(cls, task: str = 'needle', **changes) -> 'NeedleConfig':
    """Single letters on small panoramas, for a model with 40-pixel views on a laptop CPU.

    At 40 x 40 pixels for the whole canvas a letter is two to three pixels wide; in a window of
    80 x 80 canvas pixels, seen at 40 x 40, it is about ten.
    """
    return cls(**presets.fields('tiny', task) | changes)

  @classmethod
  def panorama(cls, task: str = 'needle', **changes) -> 'NeedleConfig':
    """Single letters on a strip eight times as long as high, for 40-pixel views.

    Squeezed to 40 x 40 pixels a letter is 1.5 pixels wide; a window of 80 x 80 canvas pixels, of
    which fifteen cover the strip with half overlap, shows it 14 to 17 pixels high.
    """
    return cls(**presets.fields('panorama', task) | changes)

  @classmethod
  def square(cls, task: str = 'needle', **changes) -> 'NeedleConfig':
    """Single letters on 160 x 160 pixels, for encoders that read whole square images.

    At 40 x 40 pixels a letter is five or six pixels high and four wide: most are lost.
    """
    return cls(**presets.fields('square', task) | changes)

  @classmethod
  def medium(cls, task: str = 'needle', **changes) -> 'NeedleConfig':
    """Single letters on 240 x 240 pixels, as `configs/compare/needle_tiny.py` compares on."""
    return cls(**presets.fields('medium', task) | changes)

  @classmethod
  def one_k(cls, task: str = 'needle', **changes) -> 'NeedleConfig':
    """1024 x 1024 pixels, texts of three characters about 10 to 30 pixels high."""
    return cls(**presets.fields('one_k', task) | changes)

  @classmethod
  def four_k(cls, task: str = 'needle', **changes) -> 'NeedleConfig':
    """3840 x 2160 pixels, texts of five characters about 17 to 70 pixels high."""
    return cls(**presets.fields('four_k', task) | changes)

  @property
  def chance(self) -> float:
    """Accuracy of a guess that knows the question and nothing of the image, over all kinds."""
    return sum(self.chances.values()) / len(self.ask)

  @property
  def chances(self) -> dict[str, float]:
    """The same of every kind of question."""
    return {kind: kinds.chance(self, kind) for kind in self.ask}

  def text_height(self, relative_area: float, font: str) -> int:
    """Height in pixels of a text box of the given relative area."""
    line = fonts_lib.line(font, self.alphabet)
    area = relative_area * self.width * self.height
    return max(1, round(math.sqrt(area * line.height / (self.length * line.advance))))

  def text_size(self, height: int, font: str) -> tuple[int, int]:
    """(width, height) in pixels of the box that every text of the alphabet fits in."""
    line = fonts_lib.line(font, self.alphabet)
    return self.length * -(-line.advance * height // line.height), height

  def sign_size(self, text_size: tuple[int, int], shape: str) -> tuple[int, int]:
    """(width, height) in pixels of the sign around a text box."""
    margin = 0 if shape == WORD else text_size[1] * 3 // 10 + 1
    scale_x, scale_y = SHAPE_SCALE[shape]
    width, height = text_size[0] + 2 * margin, text_size[1] + 2 * margin
    return math.ceil(width * scale_x), math.ceil(height * scale_y)

  @property
  def gap(self) -> int:
    """Least distance in pixels between two signs."""
    return max(2, min(self.width, self.height) // 100)

  def largest_sign(self) -> tuple[int, int]:
    """(width, height) in pixels that no sign of this config exceeds."""
    sizes = [
      self.sign_size(self.text_size(self.text_height(self.relative_area[1], font), font), shape)
      for font in self.fonts for shape in self.shapes
    ]
    return max(w for w, _ in sizes), max(h for _, h in sizes)

  @property
  def grid(self) -> tuple[int, int]:
    """(columns, rows) of the cells of `relate`: each has room for the largest sign.

    At most five of each; a single row has up to eight.
    """
    width, height = (side + self.gap for side in self.largest_sign())
    rows = min(5, self.height // height)
    return min(8 if rows == 1 else 5, self.width // width), rows

  @property
  def margin(self) -> int:
    """Pixels between the edge of a page and its words."""
    return max(4, min(self.width, self.height) // 30)

  def _canvas_problems(self):
    sides = self.width, self.height
    if min(sides) < 32 or max(sides) > MAX_SIDE or self.width * self.height > MAX_PIXELS:
      yield (f'width, height: found {self.width} x {self.height}, expected 32 to {MAX_SIDE} pixels '
             f'a side and at most {MAX_PIXELS} (3840 x 2160) in all')
    if not 0 <= self.grain <= 32:
      yield f'grain: found {self.grain}, expected 0 to 32 grey levels'

  def _text_problems(self):
    if len(set(self.alphabet)) != len(self.alphabet):
      yield f'alphabet: found {self.alphabet!r}, expected every character once'
    if any(c in string.whitespace for c in self.alphabet):
      yield f'alphabet: found {self.alphabet!r}, expected no white space'
    if self.length < 1 or not self.alphabet:
      yield f'length, alphabet: found {self.length}, {self.alphabet!r}, expected at least one each'
    elif (read := kinds.chance(self, 'after' if self.task == 'page' else 'read')) >= CHANCE_LIMIT:
      yield (f'alphabet, length: {len(self.alphabet)} characters and length {self.length} make a '
             f'chance of {read:.3f}, expected below {CHANCE_LIMIT}; add characters')
    low, high = self.relative_area
    if not 0 < low <= high < 1:
      yield f'relative_area: found {self.relative_area}, expected 0 < smallest <= largest < 1'
    if not self.fonts:
      yield 'fonts: found none, expected at least one'

  def _choice_problems(self):
    if self.task not in kinds.TASKS:
      yield f'task: {unknown(self.task, kinds.TASKS, what="name")}'
      return
    known = {'ask': kinds.KINDS[self.task], 'colours': COLOURS, 'backgrounds': BACKGROUNDS,
             'shapes': (WORD,) if self.task == 'page' else SHAPES, 'cues': kinds.CUES[self.task]}
    for field, names in known.items():
      values = getattr(self, field)
      if (not values and field != 'cues') or len(set(values)) != len(values):
        yield f'{field}: found {values}, expected at least one name and each only once'
      yield from (f'{field}: {unknown(v, names, what="name")}' for v in values if v not in names)
    if self.documents and self.task != 'page':
      yield f"documents: found with task {self.task!r}, expected 'page'; others show no document"
    if self.documents and self.photographs:
      yield 'documents, photographs: found both, expected one of them'
    if self.task != 'needle':
      yield from self._composed_problems()
      return
    low, high = self.signs
    if not 1 <= low <= high:
      yield f'signs: found {self.signs}, expected 1 <= fewest <= most'
    if not 1 <= self.turns <= low:
      yield f'turns: found {self.turns}, expected 1 to {low}, the fewest signs of an image'
    values = {'colour': self.colours, 'shape': self.shapes, 'place': PLACES}
    if self.cues and high >= 1 and low < 2:
      yield f'signs: found {self.signs}, expected at least 2 where a cue decides between two'
    for name in self.ask:
      if name in values and len(values[name]) < high:
        yield (f'signs: found up to {high}, but questions about the {name} need as many different '
               f'ones and there are {len(values[name])}')

  def _composed_problems(self):
    """Of relate and page: signs (rows) and turns."""
    low, high = self.signs
    least, what = (4, 'signs') if self.task == 'relate' else (1, 'rows')
    if not least <= low <= high:
      yield f'signs: found {self.signs}, expected {least} <= fewest {what} <= most {what}'
    if not 1 <= self.turns <= (most := self.most_turns):
      yield (f'turns: found {self.turns}, expected 1 to {most}: turns of an image have different '
             'kinds (relate) or are about different words (page)')
    if self.task == 'page' and 'row' not in self.ask and self.turns > low:
      yield (f'turns: found {self.turns}, expected at most {low}: a row of three words has one '
             'that stands between two; raise the rows (signs)')
    if self.task == 'relate' and len(self.colours) < high - 2:
      yield (f'colours: found {len(self.colours)}, expected at least {high - 2}: two pairs of '
             'signs of one colour, the others with colours of their own')

  @property
  def most_turns(self) -> int:
    """Questions that an image has at most."""
    return {'needle': self.signs[0], 'relate': len(self.ask), 'page': 3}[self.task]

  def _page_problems(self):
    """Room for three words in the largest row, for all rows, and different words for all."""
    low, high = (max(self.text_height(area, font) for font in self.fonts)
                 for area in self.relative_area)
    widest = max(self.text_size(self.text_height(self.relative_area[1], font), font)[0]
                 for font in self.fonts)
    room = self.width - 2 * self.margin, self.height - 2 * self.margin
    if 3 * widest + 2 * presets.word_gap(high) > room[0]:
      yield (f'relative_area: three words {high} pixels high do not fit in a row of {room[0]} '
             f'pixels; lower {self.relative_area[1]} or the length of the text')
    rows = self.signs[1]
    if presets.row_height(high) + (rows - 1) * presets.row_height(low) > room[1]:
      yield (f'signs: {rows} rows do not fit on a page {self.height} pixels high; lower it or '
             f'{self.relative_area}')
    words = len(kinds.vocabulary(self.alphabet, self.length))
    if words < 3 * rows:
      yield (f'alphabet: makes {words} different words, expected at least {3 * rows} for {rows} '
             'rows of three; add characters or lower the rows')

  def _relate_problems(self):
    """Cells for four signs, a house, an arrow and two circles."""
    (columns, rows), circles = self.grid, 'circle' in self.ask
    more = self.signs[1] - 4
    level = columns >= 6 and rows == 1 and not circles and not more
    free = (rows - 2) * columns - 2 * circles  # cells beside house and arrow would mislead
    if not level and (columns < 3 or rows < 2 + circles or free < more):
      leave = ", or leave 'circle' out of ask" if circles else ''
      yield (f'relative_area: {columns} x {rows} signs of the largest size fit on {self.width} x '
             f'{self.height}; relate needs {2 + circles} rows of three and {max(0, more)} places '
             f'in further rows; lower {self.relative_area[1]} or the number of signs, enlarge the '
             f'canvas{leave}')

  def _room_problems(self):
    low, high = (
      f(self.text_height(area, font) for font in self.fonts)
      for f, area in ((min, self.relative_area[0]), (max, self.relative_area[1]))
    )
    if low < MIN_TEXT_HEIGHT:
      yield (f'relative_area: the smallest text would be {low} pixels high, expected at least '
             f'{MIN_TEXT_HEIGHT}; raise {self.relative_area[0]} or enlarge the canvas')
    if self.task != 'needle':
      yield from self._page_problems() if self.task == 'page' else self._relate_problems()
      return
    w, h = (side + self.gap for side in self.largest_sign())
    if (self.width // w) * (self.height // h) < self.signs[1]:
      yield (f'relative_area: {self.signs[1]} signs of {w} x {h} pixels (texts {high} pixels high) '
             f'do not fit on {self.width} x {self.height}; lower {self.relative_area[1]}, the '
             f'length of the text or the number of signs')
    elif 'place' in self.ask and (w > self.width // 3 or h > self.height // 3):
      yield (f'relative_area: a sign of {w} x {h} pixels does not fit in a ninth of '
             f"{self.width} x {self.height}; lower {self.relative_area[1]} or leave 'place' out")
