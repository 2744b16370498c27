"""Text from TrueType outlines, with the same bytes on every machine.

FreeType's rasteriser and hinting differ between versions (and between builds of Pillow), so the
outlines are read with fontTools and filled here: sample points on a regular sub-pixel grid, the
non-zero winding rule of the TrueType specification, coverage = share of the samples inside.
"""

import dataclasses
import functools
from pathlib import Path

from jaxtyping import UInt8
import numpy as np

from hrvlm_jax.core.errors import UserError, nearest

SAMPLES = 8  # sub-pixel rows and columns of a pixel
CURVE_STEPS = 8  # straight pieces that stand for one quadratic or cubic curve


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


@functools.lru_cache(maxsize=32)
def _font(name: str):
  from fontTools.ttLib import TTFont, TTLibError

  try:
    return TTFont(path(name), fontNumber=0, lazy=True)
  except (TTLibError, OSError) as error:
    raise UserError(f'fonts: {path(name)} is not a TrueType or OpenType font ({error})') from error


@functools.lru_cache(maxsize=4096)
def _outline(name: str, character: str) -> tuple[np.ndarray, int]:
  """Closed outline as line pieces [n, 4] (x0 y0 x1 y1, font units, y up), and the advance."""
  from fontTools.pens.recordingPen import DecomposingRecordingPen

  font = _font(name)
  glyph_name = font.getBestCmap().get(ord(character))
  if glyph_name is None:
    raise UserError(f'alphabet: the font {name} has no glyph for {character!r}')
  glyphs = font.getGlyphSet()
  pen = DecomposingRecordingPen(glyphs)
  glyphs[glyph_name].draw(pen)
  pieces, start, here = [], (0.0, 0.0), (0.0, 0.0)
  for operation, points in pen.value:
    if operation == 'moveTo':
      start = here = points[0]
    elif operation in ('closePath', 'endPath'):
      pieces.append((*here, *start))
      here = start
    else:
      for curve in _curves(operation, here, points):
        for t in range(1, len(curve)):
          pieces.append((*curve[t - 1], *curve[t]))
        here = curve[-1]
        if points[-1] is None:  # a closed spline without an on-curve point
          start = here
  return np.array(pieces, np.float64).reshape(-1, 4), int(glyphs[glyph_name].width)


def _curves(operation, here, points):
  """The polylines of one pen operation."""
  if operation == 'lineTo' or (len(points) == 1 and points[0] is not None):
    yield [here, points[0]]
  elif operation == 'curveTo':
    from fontTools.pens.basePen import decomposeSuperBezierSegment

    for p1, p2, p3 in decomposeSuperBezierSegment(points):
      yield _bezier((here, p1, p2, p3))
      here = p3
  else:
    from fontTools.pens.basePen import decomposeQuadraticSegment

    if points[-1] is None:
      here = tuple((a + b) / 2 for a, b in zip(points[-2], points[0]))
      points = (*points[:-1], here)
      # The pen has not moved: the spline begins at this implied point.
      yield [here, here]
    for p1, p2 in decomposeQuadraticSegment(points):
      yield _bezier((here, p1, p2))
      here = p2


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


@functools.lru_cache(maxsize=2048)
def glyph(name: str, character: str, height: int, extent: Line) -> UInt8[np.ndarray, 'h w']:
  """Coverage (0 to 255) of one character in a line that is `height` pixels high.

  The width is the character's advance; ink that sticks out of it is kept by widening.
  """
  pieces, advance = _outline(name, character)
  scale = height * SAMPLES / extent.height
  left = min(0.0, pieces[:, 0::2].min())
  right = max(float(advance), pieces[:, 0::2].max())
  width = max(1, int(np.ceil((right - left) * scale / SAMPLES)))
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


def text(name: str, characters: str, height: int, extent: Line) -> UInt8[np.ndarray, 'h w']:
  """Coverage (0 to 255) of a text, `height` pixels high, without kerning or hinting."""
  return np.concatenate([glyph(name, c, height, extent) for c in characters], axis=1)


def _frozen(mask: np.ndarray) -> np.ndarray:
  mask = mask.astype(np.uint8)
  mask.setflags(write=False)  # shared by the cache
  return mask
