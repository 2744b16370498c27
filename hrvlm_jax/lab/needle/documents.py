"""Pages of PDF files as pictures of the task `page`: parts of pages, the words of their text layer.

Needs the extra `pdf` (`data.pdf`). A part is chosen so that its words are as large as the config
says. Words that the edges cut, and a second column beside the first, are painted over with the
paper's colour, so that rows can be counted.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import string
import threading

from jaxtyping import UInt8
import numpy as np
from PIL import Image

from hrvlm_jax.core import images
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.pdf import PdfPages
from hrvlm_jax.data.rows import BadRow
from hrvlm_jax.lab.needle.config import NeedleConfig
from hrvlm_jax.lab.needle.signs import Box, log_uniform

SIDE = 2400  # pixels of a page's longer side as it is rendered, once
_TRIES = 64
_MARKS = string.punctuation + '“”‘’„»«…–—'
_one = threading.Lock()
Word = tuple[str, Box]
Shown_one = threading.Lock()
Word = tuple[str, Box, float]


@dataclasses.dataclass(frozen=True)
class Shown:
  """A part of a page.

  Attributes:
    page: number among all pages of the documents.
    part: the part, pixels of the rendered page; may reach beyond its edges.
    erased: boxes on the canvas that are painted over.
  """

  page: int
  part: Box
  erased: tuple[Box, ...]


def asked(text: str) -> str:
  """A word as questions and answers have it, without marks around it; '' for what is no word."""
  word = text.strip(_MARKS)
  return word if word.isalnum() and len(word) <= 16 else ''


def draw(config: NeedleConfig, rng: np.random.Generator,
         usable: Callable[[list[list[str]]], bool]) -> tuple[Shown, list[list[ShownWord]]]:
  """(a part of a page, its rows of (text, box on the canvas, relative area)).

  Args:
    usable: whether the texts of a part's rows can be asked about.

  Raises:
    UserError: no PDF file, none with a text layer that can be asked about.
  """
  pages = _pages(config.documents)
  for _ in range(_TRIES):
    number = int(rng.integers(len(pages)))
    lines = _lines(config.documents, number)
    found = _part(config, rng, number, lines) if lines else None
    if found is not None and usable([[text for text, _, _ in row] for row in found[1]]):
      return found
  if not any(_lines(config.documents, number) for number in range(min(len(pages), _TRIES))):
    raise UserError(f'documents: {config.documents}: its pages have no text layer (scans have '
                    'none), expected a PDF file with text')
  raise UserError(f'documents: {config.documents}: no part of its {len(pages)} pages has two rows '
                  'and three words in one of them, with one that is there once; choose another '
                  'file')


def paint(config: NeedleConfig, shown: Shown) -> UInt8[np.ndarray, 'h w 3']:
  """The canvas with a part of a page."""
  page = _page(config.documents, shown.page)[0]
  x0, y0, x1, y1 = shown.part
  inside = (max(0, x0), max(0, y0), min(page.width, x1), min(page.height, y1))
  colour = tuple(int(v) for v in np.median(np.asarray(page.crop(inside)), axis=(0, 1)))
  part = Image.new('RGB', (x1 - x0, y1 - y0), colour)
  part.paste(page.crop(inside), (inside[0] - x0, inside[1] - y0))
  canvas = np.array(images.resize_exact(part, (config.width, config.height)))
  for left, top, right, bottom in shown.erased:
    canvas[max(0, top):max(0, bottom), max(0, left):max(0, right)] = colour
  return canvas


@functools.lru_cache(maxsize=4)
def _pages(path: str) -> PdfPages:
  return PdfPages(path, side=SIDE)


@functools.lru_cache(maxsize=6)
def _page(path: str, number: int) -> tuple[Image.Image, list[list[Word]]]:
  """A rendered page and the words of its lines, pixels."""
  try:
    with _one:  # PDFium is not made for threads, and `write` has several
      return _pages(path).words(number)
  except BadRow as error:
    raise UserError(f'documents: {error}') from error


@functools.lru_cache(maxsize=4096)
def _lines(path: str, number: int) -> list[list[Word]]:
  """The words of a page's lines, which take less room than the page."""
  return _page(path, number)[1]


def _part(config, rng, number: int, lines: list[list[Word]]):
  """A part that begins with a random line, or None where too few words are wholly in it."""
  heights = [box[3] - box[1] for line in lines for _, box in line]
  font = config.fonts[0]
  wanted = config.text_height(log_uniform(rng, *config.relative_area), font)
  scale = wanted / float(np.median(heights))  # canvas pixels of a pixel of the page
  width, height = round(config.width / scale), round(config.height / scale)
  start = lines[int(rng.integers(len(lines)))]
  first = int(rng.integers(max(1, len(start) - 2)))
  edge = max(2, round(config.margin / scale))
  boxes = [box for line in lines for _, box in line]
  # From a word on, but not beyond where the page has text.
  x0 = _held(start[first][1][0] - edge, width, [b[0] - edge for b in boxes], [b[2] for b in boxes])
  y0 = _held(start[0][1][1] - edge, height, [b[1] - edge for b in boxes], [b[3] for b in boxes])
  part = (x0, y0, x0 + width, y0 + height)
  rows, erased = [], []
  # From the line the part begins with; what is not below or above it is another column.
  ends = start[0][1][0], start[-1][1][2]
  for line in sorted(lines, key=lambda line: (line is not start, line[0][1][1])):
    beside = line[0][1][0] >= ends[1] or line[-1][1][2] <= ends[0] or any(
      _level(line[0][1], other[0][1]) for other in rows)
    inside = [] if beside else [word for word in line if _within(word[1], part)]
    erased += [box for _, box in line if not any(box is word[1] for word in inside)
               and _touches(box, part)]
    if inside:
      rows.append(inside)
  rows.sort(key=lambda row: row[0][1][1])
  if max((len(row) for row in rows), default=0) < 3 or len(rows) < 2:
    return None
  place = lambda box: (round((box[0] - x0) * scale), round((box[1] - y0) * scale),
                       round((box[2] - x0) * scale), round((box[3] - y0) * scale))
  canvas = config.width * config.height
  shown = []
  for row in rows:
    boxes = [place(box) for _, box in row]
    shown.append([(text, box, (box[2] - box[0]) * (box[3] - box[1]) / canvas)
                  for (text, _), box in zip(row, boxes)])
  return Shown(number, part, tuple(_grown(place(box)) for box in erased)), shown


def _held(start: int, size: int, lows: list[int], highs: list[int]) -> int:
  """A start from which `size` pixels lie between the lowest and the highest, as far as they fit."""
  return max(min(lows), min(start, max(highs) - size))


def _level(a: Box, b: Box) -> bool:
  """Whether two boxes share half of the lower one's height: boxes of lines may touch."""
  return min(a[3], b[3]) - max(a[1], b[1]) > 0.5 * min(a[3] - a[1], b[3] - b[1])


def _grown(box: Box) -> Box:
  """With the ink that sticks out of a box, and a pixel that resizing spread it to."""
  more = 1 + (box[3] - box[1]) // 12
  return box[0] - more, box[1] - 1, box[2] + more, box[3] + 1


def _within(box: Box, part: Box) -> bool:
  return part[0] <= box[0] and part[1] <= box[1] and box[2] <= part[2] and box[3] <= part[3]


def _touches(box: Box, part: Box) -> bool:
  return part[0] < box[2] and part[1] < box[3] and box[0] < part[2] and box[1] < part[3]
