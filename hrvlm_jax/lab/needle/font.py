"""Text from TrueType outlines, with the same bytes on every machine.

FreeType's rasteriser and hinting differ between versions (and between builds of Pillow), so
outlines are filled here: sample points on a regular sub-pixel grid, the non-zero winding rule of
the TrueType specification, coverage = share of the samples inside.

The outlines of the task's own fonts lie in `outlines.json` (printable ASCII; the path data of SVG,
in font units, y up); `stored` made them. Other fonts and characters are read with fontTools, which
the extra `fonts` names.
"""

import dataclasses
import functools
from pathlib import Path
import re

from jaxtyping import UInt8
import numpy as np

from hrvlm_jax.core import installed, json_text
from hrvlm_jax.core.errors import UserError, nearest

SAMPLES = 8  # sub-pixel rows and columns of a pixel
CURVE_STEPS = 8  # straight pieces that stand for one quadratic or cubic curve
_OPERATION = re.compile(r'([MLHVQCZ])([^MLHVQCZ]*)')
_NUMBER = re.compile(r'-?[\d.]+')


@dataclasses.dataclass(frozen=True)
class Line:
  """Extent of a line of text in font units: all characters of an alphabet fit in it.

  Attributes:
    bottom, top: lowest and highest point of the alphabet over the base line.
    advance: largest advance or inked width of a character.
  """

  bottom: int
  top: int
  advance: int

  @property
  def height(self) -> int:
    return self.top - self.bottom


def path(name: str) -> Path:
  """The file of a font: a path as it is, or the name of a font that matplotlib ships.

  Raises:
    UserError: neither a file nor a known name.
  """
  if Path(name).suffix.lower() in ('.ttf', '.otf', '.ttc') and Path(name).is_file():
    return Path(name)
  import matplotlib  # 0.2 s, and only needed when a font is opened

  folder = Path(matplotlib.get_data_path()) / 'fonts' / 'ttf'
  found = folder / f'{name}.ttf'
  if not found.is_file():
    known = sorted(p.stem for p in folder.glob('*.ttf'))
    raise UserError(f'fonts: {name!r} is neither a font file nor a font of matplotlib '
                    f'(nearest known: {nearest(name, known)})')
  return found


@functools.cache
def _outlines() -> dict[str, dict[str, list]]:
  """Font -> character -> [advance, path data], of the fonts that are stored."""
  return json_text.loads(Path(__file__).with_name('outlines.json').read_text())


def stored(name: str, characters: str) -> dict[str, list]:
  """What `outlines.json` holds of a font: character -> [advance, path data], from its file."""
  return {character: list(_drawn(name, character)) for character in characters}


@functools.lru_cache(maxsize=32)
def _font(name: str):
  try:
    from fontTools.ttLib import TTFont, TTLibError
  except ImportError as error:
    raise UserError(f'fonts: {name} is not one of {", ".join(_outlines())} (printable ASCII); '
                    f'others need fontTools: {installed.add("fonts")}') from error

  try:
    return TTFont(path(name), fontNumber=0, lazy=True)
  except (TTLibError, OSError) as error:
    raise UserError(f'fonts: {path(name)} is not a TrueType or OpenType font ({error})') from error


def _drawn(name: str, character: str) -> tuple[int, str]:
  """Advance and path data of a character, read from the font's file."""
  font = _font(name)
  from fontTools.pens.svgPathPen import SVGPathPen

  glyph_name = font.getBestCmap().get(ord(character))
  if glyph_name is None:
    raise UserError(f'alphabet: the font {name} has no glyph for {character!r}')
  glyphs = font.getGlyphSet()
  pen = SVGPathPen(glyphs, ntos=lambda value: f'{value:.10g}')
  glyphs[glyph_name].draw(pen)
  return int(glyphs[glyph_name].width), pen.getCommands()


@functools.lru_cache(maxsize=4096)
def _outline(name: str, character: str) -> tuple[np.ndarray, int]:
  """Closed outline as line pieces [n, 4] (x0 y0 x1 y1, font units, y up), and the advance."""
  advance, data = _outlines().get(name, {}).get(character) or _drawn(name, character)
  pieces, start, here = [], (0.0, 0.0), (0.0, 0.0)
  for operation, numbers in _OPERATION.findall(data):
    values = [float(number) for number in _NUMBER.findall(numbers)]
    if operation == 'H':
      values = [values[0], here[1]]
    elif operation == 'V':
      values = [here[0], values[0]]
    elif operation == 'Z':
      values = start
    points = list(zip(values[0::2], values[1::2]))
    if operation == 'M':
      start = here = points.pop(0)  # further points are the ends of lines
    curve = [here, *points]
    if operation in 'QC':
      curve = _bezier(curve)
    pieces.extend((*a, *b) for a, b in zip(curve, curve[1:]))
    here = curve[-1]
  return np.array(pieces, np.float64).reshape(-1, 4), advance


def _bezier(control):
  """de Casteljau at `CURVE_STEPS` equal steps: additions and products only, hence exact repeats."""
  line = [control[0]]
  for step in range(1, CURVE_STEPS + 1):
    t, points = step / CURVE_STEPS, list(control)
    while len(points) > 1:
      points = [(a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t)
                for a, b in zip(points, points[1:])]
    line.append(points[0])
  return line


@functools.lru_cache(maxsize=256)
def line(name: str, alphabet: str) -> Line:
  """Extent of the characters of an alphabet in a font.

  Raises:
    UserError: unknown font, or a character without a glyph or without ink.
  """
  tops, bottoms, widths = [], [], []
  for character in alphabet:
    pieces, advance = _outline(name, character)
    if not len(pieces):
      raise UserError(f'alphabet: {character!r} has no ink in the font {name}')
    x, y = pieces[:, 0::2], pieces[:, 1::2]
    tops.append(y.max())
    bottoms.append(y.min())
    widths.append(max(advance, x.max() - x.min()))
  return Line(bottom=int(np.floor(min(bottoms))), top=int(np.ceil(max(tops))),
              advance=int(np.ceil(max(widths))))


@functools.lru_cache(maxsize=8192)
def _place(name, character, height, extent):
  """(pixels a character is wide, where it begins in font units, samples of a font unit)."""
  pieces, advance = _outline(name, character)
  scale = height * SAMPLES / extent.height
  left = min(0.0, pieces[:, 0::2].min())
  right = max(float(advance), pieces[:, 0::2].max())
  return max(1, int(np.ceil((right - left) * scale / SAMPLES))), left, scale


@functools.lru_cache(maxsize=2048)
def glyph(name: str, character: str, height: int, extent: Line) -> UInt8[np.ndarray, 'h w']:
  """Coverage (0 to 255) of one character in a line that is `height` pixels high.

  The width is the character's advance; ink that sticks out of it is kept by widening.
  """
  pieces, _ = _outline(name, character)
  width, left, scale = _place(name, character, height, extent)
  x0, x1 = ((pieces[:, i] - left) * scale for i in (0, 2))
  y0, y1 = ((extent.top - pieces[:, i]) * scale for i in (1, 3))  # y down
  winding = np.zeros((height * SAMPLES, width * SAMPLES + 1), np.int32)
  rows = np.arange(height * SAMPLES) + 0.5
  for ax, ay, bx, by in zip(x0, y0, x1, y1):
    if ay == by:
      continue
    low, high = np.searchsorted(rows, (min(ay, by), max(ay, by)))
    crossing = ax + (bx - ax) * ((rows[low:high] - ay) / (by - ay))
    # Samples lie at column + 0.5: those right of the crossing are inside or leave it.
    column = np.clip(np.ceil(crossing - 0.5).astype(np.int64), 0, width * SAMPLES)
    np.add.at(winding, (np.arange(low, high), column), 1 if by > ay else -1)
  inside = np.cumsum(winding, axis=1)[:, :-1] != 0
  count = inside.reshape(height, SAMPLES, width, SAMPLES).sum(axis=(1, 3))
  return _frozen((count * 255 + SAMPLES**2 // 2) // SAMPLES**2)


def width(name: str, characters: str, height: int, extent: Line) -> int:
  """Pixels that `text` is wide, without drawing it."""
  return sum(_place(name, c, height, extent)[0] for c in characters)


def text(name: str, characters: str, height: int, extent: Line) -> UInt8[np.ndarray, 'h w']:
  """Coverage (0 to 255) of a text, `height` pixels high, without kerning or hinting."""
  return np.concatenate([glyph(name, c, height, extent) for c in characters], axis=1)


def _frozen(mask: np.ndarray) -> np.ndarray:
  mask = mask.astype(np.uint8)
  mask.setflags(write=False)  # shared by the cache
  return mask
