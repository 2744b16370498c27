"""What an image of the needle task looks like: one frozen, self-validating dataclass.

Lengths are pixels of the canvas. A relative area is an area divided by the canvas' area.
"""

import dataclasses
import math
import string

from hrvlm_jax.core.errors import raise_all, unknown
from hrvlm_jax.lab.needle import font as fonts_lib

MAX_SIDE, MAX_PIXELS = 3840, 3840 * 2160
CHANCE_LIMIT = 0.05
MIN_TEXT_HEIGHT = 6  # below this even the full resolution does not separate all letters

# Capitals and digits without the pairs that look alike in print (I 1, O 0 Q).
CLEAR_LETTERS = 'ABCDEFGHJKLMNPRSTUVWXYZ'
CLEAR_CHARACTERS = CLEAR_LETTERS + '23456789'

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

PROPERTIES = ('colour', 'shape', 'place')
BACKGROUNDS = ('clouds', 'gradient', 'blocks', 'tiles', 'stripes')

# Size of a sign's bounding box in units of its padded text box (signs.py draws the shapes).
SHAPE_SCALE = {
  'rectangle': (1.0, 1.0),
  'oval': (math.sqrt(2), math.sqrt(2)),
  'diamond': (2.0, 2.0),
  'triangle': (2.0, 2.0),
  'cross': (1.6, 1.8),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleConfig:
  """One needle task.

  Attributes:
    width, height: canvas in pixels; at most 3840 a side and 3840 * 2160 pixels in all.
    signs: fewest and most signs of an image.
    alphabet: characters of the answers; all texts of `length` characters are equally likely.
    length: characters of an answer. len(alphabet) ** -length, the chance level, must be below 5 %.
    relative_area: smallest and largest area of a text, relative to the canvas. The difficulty:
      drawn log-uniformly for every sign. Counted for the widest text of the alphabet, so that
      neither it nor the sign's outline tells anything about the text.
    ask: properties by which a question may pick its sign ('colour', 'shape', 'place'). The values
      of the property asked for are all different within an image.
    colours, shapes: what signs may have (`COLOURS`, `SHAPES`).
    fonts: names of TrueType fonts that matplotlib ships, or paths of font files.
    backgrounds: procedural kinds (`BACKGROUNDS`), used unless `photographs` is set.
    grain: largest deviation, in grey levels, of the pixel noise of procedural backgrounds.
    photographs: a folder of images to be used as backgrounds instead, or None.
    turns: questions per image: turns of one conversation, about different signs.

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

  def __post_init__(self):
    problems = [
      *self._canvas_problems(),
      *self._text_problems(),
      *self._choice_problems(),
    ]
    raise_all('NeedleConfig', problems)
    raise_all('NeedleConfig', self._room_problems())  # meaningful for valid fields only

  @classmethod
  def tiny(cls, **changes) -> 'NeedleConfig':
    """Single letters on small panoramas, for a model with 40-pixel views on a laptop CPU.

    At 40 x 40 pixels for the whole canvas a letter is two to three pixels wide; in a window of
    80 x 80 canvas pixels, seen at 40 x 40, it is about ten.
    """
    return cls(**{
      'width': 320,
      'height': 160,
      'signs': (3, 4),
      'alphabet': CLEAR_LETTERS,
      'length': 1,
      'relative_area': (0.005, 0.010),
      'ask': ('colour',),
      'colours': ('red', 'green', 'blue', 'yellow', 'purple', 'white'),
      'shapes': ('rectangle', 'oval'),
      'fonts': ('DejaVuSansMono-Bold',),
      'grain': 2,
      **changes,
    })

  @classmethod
  def panorama(cls, **changes) -> 'NeedleConfig':
    """Single letters on a strip eight times as long as high, for 40-pixel views.

    Squeezed to 40 x 40 pixels a letter is 1.5 pixels wide; a window of 80 x 80 canvas pixels, of
    which fifteen cover the strip with half overlap, shows it 14 to 17 pixels high.
    """
    return cls.tiny(**{
      'width': 640,
      'height': 80,
      'shapes': ('rectangle',),
      'relative_area': (0.012, 0.018),
      **changes,
    })

  @classmethod
  def square(cls, **changes) -> 'NeedleConfig':
    """Single letters on 160 x 160 pixels, for encoders that read whole square images.

    At 40 x 40 pixels a letter is five or six pixels high and four wide: most are lost.
    """
    return cls.tiny(**{
      'width': 160,
      'height': 160,
      'signs': (3, 4),
      'shapes': ('rectangle',),
      'relative_area': (0.010, 0.018),
      **changes,
    })

  @classmethod
  def one_k(cls, **changes) -> 'NeedleConfig':
    """1024 x 1024 pixels, texts of three characters about 10 to 30 pixels high."""
    return cls(**changes)

  @classmethod
  def four_k(cls, **changes) -> 'NeedleConfig':
    """3840 x 2160 pixels, texts of five characters about 17 to 70 pixels high."""
    return cls(**{
      'width': 3840,
      'height': 2160,
      'length': 5,
      'relative_area': (2e-4, 3e-3),
      **changes,
    })

  @property
  def chance(self) -> float:
    """Accuracy of a guess that knows nothing: one over the number of equally likely answers."""
    return float(len(self.alphabet)) ** -self.length

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
    margin = text_size[1] * 3 // 10 + 1
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
    elif self.chance >= CHANCE_LIMIT:
      yield (f'alphabet, length: {len(self.alphabet)} characters and length {self.length} make a '
             f'chance of {self.chance:.3f}, expected below {CHANCE_LIMIT}; add characters')
    low, high = self.relative_area
    if not 0 < low <= high < 1:
      yield f'relative_area: found {self.relative_area}, expected 0 < smallest <= largest < 1'
    if not self.fonts:
      yield 'fonts: found none, expected at least one'

  def _choice_problems(self):
    known = {'ask': PROPERTIES, 'colours': COLOURS, 'shapes': SHAPES, 'backgrounds': BACKGROUNDS}
    for field, names in known.items():
      values = getattr(self, field)
      if not values or len(set(values)) != len(values):
        yield f'{field}: found {values}, expected at least one name and each only once'
      yield from (f'{field}: {unknown(v, names, what="name")}' for v in values if v not in names)
    low, high = self.signs
    if not 1 <= low <= high:
      yield f'signs: found {self.signs}, expected 1 <= fewest <= most'
    if not 1 <= self.turns <= low:
      yield f'turns: found {self.turns}, expected 1 to {low}, the fewest signs of an image'
    values = {'colour': self.colours, 'shape': self.shapes, 'place': PLACES}
    for name in self.ask:
      if name in values and len(values[name]) < high:
        yield (f'signs: found up to {high}, but questions about the {name} need as many different '
               f'ones and there are {len(values[name])}')

  def _room_problems(self):
    low, high = (
      f(self.text_height(area, font) for font in self.fonts)
      for f, area in ((min, self.relative_area[0]), (max, self.relative_area[1]))
    )
    if low < MIN_TEXT_HEIGHT:
      yield (f'relative_area: the smallest text would be {low} pixels high, expected at least '
             f'{MIN_TEXT_HEIGHT}; raise {self.relative_area[0]} or enlarge the canvas')
    w, h = (side + self.gap for side in self.largest_sign())
    if (self.width // w) * (self.height // h) < self.signs[1]:
      yield (f'relative_area: {self.signs[1]} signs of {w} x {h} pixels (texts {high} pixels high) '
             f'do not fit on {self.width} x {self.height}; lower {self.relative_area[1]}, the '
             f'length of the text or the number of signs')
    elif 'place' in self.ask and (w > self.width // 3 or h > self.height // 3):
      yield (f'relative_area: a sign of {w} x {h} pixels does not fit in a ninth of '
             f"{self.width} x {self.height}; lower {self.relative_area[1]} or leave 'place' out")
