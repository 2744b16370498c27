"""Pages of PDF files: rendered, with the lines of their text and where they stand.

The form in which IDL and PDFA come to PS3's pre-training (paper 2503.19903, data curation). Needs
the package pypdfium2 (extra `pdf`). A row has the page as a picture and, in `extra`, `lines`:
[{"box": [x1, y1, x2, y2] in its pixels, "text"}], those of the text layer: a scan has none.
"""

from __future__ import annotations

import io
import os
import pathlib
from typing import Any
import unicodedata

from PIL import Image

from hrvlm_jax.core import installed
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.rows import BadRow, ImageRef, Row
from hrvlm_jax.data.unchanged import Unchanged

SUFFIX = '.pdf'
Box = tuple[int, int, int, int]


def are_pdfs(path: str | os.PathLike) -> bool:
  """Whether a path is a PDF file, or a folder with some and nothing else."""
  if os.path.isdir(path):
    names = [name for name in os.listdir(path) if not name.startswith('.')]
    return bool(names) and all(name.lower().endswith(SUFFIX) for name in names)
  return os.fspath(path).lower().endswith(SUFFIX)


class PdfPages:
  """The pages of a PDF file, or of all in a folder by name, in their order.

  Args:
    path: the file or folder.
    side: pixels of the longer side that pages are rendered with.

  Raises:
    UserError: no such file, not PDF, one that needs a password; pypdfium2 is missing.
  """

  def __init__(self, path: str | os.PathLike, *, side: int = 2000):
    if side < 16:
      raise UserError(f'{path}: pages of {side} pixels cannot be read; expected at least 16')
    root = pathlib.Path(path)
    self.side = side
    self.paths = sorted(str(p) for p in root.iterdir() if p.name.lower().endswith(SUFFIX)) if (
      root.is_dir()) else [os.fspath(path)]
    if missing := [p for p in self.paths if not os.path.isfile(p)]:
      raise UserError(f'{missing[0]}: no such file')
    self._unchanged = Unchanged(self.paths)
    self._open: tuple[str, Any] | None = None
    self._pages = [(p, number) for p in self.paths for number in range(len(self._document(p)))]
    if not self._pages:
      raise UserError(f'{path}: has no pages')
    self._open = None

  def _document(self, path: str):
    if self._open is None or self._open[0] != path:
      pdfium = _pdfium()
      self._unchanged.check([path])
      try:
        self._open = path, pdfium.PdfDocument(path)
      except pdfium.PdfiumError as error:
        raise UserError(f'{path}: cannot be read as PDF ({error})') from error
    return self._open[1]

  def __len__(self):
    return len(self._pages)

  def __getitem__(self, index: int) -> Row:
    """Raises:
      BadRow: a page that cannot be rendered.
    """
    if not 0 <= index < len(self):
      raise IndexError(index)
    path, number = self._pages[index]
    where, name = f'{path}, page {number + 1}', f'{pathlib.Path(path).stem}-{number + 1}'
    pdfium = _pdfium()
    try:
      page = self._document(path)[number]
      bitmap = page.render(scale=self.side / max(page.get_size()))
      place = bitmap.get_posconv(page)
      lines = list(_lines(page.get_textpage(), place))
      picture = bitmap.to_pil().convert('RGB')
    except pdfium.PdfiumError as error:
      raise BadRow('form', where, f'cannot be rendered ({error})') from error
    buffer = io.BytesIO()
    picture.save(buffer, 'PNG', compress_level=3)
    return Row(name, (ImageRef(f'{name}.png', data=buffer.getvalue()),), (), where,
               {'lines': lines})

  def words(self, index: int) -> tuple[Image.Image, list[list[tuple[str, Box]]]]:
    """(the page, RGB; of every line of its text layer, words and their boxes in its pixels).

    A gap wider than the line is high begins another line: another column, the next cell of a table.
    Ligatures are spelled out.

    Raises:
      BadRow: a page that cannot be rendered.
    """
    path, number = self._pages[index]
    pdfium = _pdfium()
    try:
      page = self._document(path)[number]
      bitmap = page.render(scale=self.side / max(page.get_size()))
      lines = list(_word_lines(page.get_textpage(), bitmap.get_posconv(page)))
      return bitmap.to_pil().convert('RGB'), lines
    except pdfium.PdfiumError as error:
      raise BadRow('form', f'{path}, page {number + 1}', f'cannot be rendered ({error})') from error

  def __getstate__(self):
    return self.__dict__ | {'_open': None}


def _lines(text, place):
  """The stretches of the text layer, lines that touch in a row joined."""
  found = []
  for index in range(text.count_rects()):
    left, bottom, right, top = text.get_rect(index)
    words = ' '.join(text.get_text_bounded(left, bottom, right, top).split())
    if not words:
      continue
    ends = [place.to_bitmap(left, top), place.to_bitmap(right, bottom)]
    xs, ys = zip(*ends)
    box = [min(xs), min(ys), max(xs), max(ys)]
    last = found[-1] if found else None
    if last is not None and _same_line(last['box'], box):
      last['text'] += f' {words}'
      last['box'] = [min(last['box'][0], box[0]), min(last['box'][1], box[1]),
                     max(last['box'][2], box[2]), max(last['box'][3], box[3])]
    else:
      found.append({'box': box, 'text': words})
  return found


def _word_lines(text, place):
  """Lines of words, each of its characters' common box."""
  line: list[tuple[str, Box]] = []
  word, box = '', None
  for index in range(text.count_chars()):
    character = text.get_text_range(index, 1)
    if character.strip():
      left, bottom, right, top = text.get_charbox(index, loose=True)
      xs, ys = zip(place.to_bitmap(left, top), place.to_bitmap(right, bottom))
      here = (min(xs), min(ys), max(xs), max(ys))
      if box is not None and _same_word(box, here):
        word += character
        box = (min(box[0], here[0]), min(box[1], here[1]), max(box[2], here[2]),
               max(box[3], here[3]))
        continue
    if box is not None:
      line.append((unicodedata.normalize('NFKC', word), box))
      word, box = '', None
    if not character.strip():
      continue
    if line and not _same_line(line[-1][1], here):
      yield line
      line = []
    word, box = character, here
  if box is not None:
    line.append((unicodedata.normalize('NFKC', word), box))
  if line:
    yield line


def _same_word(before, box) -> bool:
  """No gap of half a line; the letters of a ligature have the same place, or none of their own."""
  height = max(before[3] - before[1], box[3] - box[1])
  level = min(before[3], box[3]) - max(before[1], box[1])
  return level >= 0.4 * min(before[3] - before[1], box[3] - box[1]) and (
    -1.5 * height <= box[0] - before[2] <= 0.5 * height)


def _same_line(before, box) -> bool:
  """A change of font cuts a line: the next stretch stands close behind, at the same height."""
  height = max(before[3] - before[1], box[3] - box[1])
  shared = min(before[3], box[3]) - max(before[1], box[1])
  return shared > 0.5 * min(before[3] - before[1], box[3] - box[1]) and (
    -0.5 * height <= box[0] - before[2] <= height)


def _pdfium():
  try:
    import pypdfium2
  except ImportError as error:
    raise UserError('reading PDF needs the package pypdfium2; install it with: '
                    f'{installed.add("pdf")}') from error
  return pypdfium2
