"""What a batch holds, for people: shapes and ranges, text with its label mask, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hrvlm_jax.core.images import to_rgb
from hrvlm_jax.language.tokenizer import Tokenizer

_GREEN, _DIM, _BLUE, _END = '\x1b[32m', '\x1b[2m', '\x1b[34m', '\x1b[0m'
_PANEL, _CROP, _MOST_CROPS = 480, 88, 60


def shapes(batch: Mapping[str, Any], prefix: str = '') -> Iterator[str]:
  """One line per array: name, shape, type, smallest and largest value."""
  for name, value in batch.items():
    if isinstance(value, Mapping):
      yield from shapes(value, f'{prefix}{name}/')
      continue
    value = np.asarray(value)
    span = f'{_plain(value.min())} .. {_plain(value.max())}' if value.size else 'empty'
    shape = ' x '.join(map(str, value.shape)) or 'one'
    yield f'{prefix + name:<22} {shape:<24} {value.dtype!s:<8} {span}'


def _plain(value: Any) -> str:
  return f'{value:.4g}' if isinstance(value, np.floating) else str(value)


def text_of_row(row: Mapping[str, np.ndarray], tokenizer: Tokenizer, *, colour: bool = True) -> str:
  """The text of a row as the model reads it.

  Trained tokens are green (without colours: between guillemets), visual places are counted in
  square brackets, examples of a packed row stand on lines of their own.

  Args:
    row: tokens, visual_index, valid, labels [t]; optionally segments [t].
  """
  lines = []
  segments = row.get('segments', np.ones_like(row['tokens']))
  for segment in np.unique(segments[row['valid']]):
    own = row['valid'] & (segments == segment)
    lines.append(_line({key: row[key][own] for key in ('tokens', 'visual_index', 'labels')},
                       tokenizer, colour))
  return '\n'.join(lines)


def _line(row, tokenizer, colour) -> str:
  kind = np.where(row['visual_index'] >= 0, 2, np.where(row['labels'] >= 0, 1, 0))
  borders = np.flatnonzero(np.diff(kind)) + 1
  out = []
  for piece in np.split(np.arange(len(kind)), borders):
    if not len(piece):
      continue
    what = kind[piece[0]]
    if what == 2:
      text = f'[{len(piece)} visual tokens]'
      out.append(f'{_BLUE}{text}{_END}' if colour else text)
      continue
    ids = row['labels'][piece] if what else row['tokens'][piece]
    text = tokenizer.decode(ids.tolist(), skip_special=False)
    if colour:
      out.append(f'{_GREEN if what else _DIM}{text}{_END}')
    else:
      out.append(f'\u00ab{text}\u00bb' if what else text)
  return ''.join(out)


def with_box(image: Image.Image, box: Sequence[float] | None) -> Image.Image:
  """The image with a region outlined, (x0, y0, x1, y1) in its pixels; None: as it is."""
  if box is None:
    return image
  picture = to_rgb(image).copy()
  width = max(2, max(picture.size) // 200)
  ImageDraw.Draw(picture).rectangle(tuple(box), outline=(255, 0, 0), width=width)
  return picture


def panel(drawn: Image.Image, crops: np.ndarray, title: str) -> Image.Image:
  """An image as the system cuts it, beside the crops as the encoder gets them.

  Args:
    drawn: with windows, tiles or boxes on it.
    crops: uint8 [n h w 3].
  """
  left = to_rgb(drawn).copy()
  left.thumbnail((_PANEL, _PANEL))
  shown = list(crops[:_MOST_CROPS])
  columns = min(max(len(shown), 1), 10)
  rows = -(-len(shown) // columns)
  cell = min(_CROP, max(crops.shape[1:3])) + 4
  wide = max(left.width + 8 + columns * cell, 12 * _PANEL // 10)
  page = Image.new('RGB', (wide, max(left.height, rows * cell) + 24), 'white')
  draw = ImageDraw.Draw(page)
  if len(crops) > len(shown):
    title += f' (the first {len(shown)} are shown)'
  draw.text((2, 4), title, fill='black', font=ImageFont.load_default(size=14))
  page.paste(left, (0, 24))
  for number, crop in enumerate(shown):
    row, column = divmod(number, columns)
    small = Image.fromarray(crop)
    small.thumbnail((_CROP, _CROP))
    page.paste(small, (left.width + 8 + column * cell, 24 + row * cell))
  return page


def sheet(panels: Sequence[Image.Image]) -> Image.Image:
  """Panels below each other."""
  gap = 12
  page = Image.new('RGB', (max(p.width for p in panels),
                           sum(p.height + gap for p in panels) - gap), 'white')
  place = 0
  for item in panels:
    page.paste(item, (0, place))
    place += item.height + gap
  return page
