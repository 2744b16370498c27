"""Where the signs of an image stand, what they say, and how they are drawn.

Boxes are (x0, y0, x1, y1) in pixels, right and bottom exclusive.
"""

import dataclasses
import functools
import math

from jaxtyping import UInt8
import numpy as np

from hrvlm_jax.lab.needle import font as fonts_lib
from hrvlm_jax.lab.needle.config import COLOURS, PLACES, SHAPES, WORD, NeedleConfig

Box = tuple[int, int, int, int]

_TRIES = 48  # places tried for a sign before the signs are put on a grid
_OVERSAMPLE = 4
_CACHED_AREA = 64 * 64  # larger signs are drawn anew: they rarely repeat and would fill the memory


@dataclasses.dataclass(frozen=True)
class Sign:
  """One sign.

  Attributes:
    text: what it says.
    colour, shape, place: names in `COLOURS`, `SHAPES`, `PLACES`; the place is the ninth of the
      canvas that holds the sign's centre.
    box: bounding box of the sign. text_box: the room that any text of the alphabet would take.
    font: name of the font. rgb: colour of the plate (the named one, slightly varied).
    relative_area: area of `text_box` / area of the canvas.
  """

  text: str
  colour: str
  shape: str
  place: str
  box: Box
  text_box: Box
  font: str
  rgb: tuple[int, int, int]
  relative_area: float

  def phrase(self, asked: str) -> str:
    """The sign in words, by one of its properties: 'the red sign', 'the sign on the left'."""
    if asked == 'place':
      return f'the sign {PLACES[self.place]}'
    return f'the {self.colour if asked == "colour" else SHAPES[self.shape]} sign'


def arrange(config: NeedleConfig, rng: np.random.Generator, asked: str) -> tuple[Sign, ...]:
  """The signs of one image, in the order of drawing them; all values of `asked` are different."""
  low, high = config.signs
  n = int(rng.integers(low, high + 1))
  colours = _names(rng, config.colours, n, different=asked == 'colour')
  shapes = _names(rng, config.shapes, n, different=asked == 'shape')
  fonts = _names(rng, config.fonts, n, different=False)
  texts = _texts(config, rng, n)
  areas = [log_uniform(rng, *config.relative_area) for _ in range(n)]
  text_sizes = [
    config.text_size(config.text_height(area, font), font) for area, font in zip(areas, fonts)
  ]
  sizes = [config.sign_size(size, shape) for size, shape in zip(text_sizes, shapes)]
  if asked == 'place':
    corners = _in_cells(rng, config, sizes, 3, 3)
  else:
    corners = _scattered(rng, config, sizes)
  return tuple(
    make_sign(config, rng, text=texts[i], colour=colours[i], shape=shapes[i], font=fonts[i],
              text_size=text_sizes[i], corner=corners[i])
    for i in range(n)
  )


def make_sign(
  config: NeedleConfig, rng: np.random.Generator, *, text: str, colour: str, shape: str, font: str,
  text_size: tuple[int, int], corner: tuple[int, int],
) -> Sign:
  """A sign with its top left corner at `corner`; only the shade of its colour is drawn."""
  (width, height), (x, y) = config.sign_size(text_size, shape), corner
  left, top = x + (width - text_size[0]) // 2, y + (height - text_size[1]) // 2
  if shape == 'triangle':  # the text stands on the wide lower half
    top = y + height * 3 // 4 - text_size[1] // 2
  shade = rng.integers(-12, 13, 3)
  return Sign(
    text=text, colour=colour, shape=shape, font=font,
    place=place_of(config, x + width / 2, y + height / 2),
    box=(x, y, x + width, y + height),
    text_box=(left, top, left + text_size[0], top + text_size[1]),
    rgb=tuple(int(v) for v in np.clip(np.array(COLOURS[colour]) + shade, 0, 255)),
    relative_area=text_size[0] * text_size[1] / (config.width * config.height),
  )


def draw(canvas: UInt8[np.ndarray, 'h w 3'], sign: Sign, alphabet: str) -> None:
  """Paints a sign on the canvas, in place; what sticks out of the canvas is cut off."""
  x, y, x1, y1 = sign.box
  left, top, right, bottom = sign.text_box
  key = (sign.shape, x1 - x, y1 - y, left - x, top - y, right - left, bottom - top, sign.text,
         sign.font, alphabet)
  small = (x1 - x) * (y1 - y) <= _CACHED_AREA
  through, plate = (_layers if small else _layers.__wrapped__)(*key)
  # Rec. 601 luma: dark text on light plates, light text on dark ones.
  luma = (299 * sign.rgb[0] + 587 * sign.rgb[1] + 114 * sign.rgb[2]) // 1000
  ink = np.array(sign.rgb if sign.shape == WORD else [15 if luma > 140 else 245], np.uint16)
  rows = slice(max(y, 0), min(y1, canvas.shape[0]))
  columns = slice(max(x, 0), min(x1, canvas.shape[1]))
  if rows.start >= rows.stop or columns.start >= columns.stop:
    return
  own = slice(rows.start - y, rows.stop - y), slice(columns.start - x, columns.stop - x)
  through, plate = through[own], plate[own]
  target = canvas[rows, columns]
  mixed = target * through  # three weights of sum 255: what is behind, the plate, the ink
  mixed += plate * np.array(sign.rgb, np.uint16)
  mixed += (255 - through - plate) * ink + np.uint16(127)
  mixed //= 255
  target[:] = mixed


@functools.lru_cache(maxsize=4096)
def _layers(shape, width, height, left, top, text_w, text_h, text, font, alphabet):
  """Weights (uint16 [h, w, 1], 0 to 255) of the background and of the plate in a sign's box.

  The rest is ink: a rim around the plate, and the text in the middle of its box.
  """
  if shape == WORD:
    outer = inner = np.zeros((height, width), np.uint32)
  else:
    rim = max(1, min(width, height) // 24)
    outer = _plate(shape, width, height, 0).astype(np.uint32)
    inner = _plate(shape, width, height, rim).astype(np.uint32)
  mask = fonts_lib.text(font, text, text_h, fonts_lib.line(font, alphabet))
  paper = np.full((height, width), 255, np.uint32)
  start = left + max(0, (text_w - mask.shape[1]) // 2)
  paper[top:top + text_h, start:start + mask.shape[1]] -= mask[:, :width - start]
  through = (255 - outer) * (255 - inner) * paper // 255**2
  plate = inner * paper // 255
  layers = through.astype(np.uint16)[:, :, None], plate.astype(np.uint16)[:, :, None]
  for layer in layers:
    layer.setflags(write=False)  # shared by the cache
  return layers


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
  """A number between the two bounds whose logarithm is uniform."""
  return low * math.exp(math.log(high / low) * rng.random())


def _names(rng, names, n, *, different):
  if different:
    return [names[i] for i in rng.permutation(len(names))[:n]]
  return [names[i] for i in rng.integers(len(names), size=n)]


def _texts(config, rng, n):
  """n different texts. By symmetry each of them alone is uniform over all texts."""
  texts = []
  while len(texts) < n:
    letters = rng.integers(len(config.alphabet), size=config.length)
    text = ''.join(config.alphabet[i] for i in letters)
    if text not in texts:
      texts.append(text)
  return texts


def place_of(config: NeedleConfig, x: float, y: float) -> str:
  """The ninth of the canvas that holds a point."""
  column = min(2, int(3 * x // config.width))
  row = min(2, int(3 * y // config.height))
  return tuple(PLACES)[3 * row + column]


def _scattered(rng, config, sizes):
  """Top left corners anywhere on the canvas without overlap; the largest sign is placed first."""
  corners, taken = [None] * len(sizes), []
  for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][0] * sizes[i][1]):
    width, height = sizes[i]
    xs = rng.integers(config.width - width + 1, size=_TRIES).tolist()
    ys = rng.integers(config.height - height + 1, size=_TRIES).tolist()
    for x, y in zip(xs, ys):
      if not any(overlap((x, y, x + width, y + height), box, config.gap) for box in taken):
        break
    else:  # crowded: the config promises that a grid of the largest sign has room for all
      w, h = (side + config.gap for side in config.largest_sign())
      return _in_cells(rng, config, sizes, config.width // w, config.height // h)
    corners[i] = (x, y)
    taken.append((x, y, x + width, y + height))
  return corners


def _in_cells(rng, config, sizes, columns, rows):
  """Top left corners in different cells of a grid, each sign wholly inside its cell."""
  corners = []
  for cell, (width, height) in zip(rng.permutation(rows * columns).tolist(), sizes):
    row, column = divmod(cell, columns)
    left, right = (config.width * c // columns for c in (column, column + 1))
    top, bottom = (config.height * r // rows for r in (row, row + 1))
    x = left + int(rng.integers(max(1, right - left - width - config.gap + 1)))
    y = top + int(rng.integers(max(1, bottom - top - height - config.gap + 1)))
    corners.append((x, y))
  return corners


def overlap(a: Box, b: Box, gap: int = 0) -> bool:
  """Whether two boxes come nearer to each other than `gap` pixels in both directions."""
  return (a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap)


def _plate(shape, width, height, rim):
  """Coverage (0 to 255) of a sign's shape, drawn in by `rim` pixels from the outline of its box."""
  n = _OVERSAMPLE
  x = np.abs((np.arange(width * n) + 0.5) / n - width / 2)[None]
  y = ((np.arange(height * n) + 0.5) / n - height / 2)[:, None]
  half_x, half_y = width / 2, height / 2
  in_box = (x <= half_x - rim) & (np.abs(y) <= half_y - rim)
  if shape == 'rectangle':
    inside = in_box
  elif shape == 'oval':
    inside = (x / max(half_x - rim, 0.5)) ** 2 + (y / max(half_y - rim, 0.5)) ** 2 <= 1
  elif shape == 'diamond':
    margin = rim * math.hypot(1 / half_x, 1 / half_y)
    inside = x / half_x + np.abs(y) / half_y <= 1 - margin
  elif shape == 'triangle':
    margin = rim * math.hypot(1 / half_x, 1 / height)
    inside = in_box & (x / half_x <= (y + half_y) / height - margin)
  else:  # a cross: bars of 1 / 1.8 of the height and 1 / 1.6 of the width (config.SHAPE_SCALE)
    level, upright = np.abs(y) <= height / 3.6 - rim, x <= width / 3.2 - rim
    inside = in_box & (level | upright)
  count = inside.reshape(height, n, width, n).sum(axis=(1, 3))
  return ((count * 255 + n * n // 2) // (n * n)).astype(np.uint8)
